"""The experiment on rotations gives channels that stand out, and says what fails."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.experiments.rotation import SCHEMES, claims, on_principal_axes, with_large_scales


def test_channels_are_made_large_and_no_logit_changes(tiny_model, monkeypatch):
  monkeypatch.setattr('lean_jax.experiments.rotation.CHANNELS', (3, 20))
  tokens = np.arange(12).reshape(2, 6)
  want = tiny_model.logits(tokens)
  scales = with_large_scales(tiny_model)
  np.testing.assert_allclose(scales.logits(tokens), want, atol=1e-4)
  assert float(scales.params['layers']['mixer_norm']['scale'][0, 3]) == 60
  axes = on_principal_axes(tiny_model, jnp.asarray(tokens))
  np.testing.assert_allclose(axes.logits(tokens), want, atol=1e-4)
  _, found = axes.module.apply({'params': axes.params}, jnp.asarray(tokens), mutable=['taps'])
  x = np.concatenate([np.asarray(x).reshape(-1, 32)
                      for x in jax.tree.leaves(found['taps']['layers'])])
  size = np.sum(x ** 2, axis=0)
  assert size[0] == size.max() and size[0] > 3 * np.median(size)


@pytest.mark.parametrize(('model', 'scheme', 'value', 'fails'), [
    ('as it is', 'w4a16', 9., 0), ('scales, rotated', 'w8a8', 9., 1),
    ('axes, rotated', 'w4a16', 9., 1), ('axes', 'float', 4.1, 1)])
def test_a_claim_holds_or_fails_by_its_figures(model, scheme, value, fails):
  found = {name: dict.fromkeys(('float', *SCHEMES), 5. if name in ('scales', 'axes') else 4.)
           for name in ('as it is', 'scales', 'axes', 'scales, rotated', 'axes, rotated')}
  for row in found.values():
    row['float'] = 4.
  found[model][scheme] = value
  assert [passed for _, passed in claims(found)].count(False) == fails
