"""attention_decode: one query a row over keys and values in 8 or 4 bits, of a cache or of pages."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from lean_jax.kernels.attention_decode import reference, tpu, xla
from lean_jax.kernels.attention_decode.codes import Codes
from lean_jax.kernels.attention_decode.softmax import Scores, result
from lean_jax.kernels.platforms import device
from lean_jax.kernels.platforms.choice import Form, chosen

__all__ = ['Codes', 'attention_decode', 'attention_decode_paged']


def attention_decode(q, k, v, visible, *, bits, length=None, layer=None, recent=None, scale=None,
                     softcap=None, sinks=None, implementation=None):
  """softmax(scale q k) v of one token's queries, keys and values being codes (and a few floats).

  Args:
    q: [N R K], float: R heads that share a row's keys, as of G groups and B texts, N = G * B.
    k, v: `Codes` of N rows of S tokens, S whole groups of g; or, with `layer`, of all layers
      [L N ...], of which that one is read where it stands.
    visible: [B S'] bool, S' <= S: which tokens a row sees; row n has text n % B.
    bits: of a code, 8 or 4.
    length: None is S; or a scalar: codes of this token and those after it are not read.
    layer: None, or a scalar.
    recent: None, or floats [N g K], keys and values, of the g tokens from `length` on.
    scale: of the scores; None is 1 / sqrt(K).
    softcap: None, or the bound that tanh puts on scores.
    sinks: None, or [N R], the score of attending to nothing.
    implementation: None is the fastest that the platform has for these operands; 'pallas' (TPU,
      NVIDIA Hopper), 'xla', or 'reference', in floats all at once.

  Returns:
    [N R K], in q's dtype, sums in float32; zeros for a row that sees nothing.

  Raises:
    ValueError: shapes or dtypes do not fit, or an implementation that does not run here.
  """
  how = _scores(q, bits, scale, softcap)
  one = lambda x: x.shape if layer is None else x.shape[1:]
  S = one(v.scale)[1]
  g = _check(q, k, v, bits, q.shape[0], one)
  if visible.ndim != 2 or q.shape[0] % visible.shape[0] or visible.shape[1] > S:
    raise ValueError(f'visible {visible.shape} does not fit queries {q.shape} and {S} tokens; '
                     f'expected [B S], B dividing {q.shape[0]}, S at most {S}')
  if recent is not None and (length is None
                             or any(x.shape != (q.shape[0], g, q.shape[2]) for x in recent)):
    raise ValueError(f'recent tokens {tuple(x.shape for x in recent)} and length {length}; '
                     f'expected {(q.shape[0], g, q.shape[2])} twice, and the length before them')
  if sinks is not None and sinks.shape != q.shape[:2]:
    raise ValueError(f'sinks {sinks.shape}; expected {q.shape[:2]}, as queries')
  length = jnp.asarray(S if length is None else length, jnp.int32)
  visible = jnp.pad(visible, ((0, 0), (0, S + g - visible.shape[1])))
  if recent is not None:
    recent = recent, lax.dynamic_slice_in_dim(visible, length, g, axis=1)
  run = chosen('attention_decode', forms(how, q, k, v, g, S), implementation)
  return run(q, k, v, visible[:, :S], length, layer, recent, sinks)


def attention_decode_paged(q, k, v, table, lengths, *, bits, window=None, scale=None, softcap=None,
                           sinks=None, implementation=None):
  """`attention_decode` of rows whose tokens are in pages, in any order, of one pool.

  Args:
    q, bits, scale, softcap, sinks, implementation, and what it returns: as there.
    k, v: `Codes` of P pages: their rows are pages of n tokens, whole groups.
    table: [N M], integer: the pages of each row, in the order of its tokens. Those past its length
      may be any of 0 to P - 1.
    lengths: [N], integer, tokens of each row, up to M * n.
    window: None, or how many of a row's last tokens its query sees.

  Raises:
    ValueError: as there; or a window below 1.
  """
  how = _scores(q, bits, scale, softcap)
  N, n = q.shape[0], v.scale.shape[1]
  _check(q, k, v, bits, k.values.shape[0], lambda x: x.shape)
  if table.ndim != 2 or table.shape[0] != N or lengths.shape != (N,) or not all(
      jnp.issubdtype(x.dtype, jnp.integer) for x in (table, lengths)):
    raise ValueError(f'table {table.dtype} {table.shape} and lengths {lengths.dtype} '
                     f'{lengths.shape}; expected integers, [{N} M] and [{N}]')
  if window is not None and window < 1:
    raise ValueError(f'a window of {window} tokens; expected 1 or more, or None')
  if sinks is not None and sinks.shape != q.shape[:2]:
    raise ValueError(f'sinks {sinks.shape}; expected {q.shape[:2]}, as queries')
  at, ends = jnp.arange(table.shape[1] * n)[None], lengths[:, None]
  visible = (at < ends) & (at >= ends - window if window else True)
  run = chosen('attention_decode_paged', paged_forms(how, q, k, v), implementation)
  return run(q, k, v, table.astype(jnp.int32), lengths.astype(jnp.int32), visible, sinks)


def forms(how, q, k, v, g, S):
  """The Forms of `attention_decode`: functions of (q, k, v, visible, length, layer, recent, sinks).
  """
  bind = lambda f: functools.partial(f, how, g, S)
  return [Form(bind(_pallas), 'pallas', ('tpu',), _why_not(how, _page(S, g)), local=True),
          Form(bind(_hopper), 'pallas', ('cuda',), _why_not_hopper(how, q, v, g, S), local=True),
          Form(bind(_xla), 'xla'), Form(bind(_reference), 'reference')]


def paged_forms(how, q, k, v):
  """Those of `attention_decode_paged`: of (q, k, v, table, lengths, visible, sinks)."""
  n = v.scale.shape[1]
  bind = lambda f: functools.partial(f, how)
  return [Form(bind(_paged_pallas), 'pallas', ('tpu',), _why_not(how, n), local=True),
          Form(bind(_paged_hopper), 'pallas', ('cuda',),
               _why_not_hopper(how, q, v, n // k.scale.shape[1], n), local=True),
          Form(bind(_paged_xla), 'xla'), Form(bind(_paged_reference), 'reference')]


def _pallas(how, g, S, q, k, v, visible, length, layer, recent, sinks, interpret=False):
  N, n = q.shape[0], _page(S, g)
  pages = jnp.arange(N * (S // n), dtype=jnp.int32).reshape(N, -1)
  if layer is not None:
    pages = pages + jnp.asarray(layer, jnp.int32) * pages.size
  grids = lambda x: x if layer is None else lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
  pool = lambda x: x.reshape(-1, n * how.bits // 8, x.shape[-1])
  k, v = (Codes(pool(x.values), grids(x.scale), grids(x.least)) for x in (k, v))
  found = tpu.part(how, q, k, v, pages, jnp.full(N, length), visible, interpret=interpret)
  return _ended(how, found, q, recent, sinks)


def _hopper(how, g, S, q, k, v, visible, length, layer, recent, sinks):
  from lean_jax.kernels.attention_decode import gpu  # Pallas, where a GPU runs it
  del g, S
  N = q.shape[0]
  pages = jnp.arange(N, dtype=jnp.int32)[:, None]
  if layer is not None:
    pages = pages + jnp.asarray(layer, jnp.int32) * N
    k, v = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (k, v))
  found = gpu.part(how, q, k, v, pages, jnp.full(N, length), visible)
  return _ended(how, found, q, recent, sinks)


def _xla(how, g, S, q, k, v, visible, length, layer, recent, sinks):
  size = xla.chunk(S, g)
  found = xla.part(how, q, xla.contiguous(k, v, size, layer), size, visible, length)
  return _ended(how, found, q, recent, sinks)


def _ended(how, found, q, recent, sinks):
  if recent is not None:
    found = xla.recent(how, found, q, *recent)
  return result(found, sinks).astype(q.dtype)


def _reference(how, g, S, q, k, v, visible, length, layer, recent, sinks):
  del g, S
  if layer is not None:
    k, v = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer, 0, keepdims=False), (k, v))
  return reference.attention_decode(how, q, k, v, visible, length, recent, sinks)


def _paged_pallas(how, q, k, v, table, lengths, visible, sinks, interpret=False):
  own = lambda x: _gathered(x, table)
  k, v = (Codes(x.values, own(x.scale), own(x.least)) for x in (k, v))
  found = tpu.part(how, q, k, v, table, lengths, visible, interpret=interpret)
  return result(found, sinks).astype(q.dtype)


def _paged_hopper(how, q, k, v, table, lengths, visible, sinks):
  from lean_jax.kernels.attention_decode import gpu
  return result(gpu.part(how, q, k, v, table, lengths, visible), sinks).astype(q.dtype)


def _paged_xla(how, q, k, v, table, lengths, visible, sinks):
  found = xla.part(how, q, xla.paged(k, v, table), v.scale.shape[1], visible, jnp.max(lengths))
  return result(found, sinks).astype(q.dtype)


def _paged_reference(how, q, k, v, table, lengths, visible, sinks):
  k, v = jax.tree.map(lambda x: _gathered(x, table), (k, v))
  return reference.attention_decode(how, q, k, v, visible, jnp.max(lengths), None, sinks)


def _gathered(x, table):
  """Pages [P m K] of each row, one after the other: [N M*m K]."""
  return x[table].reshape(table.shape[0], -1, x.shape[-1])


def _page(S, g):
  """Tokens that the TPU's kernel takes at a time: as many whole groups as divide all."""
  groups = S // g
  return g * max(n for n in range(1, max(1, tpu.PAGE // g) + 1) if groups % n == 0)


def _why_not(how, n):
  """Why the TPU's kernel does not take pages of n tokens, or None."""
  rows = n * how.bits // 8
  if rows % 32:
    return f'pages of {n} tokens are {rows} rows of bytes; it takes multiples of 32'
  return None


def _why_not_hopper(how, q, v, g, n):
  """Why the GPU's kernel does not take pages of n tokens, g of a group, or None."""
  why = device.why_no_hopper()
  if why:
    return why
  K, C = q.shape[2], v.scale.shape[-1]
  if q.dtype != jnp.bfloat16:
    return f'takes queries in bfloat16, and these are {q.dtype}'
  if K not in (128, 256) or C not in (1, 4, K // 32):
    return (f'takes 128 or 256 channels, and values with 1, 4 or 8 grids a token, of 32 channels '
            f'at least; these are {K} channels and {C} grids')
  if n % 128 or g < 32 or (128 % g and g % 128):
    return (f'takes pages of multiples of 128 tokens, in groups of 32, 64 or multiples of 128; '
            f'these are pages of {n} tokens in groups of {g}')
  if K == 256 and how.bits == 8 and g < 64:                # by ptxas, which spills registers
    return f'takes 256 channels in 8 bits in groups of 64 or more, and these are groups of {g}'
  return None


def _scores(q, bits, scale, softcap):
  if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f'queries are {q.dtype} {q.shape}; expected floats [N R K]')
  if bits not in (4, 8):
    raise ValueError(f'codes of {bits} bits; expected 8 or 4')
  return Scores(bits, float(q.shape[2] ** -.5 if scale is None else scale), softcap)


def _check(q, k, v, bits, rows, one):
  """g, the tokens of a group; raises ValueError where codes do not fit queries."""
  K = q.shape[2]
  if any(x.values.dtype != jnp.uint8 for x in (k, v)):
    raise ValueError(f'codes are {k.values.dtype} and {v.values.dtype}; expected uint8')
  grids = [x.dtype for x in (*k[1:], *v[1:])]
  if any(dtype != jnp.float16 for dtype in grids):
    raise ValueError(f'grids are {", ".join(map(str, grids))}; expected float16')
  S, groups = one(v.scale)[1], one(k.scale)[1]
  wanted = dict(values=(rows, S * bits // 8, K), grid=(rows, groups, K))
  fits = (one(k.values) == one(v.values) == wanted['values'] and groups and S % groups == 0
          and one(k.scale) == one(k.least) == wanted['grid'] and one(v.scale) == one(v.least)
          and one(v.scale)[0] == rows and K % one(v.scale)[2] == 0)
  if not fits:
    shapes = [tuple(a.shape for a in x) for x in (k, v)]
    raise ValueError(f'keys {shapes[0]} and values {shapes[1]} do not fit each other, or queries '
                     f'{q.shape}; expected codes {wanted["values"]} of {bits} bits, grids '
                     f'[{rows} S/g {K}] of keys and [{rows} S C] of values, C dividing {K}')
  return S // groups
