"""Beam search against transformers' own."""
import numpy as np
import pytest

from lean_jax.generation import beam
from tests.interop.parity import made
from tests.interop.rows import bart, llama, t5

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')

PROMPTS = np.random.default_rng(3).integers(3, 97, (3, 7))
LENGTHS = (7, 4, 2)
EOS = [11, 29, 30]


@pytest.mark.parametrize('settings', [
    dict(), dict(length_penalty=2.), dict(length_penalty=-1.), dict(early_stopping=True),
    dict(repetition_penalty=1.3), dict(ends=(), tokens=5), dict(beams=1, ends=EOS[:1])])
def test_beams_are_those_of_transformers(settings):
  model, (_, config, params, _), _ = made(llama.ROWS[0])
  how = dict(tokens=14, beams=3, ends=EOS) | settings
  prompts = [row[-n:] for row, n in zip(PROMPTS, LENGTHS)]
  if 'repetition_penalty' in settings:           # they count padding as tokens that were written
    prompts = [row for row in PROMPTS]
  ours, lengths = beam.search(config.module, params, prompts, **how)
  longest = max(map(len, prompts))
  ids = np.stack([np.pad(p, (longest - len(p), 0)) for p in prompts])
  mask = np.stack([np.pad(np.ones(len(p), int), (longest - len(p), 0)) for p in prompts])
  theirs = model.generate(
      torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=how['tokens'],
      num_beams=how['beams'], num_return_sequences=how['beams'], do_sample=False,
      eos_token_id=list(how['ends']) or None, pad_token_id=0,
      **{k: v for k, v in settings.items() if k not in ('ends', 'tokens', 'beams')})
  theirs = theirs[:, longest:].reshape(3, how['beams'], -1).numpy()
  assert lengths.max() == ours.shape[2]
  for row, (mine, other, n) in enumerate(zip(ours, theirs, lengths)):
    for k in range(how['beams']):
      assert mine[k, :n[k]].tolist() == other[k, :n[k]].tolist(), (row, k)
  if not settings:
    assert lengths.min() < how['tokens']                      # some texts end by themselves


@pytest.mark.parametrize('row', [t5.ROWS[0], bart.ROWS[0]], ids=lambda row: row.id)
def test_targets_are_those_of_transformers(row):
  model, (_, config, params, _), _ = made(row)
  ours, lengths = beam.search(config.module, params, list(PROMPTS), tokens=12, beams=3, ends=[2])
  theirs = model.generate(torch.tensor(PROMPTS), max_new_tokens=12, num_beams=3, do_sample=False,
                          early_stopping=False, length_penalty=1., eos_token_id=2, pad_token_id=0)
  for mine, other, n in zip(ours[:, 0], theirs[:, 1:].numpy(), lengths[:, 0]):
    assert mine[:n].tolist() == other[:n].tolist()
