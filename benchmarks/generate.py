"""Reading a prompt and writing after it, ours against transformers', taking turns in one process.

python benchmarks/generate.py [--rounds 7] [--model DIR ...] [--draft TARGET DRAFT ...]

Models: a random Llama of 4 layers and width 256, made on disk; stories260K, where LEAN_JAX_DATA
names the real data; and those given. Of each: tokens a second of reading a prompt (the time until
the first token) and of writing greedily after it (what further tokens take), medians over rounds,
both from the same folder, in float32 on the CPU, with the same threads. The tokens themselves are
compared first. Then what a draft makes of a target's speed and how many of its tokens are kept,
greedy and at temperature 1: of a random Llama of 12 layers and width 768 whose upper layers change
little, drafted by its first layer, and of the pairs given with --draft. Needs torch and
transformers.

Ends with exit code 1 where writing is not at least twice as fast as transformers' for the model of
width 256 (batch 1), or five times for stories260K.
"""
import argparse
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

PROMPT, TOKENS = 128, 128
LEAST = {'4 layers, width 256': 2., 'stories260K': 5.}         # times transformers, at batch 1


def make(folder):
  """Writes a random Llama of 4 layers and width 256 whose greedy text is no loop of one token."""
  llama(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2).save_pretrained(folder)


def make_pair(folder, small, upper=.03):
  """Writes a random Llama of 12 layers and width 768 (85 million parameters in them), and its first
  layer as its draft; what the upper ones write into the stream is `upper` times as large."""
  import torch
  width = dict(hidden_size=768, intermediate_size=2048, num_attention_heads=12,
               num_key_value_heads=12, initializer_range=.05)
  large = llama(num_hidden_layers=12, **width)
  with torch.no_grad():
    for layer in large.model.layers[1:]:
      layer.self_attn.o_proj.weight *= upper
      layer.mlp.down_proj.weight *= upper
  large.save_pretrained(folder)
  draft = llama(num_hidden_layers=1, **width)
  draft.load_state_dict(large.state_dict(), strict=False)
  draft.save_pretrained(small)


