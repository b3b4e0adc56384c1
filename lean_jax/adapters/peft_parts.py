"""Where modules of a checkpoint and our weights are not one to one: products that it has fused, of
which ours are several, and stacked experts of ours, which are a module each.

A fused product has one adapter, with one A [R I] for all of its outputs. Read, each of our weights
has that A and its own rows of B [O R]. Written, ours with different A [Rk I] are one of rank
R = sum Rk, each B in its own rows and columns: the same differences, exactly.
"""
import dataclasses
import re
from typing import NamedTuple

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop.names import pieces, place
from lean_jax.models.segments import taken
from lean_jax.weights import LowRank, Magnitude, Scaled

# The parameters that transformers 5 has of all experts: which of ours each one is.
PARAMETERS = dict(gate_up_proj=('gate', 'up'), down_proj=('down',))


class Piece(NamedTuple):
  """What of one of our weights a module has.

  Attributes:
    module: of the Hugging Face model.
    at: the layer and the expert, where they stand along the weight's first axes.
    rows: [O] int, which of the module's outputs are the weight's; None where all are.
    outputs: of the module, where there are rows.
    parts: how many weights of ours it has.
  """
  module: str
  at: tuple
  rows: np.ndarray | None
  outputs: int
  parts: int


def pieces_of(family, config, path, w):
  """The Pieces of a weight, layer by layer, expert by expert.

  Raises:
    InputError: no module of the checkpoint has it as its outputs, or as some of them.
  """
  key, layers = place(config, path)
  stored = family.names(config)[key]
  if key == 'embed/table' and getattr(config, 'tied', False):
    raise InputError(f'{path} is also the output head here, and not there: PEFT files have no '
                     'adapter of it')
  if not stored.name.endswith('.weight') or ('e' in w.dims and '{expert}' not in stored.name):
    raise InputError(f'{path} is no module of the checkpoint but {stored.name}: PEFT files have no '
                     'adapter of it')
  rows = total = None
  if stored.sizes:
    dims = w.dims.replace('n', '')
    order = stored.permute or tuple(range(len(dims)))
    if stored.shape is not None or sorted(dims) != ['i', 'o'] or dims[order[stored.axis]] != 'o':
      raise InputError(f'{path} is a part of {stored.name}, and not of its outputs: PEFT files '
                       'have no adapter of it')
    total = stored.repeats * sum(stored.sizes)
    start = sum(stored.sizes[:stored.index])
    rows = np.arange(total).reshape(stored.repeats, -1)[:, start:start + stored.sizes[stored.index]]
    rows = rows.reshape(-1)
  return [Piece(name.removesuffix('.weight'), at, rows, total, len(stored.sizes) or 1)
          for name, at in pieces(stored, layers, w.shape)]


def adapter_of(w, at):
  """The adapter w of one layer, where it stands along the layers, and of one expert."""
  if at and 'n' in w.dims:
    w, at = taken(w, at[0]), at[1:]
  if not at:
    return w
  if not isinstance(w, LowRank):
    raise InputError(f'PEFT has LoRA of experts alone, and these have {type(w).__name__}')
  return dataclasses.replace(w, a=w.a[at[0]], b=w.b[at[0]])


def joined(module, parts):
  """One adapter of a module.

  Args:
    module: its name.
    parts: [(Piece, our adapter)], one each of its weights that have one.

  Raises:
    InputError: they are not of one kind, or together none that the files have words for.
  """
  (first, one), *_ = parts
  if first.rows is None:
    return one
  if len({type(w) for _, w in parts}) > 1:
    raise InputError(f'{module} has weights of ours in it with adapters of several kinds; attach '
                     'one kind')
  if not isinstance(one, LowRank) and len(parts) < first.parts and not (
      isinstance(one, Scaled) and one.side == 'o'):
    raise InputError(f'{module} is {first.parts} weights here, and {len(parts)} of them have an '
                     f'adapter, {type(one).__name__}, that PEFT files have of the whole alone; '
                     'attach it to all')
  if isinstance(one, LowRank):
    return _low_rank(module, parts)
  if isinstance(one, Magnitude):
    magnitude = np.zeros(first.outputs, np.float32)
    for piece, w in parts:
      magnitude[piece.rows] = np.asarray(w.magnitude).reshape(-1)
    return dataclasses.replace(one, magnitude=magnitude, base=_low_rank(
        module, [(piece, w.base) for piece, w in parts]))
  return _scaled(module, parts) if isinstance(one, Scaled) else _vectors(module, parts)


