"""Where a run's metrics go: a JSONL file and TensorBoard."""
import json
import math
import pathlib

from lean_jax.files import write_text


class Metrics:
  """A hook of `fit` that writes every `every` steps: metrics.jsonl, and TensorBoard events.

  Each line of the file is {"step": ..., metric: value, ...}, null where a value is not finite. A
  resumed run drops the lines after the step that it goes on from, so that no step is in the file
  twice. With `rates`, a `rates.Rates`, its figures are among the values.
  """

  def __init__(self, folder, *, every, first=0, rates=None):
    import tensorboardX
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'metrics.jsonl'
    if path.exists():
      lines = path.read_text().splitlines(keepends=True)
      write_text(path, ''.join(x for x in lines if x.endswith('\n')
                               and json.loads(x)['step'] <= first))
    self._file = path.open('a')
    self._board = tensorboardX.SummaryWriter(str(folder), purge_step=first + 1)
    self._every, self._rates = every, rates

  def __call__(self, step, metrics):
    if self._rates is not None:
      self._rates.begin(step)
    if step % self._every:
      return
    values = {k: float(v) for k, v in metrics.items()}
    if self._rates is not None:
      values |= self._rates(step)
    told = {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(json.dumps(dict(step=step, **told)) + '\n')
    self._file.flush()
    for k, v in values.items():
      self._board.add_scalar(k, v, step)

  def close(self):
    self._file.close()
    self._board.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()
