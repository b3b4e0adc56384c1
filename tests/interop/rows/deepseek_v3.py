"""DeepSeek-V3."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, moe_intermediate_size=16,
             num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
             max_position_embeddings=64, n_routed_experts=8, n_group=4, topk_group=2,
             num_experts_per_tok=3, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24,
             qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=10, initializer_range=.3,
             eos_token_id=2, bos_token_id=1, pad_token_id=0)

YARN = dict(rope_type='yarn', rope_theta=10_000., factor=4., original_max_position_embeddings=16,
            beta_fast=32., beta_slow=1., mscale=.8, mscale_all_dim=1.)


def corrected(model):
  """Biases of the router large enough to change its choices."""
  import torch
  with torch.no_grad():
    for name, bias in model.named_buffers():
      if name.endswith('e_score_correction_bias'):
        bias.copy_(.3 * torch.randn(bias.shape))


def row(what, **kw):
  return Row('deepseek_v3', what, lambda t: t.DeepseekV3Config(**SMALL | kw),
             'DeepseekV3ForCausalLM', tweak=corrected)


ROWS = [
    row('', rope_parameters=YARN),
    row('whole queries, biases, no groups, halves rotated', q_lora_rank=None, attention_bias=True,
        n_group=1, topk_group=1, first_k_dense_replace=0, n_shared_experts=2, rope_interleave=False,
        norm_topk_prob=False, num_hidden_layers=2),
]
