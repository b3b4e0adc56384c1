"""Classifiers and sentence encoders, trained on labels, scores and vectors."""
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lean_jax.adapters.trained import trained_with
from lean_jax.api.distillation import student_of
from lean_jax.api.model import Model
from lean_jax.data import labelled
from lean_jax.distillation import labelling, vectors
from lean_jax.distillation.classes import classes
from lean_jax.distillation.losses import PROJECTIONS
from lean_jax.errors import InputError
from lean_jax.evaluation import retrieval
from lean_jax.evaluation import texts as texts_in
from lean_jax.evaluation.retrieval import pooling_of
from lean_jax.models import fresh
from lean_jax.training import recipe


def add_classifier(model: Model, labels: Sequence[str], *, of: str = 'sequence',
                   seed: int = 0) -> Model:
  """An encoder with a fresh head for labels, of texts or (of='token') of words.

  Raises:
    InputError: no encoder, or labels that are not names, each once.
  """
  config, params = fresh.with_head(model.family, model.config, model.params, labels, of, seed)
  return dataclasses.replace(model, config=config, params=params)


def label(model: Model, texts: Sequence[str] | Sequence[Sequence[str]],
          labels: Sequence[str] | Mapping[str, str], *, prompt: str, out=None,
          batch: int = 16) -> list[dict[str, Any]]:
  """Texts labelled by a generator, for `train_classifier`: see `distillation.labelling.label`."""
  return labelling.label(model, texts, labels, prompt=prompt, out=out, batch=batch)


def train_classifier(model: Model, data, *, steps: int, teacher: Model | None = None,
                     batch: int = 16, peak: float = 1e-4, temperature: float = 1.,
                     soft_weight: float | None = None, truncate: bool = False,
                     group_by_length: bool = False, seed: int = 0, workdir=None,
                     **settings) -> Model:
  """Trains a classifier of texts or of words on labels, on a teacher's scores of them, or on both.

  All of it trains; of one with adapters these and its head, which `save` writes and `save_adapter`
  does not.

  Args:
    model: an encoder with a head: see `add_classifier`.
    data: rows of `data.labelled`, or their JSONL file, of `label` say.
    teacher: a classifier of the same labels, of any tokenizer; its logits are then the scores.
    temperature: of the scores' and the model's distributions.
    soft_weight: of scores, the labels have the rest; None is 1 without labels, 0 without scores,
      else .7.
    truncate: whether the end of a text that is too long is left out.
    group_by_length: whether a batch has texts of about one length, so that little is padding.
    settings: of `training.recipe.train`.

  Raises:
    InputError: a model or teacher that does not classify, other labels, rows without any, or a
      setting out of range.
  """
  head, rows, encoded = _encoded(model, data, truncate)
  if teacher is not None:
    if set(teacher.labels) != set(model.labels):
      raise InputError(f'the teacher has labels {", ".join(teacher.labels)}, the model '
                       f'{", ".join(model.labels)}; give both the same')
    rows = labelled.scored_by(teacher, rows, head, truncate)
  wanted, scores = labelled.targets(rows, model.labels, head == 'token')
  soft_weight = labelled.share(wanted, scores, temperature, soft_weight)
  batches = labelled.batches(encoded, wanted, scores, batch=batch, seed=seed,
                             context=model.config.context)
  loss = classes(model.module, float(temperature), float(soft_weight))
  told = dict(kind='classes', temperature=temperature, soft_weight=soft_weight)
  settings.setdefault('trainable', trained_with(model.params, fresh.HEAD))
  params, _ = recipe.train(model.module, model.params, batches, steps=steps, peak=peak, seed=seed,
                           folder=workdir, objective=(loss, told), **settings)
  return dataclasses.replace(model, params=params)


def evaluate_classifier(model: Model, data, *, batch: int = 32,
                        truncate: bool = False) -> dict[str, float]:
  """accuracy, nll (nats a label) and count, over the labels of rows of `data.labelled`."""
  head, rows, _ = _encoded(model, data, truncate)
  wanted, _ = labelled.targets(rows, model.labels, head == 'token')
  texts = labelled.texts_of(rows, head)
  if head == 'token':
    logits = np.concatenate(model.tag(texts, batch=batch, truncate=truncate))
    return labelled.figures(logits, np.concatenate(wanted))
  logits = model.classify(texts, batch=batch, truncate=truncate)
  return labelled.figures(logits, np.stack(wanted))


