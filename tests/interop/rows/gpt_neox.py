"""GPT-NeoX and Pythia."""
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
             num_attention_heads=2, max_position_embeddings=64, initializer_range=.3,
             eos_token_id=2, bos_token_id=1, pad_token_id=0)


def row(what, **kw):
  return Row('gpt_neox', what, lambda t: t.GPTNeoXConfig(**SMALL | kw), 'GPTNeoXForCausalLM')


ROWS = [
    row(''),
    row('branches in sequence, no biases in attention, tied', use_parallel_residual=False,
        attention_bias=False, rotary_pct=.5, rotary_emb_base=500., hidden_act='gelu_new',
        tie_word_embeddings=True),
    row('a context stretched by YaRN', rotary_pct=.5, max_position_embeddings=32, rope_scaling=dict(
        rope_type='yarn', factor=4., original_max_position_embeddings=32)),
]
