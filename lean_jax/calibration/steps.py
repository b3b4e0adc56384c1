"""The methods of a config in order, those that look at inputs among them."""
from lean_jax import methods
from lean_jax.calibration.driver import calibrated


def apply(config, params, steps, batches, key=None):
  """The tree after methods: `methods.apply`, and `calibrated` for methods that look at inputs.

  Args:
    config, params: of the model.
    steps: dicts with `where`, `method` and its settings; those of one method that follow each other
      are one list of rules.
    batches: a function that gives what the model is calibrated on; called where it is needed.
    key: a jax PRNG key, for methods that need one.

  Raises:
    InputError: as of `methods.apply` and `calibrated`.
  """
  for rules in methods.grouped(steps):
    if any(rule.looks for _, rule in rules):
      params, _ = calibrated(config, params, rules, batches())
    else:
      params = methods.at_once(params, rules, key)
  return params
