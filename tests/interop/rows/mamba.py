"""Mamba."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=8,
             initializer_range=.3, eos_token_id=2, bos_token_id=1, pad_token_id=0)


def uneven(model):
  """Makes channels decay differently: at the start they are all alike."""
  import torch
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name.endswith('A_log'):
        p.add_(.3 * torch.randn(p.shape))


# With a bias in the first product, padding on the left is not zero to the filter of transformers,
# and its first real tokens see that.
def row(what, **kw):
  return Row('mamba', what, lambda t: t.MambaConfig(**SMALL | kw), 'MambaForCausalLM', bound=5e-5,
             left=not kw.get('use_bias'), tweak=uneven)


ROWS = [
    row(''),
    row('biases, gelu, a long filter without one, untied', use_bias=True, use_conv_bias=False,
        conv_kernel=6, hidden_act='gelu', intermediate_size=40, time_step_rank=5,
        tie_word_embeddings=False),
]
