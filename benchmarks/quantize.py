"""What rounding costs: seconds and peak memory of GPTQ and AWQ, of one matrix and of a whole model.

python benchmarks/quantize.py [--size 4096] [--layers 16] [--width 512] [--samples 128]

One matrix, 4 bits in groups of 128, inputs of as many rows: cold with compilation, and warm, in
seconds of the processor and of the clock. The whole model is a random Llama saved as a Hugging Face
folder; ours and llm-compressor's GPTQ (where that package is installed) round it on the same tokens
in fresh processes that take turns: seconds of the call, imports and loading apart, and the peak of
resident memory. qwix's GPTQ is timed on one matrix where qwix is installed, of --peer-size.
"""
import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

VOCABULARY, WINDOW, GROUP = 2000, 256, 128


def timed(f):
  """(seconds of the processor, seconds) of f()."""
  start, cpu = time.perf_counter(), time.process_time()
  f()
  return time.process_time() - cpu, time.perf_counter() - start


def peak():
  """The largest resident memory of this process so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours_matrix(method, size):
  """One matrix [size size] with inputs of as many rows."""
  import jax
  import jax.numpy as jnp

  from lean_jax.calibration import statistics as seen
  from lean_jax.quantization.awq import awq, awq_scales
  from lean_jax.quantization.gptq import gptq
  from lean_jax.quantization.spec import parse_spec
  from lean_jax.weights import Dense
  spec, keys = parse_spec(f'w4a16-g{GROUP}'), jax.random.split(jax.random.key(0), 2)
  x = jax.random.normal(keys[0], (size, size))
  w = Dense(jax.random.normal(keys[1], (size, size)), 'io', (None, None))
  stats = jax.block_until_ready(jax.jit(seen.of_matrix)(x))

  def run():
    if method == 'awq':
      jax.block_until_ready(awq_scales([w.value], [stats], spec))
    jax.block_until_ready({'gptq': gptq, 'awq': awq}[method](w, spec, stats))
  before = peak()
  cold, warm = timed(run), timed(run)
  del jnp
  return dict(cold=cold, warm=warm, peak=peak(), before=before)


def qwix_matrix(size):
  """qwix's GPTQ of one matrix, by its own function of a matrix and a Hessian."""
  import jax
  from qwix._src.core import qarray
  from qwix.contrib import gptq_core
  keys = jax.random.split(jax.random.key(0), 2)
  x, w = (jax.random.normal(k, (size, size)) for k in keys)
  hessian = jax.block_until_ready(gptq_core.compute_hessian(x))
  how = qarray.HowToQuantize(qtype='int4', channelwise_axes=[0], tiled_axes={1: GROUP},
                             calibration_method='absmax')
  run = lambda: jax.block_until_ready(
      jax.tree.leaves(gptq_core.quantize_weight(w, hessian, how, blocksize=128)))
  before = peak()
  return dict(cold=timed(run), warm=timed(run), peak=peak(), before=before)


def ours_model(folder, samples, method='gptq'):
  """The whole model from its folder, twice in one process: the second call compiles nothing."""
  import jax
  import numpy as np

  import lean_jax as lean
  from lean_jax.data.windows import Windows
  model = lean.load(folder)
  jax.block_until_ready(model.params)
  tokens = np.load(pathlib.Path(folder, 'tokens.npy'))[:samples]
  windows = Windows(tokens.astype(np.uint16), tokens.size, tokens.size, 1, 'random')
  before = peak()
  run = lambda: jax.block_until_ready(lean.quantize(
      model, f'w4a16-g{GROUP}', method, calibration=windows, samples=samples).params)
  cold, warm = timed(run), timed(run)
  return dict(cold=cold, warm=warm, peak=peak(), before=before)


def compressor_model(folder, samples):
  """llm-compressor's GPTQ of the same model and tokens."""
  import datasets
  import numpy as np
  import torch
  import transformers
  from llmcompressor import oneshot
  from llmcompressor.modifiers.quantization import GPTQModifier
  torch.set_num_threads(os.cpu_count())
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  tokens = np.load(pathlib.Path(folder, 'tokens.npy'))[:samples]
  data = datasets.Dataset.from_dict(dict(
      input_ids=tokens.tolist(), attention_mask=np.ones_like(tokens).tolist()))
  scheme = dict(group_0=dict(targets=['Linear'], weights=dict(
      num_bits=4, type='int', symmetric=True, strategy='group', group_size=GROUP)))
  recipe = GPTQModifier(config_groups=scheme, ignore=['lm_head'])
  before = peak()
  run = lambda: oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=WINDOW,
                        num_calibration_samples=samples, batch_size=8)
  return dict(cold=timed(run), peak=peak(), before=before)


