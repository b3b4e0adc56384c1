"""The kernels compile for real TPUs, and their schedules are what the tables say (extra `aot`)."""
import subprocess
import sys

import pytest

from lean_jax.kernels.platforms import schedule

pytest.importorskip('libtpu')

INT8 = dict(op='int8_matmul', m=512, k=1024, n=1024, group=None, bits=8)
W4 = dict(op='weight_only_matmul', m=16, k=4096, n=4096, group=128, bits=4)
EXPERTS = W4 | dict(n=14336, experts=8)


def measured(devices, request, **other):
  """{device: what its schedule says}; the worker compiles for all of them in one process."""
  found = schedule.measure([request | other | dict(device=d) for d in devices])
  return {r['device']: r for r in found}


@pytest.fixture(scope='module')
def int8():
  return measured(['v5e', 'v5p', 'v6e', 'v4', 'tpu7x'], INT8)


@pytest.fixture(scope='module')
def decoding():
  return measured(['v5e', 'v5p', 'v6e'], W4)


@pytest.mark.parametrize('kind', ['v5e', 'v5p', 'v6e'])
def test_int8_matmul_is_on_the_int8_units(int8, kind):
  found = int8[kind]
  assert 'error' not in found
  assert found['units'] and all(u.endswith('.s8') for u in found['units'])
  # the codes and the step of each row of x, a little for alignment; never a wide weight
  assert found['temporaries'] <= 512 * 1024 + 4 * 512 * 128 + 2 ** 16


@pytest.mark.parametrize('kind', ['v4', 'tpu7x'])
def test_without_int8_units_int8_matmul_compiles_through_xla(int8, kind):
  found = int8[kind]
  assert 'error' not in found
  assert found['bundles'] is None and found['kernels']


@pytest.mark.parametrize('kind', ['v5e', 'v6e'])
def test_decoding_with_four_bits_waits_for_memory_and_for_nothing_else(decoding, kind):
  found = decoding[kind]
  assert found['cycles'] < found['memory_cycles']
  assert found['spills'] == 0
  assert found['temporaries'] <= 2 ** 16                 # no weight is written out


def test_decoding_compiles_for_a_v5p(decoding):
  assert decoding['v5p']['bundles'] and decoding['v5p']['spills'] == 0


@pytest.mark.parametrize('request_', [
    W4 | dict(bits=2, group=64, k=1000), INT8 | dict(bits=4, group=32, m=7, k=1000, n=200),
    *(pytest.param(r, marks=pytest.mark.slow) for r in (
        W4 | dict(bits=8), W4 | dict(m=1), W4 | dict(m=300, k=4000, n=1000),
        INT8 | dict(bits=2, m=300, k=1000, n=1000), EXPERTS | dict(m=300, k=1000, n=200, group=32),
        EXPERTS | INT8 | dict(m=300, k=1000, n=200)))])
def test_ragged_sizes_and_other_widths_compile(request_):
  for kind, found in measured(['v5e', 'v6e'], request_).items():
    assert 'error' not in found, (kind, found)
    assert found['bundles']


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'share'), [('v5e', .95), ('v6e', .75)])
def test_int8_matmul_is_near_the_peak_by_the_schedule(kind, share):
  for blocks in (None, (1024, 512, 4096)):
    found = measured([kind], INT8, m=4096, k=4096, n=4096, blocks=blocks)[kind]
    assert found['share'] >= share
    assert found['temporaries'] <= 2 * 4096 ** 2         # the codes of x, which are as many bytes
    # Each is a store to VMEM in a slot of a bundle that is counted.
    assert found['spills'] <= .7 * found['bundles']
  assert found['cycles'] >= found['unit_cycles']         # of this tile nothing is left uncounted


@pytest.mark.parametrize(('bits', 'group'), [(4, 128), (16, None)])
def test_few_rows_of_experts_wait_for_memory_and_for_nothing_else(bits, group):
  for kind, found in measured(['v5e', 'v6e'], EXPERTS, bits=bits, group=group).items():
    assert 'error' not in found, (kind, found)
    assert found['cycles'] < found['memory_cycles']
    assert found['temporaries'] <= 2 ** 16               # XLA writes all experts out: 940 MB


@pytest.mark.slow
@pytest.mark.parametrize('other', [
    dict(m=4096), dict(m=4096, bits=8, group=None),
    dict(m=4096, k=16384, bits=8), dict(m=4096, op='int8_matmul', bits=8, group=None),
    dict(m=300, k=14336, n=4096, op='int8_matmul', group=128)])
def test_many_rows_of_experts_compile_and_no_weight_is_written_out(other):
  for kind, found in measured(['v5e', 'v5p', 'v6e'], EXPERTS | other).items():
    assert 'error' not in found, (kind, found)
    assert found['bundles']
    # a step and codes of each row of x, rows that fill groups; an expert's scales, in float32
    G = -(-found['k'] // (found['group'] or found['k']))
    assert found['temporaries'] <= (found['m'] * (2 * found['k'] + 512)
                                    + 8 * 4 * max(G, 8) * found['n'] + 2 ** 17)
    units = '.s8' if found['op'] == 'int8_matmul' else '.bf16'
    assert found['units'] and all(u.endswith(units) for u in found['units'])


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'share'), [('v5e', .99), ('v6e', .85)])
def test_experts_keep_the_units_busy(kind, share):
  # 4096 rows over 8 experts are 16 tiles, and 7 that are multiplied again
  for other in (dict(), dict(bits=16, group=None)):
    assert measured([kind], EXPERTS, m=4096, **other)[kind]['share'] >= share * 16 / 23


def test_what_does_not_compile_says_so_and_the_next_one_is_measured():
  first, second = schedule.measure([INT8 | dict(device='v5e', bits=3), INT8 | dict(device='v5e')])
  assert 'expected 2, 4 or 8' in first['error']
  assert second['bundles']


def test_a_compiler_that_dies_costs_one_candidate(monkeypatch):
  def worker(folder):
    script = "import sys; n = sys.stdin.readline(); print('=' + n); sys.exit(9)"
    return subprocess.Popen([sys.executable, '-c', script], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)
  monkeypatch.setattr(schedule, '_worker', worker)
  found = list(schedule.measure([dict(k=k) for k in range(3)]))
  assert [r['k'] for r in found] == [0, 1, 2]
  assert ['error' in r for r in found] == [False, True, False]
  assert 'exit code 9' in found[1]['error']
