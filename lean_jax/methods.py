"""Every method by its name, for rules written in a config. A new method is one line here.

A method takes a weight, its own settings by name, `key=` if it draws random numbers, and `stats=`,
calibration.Statistics of the weight's inputs, if it looks at them.
"""
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lean_jax.adapters.dora import dora
from lean_jax.adapters.ia3 import ia3
from lean_jax.adapters.lora import lora
from lean_jax.adapters.merge import merge
from lean_jax.adapters.pissa import pissa
from lean_jax.adapters.requantize import requantize_lora
from lean_jax.adapters.vera import vera
from lean_jax.errors import InputError
from lean_jax.quantization.awq import awq, awq_scales
from lean_jax.quantization.ema import ema
from lean_jax.quantization.gptq import gptq
from lean_jax.quantization.hqq import hqq
from lean_jax.quantization.llm_int8 import llm_int8
from lean_jax.quantization.loftq import loftq
from lean_jax.quantization.lsq import lsq, lsq_plus
from lean_jax.quantization.outliers import outlier_scales, outliers
from lean_jax.quantization.pact import pact
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.smoothquant import smooth_scales
from lean_jax.quantization.spec import parse_spec
from lean_jax.tree import transform

METHODS = dict(rtn=rtn, gptq=gptq, awq=awq, smoothquant=rtn, hqq=hqq, llm_int8=llm_int8,
               outliers=outliers, fake_quantize=fake_quantize, lsq=lsq, lsq_plus=lsq_plus,
               pact=pact, ema=ema, lora=lora, dora=dora, vera=vera, pissa=pissa, ia3=ia3,
               loftq=loftq, merge=merge, requantize_lora=requantize_lora)
# Of the methods that first scale the inputs that weights share: the scales, see `equalization`.
SCALES = dict(awq=awq_scales, smoothquant=smooth_scales, outliers=outlier_scales)


class Bound(NamedTuple):
  """A method with its settings.

  Attributes:
    name: of the method.
    apply: (w, stats=, key= as it takes them) -> weight.
    scales: None, or (matrices, stats) -> what their inputs are divided by.
    spec: the QuantSpec that it brings a weight to; None for a method that does not quantize.
    looks: whether it cannot do without the weight's inputs.
    takes: the names of what it takes besides the weight and its settings.
  """
  name: str
  apply: Callable
  scales: Callable | None
  spec: Any
  looks: bool
  takes: frozenset

  def __call__(self, w, **given):
    return self.apply(w, **{k: v for k, v in given.items() if k in self.takes})


def apply(params, steps, key=None):
  """The tree after the methods of a config.

  Args:
    params: a tree of weights.
    steps: dicts in order, each with `where` (a regular expression on names), `method`, and the
      method's settings. Steps of the same method that follow each other are one list of rules: the
      first that matches a weight is the one.
    key: a jax PRNG key, for methods that need one.

  Raises:
    InputError: no such method or setting, one that looks at inputs, or a pattern that matches
      nothing.
  """
  groups = grouped(steps)
  for rules in groups:
    for _, rule in rules:
      if rule.looks:
        raise InputError(f'method {rule.name!r} looks at the inputs of weights; use lean.quantize('
                         f'model, scheme, {rule.name!r}, calibration=TEXT)')
  for rules in groups:
    params = at_once(params, rules, key)
  return params


def grouped(steps):
  """The steps of `apply` as lists of rules [(where, Bound)], one for each run of one method."""
  groups = []
  for step in map(dict, steps):
    where, method = step.pop('where'), step.pop('method')
    if not groups or groups[-1][0][1].name != method:
      groups.append([])
    groups[-1].append((where, bound(method, step)))
  return groups


def at_once(params, rules, key=None):
  """The tree after rules of which none looks at inputs: one compiled program, not one for each
  operation on each shape. Arrays that no method changes are those of `params`, not copies.
  """
  random = any(rule and 'key' in rule.takes for _, rule in rules)
  traced = []

  def changed(params, key):
    given = {id(x): k for k, x in enumerate(jax.tree.leaves(params))}
    leaves, shape = jax.tree.flatten(transform(params, rules, key=key))
    origins = [given.get(id(x)) for x in leaves]
    traced.append((shape, origins))
    return [x for x, k in zip(leaves, origins) if k is None]
  new = iter(jax.jit(changed)(params, key if random else None))
  (shape, origins), old = traced[-1], jax.tree.leaves(params)
  return shape.unflatten([next(new) if k is None else old[k] for k in origins])


def bound(name, settings):
  """The method with its settings, a `Bound`.

  Raises:
    InputError: no such method, a setting that it does not have, or one that is missing.
  """
  if name not in METHODS:
    raise InputError(f'no method {name!r}; there are: {", ".join(METHODS)}')
  scales, given = SCALES.get(name), dict(settings)
  if 'spec' in given:
    given['spec'] = parse_spec(given['spec'])
  own, other = _parameters(METHODS[name], 'w'), _parameters(scales, 'matrices')
  takes = {'stats', 'key'} & set(own)
  wanted = {k: v for k, v in (other | own).items() if k not in ('stats', 'key')}
  needed = [k for k, v in wanted.items() if v.default is inspect.Parameter.empty]
  missing = [k for k in needed if k not in given]
  if missing or set(given) - set(wanted):
    raise InputError(f'method {name!r} takes {list(wanted)}; given: {sorted(settings)}')
  pick = lambda parameters: {k: v for k, v in given.items() if k in parameters}
  looks = scales is not None or (
      'stats' in own and own['stats'].default is inspect.Parameter.empty)
  return Bound(name, functools.partial(METHODS[name], **pick(own)),
               scales and functools.partial(scales, **pick(other)), given.get('spec'), looks,
               frozenset(takes))


def _parameters(function, first):
  """{name: inspect.Parameter} of a function, its first one left out; {} of None."""
  if function is None:
    return {}
  return {k: p for k, p in inspect.signature(function).parameters.items() if k != first}
