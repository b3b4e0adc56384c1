"""DeepSeek-V3 in bfloat16: the bias that balances the experts is not rounded."""
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

import numpy as np

from lean_jax.interop.hf import load_hf, save_hf
from lean_jax.interop.tensors import read_json
from tests.interop.parity import made
from tests.interop.rows.deepseek_v3 import ROWS

pytestmark = pytest.mark.filterwarnings('ignore')


def test_the_bias_of_the_router_stays_in_float32(tmp_path):
  _, (_, _, wide, _), folder = made(ROWS[0])
  family, config, params, hf = load_hf(folder, dtype='bfloat16')
  bias = lambda params: params['layers']['1']['moe']['router']['correction']
  assert bias(params).dtype == 'float32'
  np.testing.assert_array_equal(bias(params), bias(wide))
  save_hf(tmp_path, family, config, params, hf)
  assert read_json(tmp_path / 'config.json')['torch_dtype'] == 'bfloat16'
  np.testing.assert_array_equal(bias(load_hf(tmp_path)[2]), bias(wide))
