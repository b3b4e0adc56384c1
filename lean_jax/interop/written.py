"""Models with rounded matrices, as the tensors of a format of `formats`."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop import rounded
from lean_jax.interop.names import copies, gathered
from lean_jax.interop.tensors import listed
from lean_jax.models.segments import taken
from lean_jax.quantization.nested import Nested
from lean_jax.quantization.spec import QuantSpec
from lean_jax.weights import Quantized


class Writer(NamedTuple):
  """What a format makes of modules.

  Attributes:
    how: quantization_config.
    layout: Module to {suffix: (shape, dtype)}.
    encode: Module and its Matrix to {suffix: array}, of that layout.
  """
  how: dict
  layout: Callable
  encode: Callable


@dataclasses.dataclass(frozen=True)
class Module:
  """A product of a model, its weight rounded.

  Attributes:
    name: as in the checkpoint, without '.weight'.
    spec: its QuantSpec.
    inputs, outputs: its sizes.
    dtype: of the dense value.
    scale, zero: dtypes of scales and zero points; zero is None where there are none.
    ordered: whether its rows are in an order of their own.
    nested: whether scales are in few bits.
    transposed: whether a checkpoint of floats has it as [inputs outputs].
    format: the format's name, for errors.
    scales: a function that gives the scales, of its first part, as they are stored.
  """
  name: str
  spec: QuantSpec
  inputs: int
  outputs: int
  dtype: Any
  scale: Any
  zero: Any
  ordered: bool
  nested: bool
  transposed: bool
  format: str
  scales: Callable[[], Any]

  def must(self, fits, what):
    """Raises InputError unless it fits what the format has: `what`."""
    if not fits:
      raise InputError(f'{self.name} is {self.spec} ({self.inputs} inputs, {self.outputs} outputs)'
                       f', and {self.format} has {what}; round it so, or save with '
                       "format='lean'")


def in_format(form, encoding, family, config, params, wanted, value):
  """What a checkpoint has of params whose rounded matrices are stored as a format has them.

  Args:
    form: of `formats.FORMATS`.
    encoding: one of its ENCODINGS, or None.
    family, config: of the model.
    params: {name: weight or array}.
    wanted, value: of `names.written`.

  Returns:
    wanted, value, quantization_config.

  Raises:
    InputError: nothing is rounded, or something in a way that the format has no words for.
  """
  parts = {name: list(dict(sorted(cut.items())).values())
           for name, cut in gathered(family, config, params).items()}
  of = {name: cut for name, cut in parts.items()
        if any(rounded.is_rounded(params[p.path]) for p in cut)}
  if not of:
    raise InputError(f'no weight of this model is rounded, and {form.NAME} is of rounded ones; '
                     "quantize it, or save with format='hf'")
  modules = {name: _module(form, name, cut, params) for name, cut in of.items()}
  floats = [name.removesuffix('.weight') for name, cut in parts.items() if name not in of
            and name.endswith('.weight') and any(p.path.endswith('kernel') for p in cut)]
  heads = [n.removesuffix('.weight') for n in copies(family, config)]
  writer = form.writer(list(modules.values()), list(dict.fromkeys(floats + heads)), encoding)
  tensors, out = {}, {}
  for name, about in wanted.items():
    if name not in modules:
      out[name] = about
      continue
    m = modules[name]
    for suffix, each in writer.layout(m).items():
      out[m.name + suffix] = each
      tensors[m.name + suffix] = name, suffix

  @functools.lru_cache(maxsize=1)
  def encoded(name):
    return writer.encode(modules[name], _joined(of[name], params))

  def one(name):
    if name not in tensors:
      return value(name)
    name, suffix = tensors[name]
    return encoded(name)[suffix]
  return out, one, writer.how


def _module(form, name, cut, params):
  """The Module that parts make up."""
  weights = [params[p.path] for p in cut]
  odd = [p.path for p, w in zip(cut, weights)
         if not isinstance(w, Quantized) or w.dims.strip('ne') != 'io']
  if odd or not name.endswith('.weight'):
    raise InputError(f'{listed(odd or [name])}: {form.NAME} has {name} rounded as one matrix of a '
                     "product, or not at all; merge adapters, round its parts alike, or save with "
                     "format='lean'")
  first, stored = weights[0], cut[0].stored
  about = lambda w: (w.spec, w.order is None, isinstance(w.scale, Nested), w.dtype)
  if len({about(w) for w in weights}) > 1:
    raise InputError(f'{name} is made of {listed([p.path for p in cut])}, rounded to '
                     f'{" and ".join(str(w.spec) for w in weights)}; {form.NAME} has one scheme of '
                     'it: round them alike')
  scale = np.dtype(np.float32) if isinstance(first.scale, Nested) else first.scale.dtype
  return Module(
      name.removesuffix('.weight'), first.spec, first.matrix_rows,
      sum(w.sizes[-1] for w in weights), np.dtype(first.dtype), np.dtype(scale),
      None if first.zero is None else np.dtype(first.zero.dtype), first.order is not None,
      isinstance(first.scale, Nested), stored.permute is None, form.NAME,
      functools.partial(_scales, first, cut[0]))


def _scales(w, part):
  at = (() if part.layer is None else (part.layer,)) + tuple(part.at)
  return jax.tree.map(lambda x: np.asarray(x[at]), w.scale)


def _joined(cut, params):
  """The Matrix of a tensor, of its parts."""
  each = [rounded.matrix(of_one(params[p.path], p)) for p in cut]
  first, stored = each[0], cut[0].stored
  if len(each) == 1:
    return first
  if any(m.order is not None and not np.array_equal(m.order, first.order) for m in each):
    raise InputError(f'{stored.name} is made of parts whose inputs are in different orders; '
                     'round them without act_order')
  if first.spec.tensor or first.input_scale is not None or isinstance(first.scale, Nested):
    raise InputError(f'{stored.name} is made of parts that are {first.spec}, each with scales of '
                     'its own for all outputs; round them without -tensor, -static or -dq')
  whole = np.argsort(np.concatenate([
      rounded.columns(p.stored, sum(stored.sizes) * stored.repeats) for p in cut]))
  join = lambda *x: np.concatenate(x, axis=-1)[:, whole]
  codes, scale, zero = jax.tree.map(join, *((m.codes, m.scale, m.zero) for m in each))
  return first._replace(codes=codes, scale=scale, zero=zero)


def of_one(w, part):
  """The Quantized of one layer and one expert."""
  w = w if part.layer is None else taken(w, part.layer)
  if not part.at:
    return w
  return dataclasses.replace(jax.tree.map(lambda x: x[part.at], w), dims='io', axes=w.axes[-2:],
                             sizes=w.sizes[-2:])


def halves(m, scale):
  """Scales as float16, to the nearest.

  Raises:
    InputError: one is too large or too small to be.
  """
  with np.errstate(over='ignore'):
    out = scale.astype(np.float16)
  if not (np.isfinite(out).all() and out.all()):
    raise InputError(f'{m.name} has scales from {scale.min():g} to {scale.max():g}, and {m.format} '
                     "has float16; save with format='compressed-tensors' or 'lean'")
  return out
