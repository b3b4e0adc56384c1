"""What a family is, and what its translations of a config share."""
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from lean_jax.errors import InputError
from lean_jax.models.config import StackConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """How a family's Hugging Face checkpoint maps to a model.

  Attributes:
    model_type: as in config.json.
    from_hf: config.json to our config; raises InputError for what we do not compute.
    to_hf: our config to config.json, without token ids.
    names: our config to {our array: where a checkpoint stores it}. Arrays of layers are named as if
      there were one layer, 'layers/attention/q/kernel'.
    prefix: of the tensors' names, which some checkpoints leave out.
    ignored: a regular expression on tensors that are no parameters.
    optional: the same on tensors that are zero where a checkpoint lacks them.
    copies: {tensor that some checkpoints have too: the one that it repeats}.
    older: {how a tensor's name ends in old checkpoints: how it ends now}.
    settle: our config and a checkpoint's tensors by name to our config, where the tensors tell what
      config.json does not.
    own_head: whether a checkpoint's own output head counts, though config.json ties it.
  """
  model_type: str
  from_hf: Callable[[dict], StackConfig]
  to_hf: Callable[[StackConfig], dict]
  names: Callable[[StackConfig], dict[str, 'Stored']]
  prefix: str = ''
  ignored: str = r'.*\.(rotary_emb\.inv_freq|masked_bias)'
  optional: str = ''
  copies: dict[str, str] = dataclasses.field(default_factory=dict)
  older: dict[str, str] = dataclasses.field(default_factory=dict)
  settle: Callable = lambda config, tensors: config
  own_head: bool = False


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor of a checkpoint, or a part of one, seen as one of our arrays.

  Attributes:
    name: of the tensor; '{layer}' and '{expert}' stand for numbers. With '{expert}', experts are
      along the first axis of ours.
    permute: axes of the part, in our order; None leaves them.
    axis, sizes, index, repeats: the tensor is `sizes` long parts side by side along `axis`, all of
      them `repeats` times over; ours is part `index`. sizes of () is the whole tensor.
    shape: of the part as stored, where it is not ours permuted (axes of length 1, say).
    dtype: of our array, where it is not the model's: what cannot be rounded.
  """
  name: str
  permute: tuple[int, ...] | None = None
  axis: int = 0
  sizes: tuple[int, ...] = ()
  index: int = 0
  repeats: int = 1
  shape: tuple[int, ...] | None = None
  dtype: str | None = None

  def part_shape(self, ours):
    """The shape of the part as stored, of the shape of ours (of one layer and one expert)."""
    if self.shape is not None:
      return self.shape
    if self.permute is None:
      return tuple(ours)
    return tuple(ours[self.permute.index(k)] for k in range(len(ours)))

  def tensor_shape(self, ours):
    """The shape of the whole tensor."""
    shape = list(self.part_shape(ours))
    if self.sizes:
      shape[self.axis] = self.repeats * sum(self.sizes)
    return tuple(shape)

  def read(self, tensor, ours):
    """Our array, of the whole tensor."""
    if self.sizes:
      tensor = self._parts(tensor)[self.index]
      tensor = tensor.reshape(self.part_shape(ours))
    if self.permute is not None:
      tensor = tensor.transpose(self.permute)
    return tensor.reshape(ours)

  def write(self, array):
    """The part as stored, of our array."""
    shape = self.part_shape(array.shape)
    if self.permute is None:
      return array.reshape(shape)
    array = array.reshape([shape[k] for k in self.permute])
    return array.transpose(np.argsort(self.permute))

  def join(self, parts):
    """The whole tensor, of its parts in their order."""
    if not self.sizes:
      return parts[0]
    shape = list(parts[0].shape)
    cut = [p.reshape(*shape[:self.axis], self.repeats, n, *shape[self.axis + 1:])
           for p, n in zip(parts, self.sizes)]
    shape[self.axis] = self.repeats * sum(self.sizes)
    return np.concatenate(cut, axis=self.axis + 1).reshape(shape)

  def _parts(self, tensor):
    shape = tensor.shape
    wide = tensor.reshape(*shape[:self.axis], self.repeats, sum(self.sizes), *shape[self.axis + 1:])
    return np.split(wide, np.cumsum(self.sizes)[:-1], axis=self.axis + 1)


def linear(name, **kw):
  """A matrix that PyTorch stores as [outputs inputs]."""
  return Stored(name, permute=(1, 0), **kw)


def parts(name, sizes, of=linear, **kw):
  """One Stored for each part of a tensor."""
  return [of(name, sizes=tuple(sizes), index=k, **kw) for k in range(len(sizes))]


def with_bias(path, name):
  """{kernel and bias of the product at `path`} of a PyTorch Linear."""
  return {f'{path}/kernel': linear(f'{name}.weight'), f'{path}/bias': Stored(f'{name}.bias')}


def layer_norm(path, name):
  """{scale and bias of the norm at `path`} of a PyTorch LayerNorm."""
  return {f'{path}/scale': Stored(f'{name}.weight'), f'{path}/bias': Stored(f'{name}.bias')}


# Keys with which any config.json changes the mathematics, and the values that change nothing.
NEUTRAL = dict(
    quantization_config=(None,), compression_config=(None,), per_layer_config=(None, {}),
    is_causal=(True,))


def require(hf, neutral):
  """Raises InputError if a key of config.json asks for mathematics that we do not have.

  Args:
    hf: config.json.
    neutral: {key: the values that change nothing}, beside `NEUTRAL`; an absent key is neutral.
  """
  neutral = NEUTRAL | neutral
  asked = [f'{k} = {hf[k]!r}' for k, allowed in neutral.items() if k in hf and hf[k] not in allowed]
  if asked:
    raise InputError(f'config.json asks for {", ".join(asked)}, which lean_jax does not compute; '
                     'give a model without')


def positive(hf, key, kind=int):
  """A number of config.json.

  Raises:
    InputError: it is absent, of another kind or not positive.
  """
  value = hf.get(key)
  number = isinstance(value, (int, kind)) and not isinstance(value, bool)
  if not number or not 0 < value < math.inf:
    raise InputError(f'config.json has {key} = {value!r}, expected a positive {kind.__name__}; '
                     'download it again')
  return kind(value)


def given(hf, key, default, kind=int):
  """A positive number of config.json, or the default where it is absent or null."""
  return default if hf.get(key) is None else positive(hf, key, kind)


def token(hf, key, default=None):
  """The id of a token in config.json, or the default where it is absent or null.

  Raises:
    InputError: it is none of the vocabulary's.
  """
  value = hf.get(key)
  if value is None:
    return default
  if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < hf['vocab_size']:
    raise InputError(f'config.json has {key} = {value!r}, expected one id, 0 to '
                     f'{hf["vocab_size"] - 1}; download it again')
  return value


def chosen(hf, key, names):
  """What a name in config.json stands for here.

  Args:
    names: {the name in config.json: ours}.
  """
  if hf.get(key) not in names:
    raise InputError(f'config.json has {key} = {hf.get(key)!r}, which lean_jax does not compute; '
                     f'it computes: {", ".join(map(str, names))}')
  return names[hf[key]]


# hidden_act of config.json: the name in nn.mlp.ACTIVATIONS.
ACTIVATIONS = dict(
    silu='silu', swish='silu', relu='relu', gelu='gelu', gelu_new='gelu_tanh',
    gelu_pytorch_tanh='gelu_tanh', gelu_fast='gelu_tanh')


def activation_name(ours):
  """hidden_act of config.json, of a name in nn.mlp.ACTIVATIONS."""
  return next(name for name, value in ACTIVATIONS.items() if value == ours)


def equal_heads(width, heads):
  """width, heads, groups, head_width where heads share the width and nothing else.

  Raises:
    InputError: they cannot.
  """
  if width % heads:
    raise InputError(f'config.json has {heads} heads and a width of {width}; the first must divide '
                     'the second')
  return dict(width=width, heads=heads, groups=heads, head_width=width // heads)


def head_shape(hf):
  """width, heads, groups, head_width of config.json, as most families spell them.

  Raises:
    InputError: they do not go together.
  """
  width, heads = positive(hf, 'hidden_size'), positive(hf, 'num_attention_heads')
  groups = given(hf, 'num_key_value_heads', heads)
  head_width = given(hf, 'head_dim', width // heads)
  if heads % groups or head_width < 2 or head_width % 2:
    raise InputError(f'config.json has {heads} heads, {groups} key and value heads and a head '
                     f'width of {head_width}; the second must divide the first, the last be even')
  return dict(width=width, heads=heads, groups=groups, head_width=head_width)
