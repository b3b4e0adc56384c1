"""The losses that a config can name, each of what it looks at in student and teacher.

A kind that looks at taps is a function of both configs and of its options, which gives a `Looks`;
kinds of labels are in `losses`. A new one is a function here, and a line in `KINDS`.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lean_jax.distillation import attention
from lean_jax.distillation.cka import cka
from lean_jax.distillation.hidden import hidden_cosine, hidden_mse
from lean_jax.distillation.layers import layer_map
from lean_jax.errors import InputError
from lean_jax.nn.taps import HEADS, SCORES, STATES

STATE_DISTANCES = dict(mse=hidden_mse, cosine=hidden_cosine)
RELATIONS = ('queries', 'keys', 'values')
SCORE_DISTANCES = dict(mse=attention.attention_mse, kl=attention.attention_kl)


class Learned(NamedTuple):
  """What a loss learns beside the student; None where it does not.

  Attributes:
    projections: a matrix [D E] from the student's states to the teacher's.
    layer_maps: [M N], of each of the student's layers a row, whose softmax weighs the teacher's.
  """
  projections: Any = None
  layer_maps: Any = None


class Looks(NamedTuple):
  """What a loss on taps needs.

  Attributes:
    taps: collections, of `nn.taps`.
    value: (student, teacher, mask, Learned) -> scalar, of two `Tapped`.
    learned: of what it learns, the shapes.
  """
  taps: tuple[str, ...]
  value: Callable
  learned: Learned = Learned()


class Tapped(NamedTuple):
  """What a model shows: a list of {tap: array}, one of each layer, and the embedding [B T D]."""
  layers: Any
  embedding: Any


def hidden(student, teacher, *, distance='mse', layers='uniform', project=None):
  """Layers' outputs, by a map of layers; see `distillation.hidden`.

  Args:
    distance: 'mse' or 'cosine'.
    layers: of `layers.layer_map`; the mean over its pairs. Or 'learned': each of the student's
      layers has a mixture of all the teacher's, as in ALP-KD (Passban et al. 2020,
      arXiv:2012.14022, section 3), its weights a learned softmax.
    project: whether a learned matrix is between, one for all pairs; None is where widths differ.
  """
  if layers == 'learned':
    each = lambda x: [layer['hidden'] for layer in x.layers]
    return _states(student, teacher, distance, project,
                   lambda x, y: [(h, jnp.stack(each(y))) for h in each(x)],
                   (student.layers, teacher.layers))
  pairs = layer_map(layers, student.layers, teacher.layers)
  return _states(student, teacher, distance, project,
                 lambda x, y: [(x.layers[s]['hidden'], y.layers[t]['hidden']) for s, t in pairs])


def embedding(student, teacher, *, distance='mse', project=None):
  """What the first layers are given; args as `hidden` has them. TinyBERT, equation 9."""
  return _states(student, teacher, distance, project, lambda x, y: [(x.embedding, y.embedding)])


def states_cka(student, teacher, *, layers='uniform'):
  """CKA of layers' outputs, the mean over a map of layers."""
  pairs = layer_map(layers, student.layers, teacher.layers)
  return Looks((STATES,), lambda x, y, mask, _: _mean(
      cka(x.layers[s]['hidden'], y.layers[t]['hidden'], mask) for s, t in pairs))


def scores(student, teacher, *, distance='mse', layers='uniform'):
  """Attention's scores ('mse') or probabilities ('kl') of layers, the mean over their map."""
  compare = _named('distance', distance, SCORE_DISTANCES)
  pairs = _attending(student, teacher, layer_map(layers, student.layers, teacher.layers))
  _same_heads(student.heads, teacher.heads)
  return Looks((SCORES,), lambda x, y, mask, _: _mean(
      compare(x.layers[s]['scores'], y.layers[t]['scores'], mask) for s, t in pairs))