def _low_rank(module, parts):
  (first, one), *_ = parts
  low = [w for _, w in parts]
  if len({w.dropout for w in low}) > 1:
    raise InputError(f'{module} has weights of ours in it with other dropouts each; PEFT files '
                     'have one')
  a = [np.asarray(w.a, np.float32).reshape(-1, w.a.shape[-1]) for w in low]        # [I R] each
  shared = all(np.array_equal(x, a[0]) for x in a)
  whole = a[0] if shared else np.concatenate(a, axis=1)
  scale, at = max((w.scale for w in low), key=abs), 0
  b = np.zeros((whole.shape[1], first.outputs), np.float32)
  for (piece, w), own in zip(parts, a):
    R = own.shape[1]
    own = np.asarray(w.b, np.float32).reshape(R, -1) * (w.scale / scale if scale else 1.)
    b[at:at + R, piece.rows] = own
    at += 0 if shared else R
  return dataclasses.replace(one, a=whole, b=b, scale=scale)


def _scaled(module, parts):
  (first, one), *_ = parts
  if one.side == 'i':
    if any(not np.array_equal(w.by, one.by) for _, w in parts):
      raise InputError(f'{module} has the same inputs for {first.parts} weights of ours, and these '
                       'scale them otherwise each; attach ia3 to outputs')
    return one
  by = np.ones(first.outputs, np.float32)
  for piece, w in parts:
    by[piece.rows] = np.asarray(w.by).reshape(-1)
  return dataclasses.replace(one, by=by)


def _vectors(module, parts):
  (first, one), *_ = parts
  if any(not np.array_equal(w.d, one.d) or not np.array_equal(w.inner, one.inner)
         for _, w in parts):
    raise InputError(f'{module} is {first.parts} weights here with VeRA on each, and PEFT files '
                     'have one d of the whole, where these differ; attach lora')
  outer = np.zeros((one.d.shape[-1], first.outputs), np.float32)
  b = np.zeros(first.outputs, np.float32)
  for piece, w in parts:
    outer[:, piece.rows] = np.asarray(w.outer).reshape(len(outer), -1)
    b[piece.rows] = np.asarray(w.b).reshape(-1)
  return dataclasses.replace(one, outer=outer, b=b)


def own_tensors(piece, found):
  """Of a module's tensors {what: array} what concerns a Piece; of VeRA's, 'rows' too."""
  if piece.rows is None or not found:
    return found
  rows = lambda x: x[piece.rows] if len(x) == piece.outputs else x     # else a check names it
  split = ('lora_B.weight', 'lora_magnitude_vector', 'vera_lambda_b')
  of = dict(rows=piece.rows) if 'vera_lambda_b' in found else {}
  return of | {name: rows(x) if name in split or (name == 'ia3_l' and x.shape[1:] == (1,)) else x
          for name, x in found.items()}


class Fused(NamedTuple):
  """LoRA of all experts of a layer: of one parameter of the module that has them.

  Attributes:
    module: its name.
    parameter: 'gate_up_proj' or 'down_proj'.
    inner: whether it is the first of two, whose tensors PEFT names after a base_layer.
    a, b: [E*R I] and [O R*E], the expert first in one and last in the other.
    rank: R.
    scale: of b @ a.
  """
  module: str
  parameter: str
  inner: bool
  a: np.ndarray
  b: np.ndarray
  rank: int
  scale: float

  @property
  def name(self):
    """Of the parameter in the model."""
    return f'{self.module}.{self.parameter}'


def fused_experts(family, config, modules):
  """The adapters of single experts as ones of the parameters that transformers 5 has of all.

  Args:
    family, config: of the model.
    modules: {module: its adapter}.

  Returns:
    [Fused], and the modules that are no experts.
  """
  names, start = _experts(family, config)
  numbered = lambda name: re.sub(r'\\\{(layer|expert)\\\}', r'(\\d+)', re.escape(name))
  patterns = {what: re.compile(numbered(name)) for what, name in names.items()}
  found, rest = {}, {}
  for module, w in modules.items():
    at, what = next(((at, what) for what, pattern in patterns.items()
                     if (at := pattern.fullmatch(module))), (None, None))
    if at:
      found.setdefault(at[1], {}).setdefault(int(at[2]), {})[what] = w
    else:
      rest[module] = w
  out = []
  for layer, experts in found.items():
    module = start.format(layer=layer)
    kinds = {k: own for k, own in PARAMETERS.items() if set(own) & set(experts[0])}
    for parameter, own in kinds.items():
      each = [_joined_expert(f'{module}.{k}', own, experts[k]) for k in sorted(experts)]
      R = each[0].a.shape[1]
      out.append(Fused(module, parameter, len(kinds) == 2 and parameter == 'gate_up_proj',
                       np.concatenate([w.a.T for w in each]),
                       np.stack([w.b.T for w in each], -1).reshape(-1, R * len(each)), R,
                       each[0].scale))
  return out, rest


