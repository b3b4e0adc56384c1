"""Quantization that looks at what weights are multiplied with, a layer at a time.

Each layer is run on what the quantized layers before it give, its weights are rounded, and the
rounded layer's output goes into the next: the order of GPTQ (arXiv:2210.17323, section 4). At once
in memory are the model, what is finished of its copy, and one layer's statistics.
"""
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax import files
from lean_jax import tree as trees
from lean_jax.calibration import blocks
from lean_jax.calibration.observer import Notes, observed
from lean_jax.calibration.shared import equalized
from lean_jax.errors import InputError
from lean_jax.models.segments import replaced, restacked
from lean_jax.objectives.forward import INPUTS
from lean_jax.quantization.error import relative_error
from lean_jax.quantization.gptq import FEWEST
from lean_jax.quantization.rtn import rtn
from lean_jax.report.kinds import kind
from lean_jax.training.checkpoint import load_model, save_model
from lean_jax.training.digest import fingerprint
from lean_jax.weights import Dense, Rescaled
from lean_jax.weights.base import to_matrix

UNSEEN = 'its inputs are not seen: rounded to nearest'


def calibrated(config, params, rules, batches, *, folder=None, progress=None):
  """The tree with methods applied that look at the inputs of weights.

  Args:
    config: of the model.
    params: its tree of weights, float where a rule is for them.
    rules: [(pattern, methods.Bound or None)], as of `tree.transform`.
    batches: dicts of arrays of one shape each: what `objectives.forward` takes.
    folder: None, or where each finished layer is kept, so that a run that was killed goes on; it is
      left there.
    progress: called with layers done, layers in all, and a note.

  Returns:
    The tree; and a dict for each weight, see `row`.

  Raises:
    InputError: weights or their inputs that are not finite, with the layer's name; a pattern or
      weight as of `tree.transform`; a folder of another quantization.
  """
  plan, rows = trees.matched(params, rules), []
  kept = None if folder is None else Kept(folder, params, rules, batches)
  encoded, done = [None] * len(batches), 0
  total = sum(len(blocks.sites(stack)) for stack in config.stacks.values())
  for prefix, stack in config.stacks.items():
    flow = [blocks.entries(config.module, params, b, prefix, e) for b, e in zip(batches, encoded)]
    own = blocks.subtree(params, prefix.rstrip('/'))
    finished = []
    for site in blocks.sites(stack):
      if progress:
        progress(done, total, f'{prefix}layer {site.number}')
      found = kept and kept.read(prefix, site.number)
      if not found:
        found = _layer(stack, site, own, plan, flow, prefix)
        if kept:
          kept.write(prefix, site.number, *found)
      finished.append(found[0])
      rows, done = rows + found[1], done + 1
      flow = [e._replace(x=blocks.through(stack, site.kind, found[0], e.x,
                                          blocks.place(stack, site), e.frame)) for e in flow]
    whole = restacked(stack, finished)
    params = replaced(params, f'{prefix}layers'.split('/'), lambda _, whole=whole: whole)
    if prefix == 'encoder/':
      encoded = [blocks.ended(config.module, params, e.x) for e in flow]
  params, more = _others(config, params, plan, batches)
  return params, rows + more


def _layer(stack, site, params, plan, flow, prefix):
  """The tree of a layer of a stack's with its methods applied, and its rows."""
  tree, full = blocks.layer(params, site), f'{prefix}{site.prefix}/'
  rules = {n: plan[full + n] for n in trees.named_weights(tree) if full + n in plan}
  if not rules:
    return tree, []
  stats, where = {}, f'{prefix}layer {site.number}'
  _check_weights(where, tree, rules)
  for e in flow:
    new = blocks.noted(stack, site.kind, counted(rules), tree, e.x, blocks.place(stack, site),
                       e.frame)
    stats = _added(stats, new)
  _check_inputs(where, {n: stats[n] for n in stats if n in rules})
  tree, stats = equalized(stack, site.kind, tree, rules, stats)
  return _rounded(tree, rules, stats, dict(stack=prefix.rstrip('/'), layer=site.number), where)


