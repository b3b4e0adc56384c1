"""Ranges of activations that are fixed before a model is used: what calibration saw."""
import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.calibration.statistics import quantile, sizes
from lean_jax.errors import InputError
from lean_jax.quantization.codes import magnitude

RANGES = ('absmax', 'percentile', 'mse')
PERCENTILE = .9999            # Wu et al. 2020 (arXiv:2004.09602), table 5: 99.99% serves best
HIGH = 127                    # of eight bits, symmetric
LEAST = 1e-8                  # of a step


def static_step(spec, stats, how='absmax'):
  """`input_step` where a scheme's activations have a fixed range; None where they do not."""
  return input_step(stats, how) if spec.static else None


def input_step(stats, how='absmax'):
  """The step between the eight-bit codes of a weight's inputs, [*e] float32.

  Args:
    stats: calibration.Statistics of the inputs.
    how: 'absmax', up to the largest |x|; 'percentile', up to what 99.99% are below; 'mse', where
      the squared error of the inputs is least.

  Raises:
    InputError: no such way, or one that needs the sizes of inputs where only the largest is known.
  """
  if how not in RANGES:
    raise InputError(f'a range of activations by {how!r}; give one of {", ".join(RANGES)}')
  top = magnitude(stats.top, -1)
  if how != 'absmax' and stats.histogram is None:
    raise InputError(f'a range by {how!r} of inputs that were scaled; give inputs="absmax"')
  if how == 'percentile':
    top = jnp.minimum(top, quantile(stats.histogram, PERCENTILE))
  if how == 'mse':
    top = jnp.minimum(top, _least_error(stats.histogram))
  return jnp.maximum(top / HIGH, LEAST)


def _least_error(histogram):
  """The range [*e] that leaves the least squared error of values with a histogram [*e BINS].

  Of a value within the range the error is that of rounding, step ** 2 / 12 in the mean (that of a
  value below half a step, which becomes 0, its square if that is less); of one beyond, what is cut.
  """
  size = sizes()

  def error(top):
    step = top / HIGH
    inside = jnp.minimum(step ** 2 / 12, size ** 2)
    return jnp.sum(histogram * jnp.where(size > top, (size - top) ** 2, inside), axis=-1)
  # An edge above a bin's middle, so that what lies in a bin is not cut by half of it.
  tops = size * np.float32(2 ** (.5 / 16))
  return tops[jnp.argmin(jax.lax.map(error, tops), axis=0)]
