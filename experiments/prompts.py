r"""Prefixes, bottlenecks and LoRA, some per cent of a model, do nearly what training all does.

python -m lean_jax.experiments.prompts ENCODER DECODER --data FOLDER [--steps N] [--seeds N]

FOLDER has sst2/ (train.tsv, dev.tsv) and e2e/devset.csv. ENCODER, all-MiniLM-L6-v2 say, learns the
sentiment of SST-2's sentences of at most 20 words, and is measured by its accuracy on those of the
dev split. DECODER, stories260K say, learns what E2E NLG says of restaurants, and is measured on
restaurants that it has not seen: by the nats a token of people's references, and by ROUGE-L of the
words that it writes itself (the most probable ones), with the reference that is most like them.
Before, all of it reads what people say of the other restaurants, not of which one they say it: a
model of stories is to know of restaurants as GPT-2 did. Every variant sees the same rows as often,
for as many steps; the decoder's for twice as many. The claims, each checked on the mean over the
seeds; a run ends with exit code 1 where one fails:

  Houlsby et al. 2019 (arXiv:1902.00751, table 1), Pfeiffer et al. 2020 (arXiv:2005.00247), P-tuning
    v2 (Liu et al. 2021, arXiv:2110.07602, table 2): near full fine-tuning on tasks of
    understanding, with 0.1 to 4% of the parameters. Here: an accuracy of at most 3 points less,
    which is two standard errors of so many sentences, and above that of a head alone.
  LoRA (Hu et al. 2021, arXiv:2106.09685, table 2): the same, of queries and values, with less than
    1%.
  Prefix-tuning (Li and Liang 2021, arXiv:2101.00190, table 1) and bottlenecks: near full
    fine-tuning on E2E. Here: a ROUGE-L of at most 3 points less, and fewer nats than before.

A prefix's parameters are those that remain once its MLP is left out, and a head's are not counted.
Rates of bottlenecks, prefixes and P-tuning v2 were chosen on rows that no figure here is of.
"""
import argparse
import csv
import json
import pathlib
import sys

import jax
import numpy as np

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters.trained import trained
from lean_jax.evaluation.rouge import rouge_l
from lean_jax.generation.text import write
from lean_jax.models.prefix import settled
from lean_jax.objectives.language_modeling import next_token
from lean_jax.pipeline.on_text import told_of_seeds
from lean_jax.training.finetune import example_windows

WORDS, ROWS = 20, 4000           # of a sentence at most; sentences that are learned from
UNSEEN, WINDOW = 5, 256          # every fifth restaurant is one for tests; tokens of a row
TESTED = 160                     # of their references
SAID, READ = 120, 400            # tokens that are written of one; steps of reading before
LABELS = dict(zip('01', ('negative', 'positive')))
TEMPLATE = '{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}'
POINTS = .03
SHARES = dict(lora=.01, houlsby=.04, pfeiffer=.04, p_tuning_v2=.04, prefix=.04)        # at most
# Of prefixes as many tokens, of bottlenecks the widths, with which both models stay within 4%.
SENTIMENT = dict(lora=dict(rank=8, alpha=16., where='layers/attention/(q|v)/kernel'),
                 houlsby=dict(rank=16), pfeiffer=dict(rank=16), p_tuning_v2=dict(tokens=16))
RESTAURANTS = dict(houlsby=dict(rank=4), pfeiffer=dict(rank=8), prefix=dict(tokens=16))
HEAD = '(classifier|transform)/.*'
RATES = dict(full=1e-4, head=1e-3, lora=2e-3, houlsby=3e-3, pfeiffer=3e-3, p_tuning_v2=1e-2)
READING, SAYING = 3e-3, dict(full=1e-3, houlsby=3e-2, pfeiffer=1e-2, prefix=3e-3)


def sentences(path):
  """The rows of a split of SST-2 that are short."""
  lines = path.read_text(encoding='utf-8').splitlines()
  pairs = [line.rsplit('\t', 1) for line in lines]
  return [dict(text=text, label=LABELS[label]) for text, label in pairs
          if len(text.split()) <= WORDS]


def restaurants(path):
  """{what is to be said: [how people said it]}, to learn from, and of other restaurants."""
  said = {}
  with path.open(newline='', encoding='utf-8') as file:
    for row in csv.DictReader(file):
      said.setdefault(row['mr'], []).append(row['ref'])
  unseen = list(said)[::UNSEEN]
  return ({mr: refs for mr, refs in said.items() if mr not in unseen},
          {mr: said[mr] for mr in unseen})


def windows(decoder, said, count=None):
  """The first so many references, with what they say before them, to learn or to measure."""
  examples = [dict(instruction=mr, output=ref) for mr, refs in said.items() for ref in refs]
  return example_windows(decoder, examples[:count], window=WINDOW, template=TEMPLATE)


def share(model):
  """The part of the parameters that an adapter adds, as it is used once it is trained."""
  params = settled(model.module, model.params)
  own = tree.split(params, trained(params))[0]
  added = sum(x.size for x in jax.tree.leaves(own))
  return added / (tree.parameters(params) - added)


