"""Writes docs/adapt.md: trains every adapter on every kind of model.

python docs/adapt.py      from the root of a checkout; twenty minutes on a core
"""
import contextlib
import functools
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.xla import quick  # noqa: E402

quick(1)

import jax  # noqa: E402

import lean_jax as lean  # noqa: E402
from docs.page import claimed, markdown, refusals, versions  # noqa: E402
from lean_jax import tree  # noqa: E402
from lean_jax.adapters.bitfit import BIASES  # noqa: E402
from lean_jax.adapters.trained import trained  # noqa: E402
from lean_jax.data.tokenizer import train_bpe  # noqa: E402
from lean_jax.models.families import family_of  # noqa: E402
from lean_jax.objectives.language_modeling import next_token  # noqa: E402
from tests.adapters.stirring import stirred  # noqa: E402
from tests.models import methods_matrix as matrix  # noqa: E402

METHODS = dict(
    lora=dict(rank=2, alpha=4.), dora=dict(rank=2, alpha=4.), vera=dict(rank=4),
    pissa=dict(rank=2), ia3={},
    houlsby=dict(rank=2), pfeiffer=dict(rank=2), parallel=dict(rank=2),
    prefix=dict(tokens=2, hidden=8), p_tuning_v2=dict(tokens=2), prompt=dict(tokens=2),
    bitfit=None)
PLACES = {'llama': ('llama', ''), 'in 4 bits': ('llama', 'w4'), 'unrolled': ('llama', 'unrolled'),
          'gpt2': ('gpt2', ''), 'mixtral': ('mixtral', ''), 'deepseek_v3': ('deepseek_v3', ''),
          'mamba': ('mamba', ''), 'jamba': ('jamba', ''), 'bert': ('bert', ''), 't5': ('t5', '')}
INTRODUCTION = '''# Adapters

Written by `python docs/adapt.py` ({versions}), on the tiny models of
`tests/models/configs`, random weights: `yes` where four steps of what trains lower the loss of a
batch, `-` where the method is refused, by the errors under the table. **files**: what
`lean.save_adapter` writes of a Llama's, and loads again with the same logits. **merges**: whether
`lean.merge` gives the same logits without it. **parameters** trained, of a Llama of {size:,}.

'''


def main():
  """Tries all of it, writes the page; the exit code is 1 if something fails."""
  rows, errors = [], []
  for method in METHODS:
    cells = [tried(errors, trains, method, *place) for place in PLACES.values()]
    rows.append((f'`{method}`', size(method), *cells, tried(errors, file_of, method),
                 tried(errors, merges, method)))
    print(*rows[-1], sep=' | ', flush=True)
    jax.clear_caches()
  params = model('llama', '').params
  text = INTRODUCTION.format(versions=versions('jax', 'flax'),
                             size=sum(x.size for x in jax.tree.leaves(params)))
  text += markdown(('method', 'parameters:', *PLACES, 'files', 'merges'), rows)
  text += '\n' + refusals(errors, METHODS)
  if claims := claimed('adapters', 'prompts'):
    text += '\n## Claims\n' + claims
  (ROOT / 'docs' / 'adapt.md').write_text(text, encoding='utf-8')
  return 1 if '**fails**' in text else 0


def tried(errors, check, *given):
  """The outcome of a check; an error that refuses is kept."""
  try:
    return 'yes' if check(*given) else '**fails**'
  except lean.InputError as error:
    if str(error) not in errors:
      errors.append(str(error))
    return '-'


@functools.lru_cache(maxsize=2)
def model(name, how):
  """The tiny model of a family."""
  config, params = matrix.model(name)
  family = family_of(dict(model_type=name))
  made = lean.Model(family, config, params, tokenizer())
  if how == 'unrolled':
    return lean.scan_layers(made, False)
  return lean.quantize(made, 'w4a16-g16') if how == 'w4' else made


@functools.lru_cache
def tokenizer():
  """One of few tokens."""
  return train_bpe(['the quick brown fox jumps over the lazy dog\n' * 20], 280)


def adapted(method, name='llama', how=''):
  """The model with the adapters of a method, and the pattern of what trains."""
  base = model(name, how)
  if METHODS[method] is None:
    return base, BIASES
  made = lean.attach(base, method, **METHODS[method])
  return made, trained(made.params)


def trains(method, name, how):
  """Whether four steps lower the loss."""
  made, pattern = adapted(method, name, how)
  given = matrix.batch(made.config)
  return matrix.trained(next_token(made.module), made.params, given, pattern) < 0


def size(method):
  """How many parameters train."""
  made, pattern = adapted(method)
  try:
    return f'{sum(x.size for x in jax.tree.leaves(tree.split(made.params, pattern)[0])):,}'
  except lean.InputError:
    return '-'


def moved(method):
  """A model whose adapters are no longer nothing."""
  return stirred(adapted(method)[0], .1)


def logits(made):
  """Of a batch."""
  return made.logits(matrix.batch(made.config)['tokens'])


def file_of(method):
  """Whether the adapter's file gives the same logits."""
  if METHODS[method] is None:
    raise lean.InputError('bitfit trains biases of the model itself; lean.save the model')
  made = moved(method)
  with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    lean.save_adapter(made, 'ADAPTER')
    loaded = lean.load_adapter(model('llama', ''), 'ADAPTER')
  return bool(abs(logits(loaded) - logits(made)).max() < 1e-4)


def merges(method):
  """Whether the merged model gives the same logits, and has no adapters."""
  if METHODS[method] is None:
    raise lean.InputError('bitfit has nothing to merge')
  made = moved(method)
  merged = lean.merge(made)
  if trained(merged.params):
    raise lean.InputError(f'{method} is not within weights and does not merge')
  return bool(abs(logits(merged) - logits(made)).max() < 1e-3)


if __name__ == '__main__':
  sys.exit(main())
