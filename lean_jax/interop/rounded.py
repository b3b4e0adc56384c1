"""What formats of rounded matrices share: such a matrix in a checkpoint, and the weight it becomes.

A format is one file with a `NAME` (its quant_method), `ENCODINGS` (what `save` may be asked for,
the default first), `read` and `writer`; see `formats`. Codes and scales stay as they are stored:
floats of a whole matrix are never made.
"""
import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.interop import bits
from lean_jax.interop.names import pieces, place
from lean_jax.interop.tensors import listed
from lean_jax.quantization.nested import BLOCK, Nested
from lean_jax.quantization.packing import unit
from lean_jax.quantization.spec import QuantSpec
from lean_jax.weights import Quantized


class Matrix(NamedTuple):
  """A rounded matrix.

  Attributes:
    codes: [I O], int8 of symmetric integers, else uint8; rows in `order`.
    scale: [G O], [1 1] of a spec with one for all, or Nested.
    zero: [G O], or None.
    spec: its QuantSpec.
    order: [I] int32, which input a row is of; None is all in their order.
    input_scale: a float32 scalar, of static activations, or None.
  """
  codes: Any
  scale: Any
  zero: Any
  spec: QuantSpec
  order: Any = None
  input_scale: Any = None


@dataclasses.dataclass(frozen=True)
class Rounded:
  """What a `tensors.Tensor` is to those who look for it by name: a matrix not yet read.

  Attributes:
    name: of the tensor that a checkpoint of floats would have.
    inputs, outputs: its sizes.
    spec: its QuantSpec.
    read: a function that gives the Matrix, its outputs in the order of the checkpoint's.
    transposed: whether that tensor would be [inputs outputs], as GPT-2's.
  """
  name: str
  inputs: int
  outputs: int
  spec: QuantSpec
  read: Callable[[], Matrix]
  transposed: bool = False
  kind = 'F32'                  # it stands for floats

  @property
  def shape(self):
    """Of the tensor of floats."""
    return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

  def blocks(self, box=None):
    """Not given: whoever asks would go through floats."""
    raise InputError(f'{self.name} is rounded to {self.spec}, and lean_jax needs its floats here; '
                     'give a checkpoint that leaves it alone')


def mixed(found):
  """Names, numbers left out, of tensors that are not rounded alike in all layers."""
  specs: dict[str, set] = {}
  for name, tensor in found.items():
    specs.setdefault(re.sub(r'\.\d+\.', '.N.', name), set()).add(getattr(tensor, 'spec', None))
  return [name for name, each in specs.items() if len(each) > 1]


def oriented(family, config, shapes, found):
  """Tensors with `transposed` as the family stores them. Args as of `names.check`."""
  names, out = family.names(config), dict(found)
  for path, shape in shapes.items():
    key, layers = place(config, path)
    for name, _ in pieces(names[key], layers, shape):
      if isinstance(out.get(name), Rounded):
        out[name] = dataclasses.replace(out[name], transposed=names[key].permute is None)
  return out


def weight(path, leaf, stored, made_of, dtype, odd):
  """The Quantized that matrices of a checkpoint make up, its arrays NumPy's.

  Args:
    path, leaf: the name of ours, and what it is as floats: a Dense.
    stored: the Stored that says how tensors have it.
    made_of: [(tensor, at)], for each layer and expert.
    dtype: of its dense value.
    odd: a set, to which the names of tensors with scales that are not finite are added.

  Raises:
    InputError: it is no matrix of a product, or its layers are not rounded alike.
  """
  specs = {str(getattr(t, 'spec', None) or 'floats') for t, _ in made_of}
  if len(specs) > 1:
    raise InputError(f'{path} is {" and ".join(sorted(specs))} in different layers or experts, '
                     'which cannot be stacked; load it with scan_layers=False, and give experts '
                     'that are rounded alike')
  dims = getattr(leaf, 'dims', '')
  if dims.strip('ne') != 'io' or stored.shape is not None:
    raise InputError(f'{path} is rounded to {", ".join(specs)}, which lean_jax reads of matrices '
                     'of products only; give a checkpoint that leaves it alone')
  each = []
  for tensor, _ in made_of:
    one = part(tensor.read(), columns(stored, tensor.outputs))
    scales = one.scale.top if isinstance(one.scale, Nested) else one.scale
    if not np.isfinite(scales.astype(np.float32)).all():
      odd.add(tensor.name)
    each.append(one)
  if any(m.order is not None for m in each):
    each = [m if m.order is not None else m._replace(
        order=np.arange(len(m.codes), dtype=np.int32)) for m in each]
  lead = leaf.shape[:len(made_of[0][1])]
  each = [quantized(m, dtype) for m in each]
  if not lead:
    return dataclasses.replace(each[0], dims=dims, axes=leaf.axes)
  whole = jax.tree.map(lambda *x: np.stack(x).reshape(*lead, *x[0].shape), *each)
  return dataclasses.replace(
      whole, dims=dims, axes=leaf.axes,
      sizes=tuple(n for n, d in zip(leaf.shape, dims) if d != 'n'))


def columns(stored, outputs):
  """Which outputs of a tensor ours are, [O]; None is all, in their order."""
  if not stored.sizes:
    return None
  every = np.arange(outputs).reshape(stored.repeats, sum(stored.sizes))
  return np.split(every, np.cumsum(stored.sizes)[:-1], axis=1)[stored.index].reshape(-1)


