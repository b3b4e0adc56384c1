"""Text as it comes: its pieces are the whole, of whole characters, and end before a stop string."""
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_jax.data.tokenizer import Tokenizer, train_bpe
from lean_jax.generation.pieces import Pieces


def byte_level():
  return train_bpe(['the cat sat on the mat\n' * 9], 280)


def byte_fallback():
  """As Llama's: words after a low line, bytes where a character has no token."""
  words = ['▁', '▁the', '▁cat', 'the', 'cat', 's', 'a', '▁a', '.']
  vocabulary = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *words]
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(
      {w: k for k, w in enumerate(vocabulary)}, [], byte_fallback=True, unk_token='<unk>'))
  backend.add_special_tokens(['<unk>', '<s>', '</s>'])
  d = tokenizers.decoders
  backend.decoder = d.Sequence([d.Replace('▁', ' '), d.ByteFallback(), d.Fuse(),
                                d.Strip(' ', 1, 0)])
  return Tokenizer(backend, 1, 2)


LEVEL, FALLBACK = byte_level(), byte_fallback()


def in_bytes(text):
  """Ids of the fallback tokenizer, each character in bytes but those with a token."""
  ids = []
  for word in text:
    id = FALLBACK.backend.token_to_id('▁' if word == ' ' else word)
    ids += [id] if id is not None else [3 + b for b in word.encode()]
  return ids


def pieces_of(tokenizer, prompt, ids, stop=()):
  pieces = Pieces(tokenizer, prompt, stop)
  out = [pieces.add([id]) for id in ids]
  return [*out, pieces.end()], pieces


def a_token_a_byte(text):
  """Ids of the byte-level tokenizer. It writes a byte as the character of that number if that is
  printable, and the others, in order, as those from 256 on."""
  printable = [b for b in range(256) if chr(b).isprintable() and chr(b) not in ' \xa0\xad']
  others = [b for b in range(256) if b not in printable]
  names = {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(others)}
  return [LEVEL.backend.token_to_id(names[b]) for b in text.encode()]


@given(st.text(max_size=12), st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_text_and_whole_characters(prompt, text):
  for tokenizer, encode in ((LEVEL, a_token_a_byte), (FALLBACK, in_bytes)):
    before, ids = [1, *encode(prompt)], encode(text)
    parts, pieces = pieces_of(tokenizer, before, ids)
    whole = tokenizer.decode(before + ids)[len(tokenizer.decode(before)):]
    assert ''.join(parts) == pieces.text == whole
    if '\ufffd' not in text:
      assert not any('\ufffd' in part for part in parts)


@pytest.mark.parametrize('tokenizer', [LEVEL, FALLBACK], ids=['bytes', 'fallback'])
def test_any_tokens_give_the_text_that_they_decode_to_in_the_end(tokenizer):
  ids = np.random.default_rng(0).integers(3, tokenizer.size, 200)
  parts, pieces = pieces_of(tokenizer, [], ids)
  assert ''.join(parts) == pieces.text
  if tokenizer is LEVEL:
    assert pieces.text == tokenizer.decode(ids)


@pytest.mark.parametrize(('stop', 'text'), [
    (['cat'], ' the '), (['t s'], ' the ca'), (['x', 'sat on'], ' the cat '), (['mat!'], None),
    ([' the cat sat on the mat'], ''), (['the m', 'at on'], ' the cat s')])
def test_text_ends_before_a_stop_string_wherever_tokens_end(stop, text):
  whole = ' the cat sat on the mat'
  ids = LEVEL.encode(whole)
  parts, pieces = pieces_of(LEVEL, [], ids, stop)
  assert pieces.stopped == (text is not None)
  assert ''.join(parts) == pieces.text == (whole if text is None else text)
  at_once = Pieces(LEVEL, [], stop)
  assert at_once.add(ids) + at_once.end() == pieces.text


def test_what_may_become_a_stop_string_is_held_back_and_no_more():
  pieces = Pieces(LEVEL, [], ['\n\n', 'at!'])
  assert [pieces.add(LEVEL.encode(t)) for t in ('a c', 'a', 't', 's\n', '\n')] == [
      'a c', '', '', 'ats', '']
  assert pieces.stopped and pieces.text == 'a cats'


def test_special_tokens_have_no_text_and_spaces_around_them_stay():
  ids = [FALLBACK.backend.token_to_id(t) for t in ('▁the', '<s>', '▁cat', '</s>')]
  parts, _ = pieces_of(FALLBACK, [], ids)
  assert parts == ['the', '', ' cat', '', '']
