"""The experiment's sizes: what each says of itself."""
import importlib
import math

import pytest

from lean_jax.errors import InputError
from lean_jax.interop import hf
from lean_jax.models.decoder import DecoderConfig
from lean_jax.pipeline import variants

pipeline, qat, ptq = (importlib.import_module(f'lean_jax.experiments.{name}')
                      for name in ('lean_pipeline', 'qat', 'quantization'))


@pytest.mark.parametrize(('experiment', 'size'), [
    (e, size) for e in (pipeline, qat, ptq) for size in e.SIZES])
def test_every_variant_starts_from_one_before_it_and_every_claim_is_on_a_variant(experiment, size):
  c = experiment.get_config(size)
  names = [v['name'] for v in c.variants]
  for k, v in enumerate(c.variants):
    assert v['start'] in ('teacher', 'random', *names[:k])
    assert v.get('phase') in (None, *c.phases)
    assert v.get('teacher') in (None, *names[:k])
    assert v.get('data') != 'written' or v.get('teacher')
  for claim in c.claims:
    assert {claim[side].split('.')[0] for side in ('left', 'right')} <= set(names)
  assert c.sample.variant in names
  assert c.speed.prompt + c.speed.decode <= c.data.window
  assert len(c.sample.prompt) + c.sample.tokens <= c.data.window


def test_the_full_size_has_several_hundred_million_parameters():
  c = pipeline.get_config('full')
  shapes = hf.shapes(hf.abstract(DecoderConfig(
      vocabulary=c.tokenizer.vocabulary, context=c.data.window, **dict(c.model))))
  count = sum(math.prod(shape) for shape in shapes.values())
  assert 2.5e8 < count < 6e8


@pytest.mark.parametrize('experiment', [pipeline, qat, ptq])
def test_an_unknown_size_is_refused(experiment):
  with pytest.raises(ValueError, match='tiny'):
    experiment.get_config('huge')


def test_what_a_teacher_writes_needs_a_teacher(tiny_model):
  variant = dict(name='alone', phase='longer', data='written')
  with pytest.raises(InputError, match="'alone'.*give it a teacher"):
    variants.make(variant, tiny_model, {}, {}, qat.get_config('tiny'), None, None, None, None)
