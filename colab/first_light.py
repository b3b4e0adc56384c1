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
# # First light: a model made lean, end to end
#
# A teacher is trained on the Python standard library's own source files; its student is distilled,
# quantized and adapted; each step says what it cost. Nothing is downloaded. This notebook was made
# for a CPU runtime; a GPU or TPU runtime works too.
#
# It needs the package: `pip install -e .` in a checkout.

# %%
import json
import os
import tempfile

import matplotlib.pyplot as plt

import lean_jax as lean
from lean_jax.experiments import lean_pipeline
from lean_jax.pipeline.run import run
from lean_jax.report.pareto import pareto
from lean_jax.report.table import markdown_table

# %% [markdown]
# The experiment is a config. `''` takes about five minutes on two cores, `'tiny'` one.

# %%
size = os.environ.get('LEAN_JAX_SIZE', '')
config = lean_pipeline.get_config(size)
workdir = os.path.join(tempfile.gettempdir(), f'first_light_{size or "default"}')
report = run(config, workdir)

# %%
from IPython.display import Markdown

Markdown(markdown_table(report['variants']))

# %% [markdown]
# Size against perplexity; the line joins the variants that no other beats in both.

# %%
pareto(report['variants'])

# %% [markdown]
# How the student learned: from hard labels and from its teacher's distribution.

# %%
figure, axes = plt.subplots(figsize=(7, 4))
for name, term in (('student-random', 'loss'), ('student-hard', 'loss'), ('student', 'hard')):
  with open(os.path.join(workdir, 'training', name, 'metrics.jsonl')) as file:
    lines = [json.loads(line) for line in file]
  axes.plot([x['step'] for x in lines], [x[term] for x in lines], label=name)
axes.set(xlabel='step', ylabel='hard-label loss, nats a token')
axes.legend()
plt.show()

# %% [markdown]
# What the run claims, and whether it holds:

# %%
for claim in report['claims']:
  print('pass' if claim['passed'] else 'FAIL', claim['name'], claim['figures'])

# %% [markdown]
# Each variant is a folder that `lean.load` opens; methods go on from there.

# %%
student = lean.load(os.path.join(workdir, 'variants', 'student'))
print(student.generate('def ', tokens=40, temperature=.6))

four_bits = lean.quantize(student, 'w4a16-g64')
print(lean.evaluate(student, 'stdlib:docs', split='test'))
print(lean.evaluate(four_bits, 'stdlib:docs', split='test'))
