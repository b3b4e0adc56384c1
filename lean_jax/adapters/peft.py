"""Adapters in the files of the PEFT library: adapter_config.json and adapter_model.safetensors.

A tensor is 'base_model.model.' + a module of the Hugging Face model + what it is: lora_A.weight
[R I] and lora_B.weight [O R] (of an embedding lora_embedding_A [R V] and lora_embedding_B [D R]),
lora_magnitude_vector [O], ia3_l [O 1] or [1 I], vera_lambda_d [R] and vera_lambda_b [O]; VeRA's
shared matrices are base_model.vera_A [R I] and base_model.vera_B [O R]. Prefixes and prompts are in
`peft_prompts`; `peft_parts` has modules that are several weights of ours, and experts.
"""
import contextlib
import hashlib
import json
import math
import os
import pathlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax import tree
from lean_jax.adapters import peft_parts, peft_prompts
from lean_jax.adapters.lora import SCALINGS, sides
from lean_jax.adapters.peft_parts import pieces_of, setting_of
from lean_jax.errors import InputError
from lean_jax.files import occupied, replace_folder
from lean_jax.interop import shards, tensors
from lean_jax.interop.hf import leaves
from lean_jax.interop.names import pieces, place
from lean_jax.models.prefix import check_takes_prefix, put
from lean_jax.models.segments import taken
from lean_jax.training.digest import fingerprint
from lean_jax.weights import Adapter, Bottleneck, LowRank, Magnitude, Prompt, Scaled, Vectors, bare
from lean_jax.weights.beside import is_beside, without_beside
from lean_jax.weights.prepared import refuse_prepared

CONFIG, TENSORS, BASE = 'adapter_config.json', 'adapter_model.safetensors', 'lean_jax_base'
_PREFIX = 'base_model.model.'
# Keys that change the mathematics, and the values that change nothing.
_NEUTRAL = dict(
    bias=('none',), modules_to_save=(None, []), lora_bias=(False,), use_qalora=(False,),
    use_bdlora=(None, False), alora_invocation_tokens=(None,), trainable_token_indices=(None,),
    layer_replication=(None,), arrow_config=(None,),
    kasa_config=(None,), velora_config=(None,), monteclora_config=(None,),
    megatron_config=(None,), init_lora_weights=(True, False, 'gaussian', 'eva', 'orthogonal'))


def save_peft(folder, family, config, params, *, overwrite=False):
  """Writes the adapters of a model, all of one kind, for `peft.PeftModel.from_pretrained`.

  The base is to be saved on its own; its fingerprint stands in the tensors' metadata. LoRA is
  written as alpha = scale * rank, whatever its scaling was; of experts without dropout, which PEFT
  does not have there.

  Args:
    folder: new, whole or untouched whatever happens.
    family, config, params: of the model.
    overwrite: whether adapters that are there may be replaced.

  Raises:
    InputError: there are no adapters, or some that the files have no words for; the folder exists
      or cannot be written.
  """
  refuse_prepared(params)
  folder = pathlib.Path(folder)
  if overwrite and occupied(folder) and not (folder / CONFIG).exists():
    raise InputError(f'{folder} holds no adapter, so it is not overwritten; name another')
  settings, arrays = _contents(family, config, params)
  with replace_folder(folder, overwrite=overwrite) as new:
    (new / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + '\n',
                              encoding='utf-8')
    shards.write_file(new / TENSORS, {n: (x.shape, x.dtype) for n, x in sorted(arrays.items())},
                      arrays.__getitem__, **{BASE: base_fingerprint(config, params)})


def refusal(family, config, params):
  """Why PEFT files have no words for the adapters of a model, in a sentence; None where they do."""
  try:
    _contents(family, config, params)
  except InputError as error:
    return str(error)
  return None


def _contents(family, config, params):
  """adapter_config.json and {name: tensor} of a model's adapters; raises as `save_peft`."""
  form, modules = _written(family, config, params)
  common = dict(peft_type=form, base_model_name_or_path=None, task_type=None, revision=None,
                inference_mode=True)
  if form == 'PROMPT':
    settings, arrays = peft_prompts.written(config, modules)
  else:
    fused, modules = peft_parts.fused_experts(family, config, modules)
    settings, arrays = _lora(modules, fused) if fused else _WRITERS[form](modules)
    named = _named(modules, _all_modules(family, config, params))
    settings = dict(target_modules=named(modules)) | settings
    if form == 'IA3':
      settings['feedforward_modules'] = named([m for m, w in modules.items() if w.side == 'i'])
  return common | settings, {name: np.asarray(x) for name, x in arrays.items()}


