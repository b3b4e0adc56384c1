"""Texts in, texts out."""
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lean_jax.errors import InputError
from lean_jax.generation import beam, choice
from lean_jax.generation.continuation import check_copies
from lean_jax.generation.pieces import Pieces
from lean_jax.generation.sampling import checked
from lean_jax.generation.writer import Writer
from lean_jax.models.prefix import length_of, settled, source_prompt
from lean_jax.training import mesh as meshes

_CHUNK = 16                   # tokens between two looks for a stop string


@dataclasses.dataclass(frozen=True)
class Written:
  """What was written.

  Attributes:
    heads: [B], the text of each prompt that a decoder goes on from; '' before an answer.
    texts: [B][n], what follows each of them.
    counts: [B][n], tokens of each.
    read: [B], tokens of each prompt.
    answers: [B][n], what the vote was about, or the scores; None without.
    chosen: [B], the index of the text that a vote or a scorer chose; None without.
    drafts: how many tokens a draft proposed, and how many of them were kept.
    cache_bytes: of what the model kept of the texts while it wrote; a draft's own apart.
  """
  heads: list[str]
  texts: list[list[str]]
  counts: list[list[int]]
  read: list[int]
  answers: list[list[Any]] | None = None
  chosen: list[int] | None = None
  drafts: tuple[int, int] = (0, 0)
  cache_bytes: int = 0

  @property
  def acceptance(self) -> float | None:
    """The part of the drafted tokens that was kept; None where none were drafted."""
    return self.drafts[1] / self.drafts[0] if self.drafts[0] else None


def generate(model, prompt, *, n: int = 1, **settings) -> Any:
  """The prompt and what a model writes after it, or its answer.

  Args:
    model: a `lean_jax.Model`.
    prompt: a text; of an encoder and a decoder the source, whose target alone is given; messages,
      a list of dicts with 'role' and 'content', whose answer alone is given; or a list of these.
    n: texts of each prompt.
    settings: of `write`.

  Returns:
    a str; for n > 1 a list of n, unless a vote or a scorer chooses one; of a list of prompts, a
    list of these.

  Raises:
    InputError: nothing to start from, more tokens than the context has, or a setting out of range.
  """
  out = write(model, prompt, n=n, **settings)
  whole = [[head + text for text in texts] for head, texts in zip(out.heads, out.texts)]
  if out.chosen is not None:
    found = [texts[k] for texts, k in zip(whole, out.chosen)]
  else:
    found = whole if n > 1 else [texts[0] for texts in whole]
  return found if several(prompt) else found[0]


