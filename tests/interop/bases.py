"""Tiny random models for tests of the PEFT library's files, saved once each."""
import dataclasses
import functools

import lean_jax as lean
from lean_jax import tree
from tests.interop import rounding


def bases(tmp_path_factory, changes):
  """The function from a family to the folder of its model, with changes {family: settings}."""
  @functools.cache
  def one(family):
    folder = tmp_path_factory.mktemp('bases') / family
    model = rounding.floats(family, **changes.get(family, {}))
    centre = lambda w: dataclasses.replace(w, value=w.value - 1)       # else all logits are alike
    params = tree.transform(model.params, [('embed/.*|head/.*', centre)])
    lean.save(dataclasses.replace(model, params=params), folder, format='hf')
    return folder
  return one
