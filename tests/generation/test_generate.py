import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.generation import generate
from lean_jax.generation.loop import bucket, decode, prefill
from lean_jax.generation.sampling import sample
from lean_jax.interop.hf import load_hf
from lean_jax.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(vocabulary=64, width=16, layers=2, heads=2, groups=1, head_width=8,
                       hidden=24, context=64, tied=False)
ONCE = [1, 403, 407, 261, 378]
# By the original implementation in transformers, from the README of the data.
LILY = [432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337, 410, 408,
        419, 292, 411, 322, 265, 282, 295, 433, 426, 385, 328, 432, 358, 394, 261, 370, 432, 352,
        266, 268, 388, 426, 338, 391, 266, 267, 337, 335, 312, 432]


@pytest.fixture(scope='module')
def model():
  module = Decoder(CONFIG)
  params = jax.jit(module.init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))['params']
  # Ten times the head: logits far enough apart for every greedy choice to be clear.
  params['head']['kernel'] = jax.tree.map(lambda x: 10 * x, params['head']['kernel'])
  return module, params


def test_a_real_model_writes_what_the_original_implementation_writes(real_data):
  _, config, params, _ = load_hf(real_data / 'models' / 'stories260K')
  assert generate(Decoder(config), params, ONCE, tokens=48).tolist() == LILY


@pytest.mark.parametrize('length', [1, 3, 16, 17])
def test_padding_and_cache_do_not_change_the_greedy_tokens(model, length):
  prompt = np.arange(length) * 7 % 64
  out = generate(*model, prompt, tokens=6)
  assert out.dtype == np.int32
  module, params = model
  whole = np.concatenate([prompt, out])[None]
  logits = jax.jit(module.apply)({'params': params}, whole)[0][0]
  np.testing.assert_array_equal(logits.argmax(axis=-1)[length - 1:-1], out)
  assert len(set(out.tolist())) > 1


def test_the_context_can_be_filled_to_its_last_token(model):
  assert generate(*model, np.arange(40), tokens=24).shape == (24,)
  assert generate(*model, np.arange(63), tokens=1).shape == (1,)


def test_a_batch_is_its_rows(model):
  prompts = np.array([[1, 2, 3], [9, 8, 7]])
  rows = [generate(*model, row, tokens=5) for row in prompts]
  np.testing.assert_array_equal(generate(*model, prompts, tokens=5), rows)


def test_text_ends_with_its_end_token_and_rows_are_filled_with_it(model):
  prompts = np.array([[1, 2, 3], [9, 8, 7]])
  full = generate(*model, prompts, tokens=8)
  eos = int(full[0, 2])
  first = full[0].tolist().index(eos) + 1
  assert generate(*model, prompts[0], tokens=8, eos=eos).tolist() == full[0, :first].tolist()
  both = generate(*model, prompts, tokens=8, eos=[eos, 1000])
  assert both[0].tolist() == (full[0, :first].tolist() + [eos] * 8)[:both.shape[1]]
  stop = full[1].tolist().index(eos) if eos in full[1] else both.shape[1]
  np.testing.assert_array_equal(both[1, :stop], full[1, :stop])


def test_one_key_gives_one_text_and_another_key_another(model):
  text = lambda seed: generate(*model, [1], tokens=20, temperature=3., key=jax.random.key(seed))
  np.testing.assert_array_equal(text(0), text(0))
  assert (text(0) != text(1)).any()


def test_narrow_sampling_is_greedy(model):
  greedy = generate(*model, [1, 2], tokens=6)
  for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-30)):
    how = dict(temperature=1., key=jax.random.key(0)) | narrow
    np.testing.assert_array_equal(generate(*model, [1, 2], tokens=6, **how), greedy)


@pytest.mark.parametrize(('top_p', 'top_k', 'expected'), [
    (None, None, [.5, .3, .15, .05]), (None, 2, [.625, .375, 0, 0]), (.7, None, [.625, .375, 0, 0]),
    (.81, 9, [10 / 19, 6 / 19, 3 / 19, 0]), (1., 1, [1, 0, 0, 0])])
def test_samples_have_the_probabilities_of_what_is_kept(top_p, top_k, expected):
  n = 20_000
  logits = jnp.tile(jnp.log(jnp.array([[.5, .3, .15, .05]])), (n, 1))
  ids = sample(logits, jax.random.key(0), 1., top_p, top_k)
  # Five standard deviations of a share of n draws at worst.
  np.testing.assert_allclose(np.bincount(ids, minlength=4) / n, expected, atol=5 * .5 / n ** .5)


def test_close_lengths_share_their_programs(model):
  generate(*model, [1, 2], tokens=3)
  before = prefill._cache_size(), decode._cache_size()
  generate(*model, [1, 2, 3, 4, 5], tokens=9)
  assert (prefill._cache_size(), decode._cache_size()) == before
  assert [bucket(n, 48) for n in (1, 16, 17, 33, 48)] == [16, 16, 32, 48, 48]


@pytest.mark.parametrize(('change', 'message'), [
    (dict(prompt_ids=[]), 'give one token or more'),
    (dict(prompt_ids=[[]]), 'give one token or more'),
    (dict(prompt_ids=3), r'shape \(\)'),
    (dict(prompt_ids=[1.5]), 'float64; give integer ids'),
    (dict(prompt_ids=[1, 64]), '1 to 64, the model has 0 to 63'),
    (dict(prompt_ids=[-1]), '-1 to -1'),
    (dict(tokens=0), '0 tokens'),
    (dict(prompt_ids=[1] * 60, tokens=5), 'prompt of 60 tokens and 5 .* the context has 64'),
    (dict(temperature=-1.), 'temperature -1.0'),
    (dict(temperature=float('nan')), 'temperature nan'),
    (dict(temperature=1.), 'give a key'),
    (dict(top_k=0), 'top_k 0'),
    (dict(top_p=0.), 'top_p 0.0'),
    (dict(top_p=1.1), 'top_p 1.1'),
])
def test_what_cannot_be_generated_is_said_in_one_line(model, change, message):
  with pytest.raises(InputError, match=message) as error:
    generate(*model, **(dict(prompt_ids=[1, 2], tokens=4) | change))
  assert '\n' not in str(error.value)