def write(model, prompt, *, tokens: int = 64, temperature: float = 0., top_k: int | None = None,
          top_p: float | None = None, min_p: float | None = None,
          repetition_penalty: float | None = None, stop: str | Sequence[str] = (), seed: int = 0,
          n: int = 1, vote: Callable[[str], Any] | None = None,
          scorer: Callable[[str], float] | None = None, beams: int = 1, length_penalty: float = 1.,
          early_stopping: bool = False, draft=None, ahead: int = 4,
          cache: str = 'float', stream: Callable[[str], None] | None = None,
          truncate: bool = False) -> Written:
  """What a model writes after prompts.

  Args:
    model: a `lean_jax.Model`.
    prompt: as `generate` takes it.
    tokens: at most; a text ends early with a token that ends texts.
    temperature: 0 takes the most probable token.
    top_k, top_p, min_p, repetition_penalty: see `sampling.Sampling`.
    stop: a string or several that end a text; it is no part of it.
    seed: of what is sampled.
    n: texts of each prompt: samples, or the best of `beams`.
    vote: gives a text's answer; of n texts the first is chosen whose answer most of them give.
    scorer: gives a text's score; the best one is chosen.
    beams: candidates of a beam search; 1 is none.
    length_penalty, early_stopping: of the beam search, see `beam.search`.
    draft: a smaller `Model` with the same tokenizer that proposes tokens, see `speculative`.
    ahead: tokens that it proposes at a time.
    cache: how keys and values are kept: 'float', 'int8' or 'int4', see `caches`.
    stream: called with each piece of the text as it comes; for one prompt and n = 1.
    truncate: whether a prompt too long for the context loses its oldest tokens (but the one that
      begins a text), a source its last ones (but the one that ends it).

  Raises:
    InputError: nothing to start from, more tokens than the context has, a setting out of range, or
      a cache that the model cannot have.
  """
  stop = (stop,) if isinstance(stop, str) else tuple(stop)
  sampling = checked(temperature, top_k, top_p, min_p, repetition_penalty)
  check_model(model, draft)
  check_choice(n, beams, temperature, vote, scorer)
  check_together(beams, temperature, draft, stop, stream, several(prompt) or n > 1)
  model = dataclasses.replace(model, params=settled(model.module, model.params))
  prompts = prompt if several(prompt) else [prompt]
  if not prompts:
    raise InputError('no prompt; give one or more')
  ids = [encoded(model, p) for p in prompts]
  if truncate:
    ids = [truncated(model, p, tokens) for p in ids]
  ends = model.tokenizer.ends
  pieces = [Pieces(model.tokenizer, [] if reads(model) else p, stop) for p in ids for _ in range(n)]
  with meshes.of(model.params):
    if beams != 1:
      counts, held = search(
          model, ids, pieces, n, tokens=tokens, ends=ends, beams=beams, cache=cache,
          length_penalty=length_penalty, early_stopping=early_stopping,
          repetition_penalty=repetition_penalty)
      drafts = (0, 0)
    else:
      writer = Writer(
          model.module, model.params, ids, tokens=tokens, ends=ends, sampling=sampling,
          key=jax.random.key(seed), copies=n, ahead=ahead, cache=cache,
          draft=None if draft is None else (draft.module, draft.params))
      counts = follow(writer, pieces, ends, stream, bool(stop))
      drafts, held = writer.drafts, writer.cache_bytes
  by_prompt = lambda rows: [rows[k:k + n] for k in range(0, len(rows), n)]
  texts = by_prompt([piece.text for piece in pieces])
  answers, picked = chosen(texts, vote, scorer)
  heads = ['' if reads(model) or is_chat(p) else model.tokenizer.decode(given)
           for p, given in zip(prompts, ids)]
  return Written(heads, texts, by_prompt(counts), [len(p) for p in ids], answers, picked, drafts,
                 held)


def search(model, ids, pieces, n, *, ends, **settings):
  """Adds the best n texts of each prompt to their `Pieces`; gives their tokens, and cache bytes."""
  found, lengths, held = beam.searched(model.module, model.params, ids, ends=ends, **settings)
  rows = [row[k, :count[k]] for row, count in zip(found, lengths) for k in range(n)]
  return [take(*row, ends)[0] for row in zip(pieces, rows)], held


def follow(writer, pieces, ends, stream, stops):
  """Writes all there is to write, and gives how many tokens each row has.

  Args:
    writer: a Writer.
    pieces: a `Pieces` of each row.
    ends: tokens that end a row.
    stream: called with each piece of the text; None for nobody.
    stops: whether there are stop strings.
  """
  every = 1 if stream else _CHUNK if stops else None
  counts, going, done, more = [0] * len(pieces), set(range(len(pieces))), 0, True
  while more:
    more = writer.advance(every)
    ids = writer.ids()
    for row in sorted(going):
      count, over = take(pieces[row], ids[row, done:], ends, stream, single=every is not None,
                         last=not more)
      counts[row] += count
      going -= {row} if over else set()
    done = ids.shape[1]
    stopped = np.array([piece.stopped for piece in pieces])
    if (stopped & ~writer.ended).any():
      writer.stop(stopped)
      more = more and not writer.ended.all()
  return counts


def take(piece, ids, ends, stream=None, *, single=False, last=True):
  """Adds the next tokens of a row to its text.

  Args:
    piece: a `Pieces`.
    ids: [t], tokens.
    ends: tokens that end a row.
    stream: called with each piece of the text; None for nobody.
    single: whether tokens are taken one by one, for the sake of the stream or of stop strings.
    last: whether no more tokens come.

  Returns:
    how many of the tokens belong to the row, and whether it is over.
  """
  end = np.flatnonzero(np.isin(ids, ends))
  text, say = ids[:end[0]] if end.size else ids, stream or (lambda piece: None)
  for count, part in enumerate(text[:, None] if single else [text], 1):
    say(piece.add(part))
    if piece.stopped:
      return count, True
  if end.size or last:
    say(piece.end())
  return len(text) + bool(end.size), bool(end.size)


