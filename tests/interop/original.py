"""The same models in PyTorch; a test file that imports this skips where there is no torch."""
import numpy as np
import pytest

from tests.interop import rounding

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def theirs(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation='eager').eval()


def logits(model):
  with torch.no_grad():
    return model(torch.tensor(rounding.IDS)).logits.numpy()


def close(one, other, part=2e-5):
  """Whether logits differ by at most this part of the largest: float32, sums in another order."""
  np.testing.assert_allclose(one, other, rtol=0, atol=part * np.abs(other).max())
