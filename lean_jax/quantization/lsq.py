"""LSQ and LSQ+: the step of the grid, and its offset, are trained with the weight."""
import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.kernels.fake_quant import learned
from lean_jax.quantization import formats
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense, LearnedStep
from lean_jax.weights.base import to_matrix

_SHARES = 20                  # of the range, tried for the least squared error


def lsq(w, spec):
  """The weight rounded with a learned step, which starts as 2 <|w|> / sqrt(Q_P).

  Esser et al. 2020 (arXiv:1902.08153), section 2: there a layer has one step ('w4a16-tensor'), here
  every column or group of it. Gradients of steps are scaled by 1 / sqrt(N Q_P), section 2.2, which
  Adam divides out again. `rtn(w, spec)` stores the integers; nothing changes by that.

  Raises:
    InputError: the weight is not a plain one, or the scheme has no symmetric integers of 2 to 8
      bits.
  """
  spec = _checked(w, spec)
  if not spec.symmetric:
    raise InputError(f'lsq learns a step and {spec} has a zero point too; use lsq_plus, or '
                     f'w{spec.bits}a16-sym')
  return LearnedStep(w, learned.lsq_start(to_matrix(meta.unbox(w), w.dims), spec), None, spec)


def lsq_plus(w, spec):
  """The weight rounded with a learned step, and of an asymmetric scheme a learned offset.

  Bhalgat et al. 2020 (arXiv:2004.09576), section 3. A symmetric step starts as
  max(|mean - 3 sigma|, |mean + 3 sigma|) / 2^(bits - 1), as the paper's weights do. Step and offset
  of an asymmetric grid start where the squared error is least, as the paper's activations do: here
  of 20 shares of the range between the least and the greatest weight. The offset is stored as a
  zero point, a code, and rounded to one in training too.

  Raises:
    InputError: the weight is not a plain one, or the scheme is not one of integers of 2 to 8 bits.
  """
  spec = _checked(w, spec)
  matrix = to_matrix(meta.unbox(w), w.dims).astype(jnp.float32)
  if spec.symmetric:
    return LearnedStep(w, _three_sigma(matrix, spec), None, spec)
  scale, zero = _least_squares(matrix, spec)
  return LearnedStep(w, scale, -zero * scale, spec)


def _checked(w, spec):
  spec = parse_spec(spec)
  if not isinstance(w, Dense):
    raise InputError(f'a {type(w).__name__} weight cannot learn a step; start from the float model')
  if spec.code != 'int':
    raise InputError(f'{spec} is no grid of integers, and has no step to learn; use w2a16 to w8a8')
  if spec.static:
    raise InputError(f'{spec} needs a range of activations: train as w8a8, and apply pact or ema')
  return spec


def _three_sigma(matrix, spec):
  count = learned.sharing(matrix.shape, spec)
  count = count.reshape((1,) * (matrix.ndim - 2) + count.shape)
  mean = lambda x: learned.per_step(formats.grouped(x, spec), spec) / count       # [..., G, O]
  middle = mean(matrix)
  sigma = jnp.sqrt(jnp.maximum(mean(matrix ** 2) - middle ** 2, 0))
  return jnp.maximum(jnp.abs(middle - 3 * sigma), jnp.abs(middle + 3 * sigma)) / 2 ** (
      spec.bits - 1)


def _least_squares(matrix, spec):
  """scale, zero [..., G, O] float32: of shares of the range, those of the least squared error."""
  def one(share):
    codes, scale, zero = formats.quantize(matrix, spec, share)
    off = formats.dequantize(codes, scale, zero, spec, jnp.float32) - matrix
    error = learned.per_step(formats.grouped(off ** 2, spec), spec)
    return error, scale.astype(jnp.float32), zero.astype(jnp.float32)
  error, scale, zero = jax.lax.map(one, jnp.arange(1, _SHARES + 1) / _SHARES)
  best = jnp.argmin(error, axis=0)[None]
  return tuple(jnp.take_along_axis(x, best, axis=0)[0] for x in (scale, zero))
