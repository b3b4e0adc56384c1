"""Texts that are written some tokens at a time: what the compiled programs need around them."""
import functools
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax import tree
from lean_jax.generation import loop, speculative
from lean_jax.generation.caches import cache_bytes, with_cache
from lean_jax.generation.prompts import begun, check_length
from lean_jax.generation.sampling import Sampling
from lean_jax.kernels.platforms import device
from lean_jax.kernels.platforms.choice import partitioned
from lean_jax.models.prefix import length_of, source_prompt
from lean_jax.models.segments import configured, converted
from lean_jax.weights.prepared import prepare

WRITTEN_OUT = 1 << 30         # bytes of weights, up to which `written_out` copies them, and
DEEPEST = 24                  # layers, up to which it writes them out


class Writer:
  """Continues prompts, or writes targets of sources.

  Attributes:
    at: the place of the next token.
    end: the place after the last one.
    ended: [rows] bool, which rows are at their end.
    cache_bytes: of what the model keeps of the texts, a draft's own apart.
  """

  def __init__(self, module, params, prompts, *, tokens, sampling=None, ends=(), key=None,
               copies=1, draft=None, ahead=4, cache=None):
    """Reads nothing yet.

    Args:
      module: a decoder, or an encoder and a decoder.
      params: its parameters, of any kinds of weights.
      prompts: a list of ids, [T] each, that `checked_prompts` let pass; the sources of an encoder.
      tokens: how many are written at most.
      sampling: a `sampling.Sampling`; None takes the most probable tokens.
      ends: tokens that end a row.
      key: a jax PRNG key; needed where something is sampled.
      copies: rows of each prompt, neighbours.
      draft: (module, params) of a smaller decoder with the same tokens, see `speculative`.
      ahead: tokens that it drafts at a time.
      cache: how the model's keys and values are kept, see `caches`.

    Raises:
      InputError: more tokens than the context has, a draft that does not fit, or a cache that the
        model cannot have.
    """
    module = with_cache(module, cache, 0 if draft is None else ahead)
    self.module, self.params = written_out(module, params)
    self.config = module.config
    source, beginnings = begun(module, prompts, source_prompt(params))
    longest = max(map(len, beginnings))
    self._given = {} if source is None else dict(zip(('source', 'lengths'), source))
    self.begin = longest if source is None else 1          # the place of the first token given out
    self.at, self.end = longest, self.begin + tokens
    check_length((longest if source is None else 1) + length_of(params), tokens,
                 self.config.context)
    self._renewals = renewals(self.config, longest, self.end)
    self._unread = {longest, *self._renewals}
    self._sampling, self._copies = sampling or Sampling(), copies
    self._ends = np.asarray(ends, np.int32).reshape(-1)
    self._small, self._ahead, self._draft = None, ahead, None
    if draft is not None:
      speculative.check(module, draft[0], longest, self.end, ahead)
      self._small = written_out(*draft)
    greedy = self._sampling.temperature is None
    ahead = 0 if draft is None else ahead
    room = loop.bucket(self.end + ahead, self.config.context)
    self.state = loop.begin([b for b in beginnings for _ in range(copies)], room,
                            None if greedy else key)
    self.cache_bytes = cache_bytes(self.config, len(self.state.ids), room,
                                   0 if source is None else source[0].shape[1] + source_prompt(
                                       params))
    self.ended = np.zeros((len(prompts) * copies,), bool)

  def advance(self, count=None):
    """Writes `count` more tokens a row, or all; fewer where all rows end.

    Returns:
      whether there is more to write.
    """
    end = self.end if count is None else min(self.end, self.at + count)
    while self.at < end and not self.ended.all():
      if self.at in self._unread:
        self._unread.remove(self.at)
        self._read()
      else:
        self._write(min([end, *(n for n in self._renewals if n > self.at)]))
      self.at, self.ended = int(self.state.at), np.array(self.state.ended)
    return self.at < self.end and not self.ended.all()

  def stop(self, rows):
    """Ends rows [rows] bool, whatever their last token."""
    self.ended = self.ended | rows
    self.state = self.state.replace(ended=jnp.asarray(self.ended))

  def ids(self):
    """[rows n], int32: the tokens so far, without the prompts; rows that ended are filled up."""
    out = np.array(self.state.ids)[:, self.begin:min(self.at, self.end)]
    ends = np.isin(out, self._ends)
    if ends.any(axis=1).all():                       # drafts go on past the last end
      out = out[:, :1 + ends.argmax(axis=1).max()]
    last = getattr(self.config, 'last', None)
    if last is not None and self.at >= self.end:
      out[:, -1] = np.where(np.isin(out[:, :-1], self._ends).any(axis=1), out[:, -1], last)
    return out

  @property
  def drafts(self):
    """How many tokens were drafted, and how many of them were kept."""
    return (0, 0) if self._draft is None else (int(self._draft.proposed), int(self._draft.kept))

  def _read(self):
    first = self.at == int(self.state.first)
    size = dict(copies=self._copies if first else 1)
    size['padded'] = self.at if self._given else min(
        loop.bucket(self.at, self.config.context), self.state.ids.shape[1])
    if self._small:
      self._draft = speculative.opened(*self._small, self.state.ids, self.state.start,
                                       self.state.at, **size)
    self.state = loop.prefill(self.module, self.params, self.state, self._sampling, self._ends,
                              **self._given, **size)

  def _write(self, end):
    how = self._sampling, self._ends
    if self._small:            # a draft may be written past the end, but not past the room
      last = self.state.ids.shape[1] - self._ahead
      if self.at < min(end, last):
        self.state, self._draft = speculative.decode(
            self.module, self.params, *self._small, self.state, self._draft, min(end, last), *how,
            ahead=self._ahead)
        return
    self.state = loop.decode(self.module, self.params, self.state, end, *how)


