"""Live progress on the console, one bar a step of the work."""
import contextlib
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

  On a console that is no terminal only those lines are printed.
  """

  def __init__(self, console=None):
    self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)

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


def training(update, steps, tokens, every=10):
  """A hook of `fit` that shows the losses and tokens a second.

  Args:
    update: of a bar.
    steps: in all.
    tokens: a step.
  """
  since = []                             # when and at which step the rate was last looked at

  def hook(step, metrics):
    now = time.monotonic()
    since[:] = since or (now, step)        # the first step's time is compilation
    if step % every and step != steps:
      return
    rate = (step - since[1]) * tokens / max(now - since[0], 1e-9)
    since[:] = now, step
    terms = '  '.join(f'{k} {float(v):.3f}' for k, v in metrics.items())
    update(step, steps, f'{terms}  {rate:,.0f} tokens/s')
  return hook
