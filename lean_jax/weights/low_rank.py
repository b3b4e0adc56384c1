"""The weight of LoRA: any weight, plus a product of two thin matrices."""
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from lean_jax.kernels.grouped_matmul import api as grouped_matmul
from lean_jax.weights.base import Weight, Wrapper, positions, pytree, static


@pytree
class LowRank(Wrapper):
  """base + scale * a @ b (Hu et al. 2021, arXiv:2106.09685, section 4.1).

  The base may be of any kind: over a quantized one this is QLoRA.
  """
  base: Weight
  a: Any                                               # [*n *e *i R]
  b: Any                                               # [*n *e R *o]
  scale: float = static()                              # alpha / rank

  def unbox(self):
    letters = 'abcdefgh'[:len(self.dims)]
    pick = lambda kinds: ''.join(letters[k] for k in positions(self.dims, kinds))
    eqn = f'{pick("n")}{pick("e")}{pick("i")}R,{pick("n")}{pick("e")}R{pick("o")}->{letters}'
    base = meta.unbox(self.base)
    return base + (self.scale * jnp.einsum(eqn, self.a, self.b)).astype(base.dtype)

  def einsum(self, eqn, x):
    down, up = low_rank_equations(eqn, self.dims)
    low = jnp.einsum(down, x, self.a.astype(x.dtype))
    return self.base.einsum(eqn, x) + self.scale * jnp.einsum(up, low, self.b.astype(x.dtype))

  def grouped(self, x, sizes):
    E, R = sizes.shape[0], self.a.shape[-1]
    low = grouped_matmul.grouped_matmul(x, self.a.reshape(E, -1, R), sizes)
    low = grouped_matmul.grouped_matmul(low, self.b.reshape(E, R, -1), sizes)
    return self.base.grouped(x, sizes) + self.scale * low

  def names(self):
    pick = lambda kinds: tuple(self.axes[k] for k in positions(self.dims, kinds))
    both = pick('n') + pick('e')
    return dataclasses.replace(self, base=self.base.names(), a=both + pick('i') + (None,),
                               b=both + (None,) + pick('o'))


def low_rank_equations(eqn, dims):
  """The product with a, then b: 'btd,dhk->bthk' gives 'btd,dR->btR' and 'btR,Rhk->bthk'."""
  xs, rest = eqn.split(',')
  ws, out = rest.split('->')
  pick = lambda kinds: ''.join(ws[k] for k in positions(dims, kinds))
  low = ''.join(c for c in xs if c in out) + 'R'
  return (f'{xs},{pick("e")}{pick("i")}R->{low}', f'{low},{pick("e")}R{pick("o")}->{out}')
