"""Our training step against the same model and optimizer in PyTorch, taking turns in one process.

python benchmarks/train_step.py [--size small|large] [--rounds 15] [--compile]

Prints, of each: tokens a CPU-second (all threads) and a second of wall time, medians over rounds,
and the ratios to PyTorch eager. First it holds the losses of both against each other on the same
weights and batch. Where there is a GPU both run there, in seconds of wall time. Needs torch.
"""
import argparse
import os
import resource
import statistics
import time

# Threads of torch that spin while jax works would be counted as torch's CPU-seconds.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

SIZES = dict(
    small=dict(vocabulary=512, width=128, layers=4, heads=4, groups=2, head_width=32, hidden=384,
               context=128, batch=16),
    large=dict(vocabulary=4096, width=256, layers=4, heads=4, groups=2, head_width=64, hidden=768,
               context=256, batch=16))
PEAK, CLIP, DECAY = 1e-3, 1., .1


def jax_model(size, seed=0):
  """A module and its parameters."""
  import jax
  import jax.numpy as jnp

  from lean_jax.models.decoder import Decoder, DecoderConfig
  module = Decoder(DecoderConfig(**{k: v for k, v in size.items() if k != 'batch'}))
  return module, jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))['params']


def as_numpy(params):
  """{name: array} of a tree."""
  import numpy as np
  from flax.core import meta

  from lean_jax.interop import hf
  return {name: np.asarray(meta.unbox(leaf)) for name, leaf in hf.leaves(params)}


def looped(loss, params, tokens, **given):
  """A function that runs one step of the real loop and waits for it; given is of `fit`."""
  from lean_jax.training.loop import fit
  from lean_jax.training.optimizer import adamw

  class Batches:
    def __getitem__(self, _):
      return dict(tokens=tokens)
  # The loop is held at each step through its hook.
  import queue
  import threading
  go, done = queue.Queue(), queue.Queue()

  def hook(step, metrics):
    metrics['loss'].block_until_ready()
    done.put(step)
    go.get()
  loop = threading.Thread(daemon=True, target=lambda: fit(
      loss, params, Batches(), adamw(steps=10 ** 6, peak=PEAK, weight_decay=DECAY, clip=CLIP),
      steps=10 ** 6, hooks=[hook], check_every=10 ** 6, **given))
  start = time.perf_counter()
  loop.start()
  done.get()
  print(f'lean_jax: first step after {time.perf_counter() - start:.1f} s, compilation included')

  def step():
    go.put(None)
    done.get()
  return step


def jax_step(size, tokens):
  """(first loss, parameters as numpy, a function that runs one step and waits for it)."""
  import jax

  from lean_jax.objectives.language_modeling import next_token
  module, params = jax_model(size)
  loss = next_token(module)
  first = float(jax.jit(loss)(params, dict(tokens=tokens), None)[0])
  return first, as_numpy(params), looped(loss, params, tokens)


def torch_model(size, arrays):
  """The parameters, and the function from tokens [B T] to logits [B T V], of PyTorch."""
  import torch
  import torch.nn.functional as F
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  H, G, K = size['heads'], size['groups'], size['head_width']
  # PyTorch's linear layers hold (out, in).
  weights = {k: torch.nn.Parameter(torch.tensor(
      x if k == 'embed/table' or k.endswith('scale') else x.swapaxes(-1, -2).copy()
  ).to(device)) for k, x in arrays.items()}
  layers = [{k.removeprefix('layers/'): torch.nn.Parameter(x[n].detach().clone())
             for k, x in weights.items() if k.startswith('layers/')}
            for n in range(size['layers'])]
  trained = [p for layer in layers for p in layer.values()] + [
      weights['embed/table'], weights['norm/scale']]
  angle = torch.outer(torch.arange(size['context']), 1e4 ** (-torch.arange(0, K, 2) / K))
  cos, sin = (torch.cat([f(angle)] * 2, -1).to(device) for f in (torch.cos, torch.sin))
  assert arrays['layers/attention/k/kernel'].shape[-1] == G * K

  def rotate(x):
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin

  def norm(x, scale):
    return F.rms_norm(x, (x.shape[-1],), scale, 1e-5)

  def logits(tokens):
    B, T = tokens.shape
    x = F.embedding(tokens, weights['embed/table'])
    for p in layers:
      h = norm(x, p['mixer_norm/scale'])
      q, k, v = (F.linear(h, p[f'attention/{n}/kernel']).view(B, T, -1, K).transpose(1, 2)
                 for n in 'qkv')
      y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
      x = x + F.linear(y.transpose(1, 2).reshape(B, T, H * K), p['attention/o/kernel'])
      h = norm(x, p['feed_forward_norm/scale'])
      h = F.silu(F.linear(h, p['mlp/gate/kernel'])) * F.linear(h, p['mlp/up/kernel'])
      x = x + F.linear(h, p['mlp/down/kernel'])
    return F.linear(norm(x, weights['norm/scale']), weights['embed/table'])
  return trained, logits


