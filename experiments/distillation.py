r"""What a student learns from its teacher, loss against loss, step for step, over seeds.

python -m lean_jax.experiments.distillation DIR --data stories.jsonl [--steps N] [--seeds N]

A student of half the layers of a decoder trains on the same rows by each loss, for as many steps
of it. It is measured on held-out text, and by what it writes itself after the beginnings of such
texts: how probable the teacher finds it, and ROUGE-L (Lin 2004) of its tokens with those of the
text. The claims, each checked on the mean over the seeds; a run ends with exit code 1 where one
fails:

  DistilBERT (Sanh et al. 2019, arXiv:1910.01108, table 4): soft labels, hard ones and the cosine of
    states beat hard labels alone; a start from the teacher's layers beats a random one.
  TinyBERT (Jiao et al. 2020, arXiv:1909.10351, tables 2 and 4): states, embeddings and attention
    first and soft labels then beat soft labels alone; layers mapped uniformly beat the last ones.
  MiniLMv2 (Wang et al. 2021, arXiv:2012.15828): relations of queries, keys and values first and
    soft labels then beat soft labels alone. As theirs, the students of these two start at random,
    and what comes first comes on top; `soft_long` learns by soft labels alone for as long as they.
  MiniLLM (Gu et al. 2023, arXiv:2306.08543): by reverse KL the student writes what the teacher
    finds more probable than by forward KL.
  GKD (Agarwal et al. 2023, arXiv:2306.13649): so does one that learns from what it writes itself.
  DistiLLM (Ko et al. 2024, arXiv:2402.03898, table 1): by skewed KL, either way round, what the
    student writes has a higher ROUGE-L than by KL. As theirs, the students of these three have
    learned from hard labels before, for as many steps.
  Sequence-level (Kim & Rush 2016, arXiv:1606.07947): a student that learns from texts that its
    teacher wrote writes what the teacher finds more probable than one that learns from people's.
"""
import functools
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import lean_jax as lean
from lean_jax.distillation.start import evenly
from lean_jax.evaluation.rouge import rouge_l
from lean_jax.generation import generate
from lean_jax.pipeline import on_text

SOFT = dict(kind='forward_kl')
DISTILBERT = [dict(kind='forward_kl', temperature=2., weight=5 / 8),       # weights of its authors
              dict(kind='cross_entropy', weight=2 / 8),
              dict(kind='hidden', distance='cosine', weight=1 / 8)]
REVERSE = dict(kind='reverse_kl')
LABELS = dict(forward_kl=SOFT, reverse_kl=REVERSE,
              skew_kl=dict(kind='skew_kl'), skew_reverse_kl=dict(kind='skew_reverse_kl'),
              jsd=dict(kind='jsd'))
PROMPT, WRITTEN, TEXTS = 16, 48, 300
PROMPTS, LENGTH = 1024, 96    # of what the teacher writes: how many, and tokens of each at most


def tinybert(layers):
  """The losses of its first stage, by a map of layers."""
  return [dict(kind='embedding'), dict(kind='hidden', layers=layers),
          dict(kind='attention', layers=layers)]


RELATIONS = [dict(kind='minilmv2', relation_heads=8)]
# Where each starts, and the settings of `lean.distill` for as many steps, one after the other.
VARIANTS = {
    'distilbert': ('layers', dict(losses=DISTILBERT)),
    'random': ('random', dict(losses=DISTILBERT)),
    'soft': ('random', dict(losses=[SOFT])),
    'soft_long': ('random', dict(losses=[SOFT]), dict(losses=[SOFT])),
    'tinybert': ('random', dict(losses=tinybert('uniform')), dict(losses=[SOFT])),
    'tinybert-last': ('random', dict(losses=tinybert('last')), dict(losses=[SOFT])),
    'minilmv2': ('random', dict(losses=RELATIONS), dict(losses=[SOFT])),
    **{name: ('hard', dict(losses=[loss])) for name, loss in LABELS.items()},
    'on_policy': ('hard', dict(losses=[REVERSE], on_policy=dict(fraction=1., tokens=WRITTEN)))}


