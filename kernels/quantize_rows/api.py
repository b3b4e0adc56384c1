"""quantize_rows: rows normalized, turned, rounded to 8 or 4 bits and packed, in one pass."""
import functools

import jax
import jax.numpy as jnp

from lean_jax.kernels.platforms import operands
from lean_jax.kernels.platforms.choice import Form, chosen
from lean_jax.kernels.quantize_rows import reference, tpu


def quantize_rows(x, scale=None, *, bits=8, norm=None, epsilon=None, offset=0., block=None,
                  implementation=None):
  """Each row of x on its own symmetric grid, or all on a given one.

  The codes have no gradient, and the steps are constants to it: `rounded_rows` has one.

  Args:
    x: [... M K], float.
    scale: None, or [...], the step of each matrix.
    bits: of a code, 8 or 4.
    norm: None, or [K], float: rows are x / rms(x) * (offset + norm) first, in x's dtype
      (Zhang & Sennrich 2019, arXiv:1910.07467).
    epsilon: of the norm, added to the mean of squares.
    offset: of the norm; 1 where scales are stored less one.
    block: None, or a power of two that divides K: each block of so many numbers is multiplied by
      the Hadamard matrix / sqrt(block) after the norm, which spreads outliers over it
      (Ashkboos et al. 2024, arXiv:2404.00456, section 3).
    implementation: None is the fastest that the platform has for these operands; or 'pallas',
      'xla' or 'reference'.

  Returns:
    codes [... M K], int8 in -127..127; of four bits -7..7, two in a byte, the first in its lower
    bits: uint8 [... M ceil(K/2)], and `reference.unpacked` takes them apart. step [... M 1],
    float32. A row of zeros has step 1; a row with a NaN has step NaN, so that the NaN reaches the
    product.

  Raises:
    ValueError: shapes or dtypes do not fit, or an implementation that is not there or does not run
      here.
  """
  _check(x, scale, bits, norm, epsilon, block)
  how = (bits, epsilon, offset, block, implementation)
  return _codes(how, *jax.lax.stop_gradient((x, scale, norm)))


def rounded_rows(x, scale=None, *, bits=8, norm=None, epsilon=None, offset=0., block=None,
                 implementation=None):
  """codes * step of `quantize_rows` in x's dtype; the gradient passes straight through.

  That is: to x and the norm it is what it would be without the rounding (Bengio et al. 2013,
  arXiv:1308.3432, section 4). None reaches `scale`.
  """
  _check(x, scale, bits, norm, epsilon, block)
  return _rounded((bits, epsilon, offset, block, implementation), x, scale, norm)


def forms(x, bits, epsilon, offset, block):
  """Its Forms for these operands, the fastest first; each takes x, scale and norm."""
  how = dict(bits=bits, epsilon=epsilon, offset=offset, block=block)
  steps = functools.partial(_steps, **how)
  return [Form(functools.partial(tpu.quantize_rows, **how), 'pallas', ('tpu',),
               tpu.why_not(x, block), local=True),
          Form(steps, 'xla'), Form(steps, 'reference')]


def _codes(how, x, scale, norm):
  *rest, implementation = how
  return chosen('quantize_rows', forms(x, *rest), implementation)(x, scale, norm)


def _unrounded(x, norm, epsilon, offset, block):
  if norm is not None:
    x = reference.normed(x, norm, epsilon, offset)
  return reference.rotated(x, block) if block else x


def _steps(x, scale, norm, *, bits, epsilon, offset, block):
  return reference.quantize_rows(_unrounded(x, norm, epsilon, offset, block), scale, bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(how, x, scale, norm):
  codes, step = _codes(how, x, scale, norm)
  if how[0] == 4:
    codes = reference.unpacked(codes, x.shape[-1])
  return (codes.astype(jnp.float32) * step).astype(x.dtype)


def _forward(how, x, scale, norm):
  return _rounded(how, x, scale, norm), (x, scale, norm)


def _backward(how, saved, g):
  x, scale, norm = saved
  _, epsilon, offset, block, _ = how
  y, pull = jax.vjp(lambda x, norm: _unrounded(x, norm, epsilon, offset, block), x, norm)
  dx, dnorm = pull(g.astype(y.dtype))
  return dx, None if scale is None else jnp.zeros_like(scale), dnorm


_rounded.defvjp(_forward, _backward)


def _check(x, scale, bits, norm, epsilon, block):
  if bits not in reference.HIGH:
    raise ValueError(f'codes of {bits} bits; there are: {", ".join(map(str, reference.HIGH))}')
  if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x is {x.dtype} {x.shape}; expected floats [... M K]')
  operands.floats(scale=scale, norm=norm)
  *batch, _, K = x.shape
  if scale is not None and scale.shape != tuple(batch):
    raise ValueError(f'scale {scale.shape} does not fit x {x.shape}; expected {tuple(batch)}, one '
                     'a matrix')
  if norm is not None and norm.shape != (K,):
    raise ValueError(f'norm {norm.shape} does not fit x {x.shape}; expected {(K,)}')
  if (norm is None) != (epsilon is None):
    raise ValueError(f'norm {"is" if norm is None else "is not"} None and epsilon is {epsilon}; '
                     'give both or neither')
  if block is not None and (block < 1 or block & (block - 1) or K % block):
    raise ValueError(f'block {block} for rows of {K}; expected a power of two that divides them')
