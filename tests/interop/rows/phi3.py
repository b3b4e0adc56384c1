"""Phi-3."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=2, max_position_embeddings=64, initializer_range=.3,
             eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('phi3', what, lambda t: t.Phi3Config(**SMALL | kw), 'Phi3ForCausalLM')


def longrope(pairs):
  return dict(rope_type='longrope', short_factor=[1 + .1 * k for k in range(pairs)],
              long_factor=[2 + .5 * k for k in range(pairs)])


ROWS = [
    row('a window', sliding_window=9),
    row('LongRoPE, short, grouped, tied', num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True, original_max_position_embeddings=48,
        rope_parameters=longrope(4)),
    row('LongRoPE, soon long, three quarters of a head', original_max_position_embeddings=12,
        partial_rotary_factor=.75, rope_parameters=longrope(6)),
]