def _written(family, config, params):
  """The peft_type of a model's adapters, and {module: its adapter}.

  Of a prefix or a prompt it is 'PROMPT', and that.

  Raises:
    InputError: there are none, or some that the files have no words for.
  """
  adapted = {path: w for path, w in tree.named_weights(params).items() if isinstance(w, Adapter)}
  beside = [x for _, x in leaves(params) if is_beside(x)]
  if len(beside) == 1 and not adapted and not isinstance(beside[0], Bottleneck):
    return 'PROMPT', beside[0]
  if beside:
    kinds = sorted({type(x).__name__ for x in [*beside, *adapted.values()]})
    raise InputError(f'PEFT files have a prefix or a prompt alone, or adapters of weights, and no '
                     f'bottlenecks; these are {", ".join(kinds)}')
  if not adapted:
    raise InputError('no weight has an adapter to save; attach and train one first')
  forms = {_form(w) for w in adapted.values()}
  if len(forms) > 1 or None in forms:
    kinds = sorted({type(w).__name__ for w in adapted.values()})
    raise InputError(f'PEFT files have adapters of one kind, LoRA, DoRA, VeRA or IA3, on a weight '
                     f'each; these are {", ".join(kinds)}, or adapters upon adapters')
  places = {}
  for path, w in adapted.items():
    for piece in pieces_of(family, config, path, w):
      places.setdefault(piece.module, []).append((piece, peft_parts.adapter_of(w, piece.at)))
  form, = forms
  return form, {module: peft_parts.joined(module, parts) for module, parts in places.items()}


def load_peft(folder, family, config, params):
  """The params with the adapters of a folder, on weights of whatever kind.

  Args:
    folder: of `save_peft`, or of the PEFT library: LoRA, rank-stabilised too, DoRA, VeRA (but its
      dropout, which concerns training alone), IA3; prefix, prompt and P-tuning.
    family, config, params: of the model without adapters.

  Raises:
    InputError: a file is missing or damaged, the adapter computes what we do not, it was made here
      for another base, or its tensors are not of this model.
  """
  folder = pathlib.Path(folder)
  hf = tensors.read_json(folder / CONFIG)
  form = hf.get('peft_type')
  if form not in _READERS and form not in peft_prompts.READS:
    raise InputError(f'{folder} has adapters of type {form!r}; lean_jax reads: '
                     f'{", ".join((*_READERS, *peft_prompts.READS))}')
  asked = [f'{k} = {hf[k]!r}' for k, fine in _NEUTRAL.items() if k in hf and hf[k] not in fine]
  if asked:
    raise InputError(f'{folder / CONFIG} asks for {", ".join(asked)}, which lean_jax does not '
                     'compute; give an adapter without')
  if any(isinstance(w, Adapter) or is_beside(w) for _, w in leaves(params)):
    raise InputError('the model has adapters already; merge them, or load the model again')
  found, made_for = _read(folder / TENSORS)
  if made_for is not None and made_for != base_fingerprint(config, params):
    raise InputError(f'the adapter in {folder} was made for a base with the fingerprint {made_for};'
                     f' this one has {base_fingerprint(config, params)}: load the model that it '
                     'was trained on, quantized the same way')
  if form in peft_prompts.READS:
    check_takes_prefix(config, Prompt if peft_prompts.READS[form] == 'prompt' else None)
    return put(config, params, *peft_prompts.read(config, hf, found, folder))
  if form == 'LORA':
    hf, found = peft_parts.single_experts(family, config, hf, found)
  shared = {k: found.pop(f'base_model.{k}', None) for k in ('vera_A', 'vera_B')}
  if form == 'VERA' and any(x is None for x in shared.values()):
    raise InputError(f"{folder} leaves VeRA's random matrices out (save_projection is false), and "
                     'only the generator of PyTorch makes them again; save it with them')
  own, used = {}, set()
  for path, w in tree.named_weights(params).items():
    try:
      modules = pieces_of(family, config, path, w)
    except InputError:                                 # its tensors, if any, are of no weight
      continue
    here = []
    for piece in modules:
      start = f'{_PREFIX}{piece.module}.'
      mine = {n: x for n, x in found.items() if n.startswith(start)}
      used |= mine.keys()
      here.append((piece.module, peft_parts.own_tensors(
          piece, {n.removeprefix(start): x for n, x in mine.items()})))
    if any(mine for _, mine in here):
      if not all(mine for _, mine in here) or len({frozenset(mine) for _, mine in here}) > 1:
        raise InputError(f'the adapter in {folder} is on some of the layers stacked in {path}; '
                         'load the model with scan_layers=False, and adapt all experts of a layer')
      own[path] = here
  odd = sorted(found.keys() - used)
  if odd or not own:
    raise InputError(f'{folder} has tensors of no weight of this {family.model_type}: '
                     f'{tensors.listed(odd) or "all of them"}; give the model that it was made for')

  def one(path, w):
    here = tree.name(path)
    if here not in own:
      return w
    whole = np.stack if 'n' in w.dims or 'e' in w.dims else lambda parts: parts[0]
    return _READERS[form](w, own[here], hf, whole, shared)
  return jax.tree_util.tree_map_with_path(one, params, is_leaf=tree.is_weight)


