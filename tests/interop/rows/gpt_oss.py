"""gpt-oss."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
             sliding_window=9, num_local_experts=6, num_experts_per_tok=2, swiglu_limit=1.5,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0)
YARN = dict(rope_type='yarn', rope_theta=10_000., factor=4., original_max_position_embeddings=16,
            beta_fast=32., beta_slow=1., truncate=False)


def row(what, **kw):
  return Row('gpt_oss', what, lambda t: t.GptOssConfig(**SMALL | kw), 'GptOssForCausalLM')


ROWS = [
    row('', rope_parameters=YARN),
    row('types of layers, plain positions, no biases of attention, tied', num_hidden_layers=2,
        layer_types=['full_attention', 'sliding_attention'], attention_bias=False,
        rope_parameters=dict(rope_type='default', rope_theta=10_000.), tie_word_embeddings=True,
        swiglu_alpha=1.2),
]
