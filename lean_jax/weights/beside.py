"""What adapts a model beside its weights: no matrix of the model is under it."""
from typing import Any

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.weights.base import Weight, pytree, static


class Beside(Weight):
  """Trained arrays beside a model's weights, which the model reads where they are there.

  Rules, which are for what the model multiplies by, do not see them. `dims` and `axes` are of the
  stacked layers alone, if there are any.
  """
  trained = ()                  # the names of the fields that train

  @property
  def shape(self):
    """The number of values, which have no one shape."""
    return (sum(x.size for x in jax.tree.leaves(self)),)

  def unbox(self):
    raise InputError(f'a {type(self).__name__} stands beside the weights and has no dense value; '
                     'keep it, or attach another adapter')

  def names(self):
    n = len(self.axes)
    return jax.tree.map(lambda x: self.axes + (None,) * (x.ndim - n), self)


@pytree
class Bottleneck(Beside):
  """y + scale * up(f(down(z))), z what a branch of a layer gives, or what it is given (parallel).

  Houlsby et al. 2019 (arXiv:1902.00751), section 2.1; parallel: He et al. 2021 (arXiv:2110.04366),
  section 3.3.
  """
  down: Any                                            # [*n D R]
  down_bias: Any                                       # [*n R]
  up: Any                                              # [*n R D]
  up_bias: Any                                         # [*n D]
  activation: str = static()                           # f, a name of `nn.mlp.ACTIVATIONS`
  parallel: bool = static()
  scale: float = static()
  dims: str = static(default='')
  axes: tuple = static(default=())
  trained = ('down', 'down_bias', 'up', 'up_bias')

  def after(self, x, y, f):
    """The branch's result [B T D], of its input x [B T D] and its own result y; f as a function."""
    z = x if self.parallel else y
    wide = lambda b, like: b.reshape(1, 1, -1).astype(like.dtype)
    h = z @ self.down.astype(z.dtype)
    h = f(h + wide(self.down_bias, h)) @ self.up.astype(z.dtype)
    return y + (self.scale * (h + wide(self.up_bias, h))).astype(y.dtype)


@pytree
class Prefix(Beside):
  """Keys and values that every query of a layer sees before those of the text.

  P-tuning v2 (Liu et al. 2021, arXiv:2110.07602), section 3.1. Keys stand as they are multiplied:
  no position turns them.
  """
  k: Any                                               # [N P G K]
  v: Any                                               # [N P G K]
  dims: str = static(default='')
  axes: tuple = static(default=())
  trained = ('k', 'v')

  @property
  def length(self):
    """P."""
    return self.k.shape[1]

  def plain(self):
    """The keys and values themselves, as a Prefix."""
    return self


@pytree
class DeepPrefix(Beside):
  """A Prefix made by an MLP, with which it trains more steadily; the MLP is dropped when saved.

  Li and Liang 2021 (arXiv:2101.00190), section 4.3.
  """
  table: Any                                           # [P D]
  inner: Any                                           # [D F]
  inner_bias: Any                                      # [F]
  outer: Any                                           # [F N*2*G*K]
  outer_bias: Any                                      # [N*2*G*K]
  sizes: tuple = static()                              # N, G, K
  dims: str = static(default='')
  axes: tuple = static(default=())
  trained = ('table', 'inner', 'inner_bias', 'outer', 'outer_bias')

  @property
  def length(self):
    """P."""
    return len(self.table)

  def plain(self):
    """The Prefix that it stands for."""
    N, G, K = self.sizes
    h = jnp.tanh(self.table @ self.inner + self.inner_bias[None])
    kv = (h @ self.outer + self.outer_bias[None]).reshape(-1, N, 2, G, K).transpose(2, 1, 0, 3, 4)
    return Prefix(kv[0], kv[1])                                        # [N P G K] each


@pytree
class Prompt(Beside):
  """Embeddings of tokens that no text has, before every text, scaled where a model scales them.

  Lester et al. 2021 (arXiv:2104.08691), section 2.
  """
  value: Any                                           # [P D]
  dims: str = static(default='')
  axes: tuple = static(default=())
  trained = ('value',)

  @property
  def length(self):
    """P."""
    return len(self.value)


def is_beside(x):
  """Whether x stands beside the weights."""
  return isinstance(x, Beside)


def without_beside(params):
  """The nested dict without what stands beside its weights."""
  if not isinstance(params, dict):
    return params
  return {k: without_beside(v) for k, v in params.items() if not is_beside(v)}


def refuse_beside(params, what):
  """Raises InputError for a tree with something beside its weights: it 'cannot be {what}'."""
  found = {type(x).__name__ for x in jax.tree.leaves(params, is_leaf=is_beside) if is_beside(x)}
  if found:
    raise InputError(f'a model with a {" and a ".join(sorted(found))} beside its weights cannot be '
                     f'{what}; do it to the base, then attach or load the adapter')

