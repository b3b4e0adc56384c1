"""Qwen2."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('qwen2', what, lambda t: t.Qwen2Config(**SMALL | kw), 'Qwen2ForCausalLM')


ROWS = [
    row('', tie_word_embeddings=True),
    row('a window above the first layer', use_sliding_window=True, sliding_window=9,
        max_window_layers=1),
    row('types of layers, YaRN', use_sliding_window=True, sliding_window=7,
        layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
        rope_parameters=dict(rope_type='yarn', rope_theta=1e4, factor=2.,
                             original_max_position_embeddings=32)),
]
