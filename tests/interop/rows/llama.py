"""Llama."""
from tests.interop.parity import CHECKS, VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, max_position_embeddings=64, initializer_range=.3,
             eos_token_id=2, bos_token_id=1, pad_token_id=0)


# Keys that were cached keep the angles of the length at which they were, there as here. The
# original remembers the longest sequence that it saw, so it generates last.
GROWING = tuple(CHECKS[name] for name in ('logits', 'save', 'bfloat16', 'unrolled', 'generate'))


def row(what, checks=(), **kw):
  return Row('llama', what, lambda t: t.LlamaConfig(**SMALL | kw), 'LlamaForCausalLM',
             checks=checks)


def scaled(what, kind, longest=64, checks=(), **kw):
  """A row of a rope_type, of 12-wide heads."""
  return row(what, checks, num_key_value_heads=2, head_dim=12, num_hidden_layers=2,
             max_position_embeddings=longest,
             rope_parameters=dict(rope_type=kind, rope_theta=500.) | kw)


ROWS = [
    row('grouped, tied', num_key_value_heads=2, tie_word_embeddings=True),
    row('one group, wide heads, untied', num_key_value_heads=1, head_dim=22),
    row('biases, gelu', attention_bias=True, mlp_bias=True, hidden_act='gelu'),
    scaled("3.1's frequencies", 'llama3', factor=8., low_freq_factor=1., high_freq_factor=4.,
           original_max_position_embeddings=32),
    scaled('linear positions', 'linear', factor=4.),
    scaled('dynamic base, within its length', 'dynamic', factor=2.),
    scaled('dynamic base, past its length', 'dynamic', longest=16, checks=GROWING, factor=4.),
    scaled('YaRN', 'yarn', factor=4., original_max_position_embeddings=16),
    scaled('LongRoPE', 'longrope', short_factor=[1 + .1 * k for k in range(6)],
           long_factor=[2 + .5 * k for k in range(6)], original_max_position_embeddings=4),
    scaled('a proportion of pairs', 'proportional', factor=2., partial_rotary_factor=.5),
]