def sentiment(encoder, train, dev, seed, *, steps, batch=16):
  """{variant: accuracy, share of the parameters}."""
  start = lean.add_classifier(encoder, list(LABELS.values()), seed=seed)
  rows = [train[k] for k in np.random.default_rng(seed).permutation(len(train))[:ROWS]]
  measure = lambda model: lean.evaluate_classifier(model, dev, truncate=True)['accuracy']

  def tuned(model, peak, **settings):
    return measure(lean.train_classifier(model, rows, steps=steps, batch=batch, peak=peak,
                                         warmup=steps // 10, seed=seed, truncate=True,
                                         group_by_length=True, **settings))
  full = tuned(start, RATES['full'])
  out = dict(full=dict(accuracy=full, near=full - POINTS),
             head=dict(accuracy=tuned(start, RATES['head'], trainable=HEAD)))
  for method, settings in SENTIMENT.items():
    adapted = lean.attach(start, method, seed=seed, **settings)
    out[method] = dict(accuracy=tuned(adapted, RATES[method]), share=share(adapted))
  return {f'sst2 {name}': figures for name, figures in out.items()}


def told_of(decoder, known, unseen, seed, *, steps, batch=8):
  """{variant: nats a token of references, ROUGE-L of what it writes, share of the parameters}."""
  def tuned(start, data, method, peak, steps=steps, settings=None):
    return lean.finetune(start, data, method=method, adapter=settings, steps=steps, batch=batch,
                         peak=peak, warmup=steps // 10, seed=seed)

  def measured(model):
    return dict(nats=nats(model, test), rouge_l=rouge(model, unseen))
  texts = [dict(text=ref) for refs in known.values() for ref in refs]
  base = tuned(decoder, example_windows(decoder, texts, window=WINDOW), 'full', READING, READ)
  rows, test = windows(decoder, known), windows(decoder, unseen, TESTED)
  full = measured(tuned(base, rows, 'full', SAYING['full']))
  out = dict(frozen=measured(base), full=full | dict(near=full['rouge_l'] - POINTS))
  for method, settings in RESTAURANTS.items():
    adapted = tuned(base, rows, method, SAYING[method], settings=settings)
    out[method] = measured(adapted) | dict(share=share(adapted))
  return {f'e2e {name}': figures for name, figures in out.items()}


def nats(model, windows):
  """The mean of the loss over all that is learned of ExampleWindows."""
  loss = jax.jit(next_token(model.module))
  whole = windows.batch(np.arange(len(windows)))
  return float(loss(settled(model.module, model.params), whole, None)[0])


def rouge(model, said):
  """The mean ROUGE-L of the words that a model writes of restaurants."""
  texts = write(model, [f'{mr}\n' for mr in said], tokens=SAID, stop='\n').texts
  return float(np.mean([rouge_l(text.split(), [ref.split() for ref in refs])
                        for (text,), refs in zip(texts, said.values())]))


def claims():
  """Each claim: left < bound * right."""
  out = []
  for method in SENTIMENT:
    this = f'sst2 {method}'
    out += [dict(name=f'{method} is near full fine-tuning on SST-2', left='sst2 full.near',
                 right=f'{this}.accuracy'),
            dict(name=f'{method} is better than a head alone', left='sst2 head.accuracy',
                 right=f'{this}.accuracy')]
  for method in RESTAURANTS:
    this = f'e2e {method}'
    out += [dict(name=f'{method} knows E2E better than the model as it was', left=f'{this}.nats',
                 right='e2e frozen.nats'),
            dict(name=f'{method} is near full fine-tuning on E2E', left='e2e full.near',
                 right=f'{this}.rouge_l')]
  few = lambda method, task: (
      f'{method} has {SHARES[method]:.0%} of the parameters at most, on {task}')
  return [*out, *(dict(name=few(method, task), left=f'{task} {method}.share',
                       right=f'parameters.{method}')
                  for task, methods in (('sst2', SENTIMENT), ('e2e', RESTAURANTS))
                  for method in methods)]


def main(argv=None):
  """Prints figures and claims, and returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('encoder', metavar='ENCODER', help='all-MiniLM-L6-v2, say')
  parser.add_argument('decoder', metavar='DECODER', help='stories260K, say')
  parser.add_argument('--data', required=True, type=pathlib.Path, help='has sst2/ and e2e/')
  parser.add_argument('--steps', type=int, default=300,
                      help='of each variant of the encoder (%(default)s)')
  parser.add_argument('--seeds', type=int, default=3, help='how many: 0, 1, ... (%(default)s)')
  a = parser.parse_args(argv)
  encoder, decoder = lean.load(a.encoder), lean.load(a.decoder)
  train, dev = (sentences(a.data / 'sst2' / f'{name}.tsv') for name in ('train', 'dev'))
  known, unseen = restaurants(a.data / 'e2e' / 'devset.csv')
  found = []
  for seed in range(a.seeds):
    found.append({**told_of(decoder, known, unseen, seed, steps=2 * a.steps),
                  **sentiment(encoder, train, dev, seed, steps=a.steps),
                  'parameters': SHARES})
    print(json.dumps({f'seed {seed}': found[-1]}), flush=True)
  return told_of_seeds(found, claims())


if __name__ == '__main__':
  sys.exit(main())
