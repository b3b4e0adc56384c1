"""How fast a run goes: tokens a second, the share of the device's peak, time left, memory."""
import time

import jax

from lean_jax import tree

# Dense bfloat16 multiply-adds, two operations each, a second of one JAX device, by its
# `device_kind`. TPUs: the pages of each version in the Cloud TPU documentation ("peak compute per
# chip"); GPUs: NVIDIA's data sheets of A100, H100 and H200 (SXM), without sparsity.
PEAKS = {'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12, 'TPU v6 lite': 918e12,
         'NVIDIA A100-SXM4-40GB': 312e12, 'NVIDIA A100-SXM4-80GB': 312e12,
         'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA H200': 989e12}


class Rates:
  """What the clock says at some steps of a run.

  Attributes:
    steps: of the run.
    tokens: a step.
    flops: of the model a step, see `step_flops`; None where nobody counted.
    devices: that share a step.
  """

  def __init__(self, steps, tokens, flops=None, devices=1):
    self.steps, self.tokens, self.flops, self.devices = steps, tokens, flops, devices
    self._since = None                                 # when, and at which step

  def begin(self, step):
    """To be called after each step; the first one's time is compilation, and is not counted."""
    self._since = self._since or (time.monotonic(), step)

  def __call__(self, step):
    """{figure: number} since the last call, of a step whose metrics are there.

    tokens_per_second; seconds_left; mfu, where the device's peak is known: model operations over
    what its devices could do (Chowdhery et al. 2022, arXiv:2204.02311, appendix B);
    device_memory_bytes, the most so far in use on a device of this host, where it says.
    """
    now = time.monotonic()
    before, at = self._since or (now, step)
    self._since = now, step
    out = {}
    if step > at and now > before:
      each = (now - before) / (step - at)
      out = dict(tokens_per_second=self.tokens / each, seconds_left=each * (self.steps - step))
      peak = PEAKS.get(jax.local_devices()[0].device_kind)
      if peak and self.flops:
        out['mfu'] = self.flops / each / (peak * self.devices)
    used = (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
    return out if used is None else dict(out, device_memory_bytes=used)


def step_flops(config, params, train, teachers, rows, length):
  """Operations of a step's products, two for each multiply-add; recomputation is not counted.

  None of a model with an encoder and a decoder.

  Forward 2 for each weight and token, 2 more for the gradient of its input and 2 for its own if it
  trains; attention 4 T for each of its channels forward, twice that backward, causal or not.

  Args:
    config, params: of the model.
    train: what of params trains, the rest None, as of `tree.split`.
    teachers: [(config, params)].
    rows, length: of a batch, in rows and tokens.
  """
  if any(len(c.stacks) > 1 for c in (config, *[c for c, _ in teachers])):
    return None                                        # a source and a target of their own lengths
  own = {name: x.size for name, x in tree.named_arrays(train).items()}
  total = 3 * _attention(config, length)
  for name, count in _products(config, params).items():
    total += 4 * count + 2 * min(count, sum(
        n for array, n in own.items() if array.startswith(name)))
  for other, known in teachers:
    total += 2 * sum(_products(other, known).values()) + _attention(other, length)
  return total * rows * length


def _products(config, params):
  """{weight: the parameters of it that a token is multiplied by}."""
  out = {}
  for name, w in tree.named_weights(params).items():
    count = tree.parameters({'w': w})
    if name.startswith('embed') and not getattr(config, 'tied', False):
      continue                                         # looked up, not multiplied
    if '/experts/' in name:
      count = count * config.moe.router.top_k // config.moe.experts
    out[name] = count
  return out


def _attention(config, length):
  """Operations a token forward of queries with keys and of probabilities with values."""
  width = (getattr(config, 'heads', 0) or 0) * (getattr(config, 'head_width', 0) or 0)
  layers = sum(layer.mixer == 'attention' for layer in config.each)
  return 4 * length * width * layers
