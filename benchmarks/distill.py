"""Our distillation step against the same models and losses in PyTorch, taking turns.

python benchmarks/distill.py [--size small|vocabulary] [--rounds 9] [--compile]

A student of half the teacher's layers; half of the loss is KL to the teacher at temperature 2, half
cross-entropy. Prints, of each: tokens a CPU-second (all threads) and a second of wall time, medians
over rounds, and the ratios to PyTorch eager; before that the first losses of both, on the same
weights. `vocabulary` has 32,768 tokens, where ours never has the logits in memory. Needs torch.
Peak memory of the fused loss alone: benchmarks/distill_loss.py.
"""
import argparse
import os

import train_step

TEMPERATURE = 2.
SIZES = dict(
    small=train_step.SIZES['small'],
    vocabulary=dict(vocabulary=32768, width=256, layers=4, heads=4, groups=2, head_width=64,
                    hidden=768, context=128, batch=8))


def main():
  """Prints the ratios."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=SIZES, default='small')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--compile', action='store_true', help='torch.compile too')
  arguments = parser.parse_args()
  import jax
  import numpy as np
  import torch
  import torch.nn.functional as F

  from lean_jax.distillation.losses import distillation
  size = SIZES[arguments.size]
  half = dict(size, layers=size['layers'] // 2)
  tokens = np.random.default_rng(0).integers(
      0, size['vocabulary'], (size['batch'], size['context'])).astype(np.int32)
  (big, known), (small, params) = train_step.jax_model(size, 1), train_step.jax_model(half)
  loss = distillation(small, big, temperature=TEMPERATURE, soft_weight=.5)
  ours = float(jax.jit(lambda p, t: loss(p, dict(tokens=tokens), None, teacher_params=t)[0])(
      params, known))
  trained, student = train_step.torch_model(half, train_step.as_numpy(params))
  _, teacher = train_step.torch_model(size, train_step.as_numpy(known))
  ids = torch.tensor(tokens, dtype=torch.long, device=trained[0].device)

  def of_torch():
    with torch.no_grad():
      wanted = teacher(ids)[:, :-1]
    y, V = student(ids)[:, :-1], size['vocabulary']
    soft = F.kl_div(F.log_softmax(y / TEMPERATURE, -1).reshape(-1, V),
                    F.log_softmax(wanted / TEMPERATURE, -1).reshape(-1, V),
                    reduction='batchmean', log_target=True) * TEMPERATURE ** 2
    return .5 * soft + .5 * F.cross_entropy(y.reshape(-1, V), ids[:, 1:].reshape(-1))
  theirs = of_torch().item()
  print(f'first loss: lean_jax {ours:.6f}, torch {theirs:.6f}')
  assert abs(ours - theirs) < 1e-4 * abs(theirs)
  steps = {'lean_jax': train_step.looped(loss, params, tokens, frozen=dict(teacher_params=known)),
           'torch eager': train_step.torch_looped(of_torch, trained)}
  if arguments.compile:
    steps['torch.compile'] = train_step.torch_looped(of_torch, trained, True)
  print(f'{arguments.size}: {size}; float32, {os.cpu_count()} cores, {jax.devices()[0]}, '
        f'jax {jax.__version__}, torch {torch.__version__}')
  train_step.report(train_step.taking_turns(steps, arguments.rounds), tokens.size)


if __name__ == '__main__':
  main()
