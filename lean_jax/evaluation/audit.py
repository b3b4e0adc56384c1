"""The precision that was asked for, against the one that the program computes in.

A quantized model that quietly multiplies in float is as right as it is slow, and a rounding that is
lost under the gradient trains another model than the one that is stored. Neither shows in the
outputs. Both show in the jaxpr: `audit` follows each weight's arrays through it.
"""
import typing

import jax
import jax.numpy as jnp

from lean_jax import tree
from lean_jax.errors import InputError, PrecisionError
from lean_jax.evaluation import provenance
from lean_jax.objectives.forward import INPUTS, forward
from lean_jax.weights import LowRank, Quantized, Trained, Wrapper


class Row(typing.NamedTuple):
  """What was asked of a weight and what was seen.

  Attributes:
    name: of the weight; an adapter's own arrays and its base have a row each.
    asked: its kind and scheme: 'float32', 'w4a16-g64', 'FakeQuantized(w8a8)'.
    forward, gradient: the products that take it in: 'int8 x int8', 'float32 x rounded float32' (the
      weight is right; 'rounded' is one of few values, times scales), 'lookup of uint8'.
  """
  name: str
  asked: str
  forward: str
  gradient: str


def audit(model, batch):
  """The precision of each weight of a model, as asked and as observed, forward and backward.

  Nothing is computed: the program is traced as `logits` and training trace it, and read; arrays may
  be jax.ShapeDtypeStructs. It shows neither the number of levels of a weight in training (that
  codes are stored as they are trained is a law of the kinds), nor what a compiler makes of it, nor
  the inside of a Pallas kernel: a weight that only such a one takes in is reported as not taken in.
  The dtype of float activations is the model's own: it is shown, and not judged.

  Args:
    model: a `lean_jax.Model`, or (module, params).
    batch: what the model reads, as `objectives.forward` takes it, {name: array}; or tokens [B T].

  Returns:
    A Row for each weight.

  Raises:
    PrecisionError: a weight is computed, or stored, in another precision than asked, or not at all.
    InputError: the batch has what no model reads.
  """
  module, params = model if isinstance(model, tuple) else (model.module, model.params)
  batch = batch if isinstance(batch, dict) else dict(tokens=batch)
  odd = set(batch) - {*INPUTS, 'labels'}
  if odd:
    raise InputError(f'a batch has no {sorted(odd)[0]!r}; it may have {", ".join(INPUTS)}')
  batch = {k: jnp.asarray(v) for k, v in batch.items() if k in INPUTS}
  return audit_function(lambda params, batch: forward(module, params, batch)[0], params, batch)


def audit_function(f, params, *inputs):
  """`audit` of any function f(params, *inputs) to an array: under jit, vmap, scan, remat, ...

  Raises:
    PrecisionError: as `audit`.
  """
  found = components(params)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  origins = [_origin(found, tree.name(path), leaf) for path, leaf in leaves]
  *products, reached = provenance.trace(f, params, *inputs)(origins)
  rows, wrong = [], []
  for k, (name, w) in enumerate(found.items()):
    ahead, again, back = ({p for p in some if p.weight == k} for some in products)
    values = [r for r, origin in zip(reached, origins) if origin[0] == k and (
        origin[1] != provenance.STATISTIC)]
    rows.append(Row(name, asked(w), _said(ahead), _said(back)))
    trouble = (stored_otherwise(w) or _odd(w, ahead, 'forward')
               or _odd(w, again, 'forward under the gradient')
               or _odd_gradient(w, ahead, back, values))
    if trouble:
      wrong.append(f'{name}: asked {asked(w)}, {trouble}')
  if wrong:
    more = f' (and {len(wrong) - 1} more weights)' if len(wrong) > 1 else ''
    raise PrecisionError(f'{wrong[0]}{more}; a kind of weight must multiply by its own arrays, in '
                         'einsum, grouped and take alike')
  return rows


