"""Mixtral."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             num_local_experts=4, initializer_range=.3, eos_token_id=2, bos_token_id=1,
             pad_token_id=0)


def row(what, **kw):
  return Row('mixtral', what, lambda t: t.MixtralConfig(**SMALL | kw), 'MixtralForCausalLM')


ROWS = [
    row(''),
    row('a window, many experts, tied', sliding_window=9, num_local_experts=9,
        num_experts_per_tok=3, tie_word_embeddings=True),
]
