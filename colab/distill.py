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
# # Distillation: what a student learns from its teacher, loss against loss
#
# A student of half its teacher's layers trains for as many steps on the same text by several
# losses: forward and reverse KL, hidden states, and on what it writes itself. Then the teacher's
# labels are computed once and kept, and the student is saved for `transformers`. This notebook was
# made for a CPU runtime; a GPU or TPU runtime works too. Nothing is downloaded unless you name a
# model.
#
# It needs the package: `pip install -e .` in a checkout.

# %%
import json
import os
import tempfile

import matplotlib.pyplot as plt

import lean_jax as lean
from lean_jax.data.sources import open_source
from lean_jax.data.tokenizer import train_bpe
from lean_jax.data.windows import pack

# %% [markdown]
# Name your own here: a Hugging Face folder or a hub id, and text (a .jsonl or .txt file, or a
# folder). With `''` a small teacher is trained on the Python standard library's source files.

# %%
tiny = os.environ.get('LEAN_JAX_SIZE') == 'tiny'
TEACHER = ''
TEXT = 'stdlib:docs' if tiny else 'stdlib'

steps, window, learned, tested = (24, 32, 8192, 2048) if tiny else (200, 128, 400_000, 32_768)
folder = os.path.join(tempfile.gettempdir(), 'distill_tiny' if tiny else 'distill')
how = dict(steps=steps, batch=8 if tiny else 16, peak=3e-3, warmup=steps // 10)

# %%
source = open_source(TEXT)
if TEACHER:
  teacher = lean.load(TEACHER)
else:
  tokenizer = train_bpe([document.text for document in source.documents('train')], 512)
  teacher = lean.create(
      'llama', tokenizer, hidden_size=64 if tiny else 128, num_hidden_layers=4,
      num_attention_heads=4, num_key_value_heads=2, intermediate_size=128 if tiny else 384,
      max_position_embeddings=window)

# %% [markdown]
# Windows of so many tokens: the source's own split keeps whole documents for tests.

# %%
train, test = (pack(source, split, teacher.tokenizer, window, f'{folder}/windows', max_tokens=most)
               for split, most in (('train', learned), ('test', tested)))
if not TEACHER:
  teacher = lean.train(teacher, train, workdir=f'{folder}/teacher', **{**how, 'steps': 3 * steps})
perplexity = lambda model: lean.evaluate(model, test)['perplexity']
print('teacher', perplexity(teacher))

# %% [markdown]
# The losses. Each is a list, of which every entry may have a weight; `lean.distill` starts a
# student as every other layer of its teacher. `on_policy` lets the student write the end of half of
# the batches, on which the teacher scores it (GKD, Agarwal et al. 2023, arXiv:2306.13649).

# %%
half = teacher.config.layers // 2
LOSSES = {
    'forward KL': dict(losses=[dict(kind='forward_kl')]),
    'reverse KL': dict(losses=[dict(kind='reverse_kl')]),
    'hidden states': dict(losses=[dict(kind='forward_kl'), dict(kind='hidden', layers='uniform')]),
    'on policy': dict(losses=[dict(kind='jsd', beta=.5)],
                      on_policy=dict(fraction=.5, tokens=window // 4, temperature=1.))}
students = {name: lean.distill(teacher, train, keep=half, workdir=f'{folder}/{name}', **settings,
                               **how)
            for name, settings in LOSSES.items()}

# %%
found = {name: perplexity(student) for name, student in students.items()}
print(*(f'{name:<16} {value:.2f}' for name, value in found.items()), sep='\n')

# %% [markdown]
# Left, the perplexity of held-out text; right, the loss of each on its way (losses of different
# kinds are not to be compared, their shapes are).

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
left.barh(['teacher', *found], [perplexity(teacher), *found.values()])
left.set(xlabel='perplexity')
for name in LOSSES:
  with open(f'{folder}/{name}/metrics.jsonl') as file:
    lines = [json.loads(line) for line in file]
  right.plot([x['step'] for x in lines], [x['loss'] for x in lines], label=name)
right.set(xlabel='step', ylabel='loss')
right.legend()
plt.show()

# %% [markdown]
# A teacher that is large is best asked once: its k most probable tokens after each are kept, in at
# most 3.2 bytes an entry, and any number of students learn from them with no teacher at hand.

# %%
cache = lean.cache_teacher(teacher, train, f'{folder}/labels', k=16, window=window)
cached = lean.distill(None, train, student=students['forward KL'], cache=cache,
                      losses=[dict(kind='forward_kl')], **how)
print('from the cache, as many steps more:', perplexity(cached))

# %% [markdown]
# What the best of them writes, and where it is saved: `transformers.AutoModelForCausalLM` loads the
# folder, and so does `lean.load`.

# %%
best = students[min(found, key=found.get)]
print(best.generate('def ', tokens=16 if tiny else 60, temperature=.6))
lean.save(best, f'{folder}/student', format='hf', overwrite=True)
print(sorted(os.listdir(f'{folder}/student')), perplexity(lean.load(f'{folder}/student')))
