"""OPT."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=40, num_hidden_layers=3,
             num_attention_heads=4, max_position_embeddings=64, init_std=.3, eos_token_id=2,
             bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('opt', what, lambda t: t.OPTConfig(**SMALL | kw), 'OPTForCausalLM')


ROWS = [
    row(''),
    row('norms afterwards, projected embeddings', do_layer_norm_before=False,
        word_embed_proj_dim=24),
    row('no biases, norms without parameters, untied', enable_bias=False,
        layer_norm_elementwise_affine=False, activation_function='gelu',
        tie_word_embeddings=False),
]
