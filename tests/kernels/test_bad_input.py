"""What no op takes is refused in words that say what it would take; a NaN reaches its row."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.kernels.attention_decode import api as attention
from lean_jax.kernels.grouped_matmul import api as grouped
from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.native import library
from lean_jax.kernels.platforms import device
from lean_jax.kernels.quantize_rows import api as rows
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.quantization import formats
from lean_jax.quantization.packing import pack
from lean_jax.quantization.spec import parse_spec


def of_int8():
  return dict(x=jnp.ones((3, 8)), values=jnp.ones((8, 4), jnp.int8), scale=jnp.ones((1, 4)))


def of_weight_only(scheme='w4a16-g4-asym'):
  spec = parse_spec(scheme)
  w = jax.random.normal(jax.random.key(0), (8, 6))
  codes, scale, zero = formats.quantize(w, spec)
  return dict(x=jnp.ones((3, 8)), values=pack(codes, spec.bits), scale=scale, zero=zero, spec=spec)


def of_grouped():
  return dict(x=jnp.ones((3, 8)), w=jnp.ones((2, 8, 4)), sizes=jnp.array([1, 2]))


def of_experts():
  return of_int8() | dict(values=jnp.ones((2, 8, 4), jnp.int8), scale=jnp.ones((2, 1, 4)),
                          sizes=jnp.array([1, 2]))


def of_coded_experts():
  given = of_weight_only()
  each = {name: jnp.stack([given[name]] * 2) for name in ('values', 'scale', 'zero')}
  return given | each | dict(sizes=jnp.array([1, 2]))


def of_rows():
  return dict(x=jnp.ones((3, 8)), scale=jnp.array(.1), norm=jnp.ones(8), epsilon=1e-6)


def of_attention(paged=False):
  """6 rows of 32 tokens of width 16, in 4 bits, groups of 8; or 6 pages of them."""
  q, codes = jnp.ones((6, 2, 16)), jnp.ones((6, 16, 16), jnp.uint8)
  grids = functools.partial(jnp.ones, dtype=jnp.float16)
  k = attention.Codes(codes, grids((6, 4, 16)), grids((6, 4, 16)))
  v = attention.Codes(codes, grids((6, 32, 1)), grids((6, 32, 1)))
  more = dict(table=jnp.zeros((6, 1), int), lengths=jnp.ones(6, int)) if paged else dict(
      visible=jnp.ones((6, 32), bool))
  return dict(q=q, k=k, v=v, bits=4) | more


def codes(**change):
  return lambda given: dict(k=given['k']._replace(**{
      name: f(getattr(given['k'], name)) for name, f in change.items()}))


INT8, WEIGHT, GROUPED = int8.int8_matmul, weight_only.weight_only_matmul, grouped.grouped_matmul
ATTENTION, PAGED = attention.attention_decode, attention.attention_decode_paged
EXPERTS, CODED, ROWS = int8.int8_grouped_matmul, grouped.grouped_weight_only, rows.quantize_rows
GIVEN = {INT8: of_int8, WEIGHT: of_weight_only, GROUPED: of_grouped, ATTENTION: of_attention,
         EXPERTS: of_experts, CODED: of_coded_experts, ROWS: of_rows,
         PAGED: lambda: of_attention(paged=True)}
integers = lambda name: lambda given: {name: given[name].astype(jnp.int32)}
REFUSED = [
    # four bits packed along the outputs, not along what is summed over
    (INT8, lambda g: dict(values=jnp.ones((8, 2), jnp.uint8)), r'does not fit values .*E M 16'),
    (WEIGHT, lambda g: dict(values=jnp.ones((8, 3), jnp.uint8)), 'packs 8 rows .* into 4: expect'),
    (ATTENTION, codes(values=lambda a: jnp.ones((6, 32, 8), jnp.uint8)), 'expected codes .6, 16'),
    (PAGED, codes(values=lambda a: jnp.ones((6, 32, 8), jnp.uint8)), 'expected codes .6, 16, 16'),
    # scales
    (INT8, lambda g: dict(scale=jnp.ones((2, 4))), r'expected \(1, 4\)'),
    (INT8, lambda g: dict(x_scale=jnp.ones(3)), 'x_scale .* expected .., one step a matrix'),
    (WEIGHT, lambda g: dict(scale=g['scale'].T, zero=g['zero'].T), r'expected \(2, 6\)'),
    (WEIGHT, lambda g: dict(zero=None), 'and zero the same'),
    (ATTENTION, codes(scale=lambda a: a[:, :3]), r'grids \[6 S/g 16\] of keys'),
    (EXPERTS, lambda g: dict(x_scale=jnp.ones(3)), 'x_scale .* expected .2,., one step a matrix'),
    (EXPERTS, lambda g: dict(scale=g['scale'][:1]), r'expected \(2, 1, 4\)'),
    # groups
    (INT8, lambda g: dict(group=0), 'groups of 0 rows; expected 1 or more'),
    (EXPERTS, lambda g: dict(group=-4), 'groups of -4 rows; expected 1 or more'),
    # dtypes
    (INT8, integers('x'), 'x is int32; expected floats'),
    (INT8, integers('scale'), 'scale is int32; expected floats'),
    (INT8, lambda g: dict(bias=jnp.ones(4, int)), 'bias is int32; expected floats'),
    (EXPERTS, integers('x'), 'x is int32; expected floats'),
    (EXPERTS, integers('scale'), 'scale is int32; expected floats'),
    (EXPERTS, lambda g: dict(sizes=jnp.ones(2)), 'sizes is float32; expected integers'),
    (CODED, integers('x'), 'x is int32; expected floats'),
    (CODED, integers('scale'), 'scale is int32; expected floats'),
    (CODED, lambda g: dict(sizes=jnp.ones(2)), 'sizes is float32; expected integers'),
    (ROWS, integers('norm'), 'norm is int32; expected floats'),
    (ROWS, integers('scale'), 'scale is int32; expected floats'),
    (WEIGHT, integers('scale'), 'scale is int32; expected floats'),
    (WEIGHT, integers('x'), r'x is int32 .* expected floats \[\*E M K\]'),
    (WEIGHT, lambda g: dict(x=g['x'][0]), r'expected floats \[\*E M K\]'),
    (WEIGHT, integers('values'), "int32; expected uint8, as layout 'packed'"),
    (GROUPED, integers('x'), 'expected x of floats, or both int8'),
    (GROUPED, lambda g: dict(x=g['x'].astype(jnp.int8)), 'w float32 .* or both int8'),
    (GROUPED, lambda g: dict(sizes=g['sizes'].astype(jnp.float32)), 'sizes of integers'),
    (ATTENTION, codes(values=lambda a: a.astype(jnp.int8)), 'codes are int8 .* expected uint8'),
    # implementations that do not run here
    (INT8, lambda g: dict(layout='int4', implementation='native'), 'here there are: xla'),
    (WEIGHT, lambda g: dict(implementation='pallas'), 'this is cpu; here there are: .*xla'),
    (PAGED, lambda g: dict(implementation='pallas'), 'this is cpu; here there are: xla')]


@pytest.mark.parametrize(('op', 'change', 'says'), REFUSED, ids=[
    f'{op.__name__}-{says}' for op, _, says in REFUSED])
def test_what_does_not_fit_is_refused(op, change, says):
  given = GIVEN[op]()
  with pytest.raises(ValueError, match=says):
    op(**given | change(given))


@pytest.mark.parametrize('op', GIVEN, ids=lambda op: op.__name__)
def test_what_the_refusals_change_is_taken_as_it_is(op):
  assert jax.tree.leaves(jax.eval_shape(lambda: op(**GIVEN[op]())))


def test_a_form_of_cpus_is_refused_in_a_program_for_a_tpu():
  with device.target('v5e'):
    with pytest.raises(ValueError, match="'blocks': runs on cpu, and this is tpu; .*ragged"):
      GROUPED(**of_grouped(), implementation='blocks')
    with pytest.raises(ValueError, match="'native': .*here there are: .*xla"):
      INT8(**of_int8(), implementation='native')


@pytest.mark.parametrize('implementation', ['xla', pytest.param('native', marks=pytest.mark.skipif(
    library.why_not() is not None, reason=f'the native kernels: {library.why_not()}'))])
@pytest.mark.parametrize('scheme', ['w4a16-g4', 'w8a16', 'nf4-g4'])
def test_a_nan_activation_reaches_all_of_its_row_and_nothing_else(scheme, implementation):
  given = of_weight_only(scheme)
  y = WEIGHT(**given | dict(x=given['x'].at[1, 2].set(jnp.nan)), implementation=implementation)
  assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
  assert np.isfinite(np.asarray(y)[[0, 2]]).all()
