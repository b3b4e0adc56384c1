"""BART."""
from tests.interop.pairs import CHECKS
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=3, decoder_layers=3,
             encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
             decoder_ffn_dim=40, max_position_embeddings=64, init_std=.1)


def row(what, tweak=lambda model: None, **kw):
  def both(model):
    import torch
    with torch.no_grad():                     # else a target repeats one token
      for stack in (model.model.encoder, model.model.decoder):
        stack.embed_positions.weight.mul_(5 * stack.embed_tokens.embed_scale)
    tweak(model)
  # transformers counts positions over padding too, so that only right padding can be compared.
  return Row('bart', what, lambda t: t.BartConfig(**SMALL | kw), 'BartForConditionalGeneration',
             left=False, tweak=both, checks=CHECKS)


def biased(model):
  import torch
  model.final_logits_bias += .2 * torch.randn(1, VOCABULARY)
  model.generation_config.forced_bos_token_id = 7


ROWS = [
    row('', forced_eos_token_id=None),
    row('biased logits, scaled embeddings, unlike stacks, forced tokens', biased,
        scale_embedding=True, activation_function='relu', decoder_layers=2,
        decoder_attention_heads=2, decoder_ffn_dim=24, decoder_start_token_id=3),
]
