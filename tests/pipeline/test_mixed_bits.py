"""The experiment on mixed bits says what fails."""
import pytest

from lean_jax.experiments.mixed_bits import UNIFORM, claims


@pytest.mark.parametrize(('name', 'change', 'fails'), [
    ('float', dict(), 0), ('mixed as w3a16-g64', dict(perplexity=5.), 1),
    ('mixed as w4a16-g64', dict(bytes=101), 1),
    ('mixed as w4a16-g64', dict(bytes=101, perplexity=9.), 2)])
def test_a_claim_holds_or_fails_by_its_figures(name, change, fails):
  found = {'float': dict(perplexity=4., bytes=900)}
  for scheme in UNIFORM:
    found |= {scheme: dict(perplexity=5., bytes=100),
              f'mixed as {scheme}': dict(perplexity=4.5, bytes=99)}
  found[name].update(change)
  assert [passed for _, passed in claims(found)].count(False) == fails