def minilm(student, teacher, *, teacher_layer=-1):
  """Attention and value relations of the student's last layer and one of the teacher's, summed.

  Wang et al. 2020 (MiniLM, arXiv:2002.10957), equation 6.

  Args:
    teacher_layer: from 0, or from the end by -1.
  """
  (s, t), = _attending(student, teacher, [_last(student, teacher, teacher_layer)])
  _same_heads(student.heads, teacher.heads)

  def value(x, y, mask, _):
    x, y = x.layers[s], y.layers[t]
    heads = x['values'].shape[2]
    _same_heads(heads, y['values'].shape[2])
    return attention.attention_kl(x['scores'], y['scores'], mask) + attention.relation_kl(
        x['values'], y['values'], mask, heads)
  return Looks((HEADS, SCORES), value)


def minilmv2(student, teacher, *, relation_heads, teacher_layer=-1, relations=RELATIONS):
  """Relations of queries, keys and values of the student's last layer and a teacher's, summed.

  Wang et al. 2020 (MiniLMv2, arXiv:2012.15828), equation 5, its weights 1 for Q-Q, K-K and V-V.
  Heads and widths may differ.

  Args:
    relation_heads: dividing the joined width of the heads of both models.
    teacher_layer: from 0, or from the end by -1.
    relations: which of `RELATIONS`.
  """
  (s, t), = _attending(student, teacher, [_last(student, teacher, teacher_layer)])
  if not relations or not set(relations) <= set(RELATIONS):
    raise InputError(f'relations {relations!r}; expected some of {", ".join(RELATIONS)}')
  if not isinstance(relation_heads, int) or relation_heads < 1:
    raise InputError(f'relation_heads {relation_heads!r}; expected 1 or more')

  def value(x, y, mask, _):
    one, other = x.layers[s], y.layers[t]
    for name in relations:
      for whose, h in (('student', one[name]), ('teacher', other[name])):
        width = h.shape[2] * h.shape[3]
        if width % relation_heads:
          raise InputError(f"relation_heads {relation_heads} do not divide the {whose}'s width "
                           f'{width} of {name}; choose a divisor of all')
    return sum(attention.relation_kl(one[name], other[name], mask, relation_heads)
               for name in relations)
  return Looks((HEADS,), value)


KINDS = dict(hidden=hidden, embedding=embedding, cka=states_cka, attention=scores, minilm=minilm,
             minilmv2=minilmv2)


def _states(student, teacher, distance, project, states, maps=None):
  compare = _named('distance', distance, STATE_DISTANCES)
  if project not in (None, True, False):
    raise InputError(f'project {project!r}; expected True, False or None')
  D, E = student.width, teacher.width
  if project is False and D != E:
    raise InputError(f'states of the student are {D} wide and of the teacher {E}, and project is '
                     'False; leave it out, or compare them by cka')
  learned = project or D != E

  def value(x, y, mask, learned):
    pairs = states(x, y)
    mixtures = [None] * len(pairs) if maps is None else jax.nn.softmax(learned.layer_maps)
    return _mean(compare(a, b, mask, learned.projections, mixture)
                 for (a, b), mixture in zip(pairs, mixtures))
  return Looks((STATES,), value, Learned((D, E) if learned else None, maps))


def _named(what, name, known):
  if name not in known:
    raise InputError(f'{what} {name!r}; expected one of {", ".join(known)}')
  return known[name]


def _last(student, teacher, layer):
  if not isinstance(layer, int) or not -teacher.layers <= layer < teacher.layers:
    raise InputError(f'teacher_layer {layer!r} of {teacher.layers}; expected '
                     f'{-teacher.layers} to {teacher.layers - 1}')
  return student.layers - 1, layer % teacher.layers


def _attending(student, teacher, pairs):
  """The pairs; raises InputError if one of their layers has no attention."""
  for whose, config, at in (('student', student, 0), ('teacher', teacher, 1)):
    for pair in pairs:
      mixer = config.each[pair[at]].mixer
      if mixer not in ('attention', 'latent'):
        raise InputError(f"layer {pair[at]} of the {whose} is {mixer} and has no attention; choose "
                         "layers that have, or compare states: 'hidden', 'cka'")
  return pairs


def _same_heads(student, teacher):
  if student != teacher:
    raise InputError(f'the student has {student} heads and the teacher {teacher}; minilmv2 '
                     'compares other numbers of heads')


def _mean(values):
  values = list(values)
  return sum(values) / len(values)
