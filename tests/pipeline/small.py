"""A pipeline of seconds, for tests: a teacher and its distilled student on text of one file."""
import importlib.util
import pathlib

_PATH = pathlib.Path(__file__).parents[2] / 'experiments' / 'lean_pipeline.py'


def get_config(text):
  """The tiny pipeline on the file `text`, with two variants and one claim."""
  spec = importlib.util.spec_from_file_location('lean_pipeline', _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config('tiny').unlock()
  c.data.update(path=text, window=32, train_tokens=20_000, test_tokens=512)
  c.domain.update(path=text, train_tokens=20_000, test_tokens=512)
  c.tokenizer.vocabulary = 300
  c.model.update(width=32, heads=2, groups=1, head_width=16, hidden=48)
  c.training.update(batch=8, warmup=5, save_every=10, log_every=1)
  c.phases.teacher.steps, c.phases.student.steps = 200, 200
  c.speed.update(prompt=8, decode=8, batch=1)
  c.sample.update(tokens=8)
  c.variants = tuple(v for v in c.variants if v['name'] in ('teacher', 'student-hard', 'student'))
  c.claims = (dict(name='the student is smaller', left='student.bytes', right='teacher.bytes',
                   bound=1.),)
  return c.lock()
