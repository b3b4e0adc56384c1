"""Tiny random models for tests of the PEFT library's files, saved once each."""
import dataclasses
import functools
import json

import tokenizers

import lean_jax as lean
from lean_jax import tree
from tests.interop import rounding


def bases(tmp_path_factory, changes):
  """The function from a family to the folder of its model, with changes {family: settings}."""
  @functools.cache
  def one(family):
    folder = tmp_path_factory.mktemp('bases') / family
    model = rounding.floats(family, **changes.get(family, {}))
    centre = lambda w: dataclasses.replace(w, value=w.value - 1)       # else all logits are alike
    params = tree.transform(model.params, [('embed/.*|head/.*', centre)])
    lean.save(dataclasses.replace(model, params=params), folder, format='hf')
    return folder
  return one


def words(folder):
  """Writes a tokenizer of the ids' own numerals, which ends a source as T5's does."""
  rules = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {'<pad>': 0, '</s>': 1, '<unk>': 2} | {str(k): k for k in range(3, 40)}, '<unk>'))
  rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  rules.add_special_tokens(['<pad>', '</s>', '<unk>'])
  rules.post_processor = tokenizers.processors.TemplateProcessing(
      single='$A </s>', special_tokens=[('</s>', 1)])
  rules.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(dict(eos_token='</s>')))
