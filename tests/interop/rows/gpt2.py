"""GPT-2."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('gpt2', what, lambda t: t.GPT2Config(**SMALL | kw), 'GPT2LMHeadModel')


ROWS = [
    row(''),
    row('scores scaled by depth alone, n_inner, relu, untied', scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True, n_inner=40, activation_function='relu',
        tie_word_embeddings=False),
]