def components(params):
  """{name: weight} of each part with a precision of its own: an adapter and its base are two."""
  found = {}
  for name, w in tree.named_weights(params).items():
    while isinstance(w, Wrapper) and not isinstance(w, Trained):
      if isinstance(w, LowRank):
        found[name] = w
      name, w = f'{name}/base', w.base
    found[name] = w
  return found


def asked(w):
  """The precision that a weight stands for, in a word."""
  if isinstance(w, Quantized):
    return str(w.spec)
  if isinstance(w, Trained):
    return f'{type(w).__name__}({w.spec})'
  return str(w.a.dtype if isinstance(w, LowRank) else jax.eval_shape(lambda: w.unbox()).dtype)


def stored_otherwise(w):
  """How the codes of a quantized weight are stored, if it is not as its scheme says; else None."""
  if not isinstance(w, Quantized):
    return None
  letters = iter(w.sizes)
  stacked = iter(w.values.shape)                       # the stacked axes are the first
  shape = tuple(next(stacked) if d == 'n' else next(letters) for d in w.dims)
  dense = jax.ShapeDtypeStruct(shape, jnp.dtype(w.dtype))
  want = jax.eval_shape(lambda v: Quantized.of(v, w.spec, w.dims, w.axes), dense).values
  if (w.values.dtype, w.values.shape) == (want.dtype, want.shape):
    return None
  return (f'stored as {w.values.dtype} {list(w.values.shape)}, expected {want.dtype} '
          f'{list(want.shape)}')


def _value_names(name, w):
  """The names of the arrays that hold a weight's values; its others are scales and the like."""
  if isinstance(w, Trained):
    return {f'{name}/base/{field}' for field in tree.named_arrays(w.base)}
  fields = tuple(tree.named_arrays(w))
  if isinstance(w, Quantized):
    fields = ('values',)
  elif isinstance(w, LowRank):
    fields = ('a', 'b')
  return {f'{name}/{field}' for field in fields}


def _origin(found, path, leaf):
  """The number of the weight that an array is of, and what it is to it."""
  for k, (name, w) in enumerate(found.items()):
    if path in _value_names(name, w):
      is_float = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1
      return k, provenance.RAW if is_float else provenance.ROUNDED
  parent = path.rpartition('/')[0]
  owners = [k for k, name in enumerate(found)
            if path.startswith(f'{name}/') or name.startswith(f'{parent}/base')]
  # A bias or a norm's scale is of no weight; the last owner is the innermost.
  return (owners[-1] if owners else provenance.INPUTS), provenance.STATISTIC


def _fits(w, p):
  """Whether a forward product, or a lookup, is as the weight's kind says."""
  if not isinstance(w, Quantized | Trained):
    return 'float' in p.right and not p.right_rounded and not p.left_rounded
  if not p.right_rounded:
    return False
  if p.left is None:
    return True
  if w.spec.activation_bits != 8:
    return 'float' in p.left and 'float' in p.right and not p.left_rounded
  if isinstance(w, Quantized):
    return (p.left, p.right) == ('int8', 'int8')
  return 'float' in p.left and p.left_rounded


def _odd(w, products, when):
  """What is wrong with the products forward, in words, or None."""
  if not products:
    return f'{when} no product takes it in'
  wrong = {p for p in products if not _fits(w, p)}
  return f'{when} found {_said(wrong)}' if wrong else None


def _odd_gradient(w, ahead, back, trained):
  """What is wrong backward: products with another value than forward, or no gradient."""
  lean = isinstance(w, Quantized | Trained)
  wrong = {p for p in back if p.right_rounded != lean}
  if wrong:
    return f'in the gradient found {_said(wrong)}'
  if not back and any(p.left is not None for p in ahead):
    return 'in the gradient no product takes it in'
  if False in trained:
    return 'its own gradient is no function of the loss'
  return None


def _said(products):
  return ', '.join(sorted({_words(p) for p in products}))


def _words(p):
  word = lambda dtype, few: f'rounded {dtype}' if few and 'float' in dtype else dtype
  right = word(p.right, p.right_rounded)
  return f'lookup of {right}' if p.left is None else f'{word(p.left, p.left_rounded)} x {right}'
