# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # QLoRA: a model in four bits learns to answer, and keeps several adapters
#
# A base model is rounded to NF4 and learns from conversations by a low-rank adapter (Dettmers et
# al. 2023, arXiv:2305.14314); the adapter is saved for `peft`, a second one stands beside it over
# the same base, and each row of a batch has its own; then one is merged into the four bits. This
# notebook was made for a CPU runtime; a GPU or TPU runtime works too. Nothing is downloaded unless
# you name a model.
#
# It needs the package: `pip install -e .` in a checkout.

# %%
import importlib
import inspect
import json
import os
import tempfile

import matplotlib.pyplot as plt
import numpy as np

import lean_jax as lean
from lean_jax import tree
from lean_jax.data.sources import open_source
from lean_jax.data.tokenizer import train_bpe
from lean_jax.data.windows import pack

# %% [markdown]
# Name your own base here: a Hugging Face folder or a hub id. With `''` a small one is trained on
# the Python language reference, which teaches it to write words, not to answer.

# %%
BASE = ''

tiny = os.environ.get('LEAN_JAX_SIZE') == 'tiny'
folder = os.path.join(tempfile.gettempdir(), 'qlora_tiny' if tiny else 'qlora')
if BASE:
  base = lean.load(BASE)
else:
  source = open_source('stdlib:docs')
  tokenizer = train_bpe([document.text for document in source.documents('train')], 512)
  base = lean.create('llama', tokenizer, hidden_size=64 if tiny else 128,
                     num_hidden_layers=2 if tiny else 4, num_attention_heads=4,
                     num_key_value_heads=2, intermediate_size=128 if tiny else 384,
                     max_position_embeddings=128)
  text = pack(source, 'train', tokenizer, 64, f'{folder}/windows',
              max_tokens=20_000 if tiny else None)
  base = lean.train(base, text, steps=30 if tiny else 400, batch=8 if tiny else 16, peak=3e-3,
                    warmup=10, workdir=f'{folder}/base')

# %% [markdown]
# Four bits a weight, in the levels of a normal distribution, and eight for each block's scale.

# %%
small = lean.quantize(base, 'nf4-g64-dq')
sizes = {'float': tree.nbytes(base.params), 'nf4': tree.nbytes(small.params)}
print(sizes)

# %% [markdown]
# The examples are conversations made of the standard library: which module a function is in, and
# how it is called. A tokenizer without a chat template is given one, whose head of an answer ends
# with a line: after a space, the answer's first token would be another one than was learned.

# %%
TEMPLATE = ('{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}'
            '{% if add_generation_prompt %}assistant:\n{% endif %}')
MODULES = ('textwrap', 'shutil') if tiny else (
    'bisect', 'calendar', 'copy', 'difflib', 'fnmatch', 'glob', 'heapq', 'json', 'shutil',
    'statistics', 'string', 'tempfile', 'textwrap', 'uuid')


def functions():
  """(module, name, arguments) of the public functions."""
  for module in MODULES:
    for name, found in vars(importlib.import_module(module)).items():
      if inspect.isfunction(found) and found.__module__ == module and not name.startswith('_'):
        yield module, name, ', '.join(list(inspect.signature(found).parameters)[:4])


def conversation(question, answer):
  """One example."""
  return dict(messages=[dict(role='user', content=question),
                        dict(role='assistant', content=answer)])


known = list(functions())
where = [conversation(f'Where is {name}?', module) for module, name, _ in known]
call = [conversation(f'How is {name} called?', f'{name}({given})') for _, name, given in known]
print(len(known), where[0], call[0], sep='\n')

# %% [markdown]
# `lean.finetune` attaches an adapter to every matrix and trains it, on the answers alone. Over a
# model that is rounded already, `method='qlora'` takes it as it is.

# %%
how = dict(method='qlora', adapter=dict(rank=8, alpha=16.), template=TEMPLATE, window=128, batch=4,
           steps=30 if tiny else 300, peak=1e-2, warmup=10)
located = lean.finetune(small, where, workdir=f'{folder}/where', **how)
called = lean.finetune(small, call, workdir=f'{folder}/call', **how)
sizes |= {'nf4 and adapter': tree.nbytes(located.params)}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
left.bar(list(sizes), [n / 1024 for n in sizes.values()])
left.set(ylabel='KiB')
for name in ('where', 'call'):
  with open(f'{folder}/{name}/metrics.jsonl') as file:
    lines = [json.loads(line) for line in file]
  right.plot([x['step'] for x in lines], [x['loss'] for x in lines], label=name)
right.set(xlabel='step', ylabel='nats a token of the answers')
right.legend()
plt.show()

# %% [markdown]
# The answer before and after.

# %%
def asked(example):
  """The prompt of a conversation, up to the answer."""
  return small.tokenizer.chat(example['messages'][:1], template=TEMPLATE)


def answers(model, examples, tokens=16):
  """What a model says to each."""
  prompts = [asked(example) for example in examples]
  return [text[len(prompt):].splitlines()[0] if text[len(prompt):].strip() else ''
          for prompt, text in zip(prompts, model.generate(prompts, tokens=tokens))]


some = where[:3]
print('asked ', [x['messages'][0]['content'] for x in some])
print('before', answers(small, some))
after = answers(located, some)
print('after ', after)

# %% [markdown]
# The adapters alone, in files that `peft.PeftModel.from_pretrained(base, folder)` reads, and that
# `lean.load_adapter` reads back.

# %%
for name, model in (('where', located), ('call', called)):
  lean.save_adapter(model, f'{folder}/{name}_adapter', overwrite=True)
  print(name, {file: os.path.getsize(f'{folder}/{name}_adapter/{file}')
               for file in sorted(os.listdir(f'{folder}/{name}_adapter'))})

# %% [markdown]
# Both over one base, which is in memory once: `lean.use` switches, or gives each row of a batch its
# own; `None` is the base alone. The first and the last row below are told apart by their
# adapters only.

# %%
both = lean.together({name: lean.load_adapter(small, f'{folder}/{name}_adapter')
                      for name in ('where', 'call')})
mixed = lean.use(both, ['where', 'call', None])
given = answers(mixed, [where[0], call[0], where[0]])
print(*(f'{name:<6} {answer}' for name, answer in zip(('where', 'call', 'base'), given)), sep='\n')
print('together', tree.nbytes(both.params), 'bytes')
assert given[0] == after[0]

# %% [markdown]
# Merged into the four bits. What is finer than a step of their grid is lost, and it says how much
# of each weight that is.

# %%
merged, errors = lean.requantize(located)
for name, error in errors.items():
  print(f'{name:<32} {error:.4f}')
print(tree.nbytes(merged.params), 'bytes; float, merged exactly:',
      tree.nbytes(lean.merge(located).params))
print('merged', answers(merged, some))
assert all(np.isfinite(list(errors.values())))
