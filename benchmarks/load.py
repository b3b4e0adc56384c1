"""Loading a checkpoint of several files: seconds and peak memory, ours and transformers'.

python benchmarks/load.py [--gigabytes 2] [--shard 300MB] [--rounds 3] [--folder DIR]

Makes a random bfloat16 Llama on disk, in a temporary folder or the one given, and loads it in fresh
processes that take turns. Prints, of each: seconds of the call, imports apart, the files being in
the system's cache; seconds, and those of the processor, until every weight has been looked at once
(transformers leaves weights in the mapped file until then, where it need not convert them); the
peak of resident memory; and the bound that ours is held to, the peak in parts of (the model's own
size + 1.3 x the largest file). Ends with exit code 1 where ours is above it. Needs transformers and
torch.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

WIDTH, HIDDEN, HEADS, GROUPS, VOCABULARY = 2048, 5632, 32, 4, 32000


def make(folder, size, shard):
  """Writes a checkpoint of about `size` bytes."""
  import ml_dtypes
  import numpy as np

  from lean_jax.interop import shards
  kv = WIDTH // HEADS * GROUPS
  layer = {'self_attn.q_proj': (WIDTH, WIDTH), 'self_attn.k_proj': (kv, WIDTH),
           'self_attn.v_proj': (kv, WIDTH), 'self_attn.o_proj': (WIDTH, WIDTH),
           'mlp.gate_proj': (HIDDEN, WIDTH), 'mlp.up_proj': (HIDDEN, WIDTH),
           'mlp.down_proj': (WIDTH, HIDDEN), 'input_layernorm': (WIDTH,),
           'post_attention_layernorm': (WIDTH,)}
  outside = {'model.embed_tokens': (VOCABULARY, WIDTH), 'model.norm': (WIDTH,),
             'lm_head': (VOCABULARY, WIDTH)}
  count = lambda shapes: sum(2 * int(np.prod(shape)) for shape in shapes.values())
  layers = max(1, round((size - count(outside)) / count(layer)))
  shapes = outside | {f'model.layers.{k}.{name}': shape for k in range(layers)
                      for name, shape in layer.items()}
  rng, dtype = np.random.default_rng(0), np.dtype(ml_dtypes.bfloat16)
  value = lambda name: rng.standard_normal(
      shapes[name.removesuffix('.weight')], np.float32) * np.float32(.02)
  shards.write(folder, {f'{name}.weight': (shape, dtype) for name, shape in shapes.items()}, value,
               shards.nbytes(shard))
  (folder / 'config.json').write_text(json.dumps(dict(
      architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=WIDTH,
      intermediate_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
      num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=2048,
      rms_norm_eps=1e-5, hidden_act='silu', tie_word_embeddings=False, torch_dtype='bfloat16')))
  return layers


def status(key):
  """A line of the kernel's account of this process, in bytes."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


# Each gives a function that loads, and one from what it gave to NumPy arrays that share its memory.
def ours(folder, dtype, devices):
  import jax
  import numpy as np

  from lean_jax.interop.hf import load_hf
  from lean_jax.training import mesh as meshes
  mesh = meshes.make_mesh(fsdp=devices) if devices > 1 else None
  where = None if mesh is None else lambda like: meshes.shardings(like, mesh)
  jax.devices()
  load = lambda: jax.block_until_ready(load_hf(folder, dtype=dtype, shardings=where)[2])
  return load, lambda params: [np.asarray(shard.data).view(np.uint8)
                               for x in jax.tree.leaves(params) for shard in x.addressable_shards
                               if shard.replica_id == 0]


def theirs(folder, dtype, devices):
  import torch
  from transformers import AutoModelForCausalLM
  load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
  return load, lambda model: [p.detach().view(torch.uint8).numpy() for p in model.parameters()]


def child(who, folder, dtype, devices):
  """Loads and prints what it took, as JSON."""
  import time
  load, arrays = dict(ours=ours, theirs=theirs)[who](folder, dtype, devices)
  before, cpu, start = status('VmRSS'), time.process_time(), time.perf_counter()
  model = load()
  seconds = time.perf_counter() - start
  found = arrays(model)
  assert all(x.max() for x in found)
  print(json.dumps(dict(
      seconds=seconds, looked=time.perf_counter() - start, cpu=time.process_time() - cpu,
      before=before, peak=status('VmHWM'), model=sum(x.nbytes for x in found))))


def run(who, folder, dtype, devices):
  import os
  flags = f'--xla_force_host_platform_device_count={devices}'
  out = subprocess.run(
      [sys.executable, __file__, '--child', who, '--folder', str(folder), '--dtype', dtype,
       '--devices', str(devices)], check=True, capture_output=True,
      env=os.environ | dict(XLA_FLAGS=flags, JAX_PLATFORMS='cpu', HF_HUB_OFFLINE='1'))
  return json.loads(out.stdout.splitlines()[-1])


def compare(folder, rounds):
  """Prints the table and gives the worst ratio of ours."""
  sizes = [path.stat().st_size for path in folder.glob('*.safetensors')]
  cases = [('ours', dtype, devices) for dtype in ('bfloat16', 'float32') for devices in (1, 8)]
  cases += [('theirs', dtype, 1) for dtype in ('bfloat16', 'float32')]
  found = {case: [] for case in cases}
  for _ in range(rounds):
    for case in cases:
      found[case].append(run(case[0], folder, *case[1:]))
  print(f'{len(sizes)} files, {sum(sizes) / 1e9:.2f} GB, the largest {max(sizes) / 1e6:.0f} MB; '
        f'medians of {rounds}\n')
  print('| who | dtype | devices | seconds | and looked at | CPU s | model GB | peak GB | of it '
        'before loading | peak / (model + 1.3 x largest file) |\n| --- | --- |' + ' ---: |' * 8)
  worst = 0
  for (who, dtype, devices), rows in found.items():
    middle = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
    peak = max(row['peak'] for row in rows)
    ratio = peak / (middle['model'] + 1.3 * max(sizes))
    worst = max(worst, ratio if who == 'ours' else 0)
    print(f'| {dict(ours="lean_jax", theirs="transformers")[who]} | {dtype} | {devices} '
          f'| {middle["seconds"]:.1f} | {middle["looked"]:.1f} '
          f'| {middle["cpu"]:.1f} | {middle["model"] / 1e9:.2f} | {peak / 1e9:.2f} '
          f'| {middle["before"] / 1e9:.2f} | {ratio:.2f} |')
  return worst


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--gigabytes', type=float, default=2.)
  parser.add_argument('--shard', default='300MB', help='bytes of a file (%(default)s)')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--folder', type=pathlib.Path, help='used again where it has a checkpoint')
  parser.add_argument('--child', choices=('ours', 'theirs'), help=argparse.SUPPRESS)
  parser.add_argument('--dtype', default='bfloat16', help=argparse.SUPPRESS)
  parser.add_argument('--devices', type=int, default=1, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    child(arguments.child, arguments.folder, arguments.dtype, arguments.devices)
    return
  with tempfile.TemporaryDirectory() as temporary:
    folder = arguments.folder or pathlib.Path(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / 'config.json').exists():
      layers = make(folder, arguments.gigabytes * 1e9, arguments.shard)
      print(f'made a Llama of {layers} layers')
    sys.exit(int(compare(folder, arguments.rounds) >= 1))


if __name__ == '__main__':
  main()
