"""A cache in few bits: the same text however it is read, and no more bytes than it says."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.data.sources import open_source
from lean_jax.data.tokenizer import load_tokenizer
from lean_jax.data.windows import pack
from lean_jax.errors import InputError
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.generation import beam, generate, loop
from lean_jax.generation.caches import cache_bytes, with_cache
from lean_jax.generation.sampling import Sampling
from lean_jax.generation.writer import Writer
from lean_jax.interop.hf import load_hf
from lean_jax.models.cache import empty_cache
from lean_jax.models.config import Layer
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.models.families import FAMILIES
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.latent import LatentOptions
from lean_jax.nn.lstm import LSTMOptions

CONFIG = DecoderConfig(vocabulary=64, width=16, layers=2, heads=4, groups=2, head_width=8,
                       hidden=24, context=128, tied=False)
WINDOWED = dataclasses.replace(
    CONFIG, kinds=(Layer(window=20), Layer()), attention=AttentionOptions(sinks=True, softcap=20.))
MIXED = dataclasses.replace(CONFIG, kinds=(Layer('lstm'), Layer()), lstm=LSTMOptions(inner=16))
LSTM = dataclasses.replace(CONFIG, kinds=(Layer('lstm'),) * 2, lstm=LSTMOptions(inner=16))
LATENT = dataclasses.replace(CONFIG, kinds=(Layer('latent'),) * 2, latent=LatentOptions(
    query_rank=None, rank=8, plain_width=4, rope_width=4, value_width=4))
CONFIGS = dict(plain=CONFIG, windowed=WINDOWED, mixed=MIXED)
IDS = np.random.default_rng(0).integers(0, 64, (2, 96)).astype(np.int32)


@functools.cache
def model(config=CONFIG, seed=3):
  params = jax.jit(config.module.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
  params = params['params']
  # Ten times the head: logits far enough apart for every greedy choice to be clear.
  params['head']['kernel'] = jax.tree.map(lambda x: 10 * x, params['head']['kernel'])
  return config.module, params


@functools.cache
def reader(config, cache, ahead=4):
  """A function from tokens, cache, offset to logits and cache; and an empty cache of two rows."""
  _, params = model(config)
  module = with_cache(config.module, cache, ahead)
  read = jax.jit(lambda *given: module.apply({'params': params}, *given))
  return read, empty_cache(module.config, 2, 96)


def logits_of(config, cache, counts):
  """Logits [2 96 V] of the text, read so many tokens at a time."""
  (read, held), at, parts = reader(config, cache), 0, []
  for count in counts:
    logits, held = read(IDS[:, at:at + count], held, at)
    parts.append(logits)
    at += count
  assert at == 96
  return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(('config', 'counts'), [
    ('plain', [*[4] * 7, *[1] * 16, 48, 4]), ('windowed', [*[1] * 31, 48, *[1] * 17]),
    ('mixed', [*[1] * 31, 48, *[1] * 17])])
def test_a_text_token_by_token_is_the_text_in_large_parts(config, counts):
  large = logits_of(CONFIGS[config], 'int4', [48, 48])
  small = logits_of(CONFIGS[config], 'int4', counts)
  np.testing.assert_allclose(small[:, :32], large[:, :32], atol=2e-4)
  # Sums of float32 in another order, after which a number may fall to the next code: few of them,
  # where the rounding moves logits by .1 (see below).
  assert np.abs(small - large).mean() < 1e-3


def test_what_was_taken_back_leaves_no_trace():
  read, held = reader(CONFIG, 'int4')
  for at in range(0, 28, 4):
    _, held = read(IDS[:, at:at + 4], held, at)
  for at in (28, 29):
    _, held = read(IDS[:, at:at + 1], held, at)
  _, never = read(IDS[:, 30:34], held, 30)
  _, taken = read(63 - IDS[:, 30:34], held, 30)              # tokens past the first group
  assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (never, taken))))
  _, taken = read(IDS[:, 30:31], taken, 30)
  _, taken = read(IDS[:, 31:32], taken, 31)
  for at in (32, 33):
    _, taken = read(IDS[:, at:at + 1], taken, at)
  logits, _ = read(IDS[:, 34:82], never, 34)
  again, _ = read(IDS[:, 34:82], taken, 34)
  np.testing.assert_allclose(again, logits, atol=.02)        # as above: a code may fall elsewhere


def test_the_rounding_is_seen_past_a_group_and_not_before():
  plain = jax.jit(model()[0].apply)({'params': model()[1]}, IDS)[0]
  off = np.abs(logits_of(CONFIG, 'int4', [48, 48]) - plain).mean(axis=(0, 2))
  assert off[:32].max() < 2e-4
  assert off[32:].mean() > .1
  finer = np.abs(logits_of(CONFIG, 'int8', [48, 48]) - plain).mean(axis=(0, 2))
  # Steps are 17 times finer, and the errors of the logits with them, as long as they are small.
  assert finer[32:].mean() < off[32:].mean() / 10


def test_greedy_text_in_eight_bits_is_that_of_floats():
  prompts = [np.arange(40) * 7 % 64, [9, 8, 7]]
  free = generate(*model(), prompts, tokens=40)
  np.testing.assert_array_equal(generate(*model(), prompts, tokens=40, cache='int8'), free)
  np.testing.assert_array_equal(generate(*model(), prompts, tokens=40, cache='float'), free)


def test_padding_leaves_no_trace_in_the_grids():
  read, empty = reader(CONFIG, 'int4')
  mask = np.arange(48)[None] >= np.array([[5], [0]])

  def text(padding):
    ids = np.where(mask, IDS[:, :48], padding)
    return read(IDS[:, 48:], read(ids, empty, 0, mask)[1], 48)[0]
  np.testing.assert_array_equal(text(7), text(60))
  assert (text(7)[0] != read(IDS[:, 48:], read(IDS[:, :48], empty, 0)[1], 48)[0][0]).any()


def test_a_row_whose_groups_begin_where_they_do_alone_is_the_row_alone():
  prompts = [IDS[0, :40], IDS[1, :8]]
  both = generate(*model(), prompts, tokens=40, cache='int4')
  np.testing.assert_array_equal(both[1], generate(*model(), prompts[1], tokens=40, cache='int4'))


@pytest.mark.parametrize('config', [CONFIG, MIXED], ids=['attention', 'with states'])
def test_a_draft_does_not_change_the_text(config):
  how = dict(tokens=60, cache='int4')
  module, params = model(config)
  near = module, dict(params, head=jax.tree.map(
      lambda x: x + jax.random.normal(jax.random.key(1), x.shape) * jnp.std(x) * .3,
      params['head']))
  writer = Writer(*model(config), list(IDS[:, :20]), draft=near, ahead=3, **how)
  writer.advance()
  assert 0 < writer.drafts[1] < writer.drafts[0]
  np.testing.assert_array_equal(writer.ids(), generate(*model(config), IDS[:, :20], **how))


def test_beams_take_their_codes_with_them():
  prompt = IDS[0, :20]
  ids, _ = beam.search(*model(), [prompt], tokens=40, beams=3, cache='int4')
  free, _ = beam.search(*model(), [prompt], tokens=40, beams=3)
  assert len({tuple(row) for row in ids[0]}) == 3
  assert (ids != free).any()
  read, empty = reader(CONFIG, 'int4')
  padded = np.zeros((2, 96), np.int32)
  total = []
  for row in ids[0]:
    padded[0, :60] = [*prompt, *row]
    first, held = read(padded[:, :48], empty, 0)
    logits = np.concatenate([first[0], read(padded[:, 48:], held, 48)[0][0]])
    logits = jax.nn.log_softmax(logits[19:59])
    total.append(float(np.take_along_axis(np.asarray(logits), row[:, None], axis=1).sum()))
  # The order is that of the probabilities which a pass over each text through the cache gives.
  assert total == sorted(total, reverse=True)


@pytest.mark.parametrize(('cache', 'bits'), [('int8', 8), ('int4', 4)])
def test_bytes_are_what_the_name_says(cache, bits):
  config = with_cache(CONFIG.module, cache).config
  more = cache_bytes(config, 3, 96 + 512) - cache_bytes(config, 3, 96)
  # Of a token: codes; a scale and a least number of 16 bits, a value's 8 channels' and a 32nd part
  # of a key's; and whether it is real.
  numbers = 2 * CONFIG.groups * CONFIG.head_width
  grids = 2 * 2 * CONFIG.groups * (1 + CONFIG.head_width / 32)
  assert more == 3 * 512 * (2 * (numbers * bits / 8 / 2 + numbers * bits / 8 / 2) + 2 * grids + 1)
  writer = Writer(*model(), [IDS[0]], tokens=20, cache=cache)
  writer.advance(1)
  assert writer.cache_bytes == sum(x.nbytes for x in jax.tree.leaves(writer.state.cache))
  assert writer.cache_bytes == cache_bytes(config, 1, 128)


@pytest.mark.parametrize(('groups', 'rows', 'scan'), [(2, 1, False), (1, 2, True)])
def test_the_loop_updates_its_cache_in_place_and_reads_it_there(groups, rows, scan, monkeypatch):
  if scan:
    monkeypatch.setattr('lean_jax.generation.writer.DEEPEST', 0)
  config = dataclasses.replace(CONFIG, groups=groups, context=2048, head_width=64)
  writer = Writer(*model(config), [np.arange(16)] * rows, tokens=2000, cache='int4')
  writer.advance(1)
  program = loop.decode.lower(writer.module, writer.params, writer.state, 50, Sampling(),
                              np.zeros((0,), np.int32)).compile()
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes >= writer.cache_bytes
  # The floats of 256 tokens at a time, and scores: less than the codes, of which it has no copy.
  assert memory.temp_size_in_bytes < cache_bytes(config, rows, 2048) / 8 < writer.cache_bytes


def test_the_real_model_loses_less_than_a_hundredth_of_its_perplexity(real_data, tmp_path):
  _, config, params, _ = load_hf(real_data / 'models' / 'stories260K')
  windows = pack(open_source(real_data / 'tinystories' / 'stories.jsonl'), 'all',
                 load_tokenizer(real_data / 'models' / 'stories260K'), 256, tmp_path,
                 max_tokens=4096)
  of = lambda cache: perplexity(with_cache(Decoder(config), cache), params, windows)['perplexity']
  plain = of('float')
  assert plain < of('int4') < 1.01 * plain


@pytest.mark.parametrize(('config', 'change', 'message'), [
    (CONFIG, dict(cache='int3'), "no cache 'int3'; there are: float, int8, int4; near it: int"),
    (CONFIG, dict(cache=8), 'no cache 8'),
    (LSTM, dict(cache='int8'), r'without keys and values \(lstm\)'),
    (LATENT, dict(cache='int4'), 'latent attention'),
    (CONFIG, dict(cache='int4', draft=True, ahead=33), '33 tokens ahead; .* 32 can be taken back'),
])
def test_what_cannot_be_kept_so_is_one_line(config, change, message):
  if change.get('draft'):
    change = change | dict(draft=model())
  with pytest.raises(InputError, match=message) as error:
    generate(config.module, {}, [1, 2], tokens=4, **change)
  assert '\n' not in str(error.value)


def test_an_encoder_and_a_decoder_refuse_it():
  module = FAMILIES['t5'].from_hf(dict(
      model_type='t5', vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
      decoder_start_token_id=0)).module
  with pytest.raises(InputError, match='an encoder and a decoder'):
    generate(module, {}, [1, 2], tokens=4, cache='int8')