def measured(teacher, train, test, seed, *, steps, batch=16, peak=2e-3):
  """{variant: its perplexity, and what `judged` says of what it writes}."""
  shared = dict(steps=steps, batch=batch, peak=peak, warmup=steps // 10, seed=seed)
  layers = evenly(teacher, teacher.config.layers // 2)
  starts = dict(layers=layers, random=lean.create(layers, seed=seed),
                hard=lean.train(layers, train, **shared))
  texts = written(teacher, train, seed)
  students = dict(hard=starts['hard'], sequence=lean.train(layers, texts, **shared))
  for name, (start, *stages) in VARIANTS.items():
    student = starts[start]
    for settings in stages:
      student = lean.distill(teacher, train, student=student, **settings, **shared)
    students[name] = student
  return {name: dict(perplexity=lean.evaluate(student, test)['perplexity'],
                     **judged(teacher, student, test, seed))
          for name, student in students.items()}


def written(teacher, windows, seed):
  """What the teacher says after the beginnings of texts, to learn from."""
  prompts = [teacher.tokenizer.decode(row) for row in windows.array[:PROMPTS, :PROMPT]]
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, 'written.jsonl')
    lean.write_data(teacher, prompts, out, tokens=LENGTH, batch=64, seed=seed, finished=False)
    return lean.completions(teacher, out, length=windows.length)


def judged(teacher, student, windows, seed):
  """Of what the student writes after the texts' beginnings: figures.

  own_text: nats a token that the teacher gives it. rouge_l: of its tokens with the text's own.
  """
  texts = np.asarray(windows.array[:TEXTS, :PROMPT + WRITTEN], np.int32)
  begun, rest = np.split(texts, [PROMPT], axis=1)
  tokens = generate(student.module, student.params, begun, tokens=WRITTEN, temperature=1.,
                    key=jax.random.key(seed))
  both = jnp.concatenate([begun, tokens], axis=1)
  alike = [rouge_l(mine, [its]) for mine, its in zip(tokens.tolist(), rest.tolist())]
  return dict(own_text=float(_nats(teacher.module, teacher.params, both)),
              rouge_l=float(np.mean(alike)))


@functools.partial(jax.jit, static_argnums=0)
def _nats(module, params, tokens):
  logits = module.apply({'params': params}, tokens)[0][:, PROMPT - 1:-1]
  found = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, PROMPT:, None], axis=-1)
  return -found.mean()


def claims():
  """Each claim: left < right."""
  less = lambda name, left, right, figure='perplexity': dict(
      name=name, left=f'{left}.{figure}', right=f'{right}.{figure}')
  return (
      less('DistilBERT: its losses beat hard labels', 'distilbert', 'hard'),
      less("DistilBERT: the teacher's layers beat a random start", 'distilbert', 'random'),
      less('TinyBERT: layers first beat soft labels alone', 'tinybert', 'soft'),
      less('TinyBERT: uniform layers beat the last ones', 'tinybert', 'tinybert-last'),
      less('MiniLMv2: relations first beat soft labels alone', 'minilmv2', 'soft'),
      less('MiniLLM: reverse KL writes what the teacher finds more probable', 'reverse_kl',
           'forward_kl', 'own_text'),
      less('GKD: on what it writes itself, it writes what the teacher finds more probable',
           'on_policy', 'forward_kl', 'own_text'),
      less('DistiLLM: by skewed KL what it writes has a higher ROUGE-L than by KL', 'forward_kl',
           'skew_kl', 'rouge_l'),
      less('DistiLLM: by skewed reverse KL, than by reverse KL', 'reverse_kl', 'skew_reverse_kl',
           'rouge_l'),
      less("Sequence-level: from the teacher's texts it writes what the teacher finds probable",
           'sequence', 'hard', 'own_text'))


def main(argv=None):
  """The command line."""
  return on_text.over_seeds(__doc__, measured, claims(), argv,
                            steps=dict(type=int, default=200, help='of each student'))


if __name__ == '__main__':
  sys.exit(main())
