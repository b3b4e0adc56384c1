"""An experiment from its config to its report; what is done already is not done again."""
import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import shutil

import jax

from lean_jax import api
from lean_jax.data import sources
from lean_jax.data.tokenizer import load_tokenizer, train_bpe
from lean_jax.data.windows import pack
from lean_jax.errors import InputError, Preempted
from lean_jax.files import write_text
from lean_jax.models.decoder import DecoderConfig
from lean_jax.pipeline import claims, variants
from lean_jax.pipeline.measure import measure
from lean_jax.report.pareto import pareto
from lean_jax.report.progress import Bars
from lean_jax.report.table import markdown_report
from lean_jax.training import hosts
from lean_jax.training.mesh import make_mesh
from lean_jax.training.signals import termination
from lean_jax.version import __version__


def run(config, workdir, bars=None, profile=None):
  """Runs an experiment in a folder, or goes on with it there.

  On several hosts all call this, with a folder that all see. A variant trains on the mesh of them;
  the first one measures it, on a device of its own, and writes it and the report.

  Args:
    config: a ConfigDict, as experiments/lean_pipeline.py makes.
    workdir: a folder for everything that the run makes.
    bars: report.progress.Bars; None makes one on stderr.
    profile: None, or '10:15', the steps of each training to trace into its folder.

  Returns:
    The report: dict(variants, claims, sample, settings, versions), as in workdir/report.json.

  Raises:
    InputError: something in the config cannot be used, or the folder holds a run with another.
    Preempted: SIGTERM came; the same call goes on from there.
  """
  workdir, bars = pathlib.Path(workdir), bars or Bars(quiet=not hosts.first())
  hosts.agree('config', dict(config=json.loads(json.dumps(config.to_dict())), lean_jax=__version__,
                             jax=jax.__version__))
  mesh = make_mesh(**dict(config.mesh))
  teacher = api.load(config.teacher) if config.teacher else None
  if teacher and config.data.window > teacher.config.context:
    raise InputError(f'data.window is {config.data.window} tokens, the teacher in {config.teacher} '
                     f'reads {teacher.config.context} at most; lower --config.data.window')
  main, domain = _source(config.data), _source(config.domain)
  settings = _settle(config, workdir, (main, domain))
  with termination() as stop:
    tokenizer = teacher.tokenizer if teacher else _tokenizer(config, main, workdir, bars)
    windows = _windows(config, main, domain, tokenizer, workdir / 'windows', bars)
    teacher = teacher or DecoderConfig(
        vocabulary=tokenizer.size, context=config.data.window, **dict(config.model))
    models, figures = {}, []
    for variant in map(dict, config.variants):
      model, found = _variant(variant, models, teacher, tokenizer, windows, config, mesh, workdir,
                              bars, stop, profile)
      models[variant['name']] = model
      figures.append(found)
  checked = claims.check(config.claims, figures)
  report = dict(variants=figures, claims=checked, sample=_sample(config.sample, models),
                settings=settings, versions=versions())
  if hosts.first():
    _write(report, workdir)
  hosts.barrier('the report is written')
  return report


def versions():
  """What made a report."""
  packages = {name: importlib.metadata.version(name) for name in (
      'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tokenizers')}
  return dict(lean_jax=__version__, python=platform.python_version(), **packages,
              device=jax.devices()[0].device_kind, devices=jax.device_count(),
              platform=platform.platform())


def _source(c):
  return sources.open_source(c.path, c.kind, c.field, c.data_dir or None)


def _settle(config, workdir, corpora):
  """The settings, written on the first run and compared on each later one, but for the mesh."""
  settings = json.loads(json.dumps(dict(config.to_dict(), corpora=[
      s.fingerprint for s in corpora])))
  hosts.agree('texts', settings['corpora'])
  path = workdir / 'settings.json'
  if path.exists():
    before = json.loads(path.read_text())
    other = sorted(k for k in (settings.keys() | before.keys()) - {'mesh'}
                   if settings.get(k) != before.get(k))
    if other:
      raise InputError(f'{workdir} holds a run with another {", ".join(other)}; choose another '
                       '--workdir, or remove that one')
    return settings
  hosts.barrier('settings are compared')
  if hosts.first():
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=2))
  return settings


