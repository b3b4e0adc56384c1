"""Task distillation: a classifier of texts or of words learns a teacher's classes."""
import functools

import jax

from lean_jax.distillation.soft_labels import soft_labels
from lean_jax.objectives.forward import forward, masked_mean, targets
from lean_jax.objectives.language_modeling import cross_entropy


@functools.lru_cache             # the same object for the same settings: its step is compiled once
def classes(module, temperature, soft_weight):
  """The loss of a classifier: soft_weight KL(scores || logits) + (1 - soft_weight) cross-entropy.

  Hinton et al. 2015 (arXiv:1503.02531), section 2, of classes: the divergence at a temperature,
  times its square. With soft_weight 0 it is training on hard labels alone, as a language model's
  are where it writes one class a text. Rows or tokens without a label or without scores do not
  count in that part, padding and special tokens in neither.

  Args:
    module: an encoder with a head of sequences or of tokens.
    temperature: above 0.
    soft_weight: 0 to 1.

  Returns:
    (params, batch, key) -> (scalar, metrics), of batches of `data.labelled`.
  """
  def loss(params, batch, key):
    del key
    logits, auxiliary = forward(module, params, batch)
    wanted, known = targets(batch)
    hard = cross_entropy(logits, wanted, known)
    soft = soft_labels(logits, batch['scores'], batch['scored'], temperature=temperature)
    right = masked_mean((logits.argmax(axis=-1) == wanted).astype(known.dtype), known)
    value = soft_weight * soft + (1 - soft_weight) * hard
    return value + auxiliary, jax.lax.stop_gradient(dict(soft=soft, hard=hard, accuracy=right))
  return loss
