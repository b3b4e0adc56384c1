"""Live progress on the console, one bar a step of the work."""
import contextlib
import datetime
import time

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)


class Bars:
  """Bars of what runs now; each leaves one line when it is done.

  On a console that is no terminal only those lines are printed; if `quiet`, not even they.
  """

  def __init__(self, console=None, quiet=False):
    self.console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)

  @contextlib.contextmanager
  def bar(self, title, total=None):
    """Gives `update(done, total=None, note='')`; the last note stays on the line that remains."""
    columns = (TextColumn('{task.description:<34}'), BarColumn(20), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn(), TextColumn('{task.fields[note]}'))
    start, last = time.monotonic(), dict(note='')
    with Progress(*columns, console=self.console, transient=True,
                  disable=not self.console.is_terminal) as progress:
      task = progress.add_task(title, total=total, note='')

      def update(done, total=None, note=None):
        if note is not None:
          last['note'] = note
        more = {} if total is None else dict(total=total)
        progress.update(task, completed=done, note=last['note'], **more)
      yield update
    self.line(title, f'{time.monotonic() - start:6.1f} s   {last["note"]}')

  def line(self, title, text):
    """Prints one line of the result."""
    self.console.print(f'{title:<34} {text}', markup=False)


def training(update, rates, every=10):
  """A hook of `fit` that shows each loss, tokens a second, and the rest that `rates` knows.

  Args:
    update: of a bar.
    rates: of `training.rates.Rates`.
  """
  def hook(step, metrics):
    rates.begin(step)
    if step % every and step != rates.steps:
      return
    terms = '  '.join(f'{k} {float(v):.3f}' for k, v in metrics.items())
    found = rates(step)
    said = [f'{found["tokens_per_second"]:,.0f} tokens/s'] if 'tokens_per_second' in found else []
    said += [f'MFU {found["mfu"]:.1%}'] if 'mfu' in found else []
    if 'device_memory_bytes' in found:
      said += [f'{found["device_memory_bytes"] / 2 ** 30:.1f} GiB']
    if found.get('seconds_left', 0) >= 1:
      said += [f'{datetime.timedelta(seconds=round(found["seconds_left"]))} left']
    update(step, rates.steps, f'{terms}  {"  ".join(said)}')
  return hook
