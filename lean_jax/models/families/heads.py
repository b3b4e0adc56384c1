"""Heads of encoders: `architectures` and the labels of config.json."""
from lean_jax.errors import InputError

HEADS = {'Model': None, 'ForMaskedLM': 'masked', 'ForSequenceClassification': 'sequence',
         'ForTokenClassification': 'token'}


def head(hf, name, more=()):
  """The head that config.json asks for.

  Args:
    hf: config.json; without `architectures` there is no head.
    name: what the family's architectures begin with, 'Bert'.
    more: {the end of another architecture's name: its head}.

  Returns:
    dict: head and labels, of an `EncoderConfig`.

  Raises:
    InputError: it asks for one that we do not have, or its labels do not make sense.
  """
  known = {name + end: kind for end, kind in (HEADS | dict(more)).items()}
  asked = hf.get('architectures') or [f'{name}Model']
  if not isinstance(asked, list) or len(asked) != 1 or asked[0] not in known:
    raise InputError(f'config.json has architectures = {asked!r}, which lean_jax does not compute; '
                     f'it computes: {", ".join(known)}')
  kind = known[asked[0]]
  return dict(head=kind, labels=labels(hf) if kind in ('sequence', 'token') else ())


def labels(hf):
  """The labels' names; two without, as transformers has it.

  Raises:
    InputError: they are not numbered from 0, or are not as many as config.json says.
  """
  names, count = hf.get('id2label'), hf.get('num_labels')
  if names is None:
    count = 2 if count is None else count
    names = {k: f'LABEL_{k}' for k in range(count)} if isinstance(count, int) else None
  try:
    names = {int(k): str(v) for k, v in names.items()}
    good = names and sorted(names) == list(range(len(names))) and count in (None, len(names))
  except (AttributeError, TypeError, ValueError):
    good = False
  if not good:
    raise InputError(f'config.json has id2label = {hf.get("id2label")!r} and num_labels = '
                     f'{count!r}, expected a name for each number from 0; download it again')
  return tuple(names[k] for k in range(len(names)))


def head_hf(c, name):
  """The keys of config.json that say a config's head."""
  end = next(end for end, kind in HEADS.items() if kind == c.head)
  out = dict(architectures=[name + end])
  if c.labels:
    out |= dict(id2label={str(k): label for k, label in enumerate(c.labels)},
                label2id={label: k for k, label in enumerate(c.labels)})
  return out
