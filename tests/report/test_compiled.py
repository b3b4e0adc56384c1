"""What is read off programs: products, collectives, what is whole, and why they do not fit."""
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lean_jax.report import compiled
from lean_jax.training import mesh as meshes

HLO = '''HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%fused (p: bf16[8,4]) -> bf16[8,16] {
  ROOT %g = bf16[8,16]{1,0} all-gather(%p), dimensions={1}
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  %f = bf16[8,16]{1,0} fusion(%q), kind=kCustom, calls=%fused
  ROOT %r = (s32[], f32[4]) tuple(%i, %y)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (s32[]) while(%t), condition=%condition, body=%body, {TRIPS}
  %r = s4[100]{0} reduce-scatter(%z), to_apply=%add
  ROOT %o = f32[4]{0} all-reduce(%e), to_apply=%add
}
'''.replace('TRIPS', '"known_trip_count":{"n":"10"}')

TPU = HLO.replace(', "known_trip_count":{"n":"10"}', '').replace(
    '  ROOT %c = pred[] compare', '  %n = s32[]{:T(128)} constant(10)\n  ROOT %c = pred[] compare')

MESSAGE = '''RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.
Used 35.80G of 15.75G hbm. Exceeded hbm capacity by 20.05G.
Total hbm usage >= 36.05G:
    reserved        258.00M
    program          20.00G
    arguments        15.80G'''


@pytest.mark.parametrize('text', [HLO, TPU], ids=['noted', 'compared'])
def test_collectives_count_as_often_as_their_loop_runs(text):
  assert compiled.collectives(text) == {
      'all-gather': (20, 10 * (64 + 256)), 'all-reduce': (1, 16), 'reduce-scatter': (1, 50)}


def test_a_real_program_gathers_each_layer_of_a_scan():
  mesh = meshes.make_mesh(fsdp=8)
  at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  w = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=at(None, 'fsdp'))
  x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=at('fsdp'))
  step = jax.jit(lambda w, x: jax.lax.scan(
      lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), at('fsdp')), None), x, w)[0])
  found = compiled.collectives(step.lower(w, x).compile().as_text())
  assert found['all-gather'] == (6, 6 * 32 * 32 * 4)


def test_operations_are_those_of_all_products_in_loops_too():
  w, x = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32), jax.ShapeDtypeStruct((8, 32), jnp.float32)

  def run(w, x):
    block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return jnp.sum(jax.lax.scan(block, x, w)[0])
  once = 6 * 2 * 8 * 32 * 32
  assert compiled.operations(jax.jit(run).trace(w, x).jaxpr.jaxpr) == once
  # forward, forward again, and two products backward
  grad = jax.jit(jax.grad(run, argnums=(0, 1))).trace(w, x).jaxpr.jaxpr
  assert compiled.operations(grad) == 4 * once


def test_arrays_that_an_axis_could_share_are_named():
  mesh = meshes.make_mesh(fsdp=4, tensor=2)
  of = lambda shape, *spec: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
  rows = compiled.replicated({'': dict(shared=of((8, 8), 'fsdp', 'tensor'), odd=of((3,)),
                                       norm=of((8,)), half=of((8, 8), 'fsdp'))}, mesh)
  assert rows == [('half', 64, 'tensor'), ('norm', 32, 'fsdp')]


def test_the_compilers_message_is_read():
  found = compiled.explained(RuntimeError(MESSAGE))
  assert {k: round(v / 2 ** 30, 2) for k, v in found.items()} == dict(
      used=35.8, limit=15.75, arguments=15.8)
  assert compiled.explained(RuntimeError('INTERNAL: else')) is None