def chosen(texts, vote, scorer):
  """The answers or scores of texts [B][n], and the index of each prompt's best; None without."""
  if vote is None and scorer is None:
    return None, None
  answers = [[(vote or scorer)(text) for text in some] for some in texts]
  return answers, [(choice.majority if vote else choice.best)(some) for some in answers]


def is_chat(prompt):
  """Whether a prompt is a conversation: a list of messages."""
  return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], dict)


def several(prompt):
  """Whether these are several prompts."""
  return isinstance(prompt, list | tuple) and not is_chat(prompt)


def reads(model):
  """Whether a model reads a source and writes a target."""
  return 'decoder_tokens' in model.module.inputs


def encoded(model, prompt):
  """The ids [T] of a prompt as the model wants them; raises InputError for an empty one."""
  t = model.tokenizer
  if is_chat(prompt):
    return t.encode(t.chat(prompt))
  if not isinstance(prompt, str):
    raise InputError(f'a prompt of {type(prompt).__name__}; give a text, or messages: a list of '
                     "dicts like dict(role='user', content='Hello')")
  if not prompt:
    name = None if t.bos is None else t.backend.id_to_token(t.bos)
    raise InputError('an empty prompt; give a text' + (
        '' if name is None or reads(model) else f', or {name!r} to begin from nothing'))
  if reads(model):
    return t.encode(prompt, special=True)
  ids, head = t.encode(prompt), t.head
  return ids if ids[:len(head)].tolist() == head else np.concatenate([np.int32(head), ids])


def truncated(model, ids, tokens):
  """Ids of a prompt, without the oldest that have no room; of a source, without the last."""
  if reads(model):
    room = model.config.encoder.context - source_prompt(model.params)
    return ids if len(ids) <= room else np.append(ids[:room - 1], ids[-1])
  room = model.config.context - tokens - length_of(model.params)
  if len(ids) <= room or room < 1:
    return ids
  head = ids[:1] if ids[0] == model.tokenizer.bos and room > 1 else ids[:0]
  return np.concatenate([head, ids[len(ids) - room + len(head):]])


def check_model(model, draft):
  """Raises InputError for a model that writes nothing, or a draft of other tokens."""
  if not model.config.decoding.causal:
    raise InputError(f'a {model.family.model_type} sees all tokens at once and writes none; give a '
                     'decoder, or an encoder and a decoder')
  if draft is not None and draft.tokenizer.fingerprint != model.tokenizer.fingerprint:
    raise InputError(f'the draft reads by another tokenizer ({draft.tokenizer.size} tokens) than '
                     f'the model ({model.tokenizer.size}); drafts need the same')


def check_choice(n, beams, temperature, vote, scorer):
  """Raises InputError where so many texts, or a choice of them, make no sense."""
  if beams == 1:
    check_copies(n, temperature)
  elif beams > 1 and not 1 <= n <= beams:
    raise InputError(f'n {n} texts of {beams} beams; give 1 to {beams}')
  if vote and scorer:
    raise InputError('both a vote and a scorer; give one of them')
  if (vote or scorer) and n == 1:
    raise InputError('one text is no choice for a vote or a scorer; give n above 1')


def check_together(beams, temperature, draft, stop, stream, many):
  """Raises InputError for settings that exclude each other."""
  if beams > 1:
    for name, value in (('a temperature', temperature), ('a draft', draft),
                        ('stop strings', stop), ('a stream', stream)):
      if value:
        raise InputError(f'{beams} beams and {name}: a beam search has none; leave one of them out')
  if not all(isinstance(s, str) and s for s in stop):
    raise InputError(f'stop strings {stop}; give texts that are not empty')
  if stream and many:
    raise InputError('a stream of several texts; give one prompt and n = 1')
