r"""A model whose channels stand out is rounded better in a rotated basis.

Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456, abstract): rotated, LLaMA-2 models lose nothing in 8
bits by rounding to nearest, without any calibration.

python -m lean_jax.experiments.rotation DIR --data stories.jsonl [--window N] [--tokens N]

Small models have no such channels, so they are given some, in two ways that change no logit:
  scales: two channels of each norm's scale times 60, and a sixtieth in the rows that read them, as
    in trained models (Wei et al. 2022, arXiv:2209.13325, section 3: the scale makes the outliers);
  axes: the stream's principal axes as its channels, the first of which is then the largest by far.
Each is rounded to nearest as it is and rotated. Ends with exit code 1 where a claim fails.

Measured on stories260K and the first 131,072 tokens of TinyStories, in windows of 512 (perplexity):

                    float    w8a8     w4a8    w4a16
  as it is         4.6537  4.6605   5.5022   5.4959
  as it is, rotated        4.6591   5.6330   5.6258
  scales                   5.8723  13.3544   6.9515
  scales, folded           4.6575   5.6782   5.6697
  scales, rotated          4.6590   5.6326   5.6258
  axes                     4.6635   6.4930   6.4811
  axes, rotated            4.6568   5.6861   5.6817

Folding the scales alone does most where these were what was large; where the stream was, only a
rotation helps; and a model without large channels loses a little by it at four bits. Minutes
on two CPU cores.
"""
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

import lean_jax as lean
from lean_jax.errors import InputError
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.pipeline import on_text
from lean_jax.quantization import rotation

SCHEMES = ('w8a8', 'w4a8', 'w4a16')
SIZE, CHANNELS = 60., (3, 40)
SAME = 1.001                  # times the perplexity, at most, where nothing but the basis changed


def with_large_scales(model):
  """The model, of stacked layers like Llama's, with two channels of each norm `SIZE` as large."""
  layers, at = dict(model.params['layers']), jnp.asarray(CHANNELS)
  if not {'mixer_norm', 'feed_forward_norm', 'attention', 'mlp'} <= layers.keys():
    raise InputError('the model is not of stacked layers of attention and MLP; give a Llama')
  for norm, block, names in (('mixer_norm', 'attention', ('q', 'k', 'v')),
                             ('feed_forward_norm', 'mlp', ('gate', 'up'))):
    layers[norm] = dict(scale=layers[norm]['scale'].at[:, at].mul(SIZE))
    own = dict(layers[block])
    for name in names:
      w = own[name]['kernel']
      own[name] = dict(own[name], kernel=w.replace_boxed(w.value.at[:, at].mul(1 / SIZE)))
    layers[block] = own
  return dataclasses.replace(model, params=dict(model.params, layers=layers))


def on_principal_axes(model, tokens):
  """The model in the basis of the principal axes of its normalised states of tokens [B T]."""
  _, found = model.module.apply({'params': model.params}, tokens, mutable=['taps'])
  x = np.concatenate([np.asarray(x).reshape(-1, model.config.width)
                      for x in jax.tree.leaves(found['taps']['layers'])])
  x = x / np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True))
  _, axes = np.linalg.eigh(x.T @ x)
  return in_basis(model, axes[:, ::-1])


def in_basis(model, R):
  """The model whose stream x is x R, [D D]."""
  config, params = rotation.turned(model.config, model.params, jnp.asarray(R, jnp.float32))
  return dataclasses.replace(model, config=config, params=params)


def measured(model, windows, seed):
  """{name of a model: {'float' or a scheme: perplexity}}."""
  tokens = jnp.asarray(windows.array[:16], jnp.int32)
  key = jax.random.key(seed)
  scales = with_large_scales(model)
  models = {'as it is': model, 'as it is, rotated': lean.rotate(model, key),
            'scales': scales, 'scales, folded': in_basis(scales, np.eye(model.config.width)),
            'scales, rotated': lean.rotate(scales, key)}
  models['axes'] = on_principal_axes(model, tokens)
  models['axes, rotated'] = lean.rotate(models['axes'], key)
  of = lambda m: perplexity(m.module, m.params, windows)['perplexity']
  return {name: dict({'float': of(m)}, **{s: of(lean.quantize(m, s)) for s in SCHEMES})
          for name, m in models.items()}


def claims(found):
  """[(claim, whether it holds)]."""
  plain = found['as it is']['float']
  worst = max(row['float'] for row in found.values())
  out = [(f'no float model differs by more than {SAME - 1:.1%}: {worst:.4f} against {plain:.4f}',
          worst < SAME * plain)]
  for name, scheme in [('scales', s) for s in SCHEMES] + [('axes', s) for s in SCHEMES[1:]]:
    before, after = found[name][scheme], found[f'{name}, rotated'][scheme]
    out.append((f'{name}: {scheme} is better rotated: {after:.4f} against {before:.4f}',
                after < before))
  return out


def main(argv=None):
  """Prints figures and claims, and returns the exit code."""
  return on_text.main(__doc__, measured, claims, argv,
                      model='a decoder like Llama',
                      seed=dict(type=int, default=0, help='of the rotation'))


if __name__ == '__main__':
  sys.exit(main())
