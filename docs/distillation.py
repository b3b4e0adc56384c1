"""Writes docs/distillation.md: tries every loss in every place, and every way to a student.

python docs/distillation.py      from the root of a checkout; twenty minutes on a core
"""
import json
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.xla import quick  # noqa: E402

quick()

import jax  # noqa: E402
import numpy as np  # noqa: E402

import lean_jax as lean  # noqa: E402
from docs.page import claimed, markdown, refusals, versions  # noqa: E402
from lean_jax.data.sources import open_source  # noqa: E402
from lean_jax.data.tokenizer import train_bpe  # noqa: E402
from lean_jax.data.windows import pack  # noqa: E402
from lean_jax.distillation import terms  # noqa: E402
from lean_jax.distillation.losses import HARD, ULD  # noqa: E402
from lean_jax.kernels.distill_loss.kinds import KINDS as DIVERGENCES  # noqa: E402
from lean_jax.training.mesh import make_mesh  # noqa: E402
from lean_jax.training.recipe import train  # noqa: E402

WINDOW, BATCH, STEPS, LONG = 32, 8, 12, 80
LOSSES = {name: dict(kind=name) for name in (*DIVERGENCES, HARD, ULD, *terms.KINDS)}
LOSSES['top_k'] |= dict(k=8)
LOSSES['minilmv2'] |= dict(relation_heads=4)
LOSSES |= {'uld, align': dict(kind='uld', align='spans'),
           'hidden, cosine': dict(kind='hidden', distance='cosine'),
           'hidden, learned': dict(kind='hidden', layers='learned')}
PLACES = ('half the layers', 'narrower', 'mamba', 'other tokenizer', 'cached', 'encoder-decoder',
          'mesh of 8')
INTRODUCTION = '''# Distillation

Written by `python docs/distillation.py` ({versions}), on tiny models and
Python's own source files: it says what works, not how well. What papers claim is checked by
`experiments/`, below.

## Losses

Each kind of a list of losses, `lean.distill(teacher, data, losses=[dict(kind=...)])`, with students
of several kinds: `yes` where a dozen steps lower it, `-` where it is refused, by the errors under
the table. `narrower` has other widths and numbers of heads, `cached` reads the teacher's labels
from a disk, `encoder-decoder` is a T5 of another, the mesh is data 2 x fsdp 2 x tensor 2. Hard
labels (`cross_entropy`) go with a `forward_kl` of weight .01.

'''
WAYS = '''
## Ways to a student

Bits a byte of held-out text, after {steps} steps of {batch} x {window} tokens; the teacher has
{teacher:.3f}.

'''
CLAIMS = '''
## Claims

What `experiments/` printed, each claim on the mean over its seeds.
'''


def main():
  """Tries all of it, writes the page; the exit code is 1 if something fails."""
  with tempfile.TemporaryDirectory() as folder:
    world = World(pathlib.Path(folder))
    cells, errors = table(world)
    ways = [(what, how, f'{figure:.3f}') for what, how, figure in world.ways()]
    text = INTRODUCTION.format(versions=versions('jax', 'flax'))
    text += markdown(('loss', *PLACES), [(f'`{name}`', *row) for name, row in cells.items()])
    text += '\n' + refusals(errors, LOSSES)
    text += WAYS.format(steps=LONG, batch=BATCH, window=WINDOW, teacher=world.bits(world.teacher))
  text += markdown(('student', 'call', 'bits a byte:'), ways)
  text += CLAIMS + claimed('distillation', 'distill_architectures', 'federated', 'retrieval')
  (ROOT / 'docs' / 'distillation.md').write_text(text, encoding='utf-8')
  return 1 if '**fails**' in text else 0


def table(world):
  """{loss: cells}, and the errors of what is refused."""
  cells, errors = {}, []
  for name, given in LOSSES.items():
    cells[name] = []
    for place in PLACES:
      try:
        first, last = world.tried(place, given)
        cell = 'yes' if last < first else '**fails**'
      except lean.InputError as error:
        cell = '-'
        if str(error) not in errors:
          errors.append(str(error))
      cells[name].append(cell)
    print(name, *cells[name], sep=' | ', flush=True)
    jax.clear_caches()
  return cells, errors


