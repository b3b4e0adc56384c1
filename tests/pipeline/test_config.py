"""The experiment's sizes: what each says of itself."""
import importlib
import math
from types import SimpleNamespace

import pytest

from lean_jax.distillation.losses import soft_and_hard
from lean_jax.errors import InputError
from lean_jax.interop import hf
from lean_jax.models.decoder import DecoderConfig
from lean_jax.pipeline import variants
from lean_jax.report.progress import Bars

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


@pytest.mark.parametrize('losses', [None, (dict(kind='reverse_kl', weight=.5),)])
def test_a_configs_losses_are_those_that_a_student_trains_by(losses, tiny_model, monkeypatch):
  c, given = pipeline.get_config('tiny').unlock(), {}
  if losses:
    c.distillation = dict(losses=losses)

  def train(module, params, batches, **settings):
    given.update(settings)
    return params, 0.
  monkeypatch.setattr(variants.recipe, 'train', train)
  monkeypatch.setattr(variants, 'Batches', lambda *args, **kw: None)
  variant = next(v for v in c.variants if v['name'] == 'student')
  variants.make(variant, tiny_model, dict(teacher=tiny_model), dict(main=SimpleNamespace(length=8)),
                c, None, None, Bars(), None)
  assert tuple(given['losses']) == (losses or soft_and_hard(1., .5))


def test_what_a_teacher_writes_needs_a_teacher(tiny_model):
  variant = dict(name='alone', phase='longer', data='written')
  with pytest.raises(InputError, match="'alone'.*give it a teacher"):
    variants.make(variant, tiny_model, {}, {}, qat.get_config('tiny'), None, None, None, None)
