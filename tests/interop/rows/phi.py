"""Phi."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, max_position_embeddings=64, initializer_range=.3,
             eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('phi', what, lambda t: t.PhiConfig(**SMALL | kw), 'PhiForCausalLM')


ROWS = [
    row(''),
    row('grouped, normed queries and keys', num_key_value_heads=2, qk_layernorm=True,
        partial_rotary_factor=.75, hidden_act='relu'),
]
