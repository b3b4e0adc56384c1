"""T5."""
from tests.interop.pairs import CHECKS
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, d_model=32, d_kv=10, d_ff=40, num_layers=3, num_heads=4,
             decoder_start_token_id=0, relative_attention_num_buckets=8,
             relative_attention_max_distance=20)


def row(what, tweak=lambda model: None, **kw):
  def both(model):
    import torch
    with torch.no_grad():      # layers and distances that matter: else a target repeats one token
      model.shared.weight.mul_(.3)
      for stack in (model.encoder, model.decoder):
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(5)
        for block in stack.block:
          block.layer[-1].DenseReluDense.wo.weight.mul_(20)
    tweak(model)
  return Row('t5', what, lambda t: t.T5Config(**SMALL | kw), 'T5ForConditionalGeneration',
             tweak=both, checks=CHECKS)


def own_head(model):
  import torch
  model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32))


def start(model):
  model.generation_config.decoder_start_token_id = 5


ROWS = [
    row('v1.0: relu, tied'),
    row('v1.1: gated, untied, fewer decoder layers', own_head, feed_forward_proj='gated-gelu',
        tie_word_embeddings=False, num_decoder_layers=2),
    row('gated silu, tied without a scale, another start', start, feed_forward_proj='gated-silu',
        tie_word_embeddings=False, relative_attention_num_buckets=32,
        relative_attention_max_distance=128),
]
