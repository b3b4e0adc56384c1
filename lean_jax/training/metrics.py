"""Where a run's metrics go: a JSONL file and TensorBoard."""
import json
import math
import pathlib

from lean_jax.files import write_text


class Metrics:
  """A hook of `fit` that writes every `every` steps: metrics.jsonl, and TensorBoard events.

  Each line of the file is {"step": ..., metric: value, ...}, null where a value is not finite. The
  first step that it is told of drops the lines from that step on, so that none is in the file twice
  after a run that was resumed, from whatever checkpoint. With `rates`, a `rates.Rates`, its figures
  are among the values.
  """

  def __init__(self, folder, *, every, rates=None):
    self._folder, self._every, self._rates = pathlib.Path(folder), every, rates
    self._file = self._board = None                    # opened by the first step

  def __call__(self, step, metrics):
    if self._file is None:
      self._open(step)
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

  def _open(self, first):
    import tensorboardX
    self._folder.mkdir(parents=True, exist_ok=True)
    path = self._folder / 'metrics.jsonl'
    if path.exists():
      lines = path.read_text().splitlines(keepends=True)
      write_text(path, ''.join(x for x in lines if x.endswith('\n')
                               and json.loads(x)['step'] < first))
    self._file = path.open('a')
    self._board = tensorboardX.SummaryWriter(str(self._folder), purge_step=first)

  def close(self):
    if self._file is not None:
      self._file.close()
      self._board.close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()