def make(folder, layers, width, samples):
  """A random Llama in float32, and tokens for it."""
  import numpy as np

  from lean_jax.data.tokenizer import train_bpe
  from lean_jax.interop import shards
  hidden, heads = 3 * width, width // 64
  layer = {'self_attn.q_proj': (width, width), 'self_attn.k_proj': (width, width),
           'self_attn.v_proj': (width, width), 'self_attn.o_proj': (width, width),
           'mlp.gate_proj': (hidden, width), 'mlp.up_proj': (hidden, width),
           'mlp.down_proj': (width, hidden), 'input_layernorm': (width,),
           'post_attention_layernorm': (width,)}
  shapes = {'model.embed_tokens': (VOCABULARY, width), 'model.norm': (width,),
            'lm_head': (VOCABULARY, width)}
  shapes |= {f'model.layers.{k}.{n}': s for k in range(layers) for n, s in layer.items()}
  rng = np.random.default_rng(0)
  value = lambda name: (np.ones(shapes[name.removesuffix('.weight')], np.float32)
                        if 'norm' in name else rng.standard_normal(
                            shapes[name.removesuffix('.weight')], np.float32) / width ** .5)
  shards.write(folder, {f'{n}.weight': (s, np.dtype('float32')) for n, s in shapes.items()}, value,
               1 << 40)
  (folder / 'config.json').write_text(json.dumps(dict(
      architectures=['LlamaForCausalLM'], model_type='llama', hidden_size=width,
      intermediate_size=hidden, num_attention_heads=heads, num_key_value_heads=heads,
      num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=WINDOW,
      rms_norm_eps=1e-5, hidden_act='silu', tie_word_embeddings=False, torch_dtype='float32')))
  train_bpe(['a text for a tokenizer that nothing is read by\n' * 20], 280).save(folder)
  np.save(folder / 'tokens.npy', rng.integers(0, VOCABULARY, (samples, WINDOW)))
  return sum(int(np.prod(s)) for s in shapes.values())


def fresh(*arguments):
  """What this script measures in a process of its own; None where a package is not there."""
  out = subprocess.run([sys.executable, __file__, '--one', json.dumps(arguments)], text=True,
                       capture_output=True)
  if 'ModuleNotFoundError' in out.stderr:
    return None
  if out.returncode:
    raise SystemExit(out.stderr)
  return json.loads(out.stdout.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', type=int, default=4096)
  parser.add_argument('--peer-size', type=int, default=512)
  parser.add_argument('--layers', type=int, default=16)
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--samples', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=1)
  parser.add_argument('--one', help=argparse.SUPPRESS)
  a = parser.parse_args()
  if a.one:
    name, *rest = json.loads(a.one)
    print(json.dumps(globals()[name](*rest)))
    return
  print(f'{os.cpu_count()} cores; seconds of the processor (of the clock)\n')
  both = lambda pair: f'{pair[0]:.1f} ({pair[1]:.1f})'
  print('| one matrix | size | cold | warm | peak above start, MiB |')
  print('| --- | ---: | ---: | ---: | ---: |')
  rows = [('lean_jax gptq', 'ours_matrix', 'gptq', a.size),
          ('lean_jax awq', 'ours_matrix', 'awq', a.size),
          ('lean_jax gptq', 'ours_matrix', 'gptq', a.peer_size),
          ('qwix gptq', 'qwix_matrix', a.peer_size)]
  for name, *given in rows:
    found = fresh(*given)
    if found is None:
      print(f'| {name} | {given[-1]} | not installed | | |')
      continue
    print(f'| {name} | {given[-1]} | {both(found["cold"])} | {both(found["warm"])} | '
          f'{(found["peak"] - found["before"]) / 2 ** 20:,.0f} |', flush=True)
  with tempfile.TemporaryDirectory() as folder:
    size = make(pathlib.Path(folder), a.layers, a.width, a.samples)
    print(f'\n{a.layers} layers of width {a.width}, {4 * size / 2 ** 20:,.0f} MiB, {a.samples} '
          f'windows of {WINDOW} tokens; medians of {a.rounds}\n')
    turns = {'ours_model': [], 'compressor_model': []}
    for _ in range(a.rounds):
      for name, seen in turns.items():
        seen.append(fresh(name, folder, a.samples))
    print('| whole model, gptq | cold | warm | peak above start, MiB |')
    print('| --- | ---: | ---: | ---: |')
    middle = lambda seen, key: [statistics.median(s[key][k] for s in seen) for k in (0, 1)]
    for name, seen in turns.items():
      if None in seen:
        print(f'| {name} | not installed | | |')
        continue
      warm = both(middle(seen, 'warm')) if 'warm' in seen[0] else 'compiles nothing'
      print(f'| {name} | {both(middle(seen, "cold"))} | {warm} | '
            f'{statistics.median((s["peak"] - s["before"]) / 2 ** 20 for s in seen):,.0f} |')


if __name__ == '__main__':
  main()
