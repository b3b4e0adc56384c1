"""How codes lie in memory while a program runs; on disk they are always packed.

packed    bytes [*E ceil(K * bits / 8) N], uint8, as `packing.pack` makes them; codes of eight bits
          as they are. What a CPU reads.
int4      one signed integer a code, [*E K N], in the narrowest of jnp.int2, int4 and int8: a TPU
          reads these at their width, and XLA does not fuse the unpacking of bytes there. Codes that
          count from 0 are stored less 2 ** (bits - 1); ternary and binary ones are -1, 0 and 1.
columns   `packed` with its two last axes exchanged, [*E N ceil(K * bits / 8)]: the codes of an
          output channel lie side by side, as the 8-bit units of a GPU take them.
panels    `packed` in pieces of four rows and 64 columns, [*E N/64 ceil(rows/4) 256]: of each column
          four bytes side by side, as the 8-bit units of a CPU take them, and all pieces of 64
          columns one after the other, as its memory reads them fastest. N is a multiple of 64.
"""
import jax.numpy as jnp

from lean_jax.quantization import codes as grid
from lean_jax.quantization.packing import pack, padded, unit, unpack

LAYOUTS = ('packed', 'int4', 'columns', 'panels')
PANEL = 64                    # columns
_INTEGERS = ('int', 'binary', 'ternary')


def element(spec):
  """The dtype of layout 'int4'; None where the codes are no integers (nf4, fp8, ...)."""
  if spec.code not in _INTEGERS:
    return None
  return jnp.dtype(jnp.int2 if spec.bits <= 2 else jnp.int4 if spec.bits <= 4 else jnp.int8)


def has_panels(spec, K, N):
  """Whether layout 'panels' takes the codes of a scheme, of weights [*E K N]."""
  try:
    check('panels', spec)
  except ValueError:
    return False
  if N % PANEL:
    return False
  return not spec.group or spec.group >= K or spec.group % (32 // spec.bits) == 0


def offset(spec):
  """What layout 'int4' has taken off the codes of an integer scheme."""
  return 0 if spec.symmetric else 2 ** (int(spec.bits) - 1)


def arranged(codes, spec, layout):
  """Codes [*E K N], as `formats.quantize` gives them, in a layout.

  Raises:
    ValueError: there is no such layout, or none such of this scheme.
  """
  if layout != 'int4':
    return laid_out(pack(codes, spec.bits), spec, layout)
  check(layout, spec)
  if spec.code != 'int':
    return grid.integers(codes, spec).astype(element(spec))
  return (codes.astype(jnp.int16) - offset(spec)).astype(jnp.int8).astype(element(spec))


def laid_out(packed, spec, layout):
  """`arranged` of codes that are packed already, in a layout of bytes: any but 'int4'."""
  check(layout, spec)
  if layout == 'columns':
    return jnp.swapaxes(packed, -1, -2)
  return _in_panels(packed) if layout == 'panels' else packed


def codes_of(values, spec, rows, layout):
  """The inverse of `arranged`; `rows` is K."""
  check(layout, spec)
  if layout == 'int4':
    wide = values.astype(jnp.int8)
    if spec.code != 'int':
      return ((wide + 1) // (2 if spec.code == 'binary' else 1)).astype(jnp.uint8)
    return wide if spec.symmetric else (wide.astype(jnp.int16) + offset(spec)).astype(jnp.uint8)
  return grid.signed(unpack(in_rows(values, layout, byte_rows(rows, spec.bits)), spec.bits, rows),
                     spec)


def columns(values, ids, layout):
  """Columns `ids` [n] of the codes in a layout, in the same one; of 'panels' in 'packed'."""
  if layout != 'panels':
    return jnp.take(values, ids, axis=-2 if layout == 'columns' else -1)
  pieces = values.reshape(*values.shape[:-1], PANEL, 4)
  found = pieces[..., ids // PANEL, :, ids % PANEL, :]              # [n *E quads 4]
  return jnp.moveaxis(found.reshape(*found.shape[:-2], -1), 0, -1)


def _in_panels(packed):
  *batch, _, N = packed.shape
  if N % PANEL:
    raise ValueError(f"layout 'panels' takes multiples of {PANEL} columns, and there are {N}")
  quads = padded(packed, 4).reshape(*batch, -1, 4, N // PANEL, PANEL)
  order = [len(batch) + k for k in (2, 0, 3, 1)]
  return quads.transpose(*range(len(batch)), *order).reshape(*batch, N // PANEL, -1, 4 * PANEL)


def in_rows(values, layout, rows):
  """Bytes [*E rows N] of codes in layout 'packed', 'columns' or 'panels'."""
  if layout == 'columns':
    return jnp.swapaxes(values, -1, -2)
  if layout != 'panels':
    return values
  *batch, P, Q, _ = values.shape
  order = [len(batch) + k for k in (1, 3, 0, 2)]
  pieces = values.reshape(*batch, P, Q, PANEL, 4).transpose(*range(len(batch)), *order)
  return pieces.reshape(*batch, 4 * Q, PANEL * P)[..., :rows, :]


def byte_rows(K, bits):
  """How many rows of bytes K codes of a column are."""
  each, size = unit(bits)
  return -(-K // each) * size


def shape(batch, K, N, spec, layout):
  """The shape of values in a layout."""
  if layout == 'int4':
    return (*batch, K, N)
  rows = byte_rows(K, spec.bits)
  if layout == 'panels':
    return (*batch, -(-N // PANEL), -(-rows // 4), 4 * PANEL)
  return (*batch, N, rows) if layout == 'columns' else (*batch, rows, N)


def columns_of(shape, layout):
  """N of values of this shape; 0 where it is none of the layout."""
  if len(shape) < (3 if layout == 'panels' else 2):
    return 0
  if layout == 'panels':
    return shape[-3] * PANEL
  return shape[-2 if layout == 'columns' else -1]


def check(layout, spec):
  """Raises ValueError where there is no such layout, or none such of this scheme."""
  if layout not in LAYOUTS:
    raise ValueError(f'layout {layout!r}; expected one of {", ".join(LAYOUTS)}')
  if layout == 'panels' and (spec.bits not in (2, 4, 8) or spec.code in grid.FLOATS):
    raise ValueError(f"layout 'panels' of {spec}; it takes codes of 2, 4 and 8 bits")
  if layout == 'int4' and element(spec) is None:
    raise ValueError(f"layout 'int4' of {spec}, whose codes are no integers; expected 'packed' or "
                     "'columns'")
