"""Formats of rounded checkpoints, by the quant_method of config.json. A new one is a line here."""
from lean_jax.errors import InputError
from lean_jax.interop import awq, bitsandbytes, compressed_tensors, gptq, packed
from lean_jax.interop.rounded import Rounded

FORMATS = {form.NAME: form for form in (compressed_tensors, bitsandbytes, gptq, awq)}
_READERS = packed.READERS | {name: form.read for name, form in FORMATS.items()}


def method(hf):
  """The quant_method of config.json, None of a checkpoint of floats.

  Raises:
    InputError: it is none that is read.
  """
  how = hf.get('quantization_config')
  if how is None:
    return None
  kind = how.get('quant_method') if isinstance(how, dict) else None
  if kind is None and isinstance(how, dict) and (how.get('load_in_4bit') or how.get(
      'load_in_8bit')):
    kind = 'bitsandbytes'                              # its first files do not name it
  if kind not in _READERS:
    raise InputError(f'config.json has a quantization_config with quant_method {kind!r}, which '
                     f'lean_jax does not read; it reads: {", ".join(_READERS)}')
  return kind


def floats(hf):
  """config.json as of a checkpoint that has the floats."""
  return hf if method(hf) is None else {k: v for k, v in hf.items() if k != 'quantization_config'}


def opened(found, hf):
  """{name: Tensor or Rounded}, as if it were a checkpoint of floats.

  Args:
    found: {name: Tensor}.
    hf: config.json.

  Raises:
    InputError: parts are missing or do not go together, or the format rounds as we do not.
  """
  kind = method(hf)
  out = found if kind is None else _READERS[kind](found, hf['quantization_config'])
  if kind in FORMATS and not any(isinstance(t, Rounded) for t in out.values()):
    raise InputError(f'config.json has a quantization_config with quant_method {kind!r}, and no '
                     'tensor of the checkpoint is stored so; give the files of one model')
  return out
