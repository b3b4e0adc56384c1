"""Every family with every method: the same few lines for all of them.

A family is a config.json in configs/, as transformers writes it for a tiny model; its weights are
random.
"""
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lean_jax import methods, tree
from lean_jax.distillation.losses import distillation
from lean_jax.models.families import family_of
from lean_jax.objectives.forward import forward
from lean_jax.objectives.language_modeling import next_token
from lean_jax.training.loop import fit
from lean_jax.weights import FakeQuantized, LowRank, Quantized

CONFIGS = {path.stem: path for path in sorted(
    pathlib.Path(__file__).with_name('configs').glob('*.json'))}
MATRICES = '(.*/)?layers/.*'
rounded = lambda method, spec: dict(where=MATRICES, method=method, spec=spec)
LORA = dict(where=MATRICES, method='lora', rank=2, alpha=4.)
STEPS = {
    'w8a8': (rounded('rtn', 'w8a8'),),
    'w4a16': (rounded('rtn', 'w4a16-g16'),),
    'lora': (LORA,),
    'qlora': (rounded('rtn', 'w4a16-g16'), LORA),
    'qat': (rounded('fake_quantize', 'w4a16-g16'),),
}
KINDS = {'w8a8': Quantized, 'w4a16': Quantized, 'lora': LowRank, 'qlora': LowRank,
         'qat': FakeQuantized}
# Of the outputs' root mean square: what rounding to so many bits may cost a random model.
BOUNDS = {'w8a8': .15, 'w4a16': 1.2, 'qlora': 1.2, 'qat': 1.2, 'lora': 1e-4}


@functools.lru_cache(maxsize=1)
def model(name):
  """(config, params) of a family's tiny model."""
  hf = json.loads(CONFIGS[name].read_text())
  config = family_of(hf).from_hf(hf)
  module = config.module
  ids = {k: jnp.zeros((1, 4), jnp.int32) for k in module.inputs}
  return config, jax.jit(module.init)(jax.random.key(0), **ids)['params']


def batch(config):
  """Random tokens for each input of a model, and labels where nothing follows a token."""
  draw = lambda seed, shape: np.random.default_rng(seed).integers(3, 60, shape).astype(np.int32)
  out = {k: draw(n, (4, 8)) for n, k in enumerate(config.module.inputs)}
  shape = jax.eval_shape(lambda: forward(config.module, abstract(config), out)[0]).shape
  if not getattr(config, 'causal', True):
    out['labels'] = draw(7, shape[:-1]) % shape[-1]
  return out


def abstract(config):
  """Zeros in the place of the parameters: for shapes."""
  from lean_jax.interop import hf
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), hf.abstract(config))


@functools.lru_cache(maxsize=1)
def outputs(name):
  """What a family's model, as it is, makes of the batch."""
  config, params = model(name)
  return computed(config.module, params, batch(config))


def computed(module, params, given):
  """Outputs of a model for a batch."""
  return np.asarray(jax.jit(lambda p: forward(module, p, given)[0])(params))


def check_method(name, method):
  """The method takes hold of matrices, the outputs stay near; where it trains, the loss falls.

  Returns:
    How far the outputs moved, in parts of their root mean square.
  """
  config, params = model(name)
  lean = methods.apply(params, STEPS[method], jax.random.key(1))
  held = [w for w in tree.named_weights(lean).values() if isinstance(w, KINDS[method])]
  assert held
  given = batch(config)
  plain, now = outputs(name), computed(config.module, lean, given)
  away = float(np.sqrt(np.mean((now - plain) ** 2) / np.mean(plain ** 2)))
  assert away < BOUNDS[method], away
  if method == 'lora':
    assert trained(next_token(config.module), lean, given, '.*/(a|b)') < 0
  if method == 'qat':
    assert trained(next_token(config.module), lean, given, '.*') < 0
  return away


def check_distill(name):
  """Distillation from the model itself lowers the loss of a student with other weights."""
  config, params = model(name)
  loss = distillation(config.module, config.module, temperature=2., soft_weight=1.)
  student = jax.tree.map(
      lambda x: x + .05 * jax.random.normal(jax.random.key(2), x.shape), params)
  change = trained(loss, student, batch(config), '.*', frozen=dict(teacher_params=params))
  assert change < 0
  return change


def trained(loss, params, given, trainable, frozen=None):
  """How much the loss of a batch changes over a few steps on it."""
  seen = []
  fit(loss, params, {k: given for k in range(4)}, optax.adam(3e-3), steps=4, trainable=trainable,
      frozen=frozen, hooks=(lambda step, metrics: seen.append(float(metrics['loss'])),))
  assert np.isfinite(seen).all()
  return seen[-1] - seen[0]
