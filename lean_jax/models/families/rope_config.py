"""Rotary positions in config.json, as transformers 4 and 5 spell them.

transformers 4 has rope_theta, partial_rotary_factor and rope_scaling beside the other keys;
transformers 5 has all of them in rope_parameters, an object for each layer type where those differ.
Both read what `rope_hf` writes.
"""
import dataclasses
import math

from lean_jax.errors import InputError
from lean_jax.models.families.base import given, positive
from lean_jax.nn.rope import Rope
from lean_jax.nn.rope_scaling import Dynamic, Linear, Llama3, LongRope, Proportional, Yarn

FULL, SLIDING = 'full_attention', 'sliding_attention'
ORIGINAL, PARTIAL = 'original_max_position_embeddings', 'partial_rotary_factor'
KINDS = dict(linear=Linear, dynamic=Dynamic, yarn=Yarn, longrope=LongRope, llama3=Llama3,
             proportional=Proportional)
# What config.json calls our fields, where it does not call them so.
THEIRS = dict(original=ORIGINAL, fraction=PARTIAL, mscale_all='mscale_all_dim',
              short='short_factor', long='long_factor', amplitude='attention_factor',
              low='low_freq_factor', high='high_freq_factor')


def ropes(hf, head_width, *, theta=10_000., local_theta=None, partial=False, interleaved=False):
  """The `Rope`s of config.json.

  Args:
    hf: config.json.
    head_width: K.
    theta: the base where config.json has none.
    local_theta: the same of layers with a window, where these have positions of their own
      (rope_local_base_freq); None where they have not.
    partial: whether the family can turn a part of a head's features.
    interleaved: whether it turns pairs (2k, 2k+1).

  Returns:
    tuple of a Rope; with local_theta of two, of full and of sliding attention.

  Raises:
    InputError: a kind or a parameter that is unknown, absent or out of its range.
  """
  def rope(asked, where, key, theta):
    asked = {'rope_theta': theta} | _present(
        {'rope_theta': hf.get(key), PARTIAL: hf.get(PARTIAL)}) | asked
    return _rope(hf, asked, where, head_width, partial, interleaved)
  old, new = _object(hf, 'rope_scaling'), _object(hf, 'rope_parameters')
  if local_theta is None:
    where, asked = ('rope_scaling', old) if old else ('rope_parameters', new)
    # Where both places have the length of training, this one counts.
    if hf.get(ORIGINAL) is not None and asked.get('rope_type', asked.get('type')) in (
        'yarn', 'longrope', 'llama3'):
      asked = asked | {ORIGINAL: hf[ORIGINAL]}
    return (rope(asked, where, 'rope_theta', theta),)
  _known(new, (FULL, SLIDING), 'rope_parameters')
  full, near = (_object(new, kind) for kind in (FULL, SLIDING))
  return (rope(full | old, f'rope_parameters.{FULL}', 'rope_theta', theta),
          rope(near, f'rope_parameters.{SLIDING}', 'rope_local_base_freq', local_theta))


def context(hf, ropes):
  """The longest sequence of config.json, in tokens: what positions are stretched to, if longer."""
  stretched = [int(r.scaling.factor * r.scaling.original) for r in ropes
               if isinstance(r.scaling, Dynamic | Yarn)]
  return max([positive(hf, 'max_position_embeddings'), *stretched])


def rope_hf(ropes, context, *, each=False):
  """The keys of config.json that say `ropes`, of a model of this context.

  Two are written for transformers 4 where it can read them: if that of windows is a plain one, and
  not `each` is asked to be written by itself.
  """
  first, *rest = ropes
  longest = first.scaling.original if isinstance(first.scaling, Dynamic) else context
  out = dict(max_position_embeddings=longest)
  if each or any(r.scaling is not None or r.fraction != first.fraction for r in rest):
    return out | dict(rope_parameters={
        kind: {'rope_type': 'default', 'rope_theta': r.theta, PARTIAL: r.fraction}
        | _scaling_hf(r.scaling, longest) for kind, r in zip((FULL, SLIDING), ropes)})
  scaling = _scaling_hf(first.scaling, longest)
  if isinstance(first.scaling, LongRope):            # transformers 4 looks for it here alone
    out[ORIGINAL] = scaling.pop(ORIGINAL)
  out |= dict(rope_theta=first.theta, rope_scaling=scaling or None)
  if first.fraction != 1:
    out[PARTIAL] = first.fraction
  return out | (dict(rope_local_base_freq=rest[0].theta) if rest else {})


