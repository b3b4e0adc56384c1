r"""What a student learns from its teacher, loss against loss, step for step, over seeds.

python -m lean_jax.experiments.distillation DIR --data stories.jsonl [--steps N] [--seeds N]

A student of half the layers of a decoder trains for as many steps on the same rows by each loss.
It is measured on held-out text, and by how probable the teacher finds what it writes itself. The
claims, each checked on the mean over the seeds; a run ends with exit code 1 where one fails:

  DistilBERT (Sanh et al. 2019, arXiv:1910.01108, table 4): soft labels, hard ones and the cosine of
    states beat hard labels alone; a start from the teacher's layers beats a random one.
  TinyBERT (Jiao et al. 2020, arXiv:1909.10351, tables 2 and 4): states, embeddings and attention
    first and soft labels then beat soft labels alone; layers mapped uniformly beat the last ones.
  MiniLMv2 (Wang et al. 2021, arXiv:2012.15828): a start by relations of queries, keys and values
    beats none, soft labels after both.
  MiniLLM (Gu et al. 2023, arXiv:2306.08543): by reverse KL the student writes what the teacher
    finds more probable than by forward KL.
  GKD (Agarwal et al. 2023, arXiv:2306.13649): a student that learns in the second half of the steps
    from what it writes itself writes what the teacher finds more probable than by forward KL.
  DistiLLM (Ko et al. 2024, arXiv:2402.03898, table 1): by skewed KL, either way round, the student
    writes better than by KL.
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
PROMPT, WRITTEN, TEXTS = 16, 48, 64
PROMPTS, LENGTH = 1024, 96    # of what the teacher writes: how many, and tokens of each at most


def tinybert(layers):
  """The losses of its first stage, by a map of layers."""
  return [dict(kind='embedding'), dict(kind='hidden', layers=layers),
          dict(kind='attention', layers=layers)]


# Settings of `lean.distill` for the first half of the steps and for the second; one is for all.
VARIANTS = {name: (dict(losses=[loss]),) for name, loss in LABELS.items()} | {
    'distilbert': (dict(losses=DISTILBERT),),
    'tinybert': (dict(losses=tinybert('uniform')), dict(losses=[SOFT])),
    'tinybert-last': (dict(losses=tinybert('last')), dict(losses=[SOFT])),
    'minilmv2': (dict(losses=[dict(kind='minilmv2', relation_heads=8)]), dict(losses=[SOFT])),
    'on_policy': (dict(losses=[SOFT]),
                  dict(losses=[REVERSE], on_policy=dict(fraction=1., tokens=WRITTEN)))}


def measured(teacher, train, test, seed, *, steps, batch=16, peak=2e-3):
  """{variant: its perplexity, and nats a token that the teacher gives to what it writes}."""
  shared = dict(batch=batch, peak=peak, warmup=steps // 10, seed=seed)

  def trained(stages, student):
    for settings in stages:
      student = lean.distill(teacher, train, student=student, steps=steps // len(stages),
                             **settings, **shared)
    return student
  start = evenly(teacher, teacher.config.layers // 2)
  students = {name: trained(stages, start) for name, stages in VARIANTS.items()}
  students['hard'] = lean.train(start, train, steps=steps, **shared)
  students['random'] = trained(VARIANTS['distilbert'], lean.create(start, seed=seed))
  students['sequence'] = lean.train(start, written(teacher, train, seed), steps=steps, **shared)
  return {name: dict(perplexity=lean.evaluate(student, test)['perplexity'],
                     own_text=judged(teacher, student, test, seed))
          for name, student in students.items()}


def written(teacher, windows, seed):
  """What the teacher says after the beginnings of texts, to learn from."""
  prompts = [teacher.tokenizer.decode(row) for row in windows.array[:PROMPTS, :PROMPT]]
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, 'written.jsonl')
    lean.write_data(teacher, prompts, out, tokens=LENGTH, batch=64, seed=seed, finished=False)
    return lean.completions(teacher, out, length=windows.length)


def judged(teacher, student, windows, seed):
  """Nats a token that the teacher gives to what the student writes after the texts' beginnings."""
  begun = np.asarray(windows.array[:TEXTS, :PROMPT], np.int32)
  tokens = generate(student.module, student.params, begun, tokens=WRITTEN, temperature=1.,
                    key=jax.random.key(seed))
  both = jnp.concatenate([begun, tokens], axis=1)
  return float(_nats(teacher.module, teacher.params, both))


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
      less('TinyBERT: layers first beat soft labels alone', 'tinybert', 'forward_kl'),
      less('TinyBERT: uniform layers beat the last ones', 'tinybert', 'tinybert-last'),
      less('MiniLMv2: relations first beat soft labels alone', 'minilmv2', 'forward_kl'),
      less('MiniLLM: reverse KL writes what the teacher finds more probable', 'reverse_kl',
           'forward_kl', 'own_text'),
      less('GKD: on what it writes itself, it writes what the teacher finds more probable',
           'on_policy', 'forward_kl', 'own_text'),
      less('DistiLLM: by skewed KL it writes what the teacher finds more probable than by KL',
           'skew_kl', 'forward_kl', 'own_text'),
      less('DistiLLM: by skewed reverse KL, than by reverse KL', 'skew_reverse_kl', 'reverse_kl',
           'own_text'),
      less("Sequence-level: from the teacher's texts it writes what the teacher finds probable",
           'sequence', 'hard', 'own_text'))


def main(argv=None):
  """The command line."""
  return on_text.over_seeds(__doc__, measured, claims(), argv,
                            steps=dict(type=int, default=200, help='of each student'))


if __name__ == '__main__':
  sys.exit(main())
