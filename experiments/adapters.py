r"""Adapters reach what full fine-tuning reaches on another domain, over floats and over four bits.

python -m lean_jax.experiments.adapters DIR --data input.txt --window 64 [--steps N] [--seeds N]

A pretrained decoder goes on to text of a domain that it never saw, for as many steps on the same
rows: all of it, or low-rank differences. Measured are the perplexity of held-out text and how many
parameters train. The claims, each checked on the mean over the seeds; a run ends with exit code 1
where one fails:

  LoRA (Hu et al. 2021, arXiv:2106.09685, tables 2 to 4): as good as full fine-tuning. Here: a
    perplexity within 3% of its own, with queries and values adapted by as large a rank as 1% of
    the parameters have room for (of GPT-3 it was 0.01%), and with every matrix adapted by rank 16,
    which of a model this small is no small part.
  QLoRA (Dettmers et al. 2023, arXiv:2305.14314, tables 3 and 4): over NF4 with double quantization
    as good as over floats. Here: within 3%; and less is left of what rounding costs the base.

Rates were chosen on the validation split of the text, of which no figure here is, with stories260K
and tinyshakespeare: full, of .001 and .003; rank 16, of .01 and .03; the few, of .01, .03 and .1.
"""
import dataclasses
import sys

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters.trained import trained
from lean_jax.pipeline import on_text
from lean_jax.training.finetune import QLORA

SHARE, RANK = .01, 16            # of the parameters at most; of the adapters on every matrix
NEAR = 1.03                      # times a perplexity
TESTED = 128                     # windows
FEW = '.*/(q|v)/.*'              # section 4.2 of LoRA
RATES = dict(full=3e-3, lora_few=3e-2, lora=1e-2)


def starts(model, seed):
  """{variant: (where it starts, its greatest rate)}; those that adapt train what they attached."""
  few = dict(method='lora', where=FEW, seed=seed)
  size = lambda adapted: count(adapted, trained(adapted.params))
  one = size(lean.attach(model, rank=1, alpha=2., **few))
  rank = max(1, int(SHARE * count(model, '.*') / one))
  every = lambda base: lean.attach(base, 'lora', rank=RANK, alpha=2. * RANK, seed=seed)
  return dict(full=(model, RATES['full']),
              lora_few=(lean.attach(model, rank=rank, alpha=2. * rank, **few), RATES['lora_few']),
              lora=(every(model), RATES['lora']),
              qlora=(every(lean.quantize(model, QLORA)), RATES['lora']))


def count(model, pattern):
  """How many numbers the arrays of these names have."""
  return sum(x.size for x in tree.named_arrays(tree.split(model.params, pattern)[0]).values())


def measured(model, train, test, seed, *, steps, batch=8):
  """{variant: perplexity, parameters that train}; of those that round, what rounding left."""
  test = dataclasses.replace(test, array=test.array[:TESTED])
  perplexity = lambda model: lean.evaluate(model, test)['perplexity']
  out = dict(base=dict(perplexity=perplexity(model)),
             nf4=dict(perplexity=perplexity(lean.quantize(model, QLORA))))
  for name, (start, peak) in starts(model, seed).items():
    tuned = lean.train(start, train, steps=steps, batch=batch, peak=peak, warmup=steps // 10,
                       seed=seed)
    out[name] = dict(perplexity=perplexity(tuned),
                     parameters=count(start, trained(start.params) or '.*'))
  for rounded, floats in (('nf4', 'base'), ('qlora', 'lora')):
    out[rounded]['left'] = out[rounded]['perplexity'] / out[floats]['perplexity'] - 1
  return out


def claims():
  """Each claim: left < bound * right."""
  near = lambda name, left, right: dict(
      name=f'{name} within {NEAR - 1:.0%}', left=f'{left}.perplexity', right=f'{right}.perplexity',
      bound=NEAR)
  return (
      dict(name='LoRA of queries and values trains under 1% of the parameters',
           left='lora_few.parameters', right='full.parameters', bound=SHARE),
      near('LoRA: so few are as good as full fine-tuning,', 'lora_few', 'full'),
      near(f'LoRA: rank {RANK} on every matrix is as good as full fine-tuning,', 'lora', 'full'),
      near('QLoRA: over NF4 it is as good as over floats,', 'qlora', 'lora'),
      dict(name='QLoRA: training leaves less of what rounding costs', left='qlora.left',
           right='nf4.left'))


def main(argv=None):
  """The command line."""
  return on_text.over_seeds(__doc__, measured, claims(), argv,
                            steps=dict(type=int, default=80, help='of each variant'))


if __name__ == '__main__':
  sys.exit(main())
