"""lean_jax: large language models made lean, in JAX.

    import lean_jax as lean
    model = lean.load('DIR')
    model = lean.quantize(model, 'w4a16-g64')
    print(model.generate('Once upon a time'))
    lean.save(model, 'OUT')

The functions are those of `lean_jax.api`, and `evaluation.audit`, imported when first used.
"""
import importlib
from typing import TYPE_CHECKING

from lean_jax.errors import InputError, LeanError
from lean_jax.version import __version__

if TYPE_CHECKING:
  from lean_jax.api import (
    Model,
    add_classifier,
    allocate_bits,
    attach,
    attach_lora,
    cache_teacher,
    combine,
    completions,
    create,
    cut,
    distill,
    distill_encoder,
    distill_ranker,
    evaluate,
    evaluate_classifier,
    evaluate_retrieval,
    federated_client,
    federated_server,
    finetune,
    generate,
    label,
    load,
    load_adapter,
    merge,
    quantize,
    requantize,
    rotate,
    save,
    save_adapter,
    scan_layers,
    together,
    train,
    train_classifier,
    use,
    write_data,
  )
  from lean_jax.evaluation.audit import audit

_API = ('Model', 'add_classifier', 'allocate_bits', 'attach', 'attach_lora', 'cache_teacher',
        'combine', 'completions', 'create', 'cut', 'distill', 'distill_encoder', 'distill_ranker',
        'evaluate', 'evaluate_classifier', 'evaluate_retrieval', 'federated_client',
        'federated_server', 'finetune', 'generate', 'label', 'load', 'load_adapter', 'merge',
        'quantize', 'requantize', 'rotate', 'save', 'save_adapter', 'scan_layers', 'together',
        'train', 'train_classifier', 'use', 'write_data')

__all__ = ['InputError', 'LeanError', 'Model', '__version__', 'add_classifier', 'allocate_bits',
           'attach', 'attach_lora', 'audit', 'cache_teacher', 'combine', 'completions', 'create',
           'cut', 'distill', 'distill_encoder', 'distill_ranker', 'evaluate', 'evaluate_classifier',
           'evaluate_retrieval', 'federated_client', 'federated_server', 'finetune', 'generate',
           'label', 'load', 'load_adapter', 'merge', 'quantize', 'requantize', 'rotate', 'save',
           'save_adapter', 'scan_layers', 'together', 'train', 'train_classifier', 'use',
           'write_data']


def __getattr__(name):
  if name in _API:
    return getattr(importlib.import_module('lean_jax.api'), name)
  if name == 'audit':
    return importlib.import_module('lean_jax.evaluation.audit').audit
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted([*globals(), *_API, 'audit'])