def base_fingerprint(config, params):
  """16 hexadecimal digits of all arrays but the adapters', whether layers are stacked or not."""
  lines = []
  for path, leaf in leaves(without_beside(params)):
    leaf = bare(leaf) if tree.is_weight(leaf) else leaf
    key, layers = place(config, path)
    each = [(n, taken(leaf, k)) for k, n in enumerate(layers)] if isinstance(layers, tuple) else [
        (layers, leaf)]
    lines += [(key, n, fingerprint(part)) for n, part in each]
  return hashlib.sha256(json.dumps(sorted(lines, key=str)).encode()).hexdigest()[:16]


def _all_modules(family, config, params):
  """Every module of the model that holds one of our weights or arrays."""
  out = set()
  for path, leaf in leaves(params):
    key, layers = place(config, path)
    out |= {name.rpartition('.')[0] for name, _ in pieces(family.names(config)[key], layers,
                                                          leaf.shape)}
  return out


def _named(modules, known):
  """The function from modules to how a config names them: by their last names, where these are of
  no other module that is there, and PEFT finds them by the end of their names.
  """
  last = lambda module: module.rpartition('.')[2]
  others = {last(m) for m in known - set(modules)}

  def named(some):
    rest = {last(m) for m in set(modules) - set(some)}
    alone = lambda m: last(m) not in others | rest
    return sorted({last(m) if alone(m) else m for m in some})
  return named


def _form(w):
  """The peft_type of a weight's adapter; None of what the files have no words for."""
  if isinstance(w, Magnitude):                         # of an embedding PEFT has other norms
    low = isinstance(w.base, LowRank) and w.dims != 'oi'
    return _form(w.base) if low else None
  if isinstance(w.base, Adapter):
    return None
  return {LowRank: 'LORA', Vectors: 'VERA', Scaled: 'IA3'}.get(type(w))


def _matrix(x, *shape):
  return np.asarray(x).reshape(shape)


def _lora(modules, fused=()):
  """The settings and the tensors of LoRA and DoRA; `fused` are `peft_parts.Fused`."""
  dora = {isinstance(w, Magnitude) for w in modules.values()} | {False for _ in fused}
  if len(dora) > 1:
    raise InputError('PEFT files are of LoRA or of DoRA, and these adapters are of both')
  low = {m: w.base if isinstance(w, Magnitude) else w for m, w in modules.items()}
  how = {m: (w.a.shape[-1], w.scale * w.a.shape[-1]) for m, w in low.items()}
  how |= {w.name: (w.rank, w.scale * w.rank) for w in fused}
  drops = {0.} if fused else {w.dropout for w in low.values()}
  if len(drops) > 1:
    raise InputError(f'PEFT files have one dropout for all weights, and these have {sorted(drops)}')
  (rank, alpha), _ = Counter(how.values()).most_common(1)[0]
  whole = lambda x: int(x) if x == int(x) else x
  settings = dict(
      r=rank, lora_alpha=whole(alpha), lora_dropout=drops.pop(), use_dora=dora.pop(),
      use_rslora=False, bias='none', fan_in_fan_out=False, init_lora_weights=True,
      rank_pattern={m: r for m, (r, _) in how.items() if r != rank},
      alpha_pattern={m: whole(a) for m, (_, a) in how.items() if a != alpha})
  out = {}
  for m, w in low.items():
    r = w.a.shape[-1]
    a, b = _matrix(w.a, -1, r), _matrix(w.b, r, -1)                    # [I R], [R O]
    pair = (('embedding_A', b), ('embedding_B', a)) if w.dims == 'oi' else (
        ('A.weight', a.T), ('B.weight', b.T))
    out |= {f'{_PREFIX}{m}.lora_{name}': x for name, x in pair}
    if modules[m] is not w:
      out[f'{_PREFIX}{m}.lora_magnitude_vector'] = _matrix(modules[m].magnitude, -1)
  for w in fused:
    m = f'{w.module}.base_layer' if w.inner else w.module
    out |= {f'{_PREFIX}{m}.lora_A.weight': w.a, f'{_PREFIX}{m}.lora_B.weight': w.b}
  if fused:
    settings['target_parameters'] = [w.name for w in fused]
  return settings, out


