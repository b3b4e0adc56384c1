"""Mamba-2."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=8, num_heads=8,
             head_dim=8, n_groups=2, chunk_size=8, initializer_range=.3, eos_token_id=2,
             bos_token_id=1, pad_token_id=0)


def recomputing(model):
  # With a cache, one token at a time, transformers forgets the limits of the time step.
  model.generation_config.use_cache = False


# Left padding and biases: see the rows of Mamba.
def row(what, tweak=lambda model: None, **kw):
  return Row('mamba2', what, lambda t: t.Mamba2Config(**SMALL | kw), 'Mamba2ForCausalLM',
             bound=5e-5, left=not kw.get('use_bias'), tweak=tweak)


ROWS = [
    row(''),
    row('limits, biases, one chunk, tied', recomputing, time_step_limit=(.05, .2), use_bias=True,
        use_conv_bias=False, chunk_size=64, n_groups=1, num_heads=4, head_dim=16,
        tie_word_embeddings=True),
]
