"""BERT."""
from tests.interop.encoders import CHECKS, check_pooler
from tests.interop.parity import VOCABULARY, Row

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
             intermediate_size=40, max_position_embeddings=64, initializer_range=.3)
LABELS = dict(id2label={0: 'none', 1: 'person', 2: 'place'},
              label2id=dict(none=0, person=1, place=2))


def row(model, what, more=(), **kw):
  return Row('bert', what, lambda t: t.BertConfig(**SMALL | kw), model, checks=(*CHECKS, *more))


ROWS = [
    row('BertModel', 'bare', (check_pooler,)),
    row('BertForMaskedLM', 'masked language model', hidden_act='gelu_new', layer_norm_eps=1e-3),
    row('BertForSequenceClassification', 'sequences', type_vocab_size=4, hidden_act='relu',
        **LABELS),
    row('BertForTokenClassification', 'tokens', **LABELS),
]
