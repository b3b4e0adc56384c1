"""Models as people use them: thin calls of the pure functions below, a file for each purpose."""
from lean_jax.api.adapters import (
  attach,
  attach_lora,
  combine,
  load_adapter,
  merge,
  requantize,
  save_adapter,
  together,
  use,
)
from lean_jax.api.distillation import cache_teacher, cut, distill
from lean_jax.api.encoders import (
  add_classifier,
  distill_encoder,
  distill_ranker,
  evaluate_classifier,
  evaluate_retrieval,
  label,
  train_classifier,
)
from lean_jax.api.federated import federated_client, federated_server
from lean_jax.api.model import Model, create, evaluate, load, save, scan_layers
from lean_jax.api.rounding import allocate_bits, rotate
from lean_jax.api.training import finetune, train
from lean_jax.calibration.quantize import quantize
from lean_jax.distillation.completions import completions
from lean_jax.distillation.generated import write_data
from lean_jax.evaluation.audit import audit
from lean_jax.generation.text import generate

__all__ = ['Model', 'add_classifier', 'allocate_bits', 'attach', 'attach_lora', 'audit',
           'cache_teacher', 'combine', 'completions', 'create', 'cut', 'distill',
           'distill_encoder', 'distill_ranker', 'evaluate', 'evaluate_classifier',
           'evaluate_retrieval', 'federated_client', 'federated_server', 'finetune', 'generate',
           'label', 'load', 'load_adapter', 'merge', 'quantize', 'requantize', 'rotate', 'save',
           'save_adapter', 'scan_layers', 'together', 'train', 'train_classifier', 'use',
           'write_data']
