"""Adapters merged into rounded weights, which are then rounded again.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314) leaves its adapter beside the integers. To merge it
is to round their sum, and what is finer than a step of the grid is lost: so the loss is reported.
"""
import dataclasses

import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.quantization.error import relative_error
from lean_jax.weights import Adapter, Quantized, Rescaled, bare
from lean_jax.weights.base import from_matrix, to_matrix, unstacked


def requantize_lora(w):
  """The adapted weight as one of its rounded base's scheme, rounded to nearest.

  A base whose inputs are rescaled keeps its scales; one whose rows were in another order, or whose
  zero points were floats, has plain ones after. Other kinds stay as they are.

  Raises:
    InputError: the adapted weight is no rounded one.
  """
  return _rounded(meta.unbox(w), bare(w)) if isinstance(w, Adapter) else w


def requantize(params):
  """Merges every adapter of a tree into its rounded weight.

  Returns:
    The tree, and {name: |merged - rounded| / |merged|} of each adapted weight (Frobenius).

  Raises:
    InputError: there is no adapter, or one on a weight that is not rounded.
  """
  if not any(isinstance(w, Adapter) for w in tree.named_weights(params).values()):
    raise InputError('no weight has an adapter to merge; attach and train one first')
  out = jax.jit(lambda params: tree.transform(params, [('.*', requantize_lora)]))(params)
  return out, merging_errors(params, out)


def merging_errors(before, after):
  """{name: |merged - rounded| / |merged|} of the weights that had an adapter in the tree `before`.
  """
  had, have = tree.named_weights(before), tree.named_weights(after)
  wide = lambda w: w.unbox().astype(jnp.float32)
  error = jax.jit(lambda a, b: relative_error(wide(a), wide(b)))
  return {n: float(error(w, have[n])) for n, w in had.items() if isinstance(w, Adapter)}


def _rounded(value, like):
  """A dense value as the kind of weight that `like` is."""
  if isinstance(like, Rescaled):
    matrix = to_matrix(value, like.dims)
    matrix = matrix / like.by[..., None].astype(matrix.dtype)
    value = from_matrix(matrix, like.dims, unstacked(value.shape, like.dims))
    return dataclasses.replace(like, base=_rounded(value, like.base))
  if isinstance(like, Quantized):
    return Quantized.of(value, like.spec, like.dims, like.axes, input_scale=like.input_scale)
  raise InputError(f'an adapter on a {type(like).__name__} weight has no rounded base to be merged '
                   'into; use merge')