def _joined_expert(module, names, found):
  """One LowRank, a [I R] and b [R O], of an expert's weights of these names, side by side."""
  size = next(found[name] for name in names if name in found).base.shape[-1]
  rows = np.arange(len(names) * size).reshape(len(names), size)
  return _low_rank(module, [(Piece(module, (), own, rows.size, len(names)), found[name])
                            for name, own in zip(names, rows) if name in found])


def _experts(family, config):
  """{gate, up, down: the module of an expert}, and the module that has all of them, of a layer."""
  names = {key.split('/')[-2]: stored.name.removesuffix('.weight')
           for key, stored in family.names(config).items() if '{expert}' in stored.name}
  start = names['gate'].split('.{expert}')[0] if names else ''
  return names, start.replace('block_sparse_moe', 'mlp')


def single_experts(family, config, hf, found):
  """adapter_config.json and tensors with those of all experts at once as those of each.

  transformers 5 has experts as parameters gate_up_proj [E 2*F D] and down_proj [E D F], whose LoRA
  is A [E*R I] and B [O R*E], the expert last; with both adapted, gate_up_proj's has 'base_layer'
  in its name.

  Returns:
    hf, found: new ones where there are such.

  Raises:
    InputError: adapters of other parameters.
  """
  given = hf.get('target_parameters') or []
  odd = [p for p in given if not p.endswith(('gate_up_proj', 'down_proj'))]
  if odd:
    raise InputError(f'adapter_config.json has target_parameters {", ".join(odd)}; lean_jax reads '
                     'those of experts, gate_up_proj and down_proj, and not of their router')
  names, start = _experts(family, config)
  if not given or not names:
    return hf, found
  found, ranks, alphas, E = dict(found), {}, {}, config.moe.experts
  for module in {n.split('.lora_A')[0].removesuffix('.base_layer') for n in found
                 if re.search(r'\.experts(\.base_layer)?\.lora_A\.weight$', n)}:
    layer = re.search(r'\.(\d+)\.', module)[1]
    if not module.endswith(start.format(layer=layer)):
      continue
    inner = f'{module}.base_layer.lora_A.weight' in found
    outer = 'down_proj' if inner or not any(p.endswith('gate_up_proj') for p in given) else (
        'gate_up_proj')
    for where, parameter in ((module, outer), (f'{module}.base_layer', 'gate_up_proj'))[:1 + inner]:
      a, b = (found.pop(f'{where}.lora_{x}.weight') for x in 'AB')
      R = len(a) // E
      if len(a) != R * E or b.shape[1] != R * E:
        raise InputError(f'the tensors of {where} do not fit: {a.shape} and {b.shape} for {E} '
                         'experts; give the model that the adapter was made for')
      a, b = a.reshape(E, R, -1), b.reshape(len(b), R, E)
      ours = PARAMETERS[parameter]
      for name, own in zip(ours, np.split(b, len(ours))):
        for e in range(E):
          single = names[name].format(layer=layer, expert=e)
          found |= {f'base_model.model.{single}.lora_A.weight': a[e],
                    f'base_model.model.{single}.lora_B.weight': own[:, :, e]}
          key = f'{module.removeprefix("base_model.model.")}.{parameter}'
          ranks[re.escape(single)] = R
          alphas[re.escape(single)] = setting_of(hf, key, 'alpha_pattern', 'lora_alpha')
  patterns = dict(rank_pattern=ranks | (hf.get('rank_pattern') or {}),
                  alpha_pattern=alphas | (hf.get('alpha_pattern') or {}))
  return {**hf, **patterns, 'target_parameters': None}, found


def setting_of(hf, module, pattern, otherwise):
  """A setting of a module: the pattern's that ends its name, as PEFT finds it, or that of all."""
  for name, value in (hf.get(pattern) or {}).items():
    if re.match(rf'(.*\.)?({name})$', module):
      return value
  return hf[otherwise]
