"""The tensors of a checkpoint folder, found without reading them."""
import contextlib
import json
import pathlib

import ml_dtypes  # noqa: F401  numpy learns bfloat16, in which most checkpoints are
import safetensors

from lean_jax.errors import InputError

_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


def opened(folder, stack):
  """{tensor: its open safetensors file} of model.safetensors, or of the files that its index names.

  Args:
    folder: a path.
    stack: a contextlib.ExitStack that closes the files.

  Raises:
    InputError: there is no such file, one is damaged, or there are only pickles.
  """
  out = {}
  for path in files(folder):
    with readable(path):
      file = stack.enter_context(safetensors.safe_open(path, framework='numpy'))
      out |= dict.fromkeys(file.keys(), file)
  return out


def files(folder):
  """The safetensors files of a checkpoint, one or those of its index."""
  single, index = folder / 'model.safetensors', folder / 'model.safetensors.index.json'
  if single.exists():
    return [single]
  if index.exists():
    try:
      names = sorted(set(read_json(index)['weight_map'].values()))
      paths = [folder / name for name in names if pathlib.Path(name).name == name]
    except (KeyError, AttributeError, TypeError):
      names, paths = [''], []
    if len(paths) < len(names):
      raise InputError(f'{str(index)!r} has no weight_map of file names; download it again')
    lost = [path.name for path in paths if not path.exists()]
    if lost:
      raise InputError(f'{str(folder)!r} lacks {listed(lost)}, which its index names; '
                       'download them again')
    return paths
  pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
  if pickles:
    raise InputError(f'{str(folder)!r} has its weights in {listed(pickles)}, and a pickle can run '
                     'any code; convert it first: transformers save_pretrained writes safetensors')
  raise InputError(f'{str(folder)!r} has no model.safetensors and no {index.name}; '
                   'give the folder of a Hugging Face model')


def read_json(path):
  """The object in a JSON file; raises InputError where there is none."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise InputError(f'cannot read {str(path)!r}: {error.strerror}; '
                     'give the folder of a Hugging Face model') from error
  except ValueError as error:
    raise InputError(f'{str(path)!r} is not JSON ({error}); download it again') from error
  if not isinstance(value, dict):
    raise InputError(f'{str(path)!r} holds a {type(value).__name__}, expected an object; '
                     'download it again')
  return value


@contextlib.contextmanager
def readable(what):
  """Turns a failure to read safetensors into an InputError that names `what`."""
  try:
    yield
  except (OSError, safetensors.SafetensorError) as error:
    reason = ' '.join(str(error).split())
    raise InputError(f'{str(what)!r} cannot be read ({reason}); download it again') from error


def listed(names, most=4):
  """Names in one line: the first ones and how many more."""
  names = list(names)
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
