"""Rounding to nearest: quantization that looks at nothing but the weight."""
import jax.numpy as jnp
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.quantization.clip import check_clip, least_error
from lean_jax.quantization.formats import grouped
from lean_jax.quantization.ranges import static_step
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense, Quantized, Trained
from lean_jax.weights.base import to_matrix


def rtn(w, spec, stats=None, clip='absmax', inputs='absmax'):
  """The weight in the format `spec` (a QuantSpec or its name, 'w4a16-g64').

  A weight in training becomes the integers that it was trained as, its learned steps, offsets and
  ranges theirs; an already quantized one, or one with an adapter, is refused.

  Args:
    w: Dense, or one in training.
    spec: the format.
    stats: None, or calibration.Statistics of its inputs: a static range of activations needs them.
    clip: how a group's range is found: 'absmax', or 'mse', see `clip.least_error`.
    inputs: how a static range of activations is found, see `ranges.input_step`.

  Raises:
    InputError: the weight is quantized already, carries an adapter, the name is no scheme, or its
      activations need a range that the weight does not have.
  """
  spec = parse_spec(spec)
  trained, w = (w, w.base) if isinstance(w, Trained) else (None, w)
  if trained is not None and trained.spec != spec:
    raise InputError(f'the weight was trained as {trained.spec}, not {spec}; quantize it to '
                     f'{trained.spec}')
  if not isinstance(w, Dense):
    raise InputError(f'a {type(w).__name__} weight cannot be rounded to {spec}; start from the '
                     'float model (merge an adapter first)')
  if trained is not None:
    return trained.quantized(spec)
  if spec.static and stats is None:
    raise InputError(f'{spec} needs a range of activations: give calibration text; or '
                     'fake_quantize as w8a8, apply ema, and train')
  check_clip(clip)
  value, shrink = meta.unbox(w), 1.
  if clip == 'mse':
    matrix = to_matrix(value, w.dims).astype(jnp.float32)
    shrink = least_error(grouped(matrix, spec), spec, matrix.shape[-2])
  return Quantized.of(value, spec, w.dims, w.axes, shrink,
                      static_step(spec, stats, inputs))
