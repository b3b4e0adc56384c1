"""Models of the Hugging Face hub, by their ids: fetched once, then from its cache."""
import pathlib
import re

from lean_jax.errors import InputError
from lean_jax.files import full, no_space

# Weights as safetensors, settings and tokenizers. What a repository has in folders is of other
# programs, but for the small settings of sentence encoders.
WANTED = ('*.json', '*.safetensors', '*.model', '*.jinja', '*.txt')
UNWANTED = ('*/*.safetensors', 'consolidated*', 'onnx/*', 'original/*')

_ID = re.compile(r'(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?')


def local_folder(where):
  """The folder of a model: the one given, or where the hub's cache has it.

  Args:
    where: a folder; or a string 'organization/name' or 'organization/name@revision', fetched from
      the hub if the cache lacks it. A folder of that name goes first. With HF_HUB_OFFLINE=1, and
      where the hub cannot be reached, the cache is all there is.

  Raises:
    InputError: it is neither, the hub has no such model or does not give it, or cannot be reached.
  """
  path = pathlib.Path(where)
  if path.is_dir():
    return path
  found = _ID.fullmatch(where) if isinstance(where, str) else None
  if not found or path.exists():
    raise InputError(f'no folder {str(where)!r}; give one with config.json, model.safetensors and '
                     "tokenizer.json, one that lean_jax saved, a model of the hub as "
                     "'organization/name', or a file that ends in .gguf")
  # Here, because most calls do not need it, and it takes a while.
  from huggingface_hub import errors, snapshot_download
  try:
    return pathlib.Path(snapshot_download(
        found[1], revision=found[2], allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
  except errors.GatedRepoError as error:
    raise InputError(f'{where!r} is given only to those who may have it; ask for it on its page of '
                     "the hub, then say 'hf auth login'") from error
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError,
          errors.HFValidationError) as error:
    raise InputError(f'no folder {where!r}, and the hub has no such model or revision; check the '
                     "spelling, or say 'hf auth login' if it is private") from error
  except Exception as error:                           # of the hub, of HTTP, of the disk
    if no_space(error):
      raise full("the hub's cache") from error
    reason = ' '.join(str(error.__cause__ or error).split())[:300]
    raise InputError(f"no folder {where!r}, it is not whole in the hub's cache, and the hub cannot "
                     f'be reached ({reason}); connect to it, or give a folder') from error
