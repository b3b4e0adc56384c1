"""OLMo 2."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, max_position_embeddings=64, initializer_range=.3,
             eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('olmo2', what, lambda t: t.Olmo2Config(**SMALL | kw), 'Olmo2ForCausalLM')


ROWS = [
    row(''),
    row('grouped, biases, tied', num_key_value_heads=2, attention_bias=True,
        tie_word_embeddings=True),
]
