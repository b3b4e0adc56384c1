"""The optimizer of every recipe: AdamW, warmed up, decayed, clipped."""
import functools

import jax
import optax

from lean_jax.errors import InputError
from lean_jax.tree import name

DECAYS = ('cosine', 'linear', 'constant')


@functools.lru_cache
def adamw(*, steps, peak, warmup=0, decay='cosine', weight_decay=0., clip=1., b1=.9, b2=.95,
          b_ratio=1.):
  """AdamW (arXiv:1711.05101) with a schedule and clipping by the global norm.

  Args:
    steps: of the whole schedule.
    peak: the greatest learning rate.
    warmup: steps from 0 to the peak.
    decay: 'cosine' or 'linear' to a tenth of the peak, or 'constant'.
    weight_decay: a step, times the learning rate; norms' scales are spared.
    clip: the greatest global norm of the gradient.
    b1, b2: of Adam.
    b_ratio: how many times faster arrays named b learn: LoRA's second factor (LoRA+, Hayou et al.
      2024, arXiv:2402.12354, who take 16).

  Raises:
    InputError: a value out of its range.
  """
  if decay not in DECAYS:
    raise InputError(f'no decay {decay!r}; there are: {", ".join(DECAYS)}')
  if steps < 1 or min(peak, clip, b_ratio) <= 0 or not 0 <= warmup <= steps:
    raise InputError(f'optimizer: steps {steps}, peak {peak}, clip {clip}, warmup {warmup}, '
                     f'b_ratio {b_ratio}; expected positive ones, and a warmup of 0 to steps')
  rest = max(steps - warmup, 1)
  after = {'cosine': lambda: optax.cosine_decay_schedule(peak, rest, alpha=.1),
           'linear': lambda: optax.linear_schedule(peak, peak / 10, rest),
           'constant': lambda: optax.constant_schedule(peak)}[decay]()
  rate = optax.join_schedules([optax.linear_schedule(0., peak, max(warmup, 1)), after], [warmup])
  spare = lambda tree: jax.tree_util.tree_map_with_path(
      lambda path, x: not name(path).endswith('/scale') and name(path) != 'scale', tree)
  return optax.chain(optax.clip_by_global_norm(clip),
                     optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=spare),
                     *[optax.stateless(lambda tree, _: _faster(tree, b_ratio))] * (b_ratio != 1))


def _faster(tree, ratio):
  """Updates, those of arrays named b times the ratio."""
  is_b = lambda path: name(path).endswith('/b')
  if not any(is_b(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)):
    raise InputError(f'b_ratio {ratio}, but no array that trains is named b, as one of LoRA is; '
                     'attach an adapter, or leave b_ratio out')
  return jax.tree_util.tree_map_with_path(lambda p, x: ratio * x if is_b(p) else x, tree)
