"""RoBERTa."""
from tests.interop.encoders import CHECKS, check_pooler
from tests.interop.parity import Row
from tests.interop.rows import bert


def row(model, what, more=(), **kw):
  return Row('roberta', what, lambda t: t.RobertaConfig(**bert.SMALL | kw), model,
             checks=(*CHECKS, *more))


ROWS = [
    row('RobertaModel', 'bare', (check_pooler,), pad_token_id=0),
    row('RobertaForMaskedLM', 'masked language model', hidden_act='relu'),
    row('RobertaForSequenceClassification', 'sequences', type_vocab_size=1, **bert.LABELS),
    row('RobertaForTokenClassification', 'tokens', pad_token_id=2, **bert.LABELS),
]
