"""What a scheme's name means."""
import dataclasses
import difflib
import re

from lean_jax.errors import InputError

GRAMMAR = ('w<1|1.58|2|3|4|5|6|8>a<16|8>[-g<group>|-tensor][-sym|-asym][-static], '
           'nf4[-g<group>][-dq], fp4[...], fp4_e2m1[...], fp8[-g<group>|-tensor], fp8_e5m2[...], '
           'mxfp4 or mxfp8; for example w8a8, w4a16-g64, w2a16-g32, w1.58a8, nf4-g64-dq')
KNOWN = ('w8a8', 'w8a8-static', 'w8a16', 'w8a16-g64', 'w4a8', 'w4a8-g64', 'w4a16', 'w4a16-g32',
         'w4a16-g64', 'w4a16-g128', 'w4a16-g64-asym', 'w3a16', 'w3a16-g64', 'w3a16-g128', 'w2a16',
         'w2a16-g16', 'w2a16-g32', 'w2a16-g64', 'w2a16-g64-sym', 'w1.58a8', 'w1.58a16', 'w1a8',
         'w1a16', 'nf4-g64', 'nf4-g64-dq', 'fp4-g64', 'fp4-g64-dq', 'fp4_e2m1-g64', 'fp8',
         'fp8-tensor', 'fp8_e5m2', 'mxfp4', 'mxfp8')
BITS = dict(int=None, binary=1, ternary=1.6, nf4=4, fp4=4, fp4_e2m1=4, fp8=8, fp8_e5m2=8,
            mxfp4=4, mxfp8=8)
_WORDS = {1: 'binary', 1.58: 'ternary'}
_TABLES, _MX = ('nf4', 'fp4', 'fp4_e2m1'), ('mxfp4', 'mxfp8')


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """How a weight is stored, and whether activations are rounded before they meet it.

  Attributes:
    bits: of a stored weight; 1.6 is five ternary digits in a byte.
    group: consecutive inputs of an output channel that share a scale; None is the whole axis.
    activation_bits: 8 rounds the activations too; None leaves them.
    symmetric: codes around 0; otherwise from the least to the greatest value, with a zero point.
    code: what the codes are: 'int', or 'binary', 'ternary', 'nf4', 'fp4', 'fp4_e2m1', 'fp8',
      'fp8_e5m2', 'mxfp4', 'mxfp8'.
    tensor: one scale for the whole matrix.
    double: the scales are stored in eight bits (QLoRA, arXiv:2305.14314, section 3).
    static: activations are rounded in a range that was calibrated, else in that of each token.
  """
  bits: float
  group: int | None = None
  activation_bits: int | None = None
  symmetric: bool = True
  code: str = 'int'
  tensor: bool = False
  double: bool = False
  static: bool = False

  def __str__(self):
    group = '-tensor' if self.tensor and self.code not in _WORDS.values() else (
        f'-g{self.group}' if self.group and self.code not in _MX else '')
    if self.code not in ('int', *_WORDS.values()):
      return f'{self.code}{group}{"-dq" * self.double}'
    bits = next((k for k, word in _WORDS.items() if word == self.code), self.bits)
    kind = '' if self.symmetric == (self.bits != 2) else '-sym' if self.symmetric else '-asym'
    return f'w{bits:g}a{self.activation_bits or 16}{group}{kind}{"-static" * self.static}'

  @property
  def low(self):
    """The least integer code."""
    return -(2 ** (self.bits - 1)) if self.symmetric else 0

  @property
  def high(self):
    """The greatest integer code."""
    return self.low + 2 ** self.bits - 1


def parse_spec(text):
  """The QuantSpec of a scheme's name.

  Two bits default to an asymmetric grid, more to a symmetric one: of four levels a symmetric grid
  uses three. `nf4`, `fp4` and `fp4_e2m1` have groups of 64, ternary and binary weights one scale a
  matrix.

  Raises:
    InputError: the name is not in the grammar, or names what no product here computes.
  """
  if isinstance(text, QuantSpec):
    return text
  match = re.fullmatch(
      r'(?:w(1|1\.58|2|3|4|5|6|8)a(8|16)|(nf4|fp4|fp4_e2m1|fp8|fp8_e5m2|mxfp4|mxfp8))'
      r'(?:-g([1-9]\d*)|-(tensor))?(?:-(sym|asym))?(-static)?(-dq)?', str(text))
  if not match:
    raise _unknown(text)
  width, activation, code, group, tensor, kind, static, double = match.groups()
  group = int(group) if group else None
  if code:
    odd = (kind or static or (double and code not in _TABLES)
           or (tensor and code in (*_TABLES, *_MX)) or (code in _MX and group))
    if odd:
      raise _unknown(text)
    group = 64 if code in _TABLES and not group else 32 if code in _MX else group
    return QuantSpec(BITS[code], group, code=code, tensor=bool(tensor), double=bool(double))
  if double:
    raise _unknown(text)
  activation_bits, bits = 8 if activation == '8' else None, float(width)
  code = _WORDS.get(bits, 'int')
  symmetric = kind == 'sym' or (kind is None and bits != 2) or code != 'int'
  if code != 'int' and (kind or tensor):
    raise _unknown(text)
  if activation_bits and not symmetric:
    raise InputError(f'scheme {text!r}: 8-bit activations go with symmetric weights; use '
                     f'w{width}a8-sym, or w{width}a16')
  if static and not (activation_bits and bits == 8):
    raise InputError(f'scheme {text!r}: a calibrated range is one of 8-bit activations and '
                     'weights; use w8a8-static')
  bits = BITS[code] or int(bits)
  return QuantSpec(bits, group, activation_bits, symmetric, code,
                   bool(tensor) or (code != 'int' and not group), static=bool(static))


def _unknown(text):
  near = difflib.get_close_matches(str(text), KNOWN, n=2, cutoff=0.3)
  hint = f'; near it: {", ".join(near)}' if near else ''
  return InputError(f'no scheme {text!r}; expected {GRAMMAR}{hint}')
