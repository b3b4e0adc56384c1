"""Jamba."""
from tests.interop.parity import VOCABULARY, Row
from tests.interop.rows.mamba import uneven

# With .3 for .1 the float32 of transformers is itself 8e-5 of the scale from its float64.
SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=8,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             attn_layer_period=4, attn_layer_offset=2, num_experts=4, mamba_d_state=8,
             initializer_range=.1, eos_token_id=2, bos_token_id=1, pad_token_id=0)


# Left padding and biases: see the rows of Mamba.
def row(what, **kw):
  return Row('jamba', what, lambda t: t.JambaConfig(**SMALL | kw), 'JambaForCausalLM', bound=5e-5,
             left=not kw.get('mamba_proj_bias'), tweak=uneven)


ROWS = [
    row(''),
    row('no experts, biases, tied', num_experts=1, num_hidden_layers=3, attn_layer_period=2,
        attn_layer_offset=1, mamba_proj_bias=True, mamba_conv_bias=False, mamba_dt_rank=3,
        tie_word_embeddings=True),
]
