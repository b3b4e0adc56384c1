r"""A transformer teaches a Mamba, an LSTM, and a transformer like itself, better than text alone.

Furlanello et al. 2018 (arXiv:1805.04770): a student of its teacher's own architecture, born again
from a random start, learns more from its predictions than from labels. Hinton et al. 2015
(arXiv:1503.02531), section 2: what soft labels teach does not depend on what computes them.

python -m lean_jax.experiments.distill_architectures DIR --data stories.jsonl [--tokens N]

Each student has the same random start, batches and steps in both ways: on text alone, and with soft
labels of DIR's model beside it. Perplexity by docs/evaluation.md, on windows that no student saw.
Ends with exit code 1 where a claim fails.
"""
import dataclasses
import sys

import lean_jax as lean
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.pipeline import on_text

SEEDS, BATCH, PEAK, TEST = (0, 1, 2), 16, 4e-3, 128
STUDENTS = {
    'mamba': dict(hidden_size=64, num_hidden_layers=2, state_size=8),
    'lean_lstm': dict(hidden_size=64, num_hidden_layers=2, lstm_size=96),
}


def student_of(teacher, kind, seed):
  """A fresh one; 'born again' has the architecture of the teacher itself."""
  if kind == 'born again':
    return lean.create(teacher, seed=seed)
  return lean.create(kind, teacher.tokenizer, seed=seed, vocab_size=teacher.config.vocabulary,
                     max_position_embeddings=teacher.config.context, **STUDENTS[kind])


def measured(teacher, windows, steps):
  """{student: [{'text': perplexity, 'distilled': perplexity} of each seed]}."""
  train, test = (part(windows, *at) for at in ((0, -TEST), (-TEST, None)))
  of = lambda model: perplexity(model.module, model.params, test)['perplexity']
  out = dict(teacher=of(teacher))
  for kind in (*STUDENTS, 'born again'):
    out[kind] = []
    for seed in SEEDS:
      student = student_of(teacher, kind, seed)
      how = dict(steps=steps, batch=BATCH, peak=PEAK, warmup=steps // 10, seed=seed)
      losses = [dict(kind='forward_kl', weight=.9), dict(kind='cross_entropy', weight=.1)]
      out[kind].append(dict(
          text=of(lean.train(student, train, **how)),
          distilled=of(lean.distill(teacher, train, student=student, losses=losses, **how))))
      print(kind, seed, out[kind][-1], flush=True)
  return out


def part(windows, first, last):
  """Some of the windows, in order."""
  array = windows.array[first:last]
  return dataclasses.replace(windows, array=array, fingerprint=f'{windows.fingerprint} {first}',
                             stream_tokens=array.size)


def claims(found):
  """[(claim, whether it holds)]."""
  out = []
  for kind in (*STUDENTS, 'born again'):
    pairs = [(one['distilled'], one['text']) for one in found[kind]]
    text = ', '.join(f'{a:.2f} against {b:.2f}' for a, b in pairs)
    out.append((f'{kind} is better distilled than on text alone, each seed: {text}',
                all(a < b for a, b in pairs)))
  return out


def main(argv=None):
  """Prints figures and claims, and returns the exit code."""
  return on_text.main(__doc__, measured, claims, argv,
                      steps=dict(type=int, default=150, help='of each training (%(default)s)'))


if __name__ == '__main__':
  sys.exit(main())
