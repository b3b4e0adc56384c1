"""Gemma."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=1, head_dim=12, max_position_embeddings=64,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0)


def quieter(model):
  """Smaller embeddings: those of Gemma are scaled, and a random tied model repeats one token."""
  if model.config.tie_word_embeddings:
    model.model.embed_tokens.weight.data.mul_(.02)


def row(what, **kw):
  return Row('gemma', what, lambda t: t.GemmaConfig(**SMALL | kw), 'GemmaForCausalLM',
             tweak=quieter)


ROWS = [
    row(''),
    row('biases, all heads, untied', attention_bias=True, num_key_value_heads=4,
        tie_word_embeddings=False, rope_parameters=dict(rope_type='default', rope_theta=100.)),
]
