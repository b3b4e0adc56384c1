"""Folders of sentence-transformers: how the vector of a text is made, beside the model's own files.

modules.json lists what follows each other: the model, a pooling, and a normalisation or none.
"""
import json
import pathlib

from lean_jax.errors import InputError
from lean_jax.interop.tensors import read_json
from lean_jax.nn.pooling import MODES, Pooling

MODULES = 'modules.json'
READING = tuple(f'sentence_{name}_config.json' for name in (
    'bert', 'roberta', 'distilbert', 'camembert', 'albert', 'xlm-roberta', 'xlnet'))
DESCRIBED = 'config_sentence_transformers.json'
# Settings of pooling by a mode's name, and those of reading, that change nothing.
OLD = dict(
    pooling_mode_cls_token='cls', pooling_mode_max_tokens='max', pooling_mode_mean_tokens='mean',
    pooling_mode_mean_sqrt_len_tokens='mean_sqrt_len_tokens',
    pooling_mode_weightedmean_tokens='weightedmean', pooling_mode_lasttoken='lasttoken')
FIRST = ('cls', 'max', 'mean', 'mean_sqrt_len_tokens')               # of the first versions
NEUTRAL = dict(
    transformer_task=('feature-extraction',), module_output_name=('token_embeddings',),
    processing_kwargs=({}, None), query_length=(None,), document_length=(None,),
    query_expansion=(None,))


def pooling(folder):
  """The `Pooling` that a folder asks for; None where it says nothing of sentences.

  Raises:
    InputError: its files are damaged, or ask for what we do not compute.
  """
  folder = pathlib.Path(folder)
  if not (folder / MODULES).is_file():
    return None
  modules = _modules(folder / MODULES)
  kinds = [kind for kind, _ in modules]
  if kinds == ['Transformer']:                       # a cross-encoder: its model is all of it
    return None
  if kinds not in (['Transformer', 'Pooling'], ['Transformer', 'Pooling', 'Normalize']):
    raise InputError(f'{str(folder / MODULES)!r} asks for {", ".join(kinds)}, which lean_jax does '
                     'not compute; it computes: Transformer, Pooling, Normalize, in this order')
  if modules[0][1]:
    raise InputError(f'{str(folder)!r} has its model in {modules[0][1]!r}; move the files of that '
                     'folder beside modules.json, and give it the path ""')
  reading = next((read_json(folder / name) for name in READING if (folder / name).is_file()), {})
  described = folder / DESCRIBED
  about = read_json(described) if described.is_file() else {}
  modes, prompted = _modes(folder / modules[1][1] / 'config.json')
  prompt = _prompt(about, described)
  _require(reading, NEUTRAL, folder)
  for _, path in modules[2:]:
    if (folder / path / 'config.json').is_file():
      vector = ('sentence_embedding',)
      _require(read_json(folder / path / 'config.json'),
               dict(module_input_name=vector, module_output_name=vector), folder)
  if prompt and not prompted:
    raise InputError(f'{str(folder)!r} leaves the prompt {prompt!r} out of its pooling '
                     '(include_prompt), which lean_jax does not compute; take the '
                     'default_prompt_name out of ' + DESCRIBED)
  length = reading.get('max_seq_length')
  if length is not None and (not isinstance(length, int) or length < 1):
    raise InputError(f'{str(folder)!r} has max_seq_length = {length!r}, expected a positive number '
                     'or null; download it again')
  return Pooling(modes=modes, normalize='Normalize' in kinds, length=length,
                 lower=bool(reading.get('do_lower_case')), prompt=prompt,
                 described=json.dumps(about) if about else '')


def write(folder, config):
  """Writes the files that `pooling` reads, as every version of sentence-transformers loads them.

  Args:
    folder: exists.
    config: of the model; one without a pooling writes nothing.
  """
  p = getattr(config, 'encoder', config).pooling
  if p is None:
    return
  folder, kinds = pathlib.Path(folder), ['Transformer', 'Pooling', *['Normalize'] * p.normalize]
  modules = [dict(idx=k, name=str(k), path=f'{k}_{kind}' if k else '',
                  type=f'sentence_transformers.models.{kind}') for k, kind in enumerate(kinds)]
  for module in modules[1:]:
    (folder / module['path']).mkdir()
  put = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2) + '\n')
  put(MODULES, modules)
  old = {key: mode in p.modes for key, mode in OLD.items() if mode in p.modes or mode in FIRST}
  if tuple(mode for key, mode in OLD.items() if old.get(key)) != p.modes:
    old = dict(pooling_mode=list(p.modes))           # in an order that only new versions know
  put('1_Pooling/config.json', dict(word_embedding_dimension=config.width, **old))
  put(READING[0], dict(max_seq_length=p.length, do_lower_case=p.lower))
  if p.described:
    put(DESCRIBED, json.loads(p.described))


def _modules(path):
  """[(kind, path)] of modules.json."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    found = sorted(found, key=lambda module: module['idx'])
    known = lambda name: name.split('.')[-1] if name.startswith('sentence_transformers.') else name
    return [(known(module['type']), module['path']) for module in found]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f'{str(path)!r} is no list of modules ({error!r}); download it again'
                     ) from error


def _modes(path):
  """The modes of a pooling, in the order of their vectors, and whether it takes prompts in."""
  found = read_json(path)
  modes = found.get('pooling_mode')
  if modes is None:
    modes = [mode for old, mode in OLD.items() if found.get(old)] or ['mean']
  modes = [modes] if isinstance(modes, str) else modes
  if not isinstance(modes, list) or not modes or not set(modes) <= set(MODES):
    raise InputError(f'{str(path)!r} has pooling_mode = {modes!r}, which lean_jax does not '
                     f'compute; it computes: {", ".join(MODES)}')
  return tuple(modes), found.get('include_prompt', True)


def _prompt(about, path):
  """The text before every text."""
  name, prompts = about.get('default_prompt_name'), about.get('prompts') or {}
  if name is None:
    return ''
  if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
    raise InputError(f'{str(path)!r} has default_prompt_name = {name!r} and no such prompt; '
                     'download it again')
  return prompts[name]


def _require(found, neutral, folder):
  asked = [f'{k} = {found[k]!r}' for k, allowed in neutral.items()
           if k in found and found[k] not in allowed]
  if asked:
    raise InputError(f'{str(folder)!r} asks for sentences with {", ".join(asked)}, which lean_jax '
                     'does not compute; give a model without')
