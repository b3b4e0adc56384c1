"""fake_quant: the rounding of a format forward, the identity backward.

The straight-through estimator: Bengio et al. 2013 (arXiv:1308.3432), section 4; for
quantization-aware training Jacob et al. 2018 (arXiv:1712.05877), section 3.
"""
import functools

import jax

from lean_jax.kernels.fake_quant import reference


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fake_quant(w, spec):
  """w [..., I, O] rounded to the format `spec` (a QuantSpec); its gradient is that of w."""
  return reference.fake_quant(w, spec)


fake_quant.defvjp(lambda w, spec: (reference.fake_quant(w, spec), None),
                  lambda spec, _, g: (g,))


@jax.custom_vjp
def fake_quant_rows(x):
  """x [... M K] rounded to 8 bits, one symmetric range a row; its gradient is that of x."""
  return reference.fake_quant_rows(x)


fake_quant_rows.defvjp(lambda x: (reference.fake_quant_rows(x), None), lambda _, g: (g,))