def part(matrix, which):
  """Some outputs of a Matrix. Double scales whose blocks are cut become floats."""
  if which is None:
    return matrix
  scale = matrix.scale
  if isinstance(scale, Nested):
    first, (G, _) = which[0], scale.shape
    whole = first * G % BLOCK == 0 and np.array_equal(which, first + np.arange(len(which)))
    at = first * G // BLOCK
    scale = Nested(scale.codes[:, which], scale.top[at:at - (-len(which) * G // BLOCK)],
                   scale.offset) if whole else np.asarray(scale.astype(np.float32))[:, which]
    spec = dataclasses.replace(matrix.spec, double=whole)
    return matrix._replace(codes=matrix.codes[:, which], scale=scale, spec=spec)
  pick = lambda x: x if x is None or matrix.spec.tensor else x[:, which]
  return matrix._replace(codes=matrix.codes[:, which], scale=pick(scale), zero=pick(matrix.zero))


def quantized(matrix, dtype):
  """The Quantized of a Matrix, with dims 'io'."""
  codes, spec = matrix.codes, matrix.spec
  if spec.bits != 8:
    raw = codes.view(np.uint8) & np.uint8(2 ** spec.bits - 1)
    codes = bits.packed(raw.T, spec.bits, unit(spec.bits)[1]).T
  return Quantized(codes, matrix.scale, matrix.zero, matrix.order, matrix.input_scale, spec,
                   matrix.codes.shape, str(np.dtype(dtype)), 'io', (None, None))


def matrix(w):
  """The Matrix of a Quantized of one layer and no experts, dims 'io', in NumPy's arrays."""
  w = jax.tree.map(np.asarray, w)
  codes, spec = w.values, w.spec
  if spec.bits != 8:
    codes = bits.unpacked(np.ascontiguousarray(codes.T), spec.bits, w.matrix_rows).T
    if spec.code == 'int' and spec.symmetric:
      half = np.uint8(2 ** (spec.bits - 1))
      codes = (codes ^ half).view(np.int8) - half.view(np.int8)
  return Matrix(codes, w.scale, w.zero, spec, w.order, w.input_scale)


def ordered(groups, size, name):
  """order [I] of inputs of these groups, or None where they stand as they are.

  Args:
    groups: [I], the group of each input.
    size: inputs of a group; the last may have fewer.
    name: of the module, for errors.

  Raises:
    InputError: groups are not of that size.
  """
  wanted = np.arange(len(groups)) // size
  if np.array_equal(groups, wanted):
    return None
  order = np.argsort(groups, kind='stable').astype(np.int32)
  if not np.array_equal(groups[order], wanted):
    raise InputError(f'{name} has groups of inputs that are not {size} each; give a checkpoint '
                     'with equal groups')
  return order


def modules(found, suffix):
  """The modules of tensors with a suffix, in their order."""
  return [name.removesuffix(suffix) for name in found if name.endswith(suffix)]


def taken(out, module, wanted, optional=()):
  """Takes a module's tensors out of `out`, and checks them.

  Args:
    out: {name: Tensor}, from which they are removed.
    wanted: {suffix: (kinds, shape)}; None in a shape is any number.
    optional: the suffixes that may be absent.

  Returns:
    {suffix: Tensor}.

  Raises:
    InputError: one is absent, or of another kind or shape.
  """
  lost = [module + s for s in wanted if module + s not in out and s not in optional]
  if lost:
    raise InputError(f'the checkpoint lacks {listed(lost)}; download it again')
  found = {s: out.pop(module + s) for s in wanted if module + s in out}
  for suffix, tensor in found.items():
    kinds, shape = wanted[suffix]
    fits = len(shape) == len(tensor.shape) and all(
        n in (None, m) for n, m in zip(shape, tensor.shape))
    if tensor.kind not in kinds or not fits:
      shown = ' '.join('?' if n is None else str(n) for n in shape)
      raise InputError(f'{tensor.name} is {tensor.kind} {tensor.shape}, expected '
                       f'{" or ".join(kinds)} [{shown}]; download it again')
  return found


def chosen(how, key, allowed, default=None):
  """A value of quantization_config; raises InputError where it is not one of those allowed."""
  value = how.get(key, default)
  if value not in allowed:
    raise InputError(f'quantization_config has {key} = {value!r}, and lean_jax reads '
                     f'{", ".join(map(repr, allowed))}; give a checkpoint with one of these')
  return next(a for a in allowed if a == value)        # 8, where it is 8.0


def section(how, key):
  """An object in quantization_config, {} where it is absent or null.

  Raises:
    InputError: it is something else.
  """
  value = how.get(key)
  if value is not None and not isinstance(value, dict):
    raise InputError(f'quantization_config has {key} = {value!r:.80}, expected an object; download '
                     'config.json again')
  return value or {}


def group_of(how, inputs=None):
  """group_size of quantization_config, None where one is all inputs.

  Raises:
    InputError: it is neither -1 nor positive.
  """
  size = how.get('group_size')
  if size in (None, -1):
    return None
  if type(size) is not int or size < 1:
    raise InputError(f'quantization_config has group_size = {size!r}, expected -1 or a positive '
                     'number; download it again')
  return None if inputs is not None and size >= inputs else size


def is_rounded(leaf):
  """Whether a leaf is a weight in codes, bare or inside another."""
  return any(isinstance(x, Quantized) for x in jax.tree.leaves(
      leaf, is_leaf=lambda x: isinstance(x, Quantized))) if tree.is_weight(leaf) else False
