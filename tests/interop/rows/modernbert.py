"""ModernBERT."""
from tests.interop.encoders import CHECKS
from tests.interop.parity import VOCABULARY, Row
from tests.interop.rows import bert

# Four layers: global, local, local, global; local ones see 4 tokens on each side.
SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
             intermediate_size=40, max_position_embeddings=64, initializer_range=.3,
             local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
             sep_token_id=2)
BIASES = dict(attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True)


def row(model, what, **kw):
  return Row('modernbert', what, lambda t: t.ModernBertConfig(**SMALL | kw), model, checks=CHECKS)


ROWS = [
    row('ModernBertModel', 'bare'),
    row('ModernBertForMaskedLM', 'masked language model'),
    row('ModernBertForMaskedLM', 'biases, a head of its own without one', **BIASES,
        decoder_bias=False, tie_word_embeddings=False, hidden_activation='silu',
        classifier_activation='relu', layer_types=['sliding_attention', *['full_attention'] * 3]),
    row('ModernBertForSequenceClassification', 'sequences', local_attention=5, **bert.LABELS),
    row('ModernBertForSequenceClassification', 'the mean of sequences, longer positions',
        classifier_pooling='mean', max_position_embeddings=128, rope_parameters=dict(
            full_attention=dict(rope_type='yarn', rope_theta=1000., factor=4.,
                                original_max_position_embeddings=32),
            sliding_attention=dict(rope_type='default', rope_theta=100.)), **bert.LABELS),
    row('ModernBertForTokenClassification', 'tokens', norm_eps=1e-3, **bert.LABELS),
]
