"""Qwen3's mixtures of experts."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, moe_intermediate_size=24,
             num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
             max_position_embeddings=64, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('qwen3_moe', what, lambda t: t.Qwen3MoeConfig(**SMALL | kw), 'Qwen3MoeForCausalLM')


ROWS = [
    row(''),
    row('dense layers between, a window, biases, weights as they are', num_hidden_layers=4,
        decoder_sparse_step=2, mlp_only_layers=[3], use_sliding_window=True, sliding_window=7,
        attention_bias=True, norm_topk_prob=False, tie_word_embeddings=True),
]
