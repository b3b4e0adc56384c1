"""Tokenizers: trained here, or read from a Hugging Face folder."""

import dataclasses
import hashlib
import json
import operator
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
import tokenizers

from lean_jax import files
from lean_jax.data import chat, reading
from lean_jax.data.special_tokens import completed
from lean_jax.data.wordpiece import wordpiece
from lean_jax.errors import InputError

BOS, EOS = '<s>', '</s>'
OLDER = ('spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model', 'vocab.json', 'vocab.txt')


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text to token ids and back.

  Attributes:
    backend: the rules, a `tokenizers.Tokenizer` that neither truncates nor pads.
    bos, eos: ids that begin and end a document; None where the tokenizer has none.
    settings: the rest of tokenizer_config.json, kept for `save`: chat templates, other special
      tokens.
    ends: ids that end what a model writes, `eos` first; a chat's turns have one of their own.
  """
  backend: tokenizers.Tokenizer
  bos: int | None = None
  eos: int | None = None
  settings: dict = dataclasses.field(default_factory=dict)
  ends: tuple[int, ...] = ()

  def __post_init__(self):
    given = self.ends if self.eos is None else (self.eos, *self.ends)
    object.__setattr__(self, 'ends', tuple(dict.fromkeys(given)))

  @property
  def size(self) -> int:
    """One more than the largest id."""
    return max(self.backend.get_vocab().values(), default=-1) + 1

  @property
  def head(self) -> list[int]:
    """[bos] where the tokenizer's own rules put it before a text (GPT-2's do not), else []."""
    first = self.encode('', special=True)[:1].tolist()
    return first if first == [self.bos] else []

  @property
  def fingerprint(self) -> str:
    """A hash of the rules and the special ids."""
    rules = json.dumps([self.backend.to_str(), self.bos, self.eos])
    return hashlib.blake2b(rules.encode(), digest_size=16).hexdigest()

  def encode(self, text, *, special=False) -> np.ndarray:
    """The int32 ids of a text, [T]; a special token in the text is its id.

    Args:
      special: whether the tokens are added that the tokenizer puts around a text.
    """
    return self.encode_batch([text], special=special)[0]

  def encode_batch(self, texts, *, special=False) -> list[np.ndarray]:
    """The int32 ids of each text, on all cores."""
    return [np.array(encoding.ids, np.int32) for encoding in encoded(self.backend, texts, special)]

  def rows(self, texts, *, most=None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, types) of each text or pair of texts, with the tokens that the tokenizer puts around.

    Args:
      texts: each a string, or two of them.
      most: tokens of a row; a longer one loses the end of its longest text, or the beginning where
        the tokenizer's own settings say so. None keeps all.

    Returns:
      int32 [T] each; the type is the number of the text.
    """
    texts = list(texts)
    found = encoded(self.backend, texts, True)
    long = [k for k, encoding in enumerate(found) if most is not None and len(encoding) > most]
    if long:
      backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
      pairs = any(not isinstance(texts[k], str) for k in long)
      if most <= backend.num_special_tokens_to_add(pairs):
        raise InputError(f'{most} tokens leave no room for a text; give more')
      backend.enable_truncation(most, direction=self.settings.get('truncation_side', 'right'))
      for k, encoding in zip(long, encoded(backend, [texts[k] for k in long], True)):
        found[k] = encoding
    return [(np.array(e.ids, np.int32), np.array(e.type_ids, np.int32)) for e in found]

  def words(self, sentences, *, most=None) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, types, places) of each list of words: int32 [T], [T] and [words].

    The place is that of a word's first token, -1 for a word that has none or that is cut off.

    Args:
      most: tokens of a row; what is longer loses its end, but for the token that ends it.
    """
    out = []
    found = encoded(self.backend, [list(words) for words in sentences], True, words=True)
    for words, e in zip(sentences, found):
      ids, of = np.array(e.ids, np.int32), np.array([-1 if w is None else w for w in e.word_ids])
      if most is not None and len(ids) > most:
        last = int(of[-1] < 0)                                 # a special token
        kept = np.append(np.arange(most - last), [len(ids) - 1] * last).astype(int)
        ids, of = ids[kept], of[kept]
      places = np.full(len(words), -1, np.int32)
      for place in range(len(of) - 1, -1, -1):                 # the first is written last
        if of[place] >= 0:
          places[of[place]] = place
      out.append((ids, np.zeros_like(ids), places))
    return out

  def decode(self, ids, *, special=False) -> str:
    """The text of ids; `special` keeps special tokens, by their names."""
    ids = np.asarray(ids, np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < self.size:
      raise InputError(f'ids from {ids.min()} to {ids.max()} to decode; the tokenizer has 0 to '
                       f'{self.size - 1}')
    return self.backend.decode(ids.tolist(), skip_special_tokens=not special)

  def chat(self, messages, *, template: str | None = None, reply: bool = True, **values) -> str:
    """The text of a conversation, special tokens and all: `encode` gives its ids.

    Args:
      messages: dicts, each with a 'role', 'user' or the like, and a 'content'.
      template: the name of one of the tokenizer's templates, or a template; None is the default,
        or the one for tools where they are given.
      reply: whether the head of the assistant's next message follows.
      values: tools, documents, and any other names that the template reads.

    Raises:
      InputError: the tokenizer has no such template, or it refuses the messages.
    """
    known = chat.templates(self.settings)
    if template is None:
      template = 'tool_use' if values.get('tools') and 'tool_use' in known else 'default'
    if template not in known and '{' not in template:
      raise InputError(
          f'the tokenizer has no chat template {template!r}, it has: {", ".join(known)}; name one'
          if known else 'the tokenizer has no chat template: its model was not trained on '
          'conversations; give a prompt, or a template')
    special = chat.special_tokens(self.settings) | {
        f'{kind}_token': self.backend.id_to_token(id)
        for kind, id in (('bos', self.bos), ('eos', self.eos)) if id is not None}
    return chat.rendered(known.get(template, template), messages, special=special, reply=reply,
                         **values)

  def bytes_of(self, text, count) -> int:
    """The UTF-8 bytes of a text that its first `count` tokens cover."""
    offsets = self.backend.encode(text, add_special_tokens=False).offsets[:count]
    return len(text[:max((end for _, end in offsets), default=0)].encode())

  def save(self, folder, *, types=False):
    """Writes tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them.

    Args:
      types: whether the model takes the types of tokens; else transformers gives it none.
    """
    inputs = ['input_ids', *['token_type_ids'] * types, 'attention_mask']
    names = {f'{kind}_token': None if id is None else self.backend.id_to_token(id)
             for kind, id in (('bos', self.bos), ('eos', self.eos))}
    settings = {'clean_up_tokenization_spaces': False, 'model_input_names': inputs,
                **self.settings, **names,
                'tokenizer_class': 'PreTrainedTokenizerFast'}
    for name, text in (('tokenizer.json', self.backend.to_str(pretty=True)),
                       ('tokenizer_config.json', json.dumps(settings, indent=2))):
      with files.replacing(pathlib.Path(folder, name)) as file:
        file.write(text.encode())


def encoded(backend, texts, special, words=False):
  """The encodings of texts, of pairs of them or of lists of words, on all cores."""
  try:
    # The fast one does not say which word a token is of.
    encode = backend.encode_batch if words else backend.encode_batch_fast
    return encode(list(texts), is_pretokenized=words, add_special_tokens=special)
  except (TypeError, UnicodeEncodeError) as error:
    raise InputError('a text to encode is not a string of whole Unicode characters; give str '
                     'without surrogates') from error


def train_bpe(texts: Iterable[str], vocabulary: int,
              progress: Callable[[int, int, str], None] | None = None) -> Tokenizer:
  """A byte-level BPE tokenizer; the same texts give the same one.

  It has all 256 bytes, so every text survives encoding and decoding. '<s>' is id 0 and '</s>' 1.

  Args:
    texts: read once.
    vocabulary: tokens at most, special ones included; short texts may give fewer.
    progress: called with texts read, texts in all (0 where unknown) and what is done.

  Raises:
    InputError: a vocabulary too small for the bytes, or no text.
  """
  least = 256 + len((BOS, EOS))
  if vocabulary < least:
    raise InputError(f'a vocabulary of {vocabulary} has no room for 256 bytes, {BOS} and {EOS}; '
                     f'give {least} or more')
  total, read = operator.length_hint(texts), 0

  def counted():
    nonlocal read
    for text in texts:
      yield text
      read += 1
      if progress:
        progress(read, total, 'training the tokenizer')

  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.train_from_iterator(counted(), tokenizers.trainers.BpeTrainer(
      vocab_size=vocabulary, special_tokens=[BOS, EOS], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  if not read:
    raise InputError('no text to train a tokenizer on; give at least one document')
  # What transformers adds by itself is what `pack` puts before a document.
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=f'{BOS} $A', pair=f'{BOS} $A {BOS} $B', special_tokens=[(BOS, 0)])
  return Tokenizer(backend, bos=0, eos=1)


def load_tokenizer(path) -> Tokenizer:
  """The tokenizer of a Hugging Face folder, or of one tokenizer.json.

  BOS and EOS are named by the first of tokenizer_config.json, special_tokens_map.json,
  generation_config.json and config.json that speaks of them; a null there means none.

  Raises:
    InputError: no tokenizer.json, a corrupt file, or a special token that is not in it.
  """
  path = pathlib.Path(path)
  file = path / 'tokenizer.json' if path.is_dir() else path
  if not file.is_file():
    older = [name for name in OLDER if (file.parent / name).is_file()]
    if older == ['vocab.txt'] and path.is_dir():
      return of_vocabulary(path)
    if older and path.is_dir():
      raise InputError(f'{str(path)!r} has {older[0]} and no tokenizer.json; convert it first: '
                       'transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)')
    raise InputError(f'no file {str(file)!r}; give a folder with a tokenizer.json, or that file')
  try:
    backend = tokenizers.Tokenizer.from_str(reading.read(file).decode())
  except Exception as error:  # the library raises plain Exception
    reason = ' '.join(str(error).split())
    raise InputError(f'{str(file)!r} is not a tokenizer ({reason}); download it again') from error
  backend.no_truncation()
  backend.no_padding()
  named = file.name == 'tokenizer.json'  # the files beside another name may be another model's
  settings = [described(file.parent / name) if named else {} for name in
              ('tokenizer_config.json', 'special_tokens_map.json',
               'generation_config.json', 'config.json')]
  bos, eos = (special(backend, settings, kind, file) for kind in ('bos', 'eos'))
  own = chat.with_files(file.parent, settings[1] | settings[0]) if named else {}
  return Tokenizer(backend, bos, eos, completed(own, backend) if named else own,
                   ends(settings[2:]))


def of_vocabulary(folder):
  """The tokenizer of a folder of BERT that has a vocab.txt alone."""
  settings = described(folder / 'tokenizer_config.json')
  kind = described(folder / 'config.json').get('model_type')
  backend = wordpiece(folder / 'vocab.txt', settings, kind)
  return Tokenizer(backend, settings=completed(settings, backend))


def ends(settings):
  """The ids of eos_token_id in these settings: one, or several where a turn has its own end."""
  given = [setting.get('eos_token_id') for setting in settings]
  ids = [id for ids in given if ids is not None for id in (ids if isinstance(ids, list) else [ids])]
  if not all(isinstance(id, int) for id in ids):
    raise InputError(f'eos_token_id {given}; it is an id or a list of ids; download it again')
  return tuple(ids)


def described(path):
  """The dict in a JSON file, empty where there is no such file."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(reading.read(path).decode())
  except ValueError as error:
    raise InputError(f'{str(path)!r} is not JSON ({error}); download it again') from error
  if not isinstance(value, dict):
    raise InputError(f'{str(path)!r} holds a {type(value).__name__}, not an object; download it '
                     'again')
  return value


def special(backend, settings, kind, file):
  """The id of 'bos' or 'eos' that the first of these settings to speak of it names, or None."""
  for setting in settings:
    for key in (f'{kind}_token', f'{kind}_token_id'):
      if key not in setting:
        continue
      value = setting[key]
      value = value[0] if isinstance(value, list) and value else value
      value = value.get('content') if isinstance(value, dict) else value
      if value is None:
        return None
      id = backend.token_to_id(value) if isinstance(value, str) else value
      if not isinstance(id, int) or backend.id_to_token(id) is None:
        raise InputError(f'{key} {value!r} is not a token of {str(file)!r}; give the folder of one '
                         'model')
      return id
  return None
