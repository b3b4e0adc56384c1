import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.generation import generate, writer
from lean_jax.generation.loop import bucket, decode, prefill
from lean_jax.generation.sampling import Sampling
from lean_jax.generation.writer import Writer
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


def test_a_batch_of_different_lengths_is_its_rows(model):
  prompts = [[5], np.arange(17) * 7 % 64, [9, 8, 7]]
  rows = [generate(*model, row, tokens=6) for row in prompts]
  np.testing.assert_array_equal(generate(*model, prompts, tokens=6), rows)
  assert len({tuple(row) for row in np.array(rows)}) == 3


def test_the_context_counts_real_tokens(model):
  out = generate(*model, [np.arange(60), [1, 2]], tokens=4)
  np.testing.assert_array_equal(out[1], generate(*model, [1, 2], tokens=4))


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


def test_close_lengths_share_their_programs(model):
  generate(*model, [1, 2], tokens=3)
  before = prefill._cache_size(), decode._cache_size()
  generate(*model, [1, 2, 3, 4, 5], tokens=9)
  assert (prefill._cache_size(), decode._cache_size()) == before
  assert [bucket(n, 48) for n in (1, 16, 17, 33, 48)] == [16, 16, 32, 48, 48]


def test_several_texts_of_a_prompt_differ_and_come_together(model):
  prompts = [[1, 2, 3], [4]]
  out = generate(*model, prompts, tokens=5, temperature=2., key=jax.random.key(0), n=3)
  assert out.shape == (2, 3, 5)
  assert len({tuple(row) for row in out.reshape(6, 5)}) == 6
  one = generate(*model, prompts[0], tokens=5, temperature=2., key=jax.random.key(0), n=3)
  np.testing.assert_array_equal(one, out[0])


def test_samples_of_a_row_do_not_depend_on_other_rows(model):
  how = dict(tokens=5, temperature=2., key=jax.random.key(1))
  alone = generate(*model, [[1, 2, 3]], **how)
  both = generate(*model, [[1, 2, 3], np.arange(9)], **how)
  np.testing.assert_array_equal(alone[0], both[0])


def test_a_repetition_penalty_counts_prompt_and_text_and_no_padding(model):
  free = generate(*model, [[7, 7, 7], [3]], tokens=12)
  out = generate(*model, [[7, 7, 7], [3]], tokens=12, repetition_penalty=1e6)
  assert any(len(set(row)) < 12 for row in free.tolist())
  for row, prompt in zip(out.tolist(), (7, 3)):
    assert len({*row, prompt}) == 13
  alone = generate(*model, [3], tokens=12, repetition_penalty=1e6)
  np.testing.assert_array_equal(alone, out[1])


def test_what_is_laid_out_for_a_text_serves_the_next_as_long_as_the_weights_live():
  module = Decoder(CONFIG)
  one, other = (jax.jit(module.init)(jax.random.key(n), jnp.zeros((1, 1), jnp.int32))['params']
                for n in range(2))
  made = lambda params: writer.written_out(module, params)[1]
  first, again, another = made(one), made(one), made(other)
  assert jax.tree.leaves(first)[0] is jax.tree.leaves(again)[0]
  for found, params in ((first, one), (another, other)):
    expected = writer._written_out(module.config, True, 'cpu', params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  kept = len(writer._KEPT)
  del one, first, again
  assert len(writer._KEPT) == kept                           # the other's is of the same key
  del other, params
  assert len(writer._KEPT) == kept - 1


def test_stacked_layers_and_written_out_ones_write_the_same(model, monkeypatch):
  out = generate(*model, [1, 2, 3], tokens=6)
  monkeypatch.setattr('lean_jax.generation.writer.DEEPEST', 0)
  np.testing.assert_array_equal(generate(*model, [1, 2, 3], tokens=6), out)


@pytest.mark.parametrize(('groups', 'rows'), [(2, 1), (1, 2)])
def test_the_loop_updates_its_cache_in_place_and_reads_it_there(groups, rows):
  module = Decoder(dataclasses.replace(CONFIG, groups=groups))
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  text = Writer(module, params, [np.arange(16)] * rows, tokens=40)
  text.advance(1)
  program = decode.lower(text.module, text.params, text.state, 50, Sampling(),
                         np.zeros((0,), np.int32)).compile()
  memory = program.memory_analysis()
  cache = sum(x.nbytes for x in jax.tree.leaves(text.state.cache))
  assert memory.alias_size_in_bytes >= cache
  assert memory.temp_size_in_bytes < cache / 4


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
    (dict(prompt_ids=[[1], []]), r'shape \(0,\)'),
    (dict(prompt_ids=[[1], [99]]), '99 to 99'),
    (dict(top_k=0), 'top_k 0'),
    (dict(n=0, temperature=1., key=1), 'n 0'),
    (dict(n=2), 'n 2 texts at temperature 0'),
])
def test_what_cannot_be_generated_is_said_in_one_line(model, change, message):
  with pytest.raises(InputError, match=message) as error:
    generate(*model, **(dict(prompt_ids=[1, 2], tokens=4) | change))
  assert '\n' not in str(error.value)
