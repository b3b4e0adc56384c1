r"""Bits where they matter: of the same bytes, a better model than with the same bits everywhere.

Yao et al. 2020 (HAWQ-V3, arXiv:2011.10680): bits by layer, chosen by an integer program over what
each layer costs, are better than bits that are the same in all.

python -m lean_jax.experiments.mixed_bits DIR --data stories.jsonl [--window N] [--tokens N]

For each uniform scheme, each weight of each layer gets one of `SCHEMES` within the bytes that the
uniform one takes, by what it costs on the first windows of the text; perplexity is of the others.
Ends with exit code 1 where a claim fails.

Measured on stories260K and the first 73,728 tokens of TinyStories, in windows of 256: at 92,720
bytes w3a16-g64 has a perplexity of 23.700 and mixed bits 17.117; at 120,560 bytes w4a16-g64 has
5.563 and mixed bits 5.453; floats have 4.714. Chosen by the loss of the text, in the place of the
divergences, it was 19.991 and 5.632. About two minutes on two CPU cores.
"""
import dataclasses
import sys

import lean_jax as lean
from lean_jax import tree
from lean_jax.calibration.quantize import MATRICES
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.pipeline import on_text
from lean_jax.quantization import mixed

UNIFORM = ('w3a16-g64', 'w4a16-g64')
SCHEMES = ('w2a16-g64', 'w3a16-g64', 'w4a16-g64', 'w5a16-g64', 'w6a16-g64', 'w8a16-g64')
SEEN = 16                     # windows on which costs are measured


def measured(model, windows):
  """{'float', a uniform scheme, or 'mixed as' it: perplexity, bytes of the matrices, schemes}."""
  model = lean.scan_layers(model, False)
  given = mixed.sensitivities(model.module, model.params, windows.array[:SEEN], SCHEMES, MATRICES)
  rest = dataclasses.replace(windows, array=windows.array[SEEN:])
  names = list(given[0])

  def of(model, schemes):
    weights = tree.named_weights(model.params)
    return dict(perplexity=perplexity(model.module, model.params, rest)['perplexity'],
                bytes=tree.nbytes([weights[n] for n in names]), schemes=schemes)
  out = {'float': of(model, {})}
  for scheme in UNIFORM:
    out[scheme] = of(lean.quantize(model, scheme), {scheme: len(names)})
    chosen = mixed.allocate_bits(*given, out[scheme]['bytes'])
    counts = {s: list(chosen.values()).count(s) for s in SCHEMES}
    out[f'mixed as {scheme}'] = of(lean.quantize(model, tuple(chosen.items())), counts)
  return out


def claims(found):
  """[(claim, whether it holds)]."""
  out = []
  for scheme in UNIFORM:
    one, other = found[scheme], found[f'mixed as {scheme}']
    out += [(f'mixed takes no more bytes than {scheme}: {other["bytes"]:,} of {one["bytes"]:,}',
             other['bytes'] <= one['bytes']),
            (f'mixed is better than {scheme}: {other["perplexity"]:.4f} against '
             f'{one["perplexity"]:.4f}', other['perplexity'] < one['perplexity'])]
  return out


def main(argv=None):
  """Prints figures and claims, and returns the exit code."""
  return on_text.main(__doc__, measured, claims, argv)


if __name__ == '__main__':
  sys.exit(main())
