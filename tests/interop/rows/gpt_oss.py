"""gpt-oss."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
             sliding_window=9, num_local_experts=6, num_experts_per_tok=2, swiglu_limit=1.5,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0,
             rope_parameters=dict(rope_type='default', rope_theta=10_000.))


def row(what, **kw):
  return Row('gpt_oss', what, lambda t: t.GptOssConfig(**SMALL | kw), 'GptOssForCausalLM')


ROWS = [
    row('plain positions'),
    row('layers as they are told, no biases of attention, tied', num_hidden_layers=3,
        layer_types=['full_attention', 'sliding_attention', 'sliding_attention'],
        attention_bias=False, tie_word_embeddings=True, swiglu_alpha=1.2),
]