def _others(config, params, plan, batches):
  """The tree with the methods of weights that are in no layer applied, and their rows."""
  inside = tuple(f'{prefix}layers/' for prefix in config.stacks)
  rules = {n: rule for n, rule in plan.items() if not n.startswith(inside)}
  stats = {}
  _check_weights('the model', params, rules)
  if rules:
    @jax.jit
    def noted(params, batch):
      notes = Notes(batch.get('mask'), histogram=counted(rules))
      config.module.apply({'params': observed(params, notes)},
                          **{k: batch[k] for k in INPUTS if k in batch})
      return {n: s for n, s in notes.found.items() if n in rules}
    for batch in batches:
      stats = _added(stats, noted(params, batch))
  _check_inputs('the model', stats)
  return _rounded(params, rules, stats, dict(stack='', layer=None), 'the model')


def _added(stats, new):
  return {n: stats[n].add(s) if n in stats else s for n, s in new.items()}


def counted(rules):
  """Whether a rule needs the sizes of inputs: for a static range."""
  return any(getattr(rule.spec, 'static', False) for rule in rules.values())


def _rounded(tree, rules, stats, at, where):
  rows = []

  def one(path, w):
    name = trees.name(path)
    if name not in rules:
      return w
    given, rule = stats.get(name), rules[name]
    base = w.base if isinstance(w, Rescaled) else w
    try:
      with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        unseen = rule.looks and given is None
        new = rtn(base, rule.spec) if unseen else rule(base, stats=given)
    except InputError as error:
      raise InputError(f'{name} of {where}: {error}') from error
    note = '; '.join([UNSEEN] * unseen + [str(w.message) for w in told])
    rows.append(at | row(name, base, new, given, note))
    return w.__class__(new, w.by) if isinstance(w, Rescaled) else new
  return jax.tree_util.tree_map_with_path(one, tree, is_leaf=trees.is_weight), rows


def row(name, before, after, stats=None, note=''):
  """What happened to a weight: its name, scheme, parameters, bytes, relative error and a note.

  The error is that of the weight's products with the inputs that were seen, sqrt(E |x (W' - W)|^2 /
  E |x W|^2); of the weight itself where none were.
  """
  if stats is not None and stats.rows.ndim:
    few = int(jnp.sum(stats.rows < FEWEST))
    least, E = int(jnp.min(stats.rows)), stats.rows.size
    seen = f'an expert saw {least} inputs or more'
    note = note or (f'{few} of {E} experts saw fewer than {FEWEST} inputs' if few else seen)
  second = None if stats is None else stats.second
  matrix = lambda w: to_matrix(meta.unbox(w), w.dims).astype(jnp.float32)
  return dict(name=name, scheme=kind(after),
              parameters=trees.parameters({'w': before}), bytes=trees.nbytes(after),
              error=float(relative_error(matrix(before), matrix(after), second)), note=note)


def _check_weights(where, tree, rules):
  for name, w in trees.named_weights(tree).items():
    if name in rules and isinstance(w, Dense) and not bool(jnp.isfinite(meta.unbox(w)).all()):
      raise InputError(f'{name} of {where} has a NaN or an infinity; mend the checkpoint')


def _check_inputs(where, stats):
  for name, s in stats.items():
    if not bool(jnp.all(s.finite)):
      raise InputError(f'the inputs of {name} of {where} have a NaN or an infinity; look for what '
                       'makes them before it, or calibrate in float32')


class Kept:
  """The finished layers of a quantization, in a folder."""

  def __init__(self, folder, params, rules, batches):
    self.folder = pathlib.Path(folder)
    text = json.dumps([fingerprint(params), fingerprint(dict(enumerate(batches))), [
        (pattern, repr(rule and (rule.name, rule.apply.keywords,
                                 rule.scales and rule.scales.keywords)))
        for pattern, rule in rules]])
    path = self.folder / 'of.json'
    if path.exists() and path.read_text() != text:
      raise InputError(f'{folder} has layers of another quantization; remove it, or name another')
    self.folder.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)

  def read(self, prefix, number):
    """(tree, rows) of a layer, or None where it is not finished."""
    path = self._path(prefix, number)
    if not path.exists():
      return None
    tree, meta = load_model(path)
    return tree, meta['rows']

  def write(self, prefix, number, tree, rows):
    """Keeps a layer."""
    save_model(self._path(prefix, number), tree, dict(rows=rows))

  def _path(self, prefix, number):
    return self.folder / f'{prefix.replace("/", "-")}{number:04d}'
