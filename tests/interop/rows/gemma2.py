"""Gemma 2."""
from tests.interop.parity import VOCABULARY, Row
from tests.interop.rows.gemma import quieter

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
             sliding_window=9, query_pre_attn_scalar=8, initializer_range=.3, eos_token_id=2,
             bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('gemma2', what, lambda t: t.Gemma2Config(**SMALL | kw), 'Gemma2ForCausalLM',
             tweak=quieter)


ROWS = [
    row('tight caps', attn_logit_softcapping=2., final_logit_softcapping=3.),
    row('no caps, types of layers, biases, untied', attn_logit_softcapping=None,
        final_logit_softcapping=None, attention_bias=True, tie_word_embeddings=False,
        num_hidden_layers=3,
        layer_types=['full_attention', 'sliding_attention', 'sliding_attention']),
]
