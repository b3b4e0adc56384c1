"""The tokenizer in the keys of a GGUF file, and a tokenizer as such keys.

'llama' is SentencePiece's: of two neighbours those are joined whose joint token has the best score.
'gpt2' is byte-level: of two neighbours those that come first in a list; 'pre' names the rules that
cut a text in words before.
"""
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lean_jax.data.tokenizer import Tokenizer
from lean_jax.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPACE = '\u2581'
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r'|\s*[\r\n]+|\s+(?!\S)|\s+')
# What tokenizer.ggml.pre calls a regular expression that cuts words; None is GPT-2's own.
PRE = {'gpt-2': None, 'llama-bpe': _WORDS % '{1,3}', 'qwen2': _WORDS % ''}
_KEY = 'tokenizer.ggml.'


def read(keys, path):
  """The Tokenizer in the keys of a file.

  Raises:
    InputError: there is none, it is of another kind, or its parts do not go together.
  """
  get = lambda name, default=None: keys.get(_KEY + name, default)
  model, tokens = get('model'), get('tokens')
  if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens) or not tokens:
    raise InputError(f'{str(path)!r} has no {_KEY}tokens; give a file with its tokenizer')
  if model not in ('llama', 'gpt2'):
    raise InputError(f'{str(path)!r} has a tokenizer of kind {model!r}; lean_jax reads llama and '
                     'gpt2')
  N = len(tokens)
  types = get('token_type', [NORMAL] * N)
  ids = {name: get(f'{name}_token_id') for name in ('bos', 'eos', 'eot', 'unknown')}
  good = (isinstance(types, list) and len(types) == N and len(set(tokens)) == N and all(
      id is None or (type(id) is int and 0 <= id < N) for id in ids.values()))
  if not good:
    raise InputError(f'{str(path)!r} has {N} tokens, not each of them once or with a type, or ids '
                     f'{ids} past them; download it again')
  try:
    backend = (_sentencepiece if model == 'llama' else _bytes)(tokens, types, get, ids, path)
    _add_special(backend, tokens, types, get, ids)
  except InputError:
    raise
  except Exception as error:                           # the library raises plain Exception
    raise InputError(f'{str(path)!r} has no tokenizer that can be built '
                     f'({" ".join(str(error).split())[:200]}); download it again') from error
  template = get('chat_template')
  settings = dict(chat_template=template) if isinstance(template, str) else {}
  return Tokenizer(backend, ids['bos'], ids['eos'], settings,
                   () if ids['eot'] is None else (ids['eot'],))


def _add_special(backend, tokens, types, get, ids):
  """Adds tokens that are found whole in a text, and what is put before each."""
  for special, wanted in ((True, (UNKNOWN, CONTROL)), (False, (USER,))):
    added = [tokenizers.AddedToken(t, normalized=False, special=special)
             for t, kind in zip(tokens, types) if kind in wanted]
    (backend.add_special_tokens if special else backend.add_tokens)(added)
  begins = get('add_bos_token', get('model') == 'llama' or get('pre') == 'llama-bpe')
  if begins is True and ids['bos'] is not None:
    name = tokens[ids['bos']]
    backend.post_processor = processors.TemplateProcessing(
        single=[name, '$A'], pair=[name, '$A', name, '$B'], special_tokens=[(name, ids['bos'])])


