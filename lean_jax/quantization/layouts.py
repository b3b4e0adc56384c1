"""How codes lie in memory while a program runs; on disk they are always packed.

packed    bytes [*E ceil(K * bits / 8) N], uint8, as `packing.pack` makes them; codes of eight bits
          as they are. What a CPU reads.
int4      one signed integer a code, [*E K N], in the narrowest of jnp.int2, int4 and int8: a TPU
          reads these at their width, and XLA does not fuse the unpacking of bytes there. Codes that
          count from 0 are stored less 2 ** (bits - 1); ternary and binary ones are -1, 0 and 1.
columns   `packed` with its two last axes exchanged, [*E N ceil(K * bits / 8)]: the codes of an
          output channel lie side by side, as the 8-bit units of a GPU take them.
"""
import jax.numpy as jnp

from lean_jax.quantization import codes as grid
from lean_jax.quantization.packing import pack, unit, unpack

LAYOUTS = ('packed', 'int4', 'columns')
_INTEGERS = ('int', 'binary', 'ternary')


def element(spec):
  """The dtype of layout 'int4'; None where the codes are no integers (nf4, fp8, ...)."""
  if spec.code not in _INTEGERS:
    return None
  return jnp.dtype(jnp.int2 if spec.bits <= 2 else jnp.int4 if spec.bits <= 4 else jnp.int8)


def offset(spec):
  """What layout 'int4' has taken off the codes of an integer scheme."""
  return 0 if spec.symmetric else 2 ** (int(spec.bits) - 1)


def arranged(codes, spec, layout):
  """Codes [*E K N], as `formats.quantize` gives them, in a layout.

  Raises:
    ValueError: there is no such layout, or none such of this scheme.
  """
  check(layout, spec)
  if layout == 'packed':
    return pack(codes, spec.bits)
  if layout == 'columns':
    return jnp.swapaxes(pack(codes, spec.bits), -1, -2)
  if spec.code != 'int':
    return grid.integers(codes, spec).astype(element(spec))
  return (codes.astype(jnp.int16) - offset(spec)).astype(jnp.int8).astype(element(spec))


def codes_of(values, spec, rows, layout):
  """The inverse of `arranged`; `rows` is K."""
  check(layout, spec)
  if layout == 'int4':
    wide = values.astype(jnp.int8)
    if spec.code != 'int':
      return ((wide + 1) // (2 if spec.code == 'binary' else 1)).astype(jnp.uint8)
    return wide if spec.symmetric else (wide.astype(jnp.int16) + offset(spec)).astype(jnp.uint8)
  packed = jnp.swapaxes(values, -1, -2) if layout == 'columns' else values
  return grid.signed(unpack(packed, spec.bits, rows), spec)


def shape(batch, K, N, spec, layout):
  """The shape of values in a layout."""
  if layout == 'int4':
    return (*batch, K, N)
  each, size = unit(spec.bits)
  rows = -(-K // each) * size
  return (*batch, N, rows) if layout == 'columns' else (*batch, rows, N)


def check(layout, spec):
  """Raises ValueError where there is no such layout, or none such of this scheme."""
  if layout not in LAYOUTS:
    raise ValueError(f'layout {layout!r}; expected one of {", ".join(LAYOUTS)}')
  if layout == 'int4' and element(spec) is None:
    raise ValueError(f"layout 'int4' of {spec}, whose codes are no integers; expected 'packed' or "
                     "'columns'")
