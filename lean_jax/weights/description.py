"""A tree of weights as plain JSON, and back: what a checkpoint needs besides the arrays."""
import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.quantization.ema import Average
from lean_jax.quantization.nested import Nested
from lean_jax.quantization.pact import Clip
from lean_jax.quantization.spec import QuantSpec, parse_spec
from lean_jax.weights import KINDS
from lean_jax.weights.base import Weight, static_names

_PARTS = (Nested, Clip, Average)                        # of weights
_KIND = {kind.__name__: kind for kind in (*KINDS, *_PARTS)}


def describe(tree):
  """JSON-able: {'kind': ...} of each weight, its fixed fields, each array's shape and dtype."""
  if isinstance(tree, (Weight, *_PARTS)):
    fixed = static_names(type(tree))
    return {'kind': type(tree).__name__} | {
        k: _plain(v) if k in fixed else describe(v) for k, v in vars(tree).items()}
  if isinstance(tree, dict):
    return {'tree': {k: describe(v) for k, v in tree.items()}}
  if tree is None:
    return None
  return {'shape': list(tree.shape), 'dtype': str(tree.dtype)}


def abstract(description):
  """The tree of jax.ShapeDtypeStruct that `describe` saw, its weights of the same kinds.

  Raises:
    InputError: a kind that this version does not have.
  """
  if description is None:
    return None
  if 'tree' in description:
    return {k: abstract(v) for k, v in description['tree'].items()}
  if 'kind' not in description:
    return jax.ShapeDtypeStruct(tuple(description['shape']), jnp.dtype(description['dtype']))
  fields = dict(description)
  kind = fields.pop('kind')
  if kind not in _KIND:
    raise InputError(f'the checkpoint has a weight of kind {kind!r}, which this version of '
                     f'lean_jax does not know; it knows: {", ".join(_KIND)}')
  fixed = static_names(_KIND[kind])
  return _KIND[kind](**{k: _read(k, v) if k in fixed else abstract(v) for k, v in fields.items()})


def difference(found, expected, path=''):
  """The first place where two descriptions differ, as a sentence; None if they are equal."""
  if found == expected:
    return None
  where = path or 'the tree'
  if not (isinstance(found, dict) and isinstance(expected, dict)):
    return f'{where} is {found}, expected {expected}'
  if 'tree' in found and 'tree' in expected:
    a, b = found['tree'], expected['tree']
    if a.keys() != b.keys():
      more, less = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
      return f'{where} has {more or "nothing"} more and lacks {less or "nothing"}'
    pairs = [(a[k], b[k], k) for k in a]
  elif found.keys() == expected.keys() and 'kind' in found:
    pairs = [(found[k], expected[k], k) for k in found]
  else:
    return f'{where} is {found}, expected {expected}'
  return next(d for a, b, k in pairs if (d := difference(a, b, f'{path}/{k}'.strip('/'))))


def _plain(value):
  if isinstance(value, QuantSpec):
    return str(value)
  return list(value) if isinstance(value, tuple) else value


def _read(field, value):
  if field == 'spec':
    return parse_spec(value)
  return tuple(value) if isinstance(value, list) else value
