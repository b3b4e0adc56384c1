"""Our steps of LoRA, QLoRA and full fine-tuning against transformers and peft, taking turns.

python benchmarks/adapt.py [--rounds 9] [--width 512]

The same Llama, batch and AdamW. Prints, of each: tokens a CPU-second (all threads) and a second of
wall time, medians over rounds; bytes of weights, of gradients and of the optimizer; ours also the
step's temporaries, by its compiler. Before that the first losses. peft's QLoRA is over weights of
bitsandbytes (NF4), which has no fast path on a CPU. Needs torch, transformers, peft, bitsandbytes.
"""
import argparse
import os
import pathlib
import tempfile

import train_step

RANK, ALPHA = 8, 16


def ours(model, tokens):
  """(the first loss, a step, bytes) of an adapted model."""
  import jax

  from lean_jax import tree
  from lean_jax.adapters.trained import trained
  from lean_jax.objectives.language_modeling import next_token
  from lean_jax.training import loop
  from lean_jax.training.optimizer import adamw
  loss, pattern = next_token(model.module), trained(model.params) or '.*'
  first = float(jax.jit(loss)(model.params, dict(tokens=tokens), None)[0])
  train, rest = tree.split(model.params, pattern)
  tx = adamw(steps=10, peak=train_step.PEAK)
  state = loop.State(train, jax.jit(tx.init)(train))
  update = loop.compiled(loss, tx, 1, loop.STOPS, state)
  done = update.lower(state, rest, {}, dict(tokens=tokens), jax.random.key(0), 0).compile()
  step = train_step.looped(loss, model.params, tokens, trainable=pattern)
  small = sum(x.nbytes for x in jax.tree.leaves(train))
  held = tree.nbytes(model.params) + 3 * small          # gradients, and two moments
  return first, step, held, done.memory_analysis().temp_size_in_bytes


def theirs(folder, tokens, how):
  """(the first loss, a step, bytes) of transformers and peft."""
  import torch
  import transformers
  more = {}
  if how == 'qlora':
    more = dict(quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32))
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
  model.train()
  if how != 'full':
    import peft
    model = peft.get_peft_model(model, peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0., target_modules='all-linear'))
  ids = torch.tensor(tokens, dtype=torch.long)
  trained = [p for p in model.parameters() if p.requires_grad]
  loss = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
  size = lambda xs: sum(x.numel() * x.element_size() for x in xs)
  held = size(model.parameters()) + 3 * size(trained)
  return loss().item(), train_step.torch_looped(loss, trained), held


def main():
  """Prints the figures."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--width', type=int, default=512)
  arguments = parser.parse_args()
  import jax
  import numpy as np
  import torch

  import lean_jax as lean
  from lean_jax.data.tokenizer import train_bpe
  tokenizer = train_bpe(['the quick brown fox jumps over the lazy dog\n' * 20], 280)
  D = arguments.width
  base = lean.create('llama', tokenizer, vocab_size=4096, hidden_size=D, intermediate_size=3 * D,
                     num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                     max_position_embeddings=128)
  tokens = np.random.default_rng(0).integers(0, 4096, (8, 128)).astype(np.int32)
  steps, rows = {}, {}
  with tempfile.TemporaryDirectory() as folder:
    lean.save(base, pathlib.Path(folder, 'base'), format='hf')
    nf4 = lean.quantize(base, 'nf4-g64-dq')
    adapted = lambda model: lean.attach(model, 'lora', rank=RANK, alpha=float(ALPHA))
    for how, model in (('full', base), ('lora', adapted(base)), ('qlora', adapted(nf4))):
      one, steps[f'lean_jax {how}'], held, temporaries = ours(model, tokens)
      other, steps[f'torch {how}'], other_held = theirs(pathlib.Path(folder, 'base'), tokens, how)
      print(f'{how}: first loss lean_jax {one:.6f}, torch {other:.6f}')
      rows[how] = held, other_held, temporaries
      assert how == 'qlora' or abs(one - other) < 1e-4 * abs(other)
    medians = train_step.taking_turns(steps, arguments.rounds)
  print(f'width {D}, 4 layers, batch {tokens.shape}; float32, {os.cpu_count()} cores, '
        f'{jax.devices()[0]}, jax {jax.__version__}, torch {torch.__version__}')
  for how, (held, other_held, temporaries) in rows.items():
    (cpu, wall), (cpu2, wall2) = (medians[f'{who} {how}'] for who in ('lean_jax', 'torch'))
    print(f'{how:<6} lean_jax {tokens.size / cpu:7,.0f} tokens/CPU-s, {tokens.size / wall:7,.0f} '
          f'tokens/s, {held / 2 ** 20:6.1f} MiB held, {temporaries / 2 ** 20:6.1f} MiB temporary; '
          f'torch {tokens.size / cpu2:7,.0f}, {tokens.size / wall2:7,.0f}, '
          f'{other_held / 2 ** 20:6.1f}; ratio {cpu2 / cpu:.2f} (CPU) {wall2 / wall:.2f} (wall)')


if __name__ == '__main__':
  main()
