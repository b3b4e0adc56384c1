"""Released checkpoints in four and eight bits: what is computed is what their floats would."""
import json
import shutil

import jax
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

import safetensors.torch
import torch
import transformers

from lean_jax.errors import InputError
from lean_jax.interop.hf import load_hf
from lean_jax.training import mesh as meshes
from tests.interop import parity
from tests.interop.rows import deepseek_v3, gpt_oss

pytestmark = pytest.mark.filterwarnings('ignore')
MXFP4 = dict(quant_method='mxfp4', modules_to_not_convert=['lm_head'])
FP8 = dict(quant_method='fp8', fmt='e4m3', activation_scheme='dynamic', weight_block_size=[16, 24])


def folder_of(row, pack, quantization, tmp_path):
  """A tiny model of transformers, and its folder with tensors that `pack` has changed in both."""
  torch.manual_seed(1)
  model = getattr(transformers, row.model)(row.config(transformers)).eval()
  model.save_pretrained(tmp_path)
  stored = pack(safetensors.torch.load_file(tmp_path / 'model.safetensors'))
  plain = tmp_path / 'plain'
  shutil.copytree(tmp_path, plain)
  safetensors.torch.save_file({k: v for k, (v, _) in stored.items()}, plain / 'model.safetensors',
                              metadata=dict(format='pt'))
  packed = {k: v for _, parts in stored.values() for k, v in parts.items()}
  safetensors.torch.save_file(packed, tmp_path / 'model.safetensors', metadata=dict(format='pt'))
  change(tmp_path, quantization_config=quantization)
  return type(model).from_pretrained(plain).eval(), tmp_path


def change(folder, **keys):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def mxfp4(tensors):
  """{name: (its floats, {names and tensors as stored})}, the experts' random in four bits."""
  from transformers.integrations.mxfp4 import convert_moe_packed_tensors
  out = {}
  for name, w in tensors.items():
    if not name.endswith(('experts.gate_up_proj', 'experts.down_proj')):
      out[name] = w, {name: w}
      continue
    E, I, O = w.shape
    blocks = torch.randint(0, 256, (E, O, I // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 127, (E, O, I // 32), dtype=torch.uint8)
    value = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert value.shape == w.shape
    out[name] = value, {f'{name}_blocks': blocks, f'{name}_scales': scales}
  return out


def fp8(tensors):
  """The same, most matrices in eight bits; their last squares may be cut."""
  out = {}
  for name, w in tensors.items():
    if w.ndim != 2 or 'embed' in name or 'lm_head' in name or name.endswith('gate.weight'):
      out[name] = w, {name: w}
      continue
    scale = torch.rand(-(-w.shape[0] // 16), -(-w.shape[1] // 24)) * .02 + .01
    codes = (w / .02).to(torch.float8_e4m3fn)
    factors = scale.repeat_interleave(16, 0)[:w.shape[0]].repeat_interleave(24, 1)[:, :w.shape[1]]
    out[name] = codes.float() * factors, {name: codes, f'{name}_scale_inv': scale}
  return out


ROWS = {
    'mxfp4': (parity.Row('gpt_oss', '', lambda t: t.GptOssConfig(**gpt_oss.SMALL | dict(
        hidden_size=64, intermediate_size=32, rope_parameters=gpt_oss.YARN)),
        'GptOssForCausalLM'), mxfp4, MXFP4),
    'fp8': (deepseek_v3.ROWS[0], fp8, FP8),
}


@pytest.mark.parametrize('kind', ROWS)
def test_a_packed_checkpoint_computes_what_its_floats_do(kind, tmp_path):
  model, folder = folder_of(*ROWS[kind], tmp_path)
  _, config, params, _ = load_hf(folder)
  tokens, _ = parity.tokens_and_mask('right')
  parity.close(parity.our_logits(config, params, tokens), parity.their_logits(model, tokens), 2e-5)


@pytest.mark.parametrize('kind', ROWS)
def test_parts_that_are_missing_or_do_not_fit_are_named(kind, tmp_path):
  _, folder = folder_of(*ROWS[kind], tmp_path)
  path = folder / 'model.safetensors'
  whole = safetensors.torch.load_file(path)
  name = next(n for n in whole if n.endswith(('_scales', '_scale_inv')))
  safetensors.torch.save_file({k: v for k, v in whole.items() if k != name}, path)
  with pytest.raises(InputError, match=name if kind == 'mxfp4' else 'F8_E4M3'):
    load_hf(folder)
  safetensors.torch.save_file(whole | {name: whole[name][..., :-1].contiguous()}, path)
  with pytest.raises(InputError, match='expected'):
    load_hf(folder)


def test_other_ways_to_pack_are_refused_by_name(tmp_path):
  _, folder = folder_of(*ROWS['fp8'], tmp_path)
  for how in (dict(quant_method='hqq'), dict(quant_method='gptq', bits=4), FP8 | dict(fmt='e5m2'),
              dict(quant_method='fp8', weight_block_size=None)):
    change(folder, quantization_config=how)
    with pytest.raises(InputError, match='quantization_config'):
      load_hf(folder)


def test_a_device_is_given_its_part_of_what_is_unpacked(tmp_path):
  _, folder = folder_of(*ROWS['mxfp4'], tmp_path)
  _, _, params, _ = load_hf(folder)
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
  _, _, parts, _ = load_hf(folder, shardings=lambda like: meshes.shardings(like, mesh))
  assert any(not x.is_fully_replicated for x in jax.tree.leaves(parts))
  jax.tree.map(np.testing.assert_array_equal, parts, params)
