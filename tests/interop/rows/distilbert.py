"""DistilBERT."""
from tests.interop.encoders import CHECKS
from tests.interop.parity import VOCABULARY, Row
from tests.interop.rows import bert

SMALL = dict(vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=4, hidden_dim=40,
             max_position_embeddings=64, initializer_range=.3)


def row(model, what, **kw):
  return Row('distilbert', what, lambda t: t.DistilBertConfig(**SMALL | kw), model, checks=CHECKS)


ROWS = [
    row('DistilBertModel', 'bare', sinusoidal_pos_embds=True),
    row('DistilBertForMaskedLM', 'masked language model'),
    row('DistilBertForMaskedLM', 'a head of its own', tie_word_embeddings=False,
        activation='relu'),
    row('DistilBertForSequenceClassification', 'sequences', **bert.LABELS),
    row('DistilBertForTokenClassification', 'tokens', **bert.LABELS),
]
