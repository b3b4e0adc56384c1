r"""Half of a sentence encoder's layers, taught by its vectors, find and rank nearly as it does.

Reimers & Gurevych 2020 (arXiv:2004.09813): a student trained by MSE to its teacher's vectors takes
over its vector space. Sanh et al. 2019 (arXiv:1910.01108): it starts as every other layer.

python -m lean_jax.experiments.retrieval DIR --data FOLDER [--steps N] [--seeds N]

DIR is all-MiniLM-L6-v2, FOLDER has stsb/ (train.csv, dev.csv) and cranfield/. The student learns
from sentences of STS-B's training split and from Cranfield's abstracts, with no scores, queries or
judgements. Measured are Spearman's correlation of cosines with people's scores on STS-B's dev
split, and recall and nDCG of Cranfield's queries over its abstracts, both read up to 128 tokens.
Of the teacher's correlation the student is to keep 97.5%, as Sentence-Transformers says of models
that are made so (its page on distillation); in search, what its own encoder of as many layers,
paraphrase-MiniLM-L3-v2, has of all-MiniLM-L6-v2's figure (its table of pretrained models): 39.19 of
49.54. Ends with exit code 1 where a claim fails.
"""
import argparse
import csv
import dataclasses
import pathlib
import sys

import numpy as np
from scipy.stats import spearmanr

import lean_jax as lean
from lean_jax.distillation.start import alternating, take_layers
from lean_jax.evaluation.retrieval import cranfield
from lean_jax.models.segments import configured
from lean_jax.pipeline.on_text import told

LENGTH = 128                  # tokens of a text at most
SENTENCES, ABSTRACTS = 8000, 1200
KEPT = {'spearman': .975, 'ndcg@10': 39.19 / 49.54, 'recall@100': 39.19 / 49.54}
LOSSES = (dict(kind='mse', weight=100.),)


def pairs(path):
  """The two sentences and the score of each line of STS-B."""
  with path.open(newline='', encoding='utf-8') as file:
    return [(a, b, float(score)) for a, b, score in csv.reader(file)]


def measured(model, folder):
  """Spearman's correlation on STS-B dev, and the figures of Cranfield."""
  rows = pairs(folder / 'stsb' / 'dev.csv')
  left, right = (model.embed([row[k] for row in rows]) for k in (0, 1))
  spearman = spearmanr((left * right).sum(axis=1), [row[2] for row in rows]).statistic
  found = lean.evaluate_retrieval(model, *cranfield(folder / 'cranfield'))
  return dict(spearman=float(spearman), **found)


def texts(folder):
  """What the student learns from: sentences of STS-B train, and Cranfield's abstracts."""
  sentences = {s for row in pairs(folder / 'stsb' / 'train.csv') for s in row[:2]}
  return sorted(sentences), list(cranfield(folder / 'cranfield')[1].values())


def claims(found):
  """[(claim, whether it holds)], of a teacher, of its cut, and of each seed's student."""
  out, teacher, cut = [], found['teacher'], found['cut']
  out.append((f'the teacher is the original: Spearman {teacher["spearman"]:.4f}, .8672 in PyTorch',
              abs(teacher['spearman'] - .8672) < 5e-4))
  for name, kept in KEPT.items():
    values = [s[name] for s in found['students']]
    out += [(f'{name} is above the untrained cut\'s in each seed: {min(values):.4f} against '
             f'{cut[name]:.4f}', min(values) > cut[name]),
            (f'{name} keeps {kept:.1%} of the teacher\'s in each seed: {min(values):.4f} of '
             f'{teacher[name]:.4f}', min(values) >= kept * teacher[name])]
  return out


def main(argv=None):
  """Prints figures and claims, and returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', metavar='DIR', help='all-MiniLM-L6-v2')
  parser.add_argument('--data', required=True, type=pathlib.Path, help='has stsb/ and cranfield/')
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--seeds', type=int, default=3)
  a = parser.parse_args(argv)
  teacher = lean.load(a.folder)
  short = dataclasses.replace(teacher.config.pooling, length=LENGTH)
  teacher = dataclasses.replace(teacher, config=configured(teacher.config, pooling=short))
  sentences, abstracts = texts(a.data)
  cut = take_layers(teacher.config, teacher.params, alternating(teacher.config.layers, 3))
  student = dataclasses.replace(teacher, **dict(zip(('config', 'params'), cut)))
  found = dict(teacher=measured(teacher, a.data), cut=measured(student, a.data), students=[])
  for seed in range(a.seeds):
    draw = np.random.default_rng(seed)
    own = [*draw.permutation(sentences)[:SENTENCES], *draw.permutation(abstracts)[:ABSTRACTS]]
    learned = lean.distill_encoder(
        teacher, [str(text) for text in own], student=student, steps=a.steps, losses=LOSSES,
        batch=32, peak=5e-4, warmup=a.steps // 10, seed=seed, trainable='layers/.*',
        group_by_length=True)
    found['students'].append(measured(learned, a.data))
  return told(found, claims(found))


if __name__ == '__main__':
  sys.exit(main())