def renewals(config, start, end):
  """The places from `start` to `end` at which the cache is made anew for the tokens after.

  It is once a sequence is longer than one of `StackConfig.renewals`.
  """
  return [n + 1 for n in config.decoding.renewals if start <= n < end - 1]


def written_out(module, params):
  """The module and params with each layer by itself, and weights laid out for the device.

  Inside a loop over tokens, XLA copies a layer's weights out of a stack of layers for every
  token. Written-out layers are copied once, and need that much memory more; so do weights that
  are laid out anew, see `prepare`. Large models stay as they are, and so do the layers of deep
  ones, whose programs take long to compile.

  What was made of the last two trees is kept as long as their arrays live, for the next text.
  """
  config = module.config
  if tree.nbytes(params) > WRITTEN_OUT:
    return module, params
  layers = sum(stack.layers for stack in config.stacks.values())
  apart = config.scan_layers and layers <= DEEPEST
  platform = None if partitioned() else dict(cpu='cpu', tpu='tpu').get(device.platform())
  if apart:
    module = configured(config, scan_layers=False).module
  arrays, shape = jax.tree.flatten(params)
  key = config, apart, platform, shape
  kept = _KEPT.get(key)
  if kept is not None and all(ref() is x for ref, x in zip(kept.refs, arrays)):
    return module, kept.params
  made = _written_out(config, apart, platform, params)
  new = {id(x) for x in jax.tree.leaves(made)}
  # What holds all arrays of the tree itself would keep them alive.
  if all(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in arrays) and any(
      id(x) not in new for x in arrays):
    _KEPT.pop(key, None)
    _KEPT[key] = _Kept([weakref.ref(x, lambda _: _KEPT.pop(key, None)) for x in arrays], made)
    for old in list(_KEPT)[:-2]:
      del _KEPT[old]
  return module, made


class _Kept(NamedTuple):
  """Arrays of a tree, weakly, and what was made of it."""
  refs: list
  params: Any


_KEPT = {}                    # of a model and its draft


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _written_out(config, apart, platform, params):
  if apart:
    params = converted(config, params, False)[1]
  return params if platform is None else prepare(params, platform)