def _ia3(modules):
  """The settings and the tensors of IA3; `feedforward_modules` are added where it is called."""
  shape = dict(i=(1, -1), o=(-1, 1))
  return dict(fan_in_fan_out=False, init_ia3_weights=True), {
      f'{_PREFIX}{m}.ia3_l': _matrix(w.by, *shape[w.side]) for m, w in modules.items()}


def _vera(modules):
  """The settings and the tensors of VeRA."""
  ranks = {w.d.shape[-1] for w in modules.values()}
  if len(ranks) > 1:
    raise InputError(f'PEFT files have one rank of VeRA, and these have {sorted(ranks)}')
  r, = ranks
  a = {m: _matrix(w.inner, -1, r).T for m, w in modules.items()}       # [R I]
  b = {m: _matrix(w.outer, r, -1).T for m, w in modules.items()}       # [O R]
  wide_a = max(a.values(), key=lambda x: x.shape[1])
  wide_b = max(b.values(), key=len)
  for m in modules:
    if not (np.array_equal(a[m], wide_a[:, :a[m].shape[1]])
            and np.array_equal(b[m], wide_b[:len(b[m])])):
      raise InputError(f"the random matrices of {m} are not those of the others; PEFT files of "
                       'VeRA have one of each: attach it with one seed and one number of inputs')
  settings = dict(r=r, vera_dropout=0., d_initial=.1, projection_prng_key=0, save_projection=True,
                  bias='none', fan_in_fan_out=False, init_weights=True)
  out = {'base_model.vera_A': wide_a, 'base_model.vera_B': wide_b}
  for m, w in modules.items():
    out[f'{_PREFIX}{m}.vera_lambda_d'] = np.asarray(w.d)
    out[f'{_PREFIX}{m}.vera_lambda_b'] = _matrix(w.b, -1)
  return settings, out


_WRITERS = dict(LORA=_lora, IA3=_ia3, VERA=_vera)


def _lora_read(w, here, hf, whole, shared):
  """A LowRank, or a Magnitude of one, over w.

  Args:
    w: the weight, of stacked layers or not.
    here: [(module, {what: its tensor})], of each layer.
    hf: adapter_config.json.
    whole: the function from the arrays of all layers to ours.
    shared: {what: a tensor that all weights share}.
  """
  del shared
  root = SCALINGS['rank_stabilised' if hf.get('use_rslora') else 'standard']
  both, inputs, outputs = sides(w)
  each = {(setting_of(hf, m, 'rank_pattern', 'r'),
           setting_of(hf, m, 'alpha_pattern', 'lora_alpha')) for m, _ in here}
  if len(each) > 1:
    raise InputError(f'{here[0][0]} and the layers stacked with it have ranks and alphas of their '
                     'own; load the model with scan_layers=False')
  (rank, alpha), = each
  _check_base(w, here)
  I, O, dora = math.prod(inputs), math.prod(outputs), bool(hf.get('use_dora'))
  if 'lora_embedding_A' in here[0][1]:
    shapes = dict(lora_embedding_A=(rank, O), lora_embedding_B=(I, rank))
    turn = lambda x: (x['lora_embedding_B'], x['lora_embedding_A'])
  else:
    shapes = {'lora_A.weight': (rank, I), 'lora_B.weight': (O, rank)}
    turn = lambda x: (x['lora_A.weight'].T, x['lora_B.weight'].T)
    shapes |= dict(lora_magnitude_vector=(O,)) if dora else {}
  _check_shapes(here, shapes)
  a, b = (whole(x) for x in zip(*(turn(x) for _, x in here)))
  fit = lambda x, *shape: jnp.asarray(x.reshape(shape), jnp.float32)
  low = LowRank(w, fit(a, *both, *inputs, rank), fit(b, *both, rank, *outputs), alpha / root(rank),
                float(hf.get('lora_dropout') or 0))
  if not dora:
    return low
  if w.dims == 'oi':
    raise InputError(f'{here[0][0]} is an embedding with DoRA, whose norms PEFT takes along the '
                     'vocabulary and lean_jax does not; give an adapter without')
  return Magnitude(low, fit(whole([x['lora_magnitude_vector'] for _, x in here]), *both, *outputs))


