"""A model's layers one by one: what goes into each, and what comes out of it.

The layers of a stack run by themselves, each compiled once for all of its kind, so that what is
needed at once is one layer and the hidden states of the calibration text.
"""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lean_jax.calibration.observer import Notes, observed
from lean_jax.models.frame import Place
from lean_jax.models.segments import segments, taken, uniform
from lean_jax.models.stack import Block


class Site(NamedTuple):
  """Where a layer's weights are.

  Attributes:
    prefix: of their names in the model's tree: 'layers', or 'layers/0/4'.
    index: along their first axis; None where they are not stacked.
    number: of the layer, in its stack.
    kind: what a `Block` takes, its config apart.
  """
  prefix: str
  index: int | None
  number: int
  kind: tuple


def sites(config):
  """The Site of each layer of a stack, in order."""
  out, cut = [], segments(config)
  for s in cut:
    for k in range(s.count):
      for j, kind in enumerate(s.kinds):
        prefix = 'layers' if uniform(cut) else '/'.join(
            ['layers', s.name, *[str(j)] * (len(s.kinds) > 1)])
        out.append(Site(prefix, k if s.stacked else None, len(out), kind))
  return out


def subtree(params, path):
  """What is at 'a/b/c'."""
  for key in filter(None, path.split('/')):
    params = params[key]
  return params


def layer(params, site):
  """The tree of one layer's weights, of a stack's."""
  part = subtree(params, site.prefix)
  return part if site.index is None else taken(part, site.index)


def place(config, site):
  """The Place of a layer that runs by itself; numbers are arrays, so that layers share programs."""
  own = config.each[site.number]
  windows = any(l.window is not None for l in config.each)
  window = jnp.int32(2 ** 30 if own.window is None else own.window) if windows else None
  return Place(None, window, jnp.int32(own.rotary), jnp.int32(site.number))


@functools.partial(jax.jit, static_argnums=(0, 1))
def through(config, kind, params, x, at, frame):
  """What a layer makes of x [B T D]."""
  (y, _), _ = Block(config, *kind).apply({'params': params}, (x, None), at, frame)
  return y


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def noted(config, kind, histogram, params, x, at, frame):
  """{name within the layer: Statistics of its inputs} for x [B T D].

  Args:
    histogram: whether the sizes of inputs are counted.
  """
  notes = Notes(frame.mask, histogram=histogram)
  Block(config, *kind).apply({'params': observed(params, notes)}, (x, None), at, frame)
  return notes.found


class Entry(NamedTuple):
  """A batch at the entry of a layer."""
  x: Any                        # [B T D]
  frame: Any


def entries(module, params, batch, prefix, encoded=None):
  """The Entry of a batch into the stack at a prefix ('', 'encoder/' or 'decoder/').

  Args:
    encoded: [B S D], the encoder's output, for a decoder that attends to it.
  """
  def run(m, batch, encoded):
    if prefix == 'encoder/':
      return m.encoder.begin(batch['tokens'], mask=batch.get('mask'))
    if prefix == 'decoder/':
      return m.decoder.begin(batch['decoder_tokens'], mask=batch.get('decoder_mask'),
                             cross=encoded, cross_mask=batch.get('mask'))
    return m.begin(batch['tokens'], mask=batch.get('mask'), token_types=batch.get('token_types'))
  x, frame, _ = jax.jit(lambda p, b, e: module.apply({'params': p}, b, e, method=run))(
      params, batch, encoded)
  return Entry(x, frame)


def ended(module, params, x):
  """The encoder's output [B S D], of that of its last layer."""
  return jax.jit(lambda p, x: module.apply({'params': p}, x, method=lambda m, x: m.encoder.end(x)))(
      params, x)
