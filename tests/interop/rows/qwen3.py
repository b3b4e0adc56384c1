"""Qwen3."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('qwen3', what, lambda t: t.Qwen3Config(**SMALL | kw), 'Qwen3ForCausalLM')


ROWS = [
    row('', tie_word_embeddings=True),
    row('biases, one group, a window above the first layer', attention_bias=True,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=9, max_window_layers=1),
]
