"""Every method by its name, for rules written in a config. A new method is one line here.

A method takes a weight, its own settings by name, and `key=` if it draws random numbers.
"""
import functools
import inspect

import jax

from lean_jax.adapters.lora import lora, merge_lora
from lean_jax.adapters.requantize import requantize_lora
from lean_jax.errors import InputError
from lean_jax.quantization.ema import ema
from lean_jax.quantization.loftq import loftq
from lean_jax.quantization.lsq import lsq, lsq_plus
from lean_jax.quantization.pact import pact
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.tree import transform

METHODS = dict(rtn=rtn, fake_quantize=fake_quantize, lsq=lsq, lsq_plus=lsq_plus, pact=pact, ema=ema,
               lora=lora, merge_lora=merge_lora, loftq=loftq, requantize_lora=requantize_lora)


def apply(params, steps, key=None):
  """The tree after the methods of a config.

  Args:
    params: a tree of weights.
    steps: dicts in order, each with `where` (a regular expression on names), `method`, and the
      method's settings. Steps of the same method that follow each other are one list of rules: the
      first that matches a weight is the one.
    key: a jax PRNG key, for methods that need one.

  Raises:
    InputError: no such method or setting, or a pattern that matches nothing.
  """
  groups = []
  for step in map(dict, steps):
    where, method = step.pop('where'), step.pop('method')
    if not groups or groups[-1][0] != method:
      groups.append((method, []))
    groups[-1][1].append((where, bound(method, step)))
  for method, rules in groups:
    random = 'key' in inspect.signature(METHODS[method]).parameters
    # One compiled program, not one for each operation on each shape.
    params = jax.jit(functools.partial(transform, rules=rules))(params, key=key if random else None)
  return params


def bound(name, settings):
  """The method with its settings, Weight -> Weight."""
  if name not in METHODS:
    raise InputError(f'no method {name!r}; there are: {", ".join(METHODS)}')
  wanted = [p for p in inspect.signature(METHODS[name]).parameters if p not in ('w', 'key')]
  unknown, missing = set(settings) - set(wanted), set(wanted) - set(settings)
  if unknown or missing:
    raise InputError(f'method {name!r} takes {wanted}; given: {sorted(settings)}')
  return functools.partial(METHODS[name], **settings)
