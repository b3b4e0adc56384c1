"""Special tokens that a tokenizer's class knows and its folder does not say."""
# What the classes of transformers call them where nothing else is said.
USUAL = dict(unk_token=('[UNK]', '<unk>'), sep_token=('[SEP]',), pad_token=('[PAD]', '<pad>'),
             cls_token=('[CLS]',), mask_token=('[MASK]', '<mask>'))


def completed(settings, backend):
  """The settings, with the special tokens that a tokenizer saved without its class would lose.

  Args:
    settings: tokenizer_config.json and special_tokens_map.json, of a folder.
    backend: a `tokenizers.Tokenizer`, which has to have a token that is not named.
  """
  out = dict(settings)
  if settings.get('tokenizer_class') == 'PreTrainedTokenizerFast':     # which knows none
    return out
  for key, names in USUAL.items():
    found = [name for name in names if backend.token_to_id(name) is not None]
    if key not in out and found:
      out[key] = found[0]
  return out
