"""The tokenizer of BERT, made of its vocabulary (Devlin et al. 2018, arXiv:1810.04805)."""
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from lean_jax.data import reading
from lean_jax.errors import InputError

CLASSES = ('BertTokenizer', 'BertTokenizerFast', 'DistilBertTokenizer', 'DistilBertTokenizerFast')
KINDS = ('bert', 'distilbert')
SPECIAL = dict(unk_token='[UNK]', sep_token='[SEP]', pad_token='[PAD]', cls_token='[CLS]',
               mask_token='[MASK]')


def wordpiece(path, settings, kind):
  """A `tokenizers.Tokenizer` of a vocab.txt.

  Args:
    path: of the file: a token a line, its id the line's number.
    settings: tokenizer_config.json.
    kind: model_type of config.json; decides where the settings name no class.

  Raises:
    InputError: the file is not UTF-8 or lacks a special token, or may be of another tokenizer.
  """
  cls = settings.get('tokenizer_class')
  if cls not in CLASSES and (cls is not None or kind not in KINDS):
    raise InputError(f'{str(path)!r} is of a {cls or kind}, and only a vocab.txt of BERT can be '
                     'read without tokenizer.json; convert it first: '
                     'transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)')
  try:
    text = reading.read(path).decode().replace('\r\n', '\n')
  except UnicodeDecodeError as error:
    raise InputError(f'{str(path)!r} is not UTF-8 ({error}); download it again') from error
  vocabulary = {token: id for id, token in enumerate(text.removesuffix('\n').split('\n'))}
  special = {k: _content(settings.get(k, token)) for k, token in SPECIAL.items()}
  lacking = [str(token) for token in special.values() if token not in vocabulary]
  if lacking:
    raise InputError(f'{str(path)!r} lacks {", ".join(lacking)}; download it again')
  backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(
      vocabulary, unk_token=special['unk_token']))
  backend.normalizer = normalizers.BertNormalizer(
      lowercase=settings.get('do_lower_case', True), strip_accents=settings.get('strip_accents'),
      handle_chinese_chars=settings.get('tokenize_chinese_chars', True))
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  first, last = special['cls_token'], special['sep_token']
  backend.post_processor = processors.TemplateProcessing(
      single=f'{first} $A {last}', pair=f'{first} $A {last} $B:1 {last}:1',
      special_tokens=[(token, vocabulary[token]) for token in (first, last)])
  backend.add_special_tokens(list(special.values()))
  return backend


def _content(token):
  return token.get('content') if isinstance(token, dict) else token
