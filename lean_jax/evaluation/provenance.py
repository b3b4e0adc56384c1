"""Which products of a program take in which weights, and how they were rounded on the way there.

A walk over a jaxpr with, for each value, where it comes from: a set of traces, each an origin and a
state. Origins are a weight's number, INPUTS (of the program, or anything after a product), and
COTANGENT (anything that depends on one). States:

  RAW         the value itself, or what is made of it
  STATISTIC   something that many values share: a maximum, a sum, a scale
  ROUNDED     one of few: it, or what it is made of, went through integers or a comparison

A value is rounded if a trace is ROUNDED and none is RAW: the scale that a code is multiplied with
may be any number, the code may not. So w + (round(w) - w) is not rounded: in floats it is not
round(w) to the bit. Where a weight meets inputs, inputs are what comes out.
"""
import typing

import jax
import jax.numpy as jnp
from jax.extend import core

INPUTS, COTANGENT = 'inputs', 'cotangent'
RAW, STATISTIC, ROUNDED = 'raw', 'statistic', 'rounded'

_PRODUCTS = {'dot_general', 'ragged_dot_general', 'ragged_dot', 'conv_general_dilated'}
_ROWS = {'gather', 'dynamic_slice'}                    # of the first operand, by the others


class Product(typing.NamedTuple):
  """A product that takes in a weight.

  Attributes:
    weight: its number.
    left, right: dtypes of the other operand and of the weight; `left` is None where the weight is
      looked up in, or added.
    left_rounded, right_rounded: whether each is one of few values.
    backward: whether it depends on a cotangent.
  """
  weight: int
  left: str | None
  left_rounded: bool
  right: str
  right_rounded: bool
  backward: bool


def walk(jaxpr, inputs, found):
  """The traces of a jaxpr's outputs.

  Args:
    jaxpr: open; what it closes over has no origin.
    inputs: for each of its inputs a frozenset of (origin, state).
    found: a set, to which the products are added.
  """
  env = dict(zip(jaxpr.invars, inputs))
  read = lambda v: frozenset() if isinstance(v, core.Literal) else env.get(v, frozenset())
  for eqn in jaxpr.eqns:
    env.update(zip(eqn.outvars, _step(eqn, [read(v) for v in eqn.invars], found)))
  return [read(v) for v in jaxpr.outvars]


def rounded(traces):
  """Whether a value is one of few."""
  states = {state for _, state in traces}
  return ROUNDED in states and RAW not in states


def joined(*many):
  """The traces of what is made of several values."""
  traces = frozenset().union(*many)
  met = frozenset(t for t in traces if t[0] in (INPUTS, COTANGENT))
  return met or traces


def _step(eqn, inputs, found):
  name = eqn.primitive.name
  if name == 'scan':
    return _scan(eqn, inputs, found)
  if name == 'while':
    return _while(eqn, inputs, found)
  if name == 'cond':
    outs = [walk(b.jaxpr, inputs[1:], found) for b in eqn.params['branches']]
    return [joined(*each) for each in zip(*outs)]
  inner = _called(eqn)
  if inner is not None:
    return walk(inner, inputs, found)
  if name in _PRODUCTS:
    return [_product(eqn, inputs, found)]
  if name in _ROWS:
    return [_rows(eqn, inputs, found)]
  if name in ('add', 'add_any') and not _is_weight(joined(*inputs)):
    for traces, v in zip(inputs, eqn.invars):          # positions' rows, added to tokens'
      if _is_weight(traces):
        _looked_up(traces, v, found)
  return [_plain(eqn, inputs, out) for out in eqn.outvars]


def _called(eqn):
  """The jaxpr that an equation calls with its own operands: jit, remat, custom_vjp, shard_map."""
  for value in eqn.params.values():
    inner = getattr(value, 'jaxpr', value)
    if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(eqn.invars):
      return inner
  return None


def _scan(eqn, inputs, found):
  body = eqn.params['jaxpr'].jaxpr
  # What is sliced comes last, and has an axis more outside; versions of JAX count it differently.
  whole = lambda outside, inside: sum(
      a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))
  carries = whole(eqn.outvars, body.outvars)
  first = whole(eqn.invars, body.invars)
  fixed, carry, xs = inputs[:first - carries], inputs[first - carries:first], inputs[first:]
  return _until_still(lambda carry, into: walk(body, [*fixed, *carry, *xs], into), carry, found)


def _while(eqn, inputs, found):
  first, second = eqn.params['cond_nconsts'], eqn.params['body_nconsts']
  fixed, carry = inputs[first:first + second], inputs[first + second:]
  body = eqn.params['body_jaxpr'].jaxpr
  return _until_still(lambda carry, into: walk(body, [*fixed, *carry], into), carry, found)


def _until_still(body, carry, found):
  """The outputs of a loop's body, once another turn adds nothing to what is carried.

  Only that turn's products count: before it, what is carried looks like a constant.
  """
  carry = list(carry)
  while True:
    products = set()
    outs = body(carry, products)
    after = [joined(a, b) for a, b in zip(carry, outs)]
    if after == carry:
      found |= products
      return [*after, *outs[len(carry):]]
    carry = after


