"""Eight virtual CPU devices, and no silent rank promotion, for every test."""
import os

from tests.xla import quick

quick()

import gc  # noqa: E402
import pathlib  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


PASSED = 'lean_jax/passed'       # in pytest's cache: the tests that passed in the last run


def pytest_addoption(parser):
  parser.addoption('--unpassed', action='store_true',
                   help='only tests that did not pass in the last run: skipped ones, say')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """A file's tests run in one process, which then compiles once what they share."""
  done = set(config.cache.get(PASSED, ())) if config.getoption('unpassed') else ()
  config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
  items[:] = [item for item in items if item.nodeid not in done]
  for item in items:
    if item.get_closest_marker('xdist_group') is None:
      item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_terminal_summary(terminalreporter, config):
  """Remembers what passed, for `--unpassed`."""
  if hasattr(config, 'cache'):                         # or it is switched off
    passed = terminalreporter.stats.get('passed', ())
    config.cache.set(PASSED, [r.nodeid.rsplit('@', 1)[0] for r in passed])   # without its group


@pytest.fixture(autouse=True, scope='module')
def _programs_of_a_module_alone():
  """Forgets what was compiled: thousands of programs end in more maps of memory than Linux allows,
  and XLA then crashes. Garbage waits until then.
  """
  gc.disable()                                         # a tenth of the time: JAX traces much
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def real_data():
  """The folder of real data that LEAN_JAX_DATA names; without it the test skips."""
  folder = os.environ.get('LEAN_JAX_DATA')
  if not folder:
    pytest.skip('LEAN_JAX_DATA is not set')
  return pathlib.Path(folder)


@pytest.fixture(scope='session')
def tiny_model():
  """A Llama of a few thousand parameters with a byte-level tokenizer, its weights random."""
  import jax.numpy as jnp

  from lean_jax.api import Model
  from lean_jax.data.tokenizer import train_bpe
  from lean_jax.models.decoder import Decoder, DecoderConfig
  from lean_jax.models.families import FAMILIES
  tokenizer = train_bpe(['the quick brown fox jumps over the lazy dog\n' * 20], 280)
  config = DecoderConfig(vocabulary=tokenizer.size, width=32, layers=2, heads=2, groups=1,
                         head_width=16, hidden=48, context=64)
  params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  return Model(FAMILIES['llama'], config, params, tokenizer)