def _sentencepiece(tokens, types, get, ids, path):
  scores, vocabulary = get('scores'), {t: k for k, t in enumerate(tokens)}
  if not isinstance(scores, list) or len(scores) != len(tokens) or not all(
      isinstance(s, float) for s in scores):
    raise InputError(f'{str(path)!r} has no score of each of its {len(tokens)} tokens; download it '
                     'again')
  merges = []
  for token, kind, score in zip(tokens, types, scores):
    if kind in (NORMAL, USER):
      halves = [(token[:k], token[k:]) for k in range(1, len(token))]
      merges += [(-score, pair) for pair in halves if pair[0] in vocabulary
                 and pair[1] in vocabulary]
  merges.sort(key=lambda item: item[0])
  unknown = ids['unknown'] if ids['unknown'] is not None else next(
      (k for k, kind in enumerate(types) if kind == UNKNOWN), None)
  backend = tokenizers.Tokenizer(models.BPE(
      vocabulary, [pair for _, pair in merges], fuse_unk=True, byte_fallback=True,
      unk_token=None if unknown is None else tokens[unknown]))
  prefix = get('add_space_prefix', True) is not False
  backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(' ', SPACE)])
  backend.decoder = decoders.Sequence(
      [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
      + [decoders.Strip(' ', 1, 0)] * prefix)
  return backend


def _bytes(tokens, types, get, ids, path):
  merges, pre = get('merges'), get('pre', 'gpt-2')
  pre = 'gpt-2' if pre == 'default' else pre
  if pre not in PRE:
    raise InputError(f'{str(path)!r} cuts words as {pre!r} does; lean_jax knows: {", ".join(PRE)}')
  pairs = [tuple(m.split(' ')) if isinstance(m, str) else () for m in merges or [()]]
  if not merges or any(len(pair) != 2 for pair in pairs):
    raise InputError(f'{str(path)!r} has no merges of two tokens each; download it again')
  backend = tokenizers.Tokenizer(models.BPE(
      {t: k for k, t in enumerate(tokens)}, pairs, ignore_merges=pre == 'llama-bpe'))
  words = PRE[pre]
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  if words is not None:
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(words), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  if pre == 'qwen2':
    backend.normalizer = normalizers.NFC()
  backend.decoder = decoders.ByteLevel()
  return backend


def written(tokenizer, size):
  """{key without its prefix: value} of a tokenizer, for a model of `size` tokens.

  Raises:
    InputError: a tokenizer whose rules have no name in GGUF.
  """
  rules = json.loads(tokenizer.backend.to_str())
  model, added = rules['model'], {t['id']: t for t in rules['added_tokens']}
  if model.get('type') != 'BPE':
    raise InputError(f'a tokenizer of kind {model.get("type")}; GGUF is written with BPE alone')
  names = {id: token for token, id in tokenizer.backend.get_vocab().items()}
  tokens = [names.get(k, f'[PAD{k}]') for k in range(size)]

  def kind(k):
    if k not in names:
      return UNUSED
    if k in added:
      return (UNKNOWN if names[k] == model.get('unk_token') else
              CONTROL if added[k]['special'] else USER)
    return BYTE if _is_byte(names[k]) and model.get('byte_fallback') else NORMAL
  pairs = [tuple(m.split(' ')) if isinstance(m, str) else tuple(m) for m in model['merges']]
  out = dict(tokens=tokens, token_type=[kind(k) for k in range(size)],
             add_bos_token=bool(tokenizer.head))
  ids = dict(bos=tokenizer.bos, eos=tokenizer.eos)
  ids['unknown'] = next((k for k in range(size) if out['token_type'][k] == UNKNOWN), None)
  ids['eot'] = next((k for k in tokenizer.ends if k != tokenizer.eos), None)
  out |= {f'{name}_token_id': id for name, id in ids.items() if id is not None}
  if isinstance(tokenizer.settings.get('chat_template'), str):
    out['chat_template'] = tokenizer.settings['chat_template']
  if model.get('byte_fallback'):
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
      ranks.setdefault(''.join(pair), rank)
    return out | dict(
        model='llama', scores=[-float(ranks.get(t, len(ranks))) for t in tokens],
        add_space_prefix=_prefix(rules))
  return out | dict(model='gpt2', pre=_pre(rules), merges=[' '.join(pair) for pair in pairs])


def _prefix(rules):
  """Whether a space is put before a text, by rules that are SentencePiece's."""
  before = dict(type='Prepend', prepend=SPACE)
  spaces = dict(type='Replace', pattern=dict(String=' '), content=SPACE)
  given = rules['normalizer'] or {}
  given = given.get('normalizers', [given])
  if rules['pre_tokenizer'] is None and given in ([before, spaces], [spaces]):
    return given[0] == before
  raise InputError("a tokenizer with byte fallback whose rules are not SentencePiece's has no name "
                   "in GGUF; save with format='hf'")


def _pre(rules):
  """The name of the rules that cut words."""
  steps = rules['pre_tokenizer'] or {}
  steps = steps.get('pretokenizers', [steps])
  last, normal = steps[-1], (rules['normalizer'] or {}).get('type')
  if last.get('type') == 'ByteLevel' and not last.get('add_prefix_space'):
    words = None if len(steps) == 1 and last.get('use_regex', True) else (
        steps[0].get('pattern', {}).get('Regex') if len(steps) == 2 else '')
    for name, known in PRE.items():
      if words == known and normal == ('NFC' if name == 'qwen2' else None):
        return name
  raise InputError('a tokenizer that cuts words by rules without a name in GGUF; it has names for: '
                   f"{', '.join(PRE)}; save with format='hf'")


def _is_byte(token):
  return len(token) == 6 and token.startswith('<0x') and token.endswith('>')