def _product(eqn, inputs, found):
  """Records what meets in a product; what comes out is new."""
  pairs = [(inputs[0], inputs[1], eqn.invars[0], eqn.invars[1]),
           (inputs[1], inputs[0], eqn.invars[1], eqn.invars[0])]
  for w, x, w_var, x_var in pairs:
    if _is_weight(w) and x and not _is_weight(x):
      backward = any(origin == COTANGENT for origin, _ in x)
      found.update(Product(origin, str(x_var.aval.dtype), rounded(x), str(w_var.aval.dtype),
                           rounded(part), backward) for origin, part in _values(w))
  met = joined(*inputs)
  return frozenset((origin, RAW) for origin, _ in met)


def _rows(eqn, inputs, found):
  """Rows of a table. Those of a weight by inputs are a lookup, and inputs."""
  table, places = inputs[0], joined(*inputs[1:])
  if not table:
    return joined(*inputs)
  if eqn.primitive.name == 'dynamic_slice' or not _is_weight(table):
    return table
  if not places or _is_weight(places):
    return joined(table, places)
  _looked_up(table, eqn.invars[0], found)
  return frozenset([(INPUTS, RAW)])


def _looked_up(table, var, found):
  """Records that a weight's value goes in as it is."""
  found.update(Product(origin, None, False, str(var.aval.dtype), rounded(part), False)
               for origin, part in _values(table))


def _plain(eqn, inputs, out):
  """What any other operation makes of its operands."""
  name, dtype = eqn.primitive.name, getattr(out.aval, 'dtype', None)
  traces = joined(*(_spread(eqn, traces, v, out) for traces, v in zip(inputs, eqn.invars)))
  if name.startswith(('reduce_', 'arg')) and name != 'reduce_precision':
    return _shared(traces)
  wide = any(_is_wide(getattr(v.aval, 'dtype', None)) for v in eqn.invars)
  fewer = wide and not _is_wide(dtype) and name != 'bitcast_convert_type'
  if fewer or name == 'round' or dtype == jnp.bool_:
    return frozenset((origin, ROUNDED) for origin, _ in traces)
  return traces


def _spread(eqn, traces, v, out):
  """Traces of an operand; of a weight's value that serves many of the results they are shared."""
  parts = eqn.primitive.name.startswith(('concatenate', 'pad', 'scatter', 'dynamic_update_slice'))
  smaller = getattr(v.aval, 'size', 0) < getattr(out.aval, 'size', 0)
  return _shared(traces) if smaller and not parts and _is_weight(traces) else traces


def _shared(traces):
  return frozenset((o, STATISTIC if state == RAW else state) for o, state in traces)


def _values(traces):
  """(origin, its traces) of each weight of which there is more than a scale."""
  return [(origin, {t for t in traces if t[0] == origin})
          for origin in {o for o, state in traces if state != STATISTIC}]


def _is_weight(traces):
  return bool(traces) and all(origin not in (INPUTS, COTANGENT) for origin, _ in traces)


def _is_float(dtype):
  return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _is_wide(dtype):
  """Whether numbers of a dtype are many: a float of more than a byte."""
  return _is_float(dtype) and dtype.itemsize > 1


def trace(f, weights, *inputs):
  """The products of f(weights, *inputs), and of its gradient, which take in weights.

  Args:
    f: a pure function to an array, of any composition of jax's transformations.
    weights: a tree of arrays.
    inputs: trees of arrays.

  Returns:
    A function from the origin and state of each leaf of `weights` to the products of f; those of f
    as it runs where a gradient is wanted; those of the gradient; and whether that of each leaf
    depends on a cotangent (None of integers).
  """
  leaves, tree = jax.tree.flatten(weights)
  is_float = [_is_float(x.dtype) for x in leaves]
  values, shape = jax.tree.flatten(inputs)
  run = lambda leaves, values: f(tree.unflatten(leaves), *shape.unflatten(values))

  def vjp(leaves, values):
    def of(train):
      train = iter(train)
      return run([next(train) if f else x for f, x in zip(is_float, leaves)], values)
    return jax.vjp(of, [x for f, x in zip(is_float, leaves) if f])
  alone = jax.make_jaxpr(run)(leaves, values).jaxpr
  # What is kept for the gradient is of the program's outputs, and of the gradient's inputs.
  kept, (out, pull) = jax.make_jaxpr(vjp, return_shape=True)(leaves, values)
  gradient = jax.make_jaxpr(lambda pull, cotangent: pull(cotangent)[0])(pull, out).jaxpr

  def products(origins):
    own = [frozenset([o]) for o in origins] + [frozenset([(INPUTS, RAW)])] * len(values)
    forward, ahead, back = set(), set(), set()
    walk(alone, own, forward)
    residuals = walk(kept.jaxpr, own, ahead)[1:]
    grads = iter(walk(gradient, [*residuals, frozenset([(COTANGENT, RAW)])], back))
    reached = [any(o == COTANGENT for o, _ in next(grads)) if f else None for f in is_float]
    # The others are the forward pass again, or products of inputs that only a gradient wants.
    return forward, ahead, {p for p in back if p.backward}, reached
  return products
