"""A trace of some steps of a run, for TensorBoard's or XProf's profiler."""
import jax

from lean_jax.errors import InputError
from lean_jax.training import hosts


def steps_of(text):
  """(10, 15) of '10:15'.

  Raises:
    InputError: it is no such range.
  """
  first, colon, last = text.partition(':')
  if not (colon and first.isdecimal() and last.isdecimal() and 2 <= int(first) <= int(last)):
    raise InputError(f'profile {text!r}; expected FIRST:LAST, as 10:15, steps from 2 on: the first '
                     'is compiled')
  return int(first), int(last)


class Profile:
  """A hook of `fit` that traces the steps from `first` to `last` into a folder.

  It waits for the step before and for the last one, so that nothing else is in the trace. A run
  that begins after `first` traces nothing.
  """

  def __init__(self, folder, first, last):
    self._folder, self._first, self._last = str(folder), first, last
    self._tracing = False

  def __call__(self, step, metrics):
    if step == self._first - 1:
      jax.block_until_ready(metrics)
      jax.profiler.start_trace(self._folder)
      self._tracing = True
    if self._tracing and step >= self._last:
      jax.block_until_ready(metrics)
      self.close()
      hosts.barrier('the trace is written')            # that takes each its own time

  def close(self):
    """Ends a trace under way."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()