def torch_looped(loss, trained, compiled=False):
  """A function that runs one step of AdamW on a loss without arguments, and waits for it."""
  import torch
  optimizer = torch.optim.AdamW(trained, lr=PEAK, betas=(.9, .95), weight_decay=DECAY, fused=True)
  run = torch.compile(loss) if compiled else loss

  def step():
    optimizer.zero_grad(set_to_none=True)
    value = run()
    value.backward()
    torch.nn.utils.clip_grad_norm_(trained, CLIP)
    optimizer.step()
    if torch.cuda.is_available():
      torch.cuda.synchronize()
  return step


def torch_step(size, tokens, arrays, compiled):
  """(first loss, a function that runs one step and waits for it)."""
  import torch
  import torch.nn.functional as F
  trained, logits = torch_model(size, arrays)
  tokens = torch.tensor(tokens, dtype=torch.long, device=trained[0].device)

  def loss():
    y = logits(tokens)
    return F.cross_entropy(y[:, :-1].reshape(-1, y.shape[-1]), tokens[:, 1:].reshape(-1))
  return loss().item(), torch_looped(loss, trained, compiled)


def taking_turns(steps, rounds):
  """{name: (CPU-seconds, seconds)} of a step: medians over rounds, after two that warm up."""
  found = {name: [] for name in steps}
  for k in range(rounds + 2):
    for name, one in steps.items():
      cpu, wall = cpu_seconds(), time.perf_counter()
      one()
      if k >= 2:
        found[name].append((cpu_seconds() - cpu, time.perf_counter() - wall))
  return {name: [statistics.median(column) for column in zip(*rows)]
          for name, rows in found.items()}


def report(medians, tokens):
  """Prints tokens a second, and the ratios to PyTorch eager."""
  base = medians['torch eager']
  for name, (cpu, wall) in medians.items():
    print(f'{name:<14} {tokens / cpu:9,.0f} tokens/CPU-s  {tokens / wall:9,.0f} tokens/s'
          f'  ratio to torch eager {base[0] / cpu:.2f} (CPU)  {base[1] / wall:.2f} (wall)')


def cpu_seconds():
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=SIZES, default='small')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--compile', action='store_true', help='torch.compile too')
  arguments = parser.parse_args()
  import jax
  import numpy as np
  import torch
  size = SIZES[arguments.size]
  tokens = np.random.default_rng(0).integers(
      0, size['vocabulary'], (size['batch'], size['context'])).astype(np.int32)
  ours, arrays, step = jax_step(size, tokens)
  theirs, other = torch_step(size, tokens, arrays, False)
  print(f'first loss: lean_jax {ours:.6f}, torch {theirs:.6f}')
  assert abs(ours - theirs) < 1e-4 * abs(theirs)
  steps = {'lean_jax': step, 'torch eager': other}
  if arguments.compile:
    steps['torch.compile'] = torch_step(size, tokens, arrays, True)[1]
  print(f'{arguments.size}: {size}; float32, {os.cpu_count()} cores, {jax.devices()[0]}, '
        f'jax {jax.__version__}, torch {torch.__version__}')
  report(taking_turns(steps, arguments.rounds), tokens.size)


if __name__ == '__main__':
  main()
