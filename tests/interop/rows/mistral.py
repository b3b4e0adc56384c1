"""Mistral."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('mistral', what, lambda t: t.MistralConfig(**SMALL | kw), 'MistralForCausalLM')


ROWS = [
    row('a window', sliding_window=9),
    row('no window, wide heads, tied', sliding_window=None, head_dim=12, tie_word_embeddings=True),
]
