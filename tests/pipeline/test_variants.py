"""What the last methods of a variant lose is told."""
import dataclasses
import types

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters.requantize import merging_errors
from lean_jax.pipeline import variants
from lean_jax.weights import Quantized

WHERE = 'layers/mlp/.*'


def test_merging_into_integers_is_told_with_the_weight_that_lost_most(tiny_model):
  model = lean.attach_lora(lean.quantize(tiny_model, 'w4a16-g16', where=WHERE), rank=2, where=WHERE)
  params = tree.transform(model.params, [
      ('.*/up/.*', lambda w: dataclasses.replace(w, b=w.b + .2)), ('.*', None)])
  model = dataclasses.replace(model, params=params)
  lines = []
  bars = types.SimpleNamespace(line=lambda title, text: lines.append((title, text)))
  variant = dict(name='merged', finish=(dict(where='.*', method='requantize_lora'),))
  made, _ = variants.make(variant, model, {}, {}, types.SimpleNamespace(seed=0), None, None, bars,
                          None)
  assert isinstance(made.params['layers']['mlp']['up']['kernel'], Quantized)
  error = merging_errors(params, made.params)['layers/mlp/up/kernel']
  assert lines == [('merged merged', f'{error:.2%} of layers/mlp/up/kernel lost, the most of 3 '
                    'weights')]
