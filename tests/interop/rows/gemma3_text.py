"""Gemma 3's text models."""
from tests.interop.parity import VOCABULARY, Row
from tests.interop.rows.gemma import quieter

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=7,
             num_attention_heads=4, num_key_value_heads=1, head_dim=12, max_position_embeddings=64,
             sliding_window=9, query_pre_attn_scalar=12, initializer_range=.3, eos_token_id=2,
             bos_token_id=1, pad_token_id=0)
LINEAR = dict(rope_type='linear', factor=8., rope_theta=500.)
DEFAULT = dict(rope_type='default', rope_theta=100.)


def row(what, **kw):
  return Row('gemma3_text', what, lambda t: t.Gemma3TextConfig(**SMALL | kw),
             'Gemma3ForCausalLM', tweak=quieter)


ROWS = [
    row(''),
    row('linear positions where there is no window, types of layers', num_hidden_layers=3,
        layer_types=['full_attention', 'sliding_attention', 'sliding_attention'],
        rope_parameters=dict(full_attention=LINEAR, sliding_attention=DEFAULT)),
    row('scaled positions in either, biases, capped logits, untied', num_hidden_layers=2,
        layer_types=['sliding_attention', 'full_attention'], attention_bias=True,
        rope_parameters=dict(full_attention=DEFAULT, sliding_attention=LINEAR),
        final_logit_softcapping=3., tie_word_embeddings=False),
]
