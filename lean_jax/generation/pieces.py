"""Tokens to text, piece by piece: whole characters, up to a stop string."""

_BROKEN = '\ufffd'            # what stands for bytes that are no character, or not yet one
_HELD = 64                    # tokens that are kept back at most; a character has 4 bytes


class Pieces:
  """The text of tokens that follow a prompt, as they come.

  A piece is settled once no later token can change it: it ends with a whole character, and with
  nothing that may be the beginning of a stop string.

  Attributes:
    text: all pieces so far.
    stopped: whether a stop string came; it is no part of the text, nor is what follows it.
  """

  def __init__(self, tokenizer, prompt=(), stop=()):
    """Nothing has come yet.

    Args:
      tokenizer: a `Tokenizer`; tokens that it calls special have no text.
      prompt: ids before the text, which may decide whether it begins with a space.
      stop: strings that end the text.
    """
    self.text, self.stopped = '', False
    self._tokenizer, self._stop = tokenizer, tuple(stop)
    # Only the tokens of the last pieces are decoded again; what of their text was given out.
    self._window, self._fresh = [int(id) for id in prompt], len(prompt)
    self._known = tokenizer.decode(self._window)
    self._whole = ''                                          # of whole characters

  def add(self, ids) -> str:
    """The piece that these tokens settle; it may be empty."""
    if self.stopped:
      return ''
    self._window += [int(id) for id in ids]
    text = self._tokenizer.decode(self._window)
    if not text.endswith(_BROKEN) or len(self._window) - self._fresh > _HELD:
      self._take(text)
    return self._settle(self._open())

  def end(self) -> str:
    """The last piece, when no more tokens come."""
    if self.stopped:
      return ''
    self._take(self._tokenizer.decode(self._window))
    return self._settle(len(self._whole))

  def _take(self, text):
    new = text[len(self._known):]
    self._whole += new
    if new:                    # its tokens alone are the next window
      self._window = self._window[self._fresh:]
      self._known = self._tokenizer.decode(self._window)
    self._fresh = len(self._window)

  def _open(self):
    """Where the longest end of the text begins that may become a stop string."""
    size = len(self._whole)
    longest = max(map(len, self._stop), default=1) - 1
    return next((at for at in range(max(size - longest, 0), size)
                 if any(s.startswith(self._whole[at:]) for s in self._stop)), size)

  def _settle(self, end):
    found = [at for s in self._stop if (at := self._whole.find(s, len(self.text))) >= 0]
    if found:
      end, self.stopped = min(found), True
    piece = self._whole[len(self.text):end]
    self.text += piece
    return piece
