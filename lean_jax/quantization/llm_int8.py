"""LLM.int8(): weights and activations in eight bits, but for the inputs that are far larger.

Dettmers et al. 2022 (arXiv:2208.07339), section 3.2: inputs of which one value reaches 6.0 are
multiplied with the rows of the weight that they meet in floats, all others in integers, row by row
and column by column. The authors look at each batch; here the inputs are those of a calibration
text, so that the rows are stored once, and the others in one byte each.
"""
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Outliers, Quantized, Rescaled
from lean_jax.weights.base import from_matrix, to_matrix, unstacked
from lean_jax.weights.dense import check_dense


def llm_int8(w, spec, stats, threshold=6.):
  """Outliers over a weight of eight-bit activations, w8a8 in the
  paper; the outliers are inputs whose largest value is at the threshold.

  How many there are decides shapes: call it on known numbers, not under jit. Layers, or experts,
  with fewer than another have room to spare; there is room for one at least.

  Args:
    w: Dense; stacked layers take statistics that are stacked too.
    spec: a QuantSpec or its name, with activations in eight bits.
    stats: calibration.Statistics of its inputs, `top` [*n *e I].
    threshold: of |x|.

  Raises:
    InputError: the weight is no float one, the activations of the scheme are not in eight bits, or
      the statistics are another weight's.
  """
  check_dense(w, 'rounded by llm_int8')
  spec = parse_spec(spec)
  if spec.activation_bits != 8 or spec.static:
    raise InputError(f'llm_int8 leaves outliers out of activations that are rounded token by '
                     f'token, and those of {spec} are not; give w8a8 or w4a8-g64')
  return apart(w, np.asarray(stats.top) >= threshold, spec)


def apart(w, large, spec):
  """The weight rounded to nearest, but for the rows of some inputs, which stay as they are.

  Args:
    w: Dense.
    large: [*n *e I] bool, numbers and not traced: which inputs these are.
    spec: a QuantSpec or its name.
  """
  spec, value = parse_spec(spec), meta.unbox(w)
  matrix = to_matrix(value, w.dims)
  if large.shape != matrix.shape[:-1]:
    raise InputError(f'statistics of inputs {large.shape}, and the weight has {matrix.shape[:-1]}; '
                     'give those of its own inputs')
  I = matrix.shape[-2]
  count = max(1, int(large.sum(axis=-1).max()))
  index = np.argsort(~large, axis=-1, kind='stable')[..., :count]
  real = np.take_along_axis(large, index, axis=-1)
  rows = jnp.take_along_axis(matrix, index[..., None], axis=-2)
  rows = jnp.where(real[..., None], rows, 0)
  usual = jnp.asarray(~large)
  rest = from_matrix(jnp.where(usual[..., None], matrix, 0), w.dims, unstacked(value.shape, w.dims))
  rest = Rescaled(Quantized.of(rest, spec, w.dims, w.axes), usual.astype(jnp.float32))
  return Outliers(rest, rows, jnp.asarray(np.where(real, index, I), jnp.int32))