def _ia3_read(w, here, hf, whole, shared):
  """A Scaled over w; Args as of `_lora_read`."""
  del hf, shared
  both, inputs, outputs = sides(w)
  I, O = math.prod(inputs), math.prod(outputs)
  side = 'i' if {x['ia3_l'].shape for _, x in here if 'ia3_l' in x} == {(1, I)} else 'o'
  _check_shapes(here, dict(ia3_l=(1, I) if side == 'i' else (O, 1)))
  by = whole([x['ia3_l'] for _, x in here])
  return Scaled(w, jnp.asarray(by.reshape(both + (inputs if side == 'i' else outputs)),
                               jnp.float32), side)


def _vera_read(w, here, hf, whole, shared):
  """A Vectors over w; Args as of `_lora_read`."""
  del hf
  both, inputs, outputs = sides(w)
  I, O, r = math.prod(inputs), math.prod(outputs), len(shared['vera_A'])
  rows, *_ = [x.pop('rows', np.arange(O)) for _, x in here]            # of the shared B
  _check_shapes(here, dict(vera_lambda_d=(r,), vera_lambda_b=(O,)))
  if shared['vera_A'].shape[1] < I or len(shared['vera_B']) <= rows.max():
    raise InputError(f'{here[0][0]} is larger than the shared matrices of VeRA, '
                     f'{shared["vera_A"].shape} and {shared["vera_B"].shape}; give the model that '
                     'they were made for')
  a = jnp.asarray(shared['vera_A'][:, :I].T.reshape(*inputs, r), jnp.float32)
  b = jnp.asarray(shared['vera_B'][rows].T.reshape(r, *outputs), jnp.float32)
  each = lambda x: jnp.broadcast_to(x, both + x.shape)
  fit = lambda name, *shape: jnp.asarray(whole([x[name] for _, x in here]).reshape(shape),
                                         jnp.float32)
  return Vectors(w, each(a), each(b), fit('vera_lambda_d', *both, r),
                 fit('vera_lambda_b', *both, *outputs))


_READERS = dict(LORA=_lora_read, IA3=_ia3_read, VERA=_vera_read)


def _check_shapes(here, shapes):
  """Raises InputError unless each module has the tensors {name: shape}; a base's is another check.
  """
  for module, mine in here:
    found = {name: x.shape for name, x in mine.items() if name != 'base_layer.weight'}
    if found != shapes:
      raise InputError(f'the tensors of {module} do not fit: {found}, expected {shapes}; give the '
                       'model that the adapter was made for, and all of its tensors')


def _check_base(w, here):
  """Raises InputError where a file has another embedding than the model, to be put in its place."""
  for module, mine in here:
    value = mine.get('base_layer.weight')
    value = value if value is None or w.dims == 'oi' else value.T
    if value is not None and not np.array_equal(value, w.unbox()):
      raise InputError(f'the adapter brings its own {module}, which is not that of this model; '
                       'give the model that it was made for')


def _read(path):
  """{name: array} of a safetensors file, and the fingerprint in its metadata or None."""
  with contextlib.ExitStack() as stack, tensors.readable(path):
    file = os.open(path, os.O_RDONLY)
    stack.callback(os.close, file)
    found = tensors.header(path, file)
    odd = [f'{n} ({t.kind})' for n, t in found.items() if t.kind not in tensors.FLOATS]
    if odd:
      raise InputError(f'{path} has tensors that are no floats: {tensors.listed(odd)}')
    return {n: t.read() for n, t in found.items()}, tensors.metadata(file).get(BASE)