def distill_encoder(teacher: Model, texts: Sequence[str], *, steps: int,
                    student: Model | None = None, keep: int | None = None,
                    losses: Sequence[Mapping[str, Any]] = (dict(kind='mse'),), batch: int = 32,
                    peak: float = 1e-4, group_by_length: bool = False, seed: int = 0,
                    workdir=None, **settings) -> Model:
  """A smaller model of texts' vectors, like the teacher's (Reimers & Gurevych 2020).

  Args:
    teacher: its vectors are made once, before training.
    student: of any tokenizer and width; None takes evenly spread layers of the teacher. Where
      widths differ, a matrix between is learned, which is not part of the student.
    keep: how many layers; None is half of them.
    losses: of `distillation.vectors`: mse, cosine, similarity_kl.
    group_by_length: whether a batch has texts of about one length, so that little is padding.
    settings: of `training.recipe.train`.
  """
  student = student_of(teacher, keep) if student is None else student
  terms, told = vectors.parsed(losses), json.dumps([dict(x) for x in losses], sort_keys=True)
  way = pooling_of(student.config)
  targets = teacher.embed(texts, truncate=True)
  rows = texts_in.read_texts(student.module, student.tokenizer, texts, truncate=True)
  widths = (student.config.width * len(way.modes), targets.shape[1])
  learned = vectors.projection(terms, widths, seed)
  params = {**student.params, PROJECTIONS: learned} if learned else student.params
  batches = vectors.vector_batches(rows, targets, batch=batch, seed=seed,
                                   context=student.config.context, by_length=group_by_length)
  params, _ = recipe.train(
      student.module, params, batches, steps=steps, peak=peak, seed=seed, folder=workdir,
      objective=(vectors.like_teacher(student.module, way, told), json.loads(told)), **settings)
  return dataclasses.replace(student, params=params)


def distill_ranker(teacher: Model | Sequence[float], student: Model,
                   triples: Sequence[tuple[str, str, str]], *, steps: int, scale: float = 1.,
                   batch: int = 32, peak: float = 1e-4, seed: int = 0, workdir=None,
                   **settings) -> Model:
  """A model of vectors that ranks texts as a cross-encoder does: margin-MSE of its products.

  Args:
    teacher: a classifier of pairs with one label, its score; or the margins themselves [n].
    student: embeds.
    triples: (query, a relevant text, another).
    scale: what the teacher's margins are multiplied by; products of vectors that the student brings
      to length one differ by 2 at most.
    settings: of `training.recipe.train`.

  Raises:
    InputError: no triples, a teacher of several labels, or margins that are not as many.
  """
  sides = list(zip(*triples))
  if len(sides) != 3:
    raise InputError(f'triples {triples!r:.60}; expected (query, relevant text, another) each')
  if isinstance(teacher, Model):
    if len(teacher.labels) != 1:
      raise InputError(f'the teacher has labels {", ".join(teacher.labels) or "none"}; give a '
                       'classifier of pairs with one, the score')
    scores = [teacher.classify(list(zip(sides[0], side)), truncate=True)[:, 0]
              for side in sides[1:]]
    teacher = scores[0] - scores[1]
  margins = scale * np.asarray(teacher, np.float32)
  if margins.shape != (len(triples),):
    raise InputError(f'margins of shape {margins.shape} for {len(triples)} triples; give one each')
  rows = [texts_in.read_texts(student.module, student.tokenizer, side, truncate=True)
          for side in sides]
  batches = vectors.triple_batches(rows, margins, batch=batch, seed=seed,
                                   context=student.config.context)
  loss = vectors.like_ranker(student.module, pooling_of(student.config))
  params, _ = recipe.train(
      student.module, student.params, batches, steps=steps, peak=peak, seed=seed, folder=workdir,
      objective=(loss, dict(kind='margin_mse')), **settings)
  return dataclasses.replace(student, params=params)


def evaluate_retrieval(model: Model, queries: Mapping[str, str], documents: Mapping[str, str],
                       judged: Mapping[str, Mapping[str, float]], **settings) -> dict[str, float]:
  """recall@10, recall@100, ndcg@10 and mrr@10 of a model's vectors: see `evaluation.retrieval`."""
  return retrieval.evaluate(model, queries, documents, judged, **settings)


def _encoded(model, data, truncate):
  """A classifier's head, rows of `data.labelled`, and the ids that it reads of each."""
  head, rows = getattr(model.config, 'head', None), labelled.rows_of(data)
  if head not in fresh.HEADS:
    raise InputError(f'this {model.family.model_type} has no head of classes; give an encoder that '
                     'has, of lean.add_classifier(encoder, labels) say')
  texts = labelled.texts_of(rows, head)
  if head == 'token':
    return head, rows, texts_in.read_words(model.module, model.tokenizer, texts, truncate)
  return head, rows, texts_in.read(
      model.module, model.tokenizer, texts_in.strings(texts, pairs=True), model.config.context,
      truncate)
