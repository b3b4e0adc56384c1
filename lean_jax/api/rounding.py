"""Where bits go, and what lets fewer do."""
import dataclasses
import re
from collections.abc import Sequence

import jax.numpy as jnp

from lean_jax.api.model import Model
from lean_jax.calibration.quantize import MATRICES
from lean_jax.data.packed import check_reads_text
from lean_jax.errors import InputError
from lean_jax.quantization import mixed, rotation
from lean_jax.weights.beside import refuse_beside


def allocate_bits(model: Model, tokens, budget: float | str = '3.2 bits', *,
                  schemes: Sequence[str] = mixed.SCHEMES,
                  where: str = MATRICES) -> tuple[tuple[str, str], ...]:
  """Rules for `quantize`: of each weight the scheme with which the loss is least in so many bytes.

  Stacked layers are one weight, of one scheme. For bits that differ by layer, load the model with
  scan_layers=False, or give `scan_layers(model, False)`; every layer is then compiled.

  Args:
    tokens: [B T], text on which losses are measured: see `quantization.mixed`.
    budget: '3.2 bits' a parameter, scales included, of the weights that match; or their bytes.
    schemes: to choose from.
    where: a regular expression on the weights' whole names.

  Raises:
    InputError: tokens of another shape, schemes that are none or too large for the budget, weights
      that are rounded already.
  """
  check_reads_text(model)
  tokens = jnp.asarray(tokens, jnp.int32)
  if tokens.ndim != 2 or tokens.shape[1] < 2:
    raise InputError(f'tokens of shape {tokens.shape}; give [B T], texts of at least 2 tokens')
  names = mixed.matched(model.params, where)
  limit = mixed.budget_bytes(budget, model.params, names)
  costs, sizes = mixed.sensitivities(model.module, model.params, tokens, schemes, where)
  chosen = mixed.allocate_bits(costs, sizes, limit)
  return tuple((re.escape(name), scheme) for name, scheme in chosen.items())


def rotate(model: Model, key) -> Model:
  """The model in a randomly rotated basis: every logit as it was, and no channel that stands out.

  Rounding it to few bits then costs less: see `quantization.rotation` (QuaRot).

  Args:
    key: a jax PRNG key.

  Raises:
    InputError: norms or branches that no rotation passes through, or weights that are not floats.
  """
  refuse_beside(model.params, 'rotated')
  config, params = rotation.rotate(model.config, model.params, key)
  return dataclasses.replace(model, config=config, params=params)
