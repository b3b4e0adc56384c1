"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060), Codestral Mamba among them."""
import math

from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import mamba
from lean_jax.models.families.base import Family, Stored, linear, positive, with_bias
from lean_jax.nn.mamba2 import Mamba2Options

DEFAULTS = mamba.DEFAULTS | dict(
    vocab_size=32768, hidden_size=4096, num_hidden_layers=64, state_size=128, num_heads=128,
    head_dim=64, n_groups=8, chunk_size=256, time_step_limit=(0., math.inf),
    tie_word_embeddings=False)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  hf = DEFAULTS | hf
  o = Mamba2Options(
      heads=positive(hf, 'num_heads'), head_width=positive(hf, 'head_dim'),
      groups=positive(hf, 'n_groups'), chunk=positive(hf, 'chunk_size'),
      limits=limits(hf['time_step_limit']), **mamba.mixer(hf))
  inner = positive(hf, 'expand', float) * positive(hf, 'hidden_size')
  if o.inner != inner or o.heads % o.groups:
    raise InputError(f'config.json has num_heads = {o.heads}, head_dim = {o.head_width} and '
                     f'n_groups = {o.groups}; the first two must multiply to expand * hidden_size '
                     f'= {inner:g}, the last divide the first')
  return DecoderConfig(**mamba.common(hf, 'mamba2'), mamba2=o)


def to_hf(c):
  """config.json of a config."""
  o = c.mamba2
  given = {} if o.limits == DEFAULTS['time_step_limit'] else dict(time_step_limit=list(o.limits))
  return mamba.keys(c, o) | given | dict(
      architectures=['Mamba2ForCausalLM'], model_type='mamba2', num_heads=o.heads,
      head_dim=o.head_width, n_groups=o.groups, chunk_size=o.chunk)


def names(c):
  """Where a checkpoint has each array; the first product's tensor is three of ours."""
  layer, ours, o = 'backbone.layers.{layer}.mixer.', 'layers/mamba2', c.mamba2
  out, sizes = mamba.outside(), (o.inner, o.joint, o.heads)
  for k, part in enumerate(('gate', 'in', 'dt')):
    out[f'{ours}/{part}/kernel'] = linear(f'{layer}in_proj.weight', sizes=sizes, index=k)
    out[f'{ours}/{part}/bias'] = Stored(f'{layer}in_proj.bias', sizes=sizes, index=k)
  for name in ('A_log', 'D', 'dt_bias'):
    out[f'{ours}/{name}'] = Stored(f'{layer}{name}')
  out[f'{ours}/norm/scale'] = Stored(f'{layer}norm.weight')
  return out | mamba.conv_names(f'{ours}/conv', f'{layer}conv1d', o.joint, o.conv) | with_bias(
      f'{ours}/out', f'{layer}out_proj')


MAMBA2 = Family('mamba2', from_hf, to_hf, names, prefix='backbone.')


def limits(value):
  """The least and the greatest time step of config.json, where an infinity may be spelled out."""
  try:
    low, high = (float(v['__float__'] if isinstance(v, dict) else v) for v in value)
  except (TypeError, ValueError, KeyError):
    low, high = math.nan, math.nan
  if not 0 <= low < high:
    raise InputError(f'config.json has time_step_limit = {value!r}, expected two numbers, the '
                     'first at least 0, the second greater; download it again')
  return low, high