def _tokenizer(config, source, workdir, bars):
  folder = workdir / 'tokenizer'
  with _first_alone('the tokenizer is trained'):
    if (folder / 'tokenizer_config.json').exists():
      return load_tokenizer(folder)
    with bars.bar('train tokenizer') as update:
      texts = [d.text for d in source.documents('train')]
      made = train_bpe(texts, config.tokenizer.vocabulary,
                       lambda done, total, what: update(done, total))
      update(len(texts), note=f'{made.size} tokens, from {sum(map(len, texts)) / 1e6:.1f} MB')
    folder.mkdir(parents=True, exist_ok=True)
    made.save(folder)
    return made


@contextlib.contextmanager
def _first_alone(what):
  """The first host goes through the block before the others, who find what it wrote."""
  if not hosts.first():
    hosts.barrier(what)
  yield
  if hosts.first():
    hosts.barrier(what)


def _windows(config, main, domain, tokenizer, cache, bars):
  """Windows of each split: main, test, domain, domain_test."""
  c, d = config.data, config.domain
  out = {}
  for name, source, split, tokens in (
      ('main', main, 'train', c.train_tokens), ('test', main, 'test', c.test_tokens),
      ('domain', domain, 'train', d.train_tokens), ('domain_test', domain, 'test', d.test_tokens)):
    with bars.bar(f'pack {name}') as update, _first_alone(f'{name} is packed'):
      out[name] = pack(source, split, tokenizer, c.window, cache, max_tokens=tokens,
                       progress=update)
      update(out[name].bytes, note=f'{out[name].tokens:,} tokens of {out[name].documents} '
             'documents')
  return out


def _variant(variant, models, teacher, tokenizer, windows, config, mesh, workdir, bars, stop,
             profile):
  """A variant and its figures: made, or found finished in the work directory."""
  name = variant['name']
  folder, scratch = workdir / 'variants' / name, workdir / 'training' / name
  done = folder / 'figures.json'
  if hosts.of_first(done.exists()):
    bars.line(name, 'done before')
    return api.load(folder), json.loads(done.read_text())
  if stop():
    raise Preempted(f'asked to stop before {name}; the same command goes on from there')
  if variant['start'] == 'teacher' and not models and config.teacher:
    variant = variant | dict(phase=None)
  model = variants.begin(variant, models, teacher, tokenizer, config.seed)
  model, seconds = variants.make(variant, model, models, windows, config, mesh, scratch, bars, stop,
                                 profile)
  model = dataclasses.replace(model, params=hosts.local(model.params))
  if hosts.first():
    with bars.bar(f'measure {name}') as update:
      found = dict(name=name, train_seconds=seconds) | measure(
          model, windows['test'], windows['domain_test'] if variant.get('domain') else None,
          dict(config.speed), update)
      update(1, 1, f'perplexity {found["perplexity"]:.3f}, {found["bytes"]:,} bytes')
    api.save(model, folder, extra={'figures.json': json.dumps(found, indent=2)})
    shutil.rmtree(scratch / 'checkpoints', ignore_errors=True)
  hosts.barrier(f'{name} is measured')
  return model, json.loads(done.read_text())


def _sample(c, models):
  if c.variant not in models:
    raise InputError(f'sample of {c.variant!r}: no such variant; there are: {", ".join(models)}')
  text = models[c.variant].generate(c.prompt, tokens=c.tokens, temperature=c.temperature, seed=0)
  return dict(variant=c.variant, text=text)


def _write(report, workdir):
  pareto(report['variants']).savefig(workdir / 'pareto.png')
  write_text(workdir / 'report.md', markdown_report(report))
  write_text(workdir / 'report.json', json.dumps(report, indent=2))