def _rope(hf, asked, where, head_width, partial, interleaved):
  """The Rope of an object in config.json, with what it takes from elsewhere filled in."""
  kind = asked.get('rope_type', asked.get('type', 'default'))
  if kind != 'default' and kind not in KINDS:
    raise InputError(f'config.json asks for {where} of rope_type {kind!r}, which lean_jax does not '
                     f'compute; it computes: default, {", ".join(KINDS)}')
  theta, fraction = positive(asked, 'rope_theta', float), given(asked, PARTIAL, 1., float)
  parameters = {k: v for k, v in asked.items() if k not in ('rope_type', 'type', 'rope_theta')}
  if kind == 'proportional':                         # of which it is a parameter
    rope = Rope(theta, interleaved=interleaved)
  else:
    rope = Rope(theta, fraction, interleaved)
    parameters.pop(PARTIAL, None)
  R = rope.width(head_width)
  if R % 2 or not 2 <= R <= head_width or not (partial or rope.fraction == 1):
    raise InputError(f'config.json asks for {PARTIAL} = {fraction} of heads of {head_width} '
                     'features, which lean_jax does not compute here; give a model in which '
                     + ('an even number of them' if partial else 'all of them') + ' turn')
  if kind == 'default':
    _known(parameters, (), where)
    return rope
  return dataclasses.replace(rope, scaling=_scaling(
      parameters, kind, f'{where} ({kind})', positive(hf, 'max_position_embeddings'), R))


def _scaling(asked, kind, where, longest, width):
  """A scaling of its parameters in config.json, for a context and a rotated width."""
  known = [THEIRS.get(f.name, f.name) for f in dataclasses.fields(KINDS[kind])]
  _known(asked, known + ['factor'] * (kind == 'longrope'), where)
  number = lambda key, default=None: positive({key: default} | asked, key, float)
  optional = lambda key: given(asked, key, None, float)
  original = given(asked, ORIGINAL, longest)
  usual, factors = longest / original, lambda key: _factors(asked, key, width // 2, where)
  made = dict(
      linear=lambda: Linear(number('factor')),
      dynamic=lambda: Dynamic(number('factor'), original),
      yarn=lambda: Yarn(
          number('factor', usual), original, optional('attention_factor'),
          number('beta_fast', 32.), number('beta_slow', 1.), optional('mscale'),
          optional('mscale_all_dim'), bool(asked.get('truncate', True))),
      longrope=lambda: LongRope(
          factors('short_factor'), factors('long_factor'), original,
          number('attention_factor', longrope_amplitude(number('factor', usual), original))),
      llama3=lambda: Llama3(
          number('factor'), number('low_freq_factor'), number('high_freq_factor'), original),
      proportional=lambda: Proportional(number(PARTIAL, 1.), number('factor', 1.)))
  scaling = made[kind]()
  if kind == 'dynamic' and (original != longest or width < 4):
    raise InputError(f'config.json has {where} of {ORIGINAL} = {original} and {width} features, '
                     f'expected max_position_embeddings, {longest}, and 4 features or more')
  if kind == 'llama3' and scaling.low >= scaling.high:
    raise InputError(f'config.json has {where} with low_freq_factor = {scaling.low}, expected less '
                     f'than high_freq_factor = {scaling.high}')
  return scaling


def _scaling_hf(scaling, context):
  """rope_scaling of config.json; {} for None."""
  if scaling is None:
    return {}
  kind = next(name for name, cls in KINDS.items() if isinstance(scaling, cls))
  out = {THEIRS.get(k, k): list(v) if isinstance(v, tuple) else v
         for k, v in dataclasses.asdict(scaling).items() if v is not None}
  if kind == 'dynamic':
    out.pop(ORIGINAL)
  if kind != 'longrope':
    return dict(rope_type=kind) | out
  # transformers 4 wants `type` of Phi-3, and no more than it needs.
  if scaling.amplitude == longrope_amplitude(context / scaling.original, scaling.original):
    out.pop('attention_factor')
  return dict(type=kind) | out


def longrope_amplitude(factor, original):
  """sqrt(1 + ln(factor) / ln(original)), of a context `factor` times as long (Phi-3's)."""
  return 1. if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _factors(asked, key, count, where):
  """A tuple of `count` positive numbers."""
  values = asked.get(key)
  good = isinstance(values, list) and len(values) == count and all(
      isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in values)
  if not good:
    raise InputError(f'config.json has {where} with {key} = {values!r}, expected {count} positive '
                     'numbers; download it again')
  return tuple(float(v) for v in values)


def _present(asked):
  return {k: v for k, v in asked.items() if v is not None}


def _object(hf, key):
  """An object in config.json without its nulls, {} where it is absent or null."""
  value = hf.get(key)
  if value is not None and not isinstance(value, dict):
    raise InputError(f'config.json has {key} = {value!r}, expected an object; download it again')
  return _present(value or {})


def _known(asked, known, where):
  """Raises InputError for a parameter that is not of these."""
  unknown = [f'{k} = {v!r}' for k, v in asked.items() if k not in known]
  if unknown:
    raise InputError(f'config.json asks for {where} with {", ".join(unknown)}, which lean_jax does '
                     f'not compute; it knows: {", ".join(known) or "rope_theta"}')
