"""`lean.quantize`: every method of rounding weights, with calibration text or without."""
import dataclasses

from lean_jax import methods
from lean_jax.calibration.driver import calibrated, row
from lean_jax.calibration.text import text_batches
from lean_jax.data.packed import opened, packed_windows
from lean_jax.errors import InputError
from lean_jax.quantization.spec import QuantSpec, parse_spec
from lean_jax.training import mesh as meshes
from lean_jax.tree import named_weights

MATRICES = '(.*/)?layers/.*'      # the weights that methods take by default


def quantize(model, scheme, method='rtn', *, where=MATRICES, rules=(), calibration=None,
             samples=64, window=None, batch=8, field='text', folder=None, progress=None,
             report=None, **settings):
  """The model with its matrices in few bits.

  Args:
    model: a Model of float weights.
    scheme: 'w8a8', 'w4a16-g64', 'nf4-g64-dq', 'w2a16-g32', ...: see quantization/spec.py; or rules
      alone, as `allocate_bits` gives them, for what they match.
    method: 'rtn' rounds to nearest (clip='mse' within the best ranges), 'hqq' without calibration
      too; 'gptq' (damping=, act_order=, clip=), 'awq' (clip=) and 'smoothquant' (alpha=) look at
      what weights are multiplied with, and so do 'llm_int8' (threshold=) and a static scheme
      (inputs='absmax', 'percentile' or 'mse').
    where: a regular expression on the weights' whole names.
    rules: (pattern, scheme) of weights that have another scheme, or None to stay as they are; the
      first that matches a whole name is the one, and `where` comes last.
    calibration: text: a path (see `data.sources.open_source`), a Source, or Windows. None is none.
    samples: how many windows of it, or documents, are read, `batch` at a time.
    window: tokens a window; None is the model's context, at most 512.
    field: the text's key in JSON.
    folder: None, or where finished layers are kept, so that the same call goes on after a kill.
    progress: called with layers done, layers in all, and a note.
    report: None, or a list to which a dict for each weight is added: see `calibration.driver.row`.
    settings: of the method.

  Raises:
    InputError: an unknown method, scheme or setting, text that is too short, weights or inputs that
      are not finite, a pattern that matches nothing, or a weight that is quantized already.
  """
  bound = lambda spec: methods.bound(method, dict(settings, spec=spec))
  made = [(p, None if spec is None else bound(parse_spec(spec))) for p, spec in rules]
  if isinstance(scheme, str | QuantSpec):
    made.append((where, bound(parse_spec(scheme))))
  elif where != MATRICES or rules:
    raise InputError('rules in the place of a scheme say what they are for; leave where and rules= '
                     'out')
  else:
    made = [(p, None if spec is None else bound(parse_spec(spec))) for p, spec in scheme]
  rules = tuple(made)
  if any(rule and rule.spec is None for _, rule in rules):
    raise InputError(f'method {method!r} does not quantize; give rtn, hqq, '
                     'gptq, awq, smoothquant or llm_int8')
  rows = [] if report is None else report
  if calibration is None:
    if folder is not None:
      raise InputError('layers are kept while calibration goes through them; give calibration '
                       'text, or no folder')
    params = _at_once(model.params, rules, rows)
  else:
    batches = _batches(model, calibration, samples, window, batch, field)
    params, found = calibrated(model.config, model.params, rules, batches, folder=folder,
                               progress=progress)
    rows += found
  return dataclasses.replace(model, params=meshes.placed(params, model.params))


def _at_once(params, rules, rows):
  for _, rule in rules:
    if rule and rule.looks:
      raise InputError(f'method {rule.name!r} of {rule.spec} looks at the inputs of weights; give '
                       'calibration text')
  out = methods.at_once(params, rules)
  before, after = named_weights(params), named_weights(out)
  rows += [dict(stack='', layer=None) | row(n, before[n], after[n])
           for n in before if before[n] is not after[n] and type(before[n]) is not type(after[n])]
  return out


def _batches(model, data, samples, window, batch, field):
  decoder = model.config.decoding.causal and 'decoder_tokens' not in model.module.inputs
  if not decoder:
    return text_batches(model.module, model.tokenizer, opened(data, field), None, samples=samples,
                        batch=batch)
  window = window or min(model.config.context, 512)
  with packed_windows(data, 'all', model, window, field) as windows:
    return text_batches(model.module, model.tokenizer, None, windows, samples=samples, batch=batch)