def llama(**keys):
  """A random Llama of transformers."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM
  torch.manual_seed(0)
  return LlamaForCausalLM(LlamaConfig(**dict(
      vocab_size=4096, max_position_embeddings=512, tie_word_embeddings=False,
      initializer_range=.1) | keys))


def medians(runs, rounds):
  """{name: median seconds} of functions that take turns; the first turn is not counted."""
  found = {name: [] for name in runs}
  for k in range(rounds + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      if k:
        found[name].append(time.perf_counter() - start)
  return {name: statistics.median(seconds) for name, seconds in found.items()}


def compare(name, folder, batch, prompt, tokens, rounds):
  """Prints a row and gives how many times faster ours writes."""
  import numpy as np
  import torch
  from transformers import AutoModelForCausalLM, GenerationConfig

  from lean_jax.generation import generate
  from lean_jax.interop.hf import load_hf
  _, config, params, _ = load_hf(folder)
  other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  # Without this a model that ends texts would write fewer tokens than are counted.
  other.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
  ids = np.random.default_rng(0).integers(3, config.vocabulary, (batch, prompt)).astype(np.int32)
  given = torch.tensor(ids, dtype=torch.long)

  def ours(count):
    return generate(config.module, params, ids, tokens=count)

  def theirs(count):
    with torch.inference_mode():
      out = other.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count)
    return out.numpy()[:, prompt:]
  same = int((ours(tokens) == theirs(tokens)).all(axis=0).cumprod().sum())
  seconds = medians({'ours, 1': lambda: ours(1), 'theirs, 1': lambda: theirs(1),
                     'ours': lambda: ours(tokens), 'theirs': lambda: theirs(tokens)}, rounds)
  reading = {who: batch * prompt / seconds[f'{who}, 1'] for who in ('ours', 'theirs')}
  writing = {who: batch * (tokens - 1) / (seconds[who] - seconds[f'{who}, 1'])
             for who in ('ours', 'theirs')}
  ratio = writing['ours'] / writing['theirs']
  print(f'| {name} | {batch} | {reading["ours"]:,.0f} | {reading["theirs"]:,.0f} '
        f'| {reading["ours"] / reading["theirs"]:.2f} | {writing["ours"]:,.0f} '
        f'| {writing["theirs"]:,.0f} | {ratio:.2f} | {same} of {tokens} |', flush=True)
  return ratio


def drafts(target, draft, rounds, prompt=32, tokens=96, ahead=4):
  """Prints what a draft makes of a target's speed."""
  import jax
  import numpy as np

  from lean_jax.generation.sampling import checked
  from lean_jax.generation.writer import Writer
  from lean_jax.interop.hf import load_hf
  (_, large, params, _), (_, small, theirs, _) = load_hf(target), load_hf(draft)
  ids = np.random.default_rng(0).integers(3, large.vocabulary, (1, prompt)).astype(np.int32)
  pair = small.module, theirs
  for temperature in (0., 1.):
    kept, turn = [], itertools.count()

    def run(draft, turn=turn, temperature=temperature, kept=kept):
      writer = Writer(large.module, params, list(ids), tokens=tokens, sampling=checked(
          temperature, None, None, None, None), key=jax.random.key(next(turn)), draft=draft,
          ahead=ahead)
      writer.advance()
      if draft:
        kept.append(writer.drafts)
      return writer.ids()
    seconds = medians(dict(alone=functools.partial(run, None),
                           drafted=functools.partial(run, pair)), rounds)
    same = '' if temperature else (
        f'{int((run(None) == run(pair)).cumprod().sum())} of {tokens}')
    part = sum(k for _, k in kept[1:]) / sum(n for n, _ in kept[1:])
    print(f'| {target.name} drafted by {draft.name} | {temperature:g} '
          f'| {tokens / seconds["alone"]:,.0f} | {tokens / seconds["drafted"]:,.0f} '
          f'| {seconds["alone"] / seconds["drafted"]:.2f} | {part:.2f} | {same} |', flush=True)
  jax.clear_caches()


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--batches', type=int, nargs='*', default=(1, 8))
  parser.add_argument('--model', type=pathlib.Path, nargs='*', default=())
  parser.add_argument('--draft', type=pathlib.Path, nargs=2, metavar=('TARGET', 'DRAFT'),
                      action='append', default=[])
  arguments = parser.parse_args()
  os.environ.setdefault('HF_HUB_OFFLINE', '1')
  import jax
  import torch
  import transformers
  print(f'float32, {os.cpu_count()} cores, {jax.devices()[0].platform}, jax {jax.__version__}, '
        f'torch {torch.__version__}, transformers {transformers.__version__} (eager); medians of '
        f'{arguments.rounds}; prompts of {PROMPT} tokens, texts of {TOKENS}\n\n'
        '| model | batch | reads, tokens/s | transformers | times | writes, tokens/s '
        '| transformers | times | tokens that agree |\n| --- | ---: |' + ' ---: |' * 7)
  with tempfile.TemporaryDirectory() as temporary:
    folders = {'4 layers, width 256': pathlib.Path(temporary)}
    make(folders['4 layers, width 256'])
    if os.environ.get('LEAN_JAX_DATA'):
      folders['stories260K'] = pathlib.Path(os.environ['LEAN_JAX_DATA'], 'models', 'stories260K')
    folders |= {folder.name: folder for folder in arguments.model}
    slow = []
    for name, folder in folders.items():
      context = json.loads((folder / 'config.json').read_text())['max_position_embeddings']
      for batch in arguments.batches:
        ratio = compare(name, folder, batch, min(PROMPT, context // 2), min(TOKENS, context // 2),
                        arguments.rounds)
        if batch == 1 and ratio < LEAST.get(name, 0):
          slow.append(f'{name}: {ratio:.2f} times transformers, not {LEAST[name]:g}')
  print('\ndrafts of 4 tokens; the prompt of 32 tokens is read in both\n\n'
        '| pair | temperature | alone, tokens/s | with the draft | times | of the drafted tokens '
        'kept | greedy tokens that agree |\n| --- |' + ' ---: |' * 6)
  with tempfile.TemporaryDirectory() as temporary:
    pair = pathlib.Path(temporary, '12 layers'), pathlib.Path(temporary, '1 layer')
    make_pair(*pair)
    for folders in (pair, *arguments.draft):
      drafts(*folders, arguments.rounds)
  if slow:
    sys.exit('\n'.join(slow))


if __name__ == '__main__':
  main()