class World:
  """A teacher, its text, and students of every kind."""

  def __init__(self, folder):
    self.folder, source = folder, open_source('stdlib')
    texts = [d.text for _, d in zip(range(60), source.documents('train'))]
    tokenizer, self.other = (train_bpe(texts, size) for size in (300, 340))
    self.teacher = self.llama(tokenizer, layers=4)
    self.train, self.test = (pack(source, split, tokenizer, WINDOW, folder, max_tokens=tokens)
                             for split, tokens in (('train', 60_000), ('test', 8_000)))
    self.teacher = lean.train(self.teacher, self.train, steps=200, batch=BATCH, peak=4e-3)
    self.cache = folder / 'labels'
    lean.cache_teacher(self.teacher, self.train, self.cache, k=64)
    self.text = folder / 'text.jsonl'
    with open(self.text, 'w', encoding='utf-8') as file:
      for text in texts:
        file.write(json.dumps(dict(text=text)) + '\n')

  def llama(self, tokenizer, layers=2, **change):
    return lean.create('llama', tokenizer, **dict(dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64), **change))

  def tried(self, place, given):
    """The first and the last value of a loss."""
    seen, losses = [], [given]
    if given['kind'] == HARD:
      losses = [given, dict(kind='uld' if place == 'other tokenizer' else 'forward_kl', weight=.01)]
    hook = lambda step, metrics: seen.append(float(metrics[given['kind']]))
    how = dict(losses=losses, steps=STEPS, peak=3e-3, hooks=(hook,))
    if place == 'encoder-decoder':
      self._pair(given, how)
    else:
      data, more = self.train, dict(init='random')
      if place == 'narrower':
        more = dict(student=self.llama(self.teacher.tokenizer, hidden_size=24,
                                       num_key_value_heads=2, head_dim=8))
      elif place == 'mamba':
        more = dict(student=self.mamba())
      elif place == 'other tokenizer':
        data, more = self.text, dict(student=self.llama(self.other), window=WINDOW)
      elif place == 'cached':
        more = dict(cache=self.cache, init='random')
      elif place == 'mesh of 8':
        more = dict(mesh=make_mesh(data=2, fsdp=2, tensor=2), init='random')
      lean.distill(self.teacher, data, batch=BATCH, **more, **how)
    return np.mean(seen[:3]), np.mean(seen[-3:])

  def mamba(self):
    return lean.create('mamba', self.teacher.tokenizer, hidden_size=32, num_hidden_layers=2,
                       state_size=8)

  def _pair(self, given, how):
    """A T5 of another, on batches of sources and targets."""
    big, small = (lean.create('t5', self.teacher.tokenizer, d_model=32, d_kv=8, d_ff=48,
                              num_layers=n, num_decoder_layers=n, num_heads=4, seed=n)
                  for n in (4, 2))
    draw = np.random.default_rng(0).integers(3, 200, (2, BATCH, 12)).astype(np.int32)
    batch = dict(tokens=draw[0], decoder_tokens=draw[1])
    if given['kind'] in terms.KINDS:
      how = how | dict(losses=[given | dict(side='decoder')])
    train(small.module, small.params, {k: batch for k in range(STEPS)},
          teacher=(big.module, big.params), **how)

  def bits(self, model):
    """Bits a byte of held-out text."""
    data = self.test if model.tokenizer is self.teacher.tokenizer else open_source('stdlib')
    if data is self.test:
      return lean.evaluate(model, data)['bits_per_byte']
    with tempfile.TemporaryDirectory() as folder:
      windows = pack(data, 'test', model.tokenizer, WINDOW, folder, max_tokens=8_000)
      return lean.evaluate(model, windows)['bits_per_byte']

  def ways(self):
    """(student, call, bits a byte) of each."""
    teacher, data = self.teacher, self.train
    soft = [dict(kind='forward_kl')]
    how = dict(steps=LONG, batch=BATCH, peak=3e-3)
    written = self.folder / 'written.jsonl'
    prompts = [dict(prompt=text[:40]) for text in self._prompts()]

    def of_written():
      lean.write_data(teacher, prompts, written, tokens=24, finished=False)
      half = lean.distill(teacher, data, losses=soft, **dict(how, steps=1))
      return lean.train(half, lean.completions(half, written), **how)
    rows = (
        ('its even layers', "losses=[dict(kind='forward_kl')]",
         lambda: lean.distill(teacher, data, losses=soft, **how)),
        ('the most important', "init='importance'",
         lambda: lean.distill(teacher, data, losses=soft, init='importance', **how)),
        ('random', "init='random'",
         lambda: lean.distill(teacher, data, losses=soft, init='random', **how)),
        ('cut in width', 'student=lean.cut(teacher, data, layers=3, hidden=32)',
         lambda: lean.distill(teacher, data, losses=soft, student=lean.cut(
             teacher, data, layers=3, hidden=32), **how)),
        ('on its own text', 'on_policy=dict(fraction=.5, tokens=16)',
         lambda: lean.distill(teacher, data, losses=soft, on_policy=dict(fraction=.5, tokens=16),
                              **how)),
        ('from a cache', 'cache=lean.cache_teacher(...)',
         lambda: lean.distill(teacher, data, losses=soft, cache=self.cache, **how)),
        ('on what the teacher writes', 'lean.train(student, lean.completions(student, FILE))',
         of_written),
        ('of several teachers', '[teacher, other], teacher=1 in a loss',
         lambda: lean.distill([teacher, lean.create(teacher, seed=3)], data, losses=[
             soft[0], dict(kind='cka', teacher=1, weight=.01)], **how)),
        ('itself, born again', 'student=lean.create(teacher, seed=1)',
         lambda: lean.distill(teacher, data, losses=soft, student=lean.create(teacher, seed=1),
                              **how)),
        ('a Mamba', "student=lean.create('mamba', tokenizer, ...)",
         lambda: lean.distill(teacher, data, losses=soft, student=self.mamba(), **how)),
        ('an LSTM', "student=lean.create('lean_lstm', tokenizer, ...)",
         lambda: lean.distill(teacher, data, losses=soft, student=lean.create(
             'lean_lstm', teacher.tokenizer, hidden_size=32, lstm_size=32,
                 num_hidden_layers=2), **how)),
        ('of a rounded teacher', "lean.quantize(teacher, 'w4a16-g32')",
         lambda: lean.distill(lean.quantize(teacher, 'w4a16-g32'), data, losses=soft,
                              student=lean.create(teacher, seed=1), **how)),
        ('by another tokenizer', "losses=[dict(kind='uld', align='spans'), ...]",
         lambda: lean.distill(teacher, self.text, student=self.llama(self.other), window=WINDOW,
                              losses=[dict(kind='uld', align='spans', weight=.1),
                                      dict(kind='cross_entropy')], **how)))
    for what, call, make in rows:
      figure = self.bits(make())
      print(what, call, figure, sep=' | ', flush=True)
      jax.clear_caches()
      yield what, f'`{call}`', figure

  def _prompts(self):
    return [json.loads(line)['text'] for line in open(self.text, encoding='utf-8')]


if __name__ == '__main__':
  sys.exit(main())
