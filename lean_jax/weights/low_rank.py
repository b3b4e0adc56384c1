"""The weight of LoRA: any weight, plus a product of two thin matrices."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax.kernels.grouped_matmul import api as grouped_matmul
from lean_jax.weights.adapter import Adapter
from lean_jax.weights.base import Weight, positions, pytree, static


@pytree
class LowRank(Adapter):
  """base + scale * a @ b (Hu et al. 2021, arXiv:2106.09685, section 4.1).

  The base may be of any kind: over a quantized one this is QLoRA. A step of training that drops
  out gives it `keys` (see `adapters.dropout`): then `einsum` and `grouped` give a @ b a part of
  their inputs, the others being zero. A lookup has no inputs to drop.
  """
  base: Weight
  a: Any                                               # [*n *e *i R]
  b: Any                                               # [*n *e R *o]
  scale: float = static()                              # alpha / rank
  dropout: float = static(default=0.)                  # the part of the inputs that is dropped
  keys: Any = None                                     # [*n] of jax.random.key; None drops nothing
  trained = ('a', 'b')

  def unbox(self):
    letters = 'abcdefgh'[:len(self.dims)]
    pick = lambda kinds: ''.join(letters[k] for k in positions(self.dims, kinds))
    eqn = f'{pick("n")}{pick("e")}{pick("i")}R,{pick("n")}{pick("e")}R{pick("o")}->{letters}'
    base = meta.unbox(self.base)
    return base + (self.scale * jnp.einsum(eqn, self.a, self.b)).astype(base.dtype)

  def einsum(self, eqn, x):
    down, up = low_rank_equations(eqn, self.dims)
    low = thin(down, up, self._kept(x), self.a.astype(x.dtype), self.b.astype(x.dtype))
    return self.base.einsum(eqn, x) + self.scale * low

  def grouped(self, x, sizes):
    E, R = sizes.shape[0], self.a.shape[-1]
    low = grouped_matmul.grouped_matmul(self._kept(x), self.a.reshape(E, -1, R), sizes)
    low = grouped_matmul.grouped_matmul(low, self.b.reshape(E, R, -1), sizes)
    return self.base.grouped(x, sizes) + self.scale * low

  def take(self, ids):
    if self.dims != 'oi':
      return super().take(ids)
    low = jnp.einsum('r...,dr->...d', jnp.take(self.b, ids, axis=-1), self.a)
    base = self.base.take(ids)
    return base + (self.scale * low).astype(base.dtype)

  def _kept(self, x):
    """x with a part `dropout` of it zero, and the rest larger by as much."""
    if self.keys is None:
      return x
    kept = jax.random.bernoulli(self.keys, 1 - self.dropout, x.shape)
    return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)

  def names(self):
    pick = lambda kinds: tuple(self.axes[k] for k in positions(self.dims, kinds))
    both = pick('n') + pick('e')
    return dataclasses.replace(self, base=self.base.names(), a=both + pick('i') + (None,),
                               b=both + (None,) + pick('o'),
                               keys=None if self.keys is None else pick('n'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def thin(down, up, x, a, b):
  """einsum(up, einsum(down, x, a), b), of the equations of `low_rank_equations`.

  What jax derives for the gradients of a and b has the rank last, and XLA multiplies all of x or of
  the result's gradient transposed for that: on CPUs it writes them out, which took more time than
  the thin products themselves, ten times as long. Here the rank comes first.
  """
  return jnp.einsum(up, jnp.einsum(down, x, a), b)


def _thin_forward(down, up, x, a, b):
  low = jnp.einsum(down, x, a)
  return jnp.einsum(up, low, b), (x, a, b, low)


def _thin_backward(down, up, kept, g):
  x, a, b, low = kept
  (xs, a_is), (b_is, out) = down.split('->')[0].split(','), up.split(',')[1].split('->')
  lows = up.split(',')[0]
  g_low = jnp.einsum(f'{out},{b_is}->{lows}', g, b)
  first = a_is.replace('R', '')
  at = next((k for k, c in enumerate(first) if c not in out), len(first))      # past the experts
  g_a = jnp.einsum(f'{lows},{xs}->{first[:at]}R{first[at:]}', g_low, x)
  g_a = jnp.moveaxis(jax.lax.optimization_barrier(g_a), at, -1)
  return (jnp.einsum(f'{lows},{a_is}->{xs}', g_low, a), g_a,
          jnp.einsum(f'{lows},{out}->{b_is}', low, g))


thin.defvjp(_thin_forward, _thin_backward)


def low_rank_equations(eqn, dims):
  """The product with a, then b: 'btd,dhk->bthk' gives 'btd,dR->btR' and 'btR,Rhk->bthk'."""
  xs, rest = eqn.split(',')
  ws, out = rest.split('->')
  pick = lambda kinds: ''.join(ws[k] for k in positions(dims, kinds))
  low = ''.join(c for c in xs if c in out) + 'R'
  return (f'{xs},{pick("e")}{pick("i")}R->{low}', f'{low},{pick("e")}R{pick("o")}->{out}')
