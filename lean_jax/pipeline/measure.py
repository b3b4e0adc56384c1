"""The figures of one variant."""
import jax

from lean_jax import tree
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.evaluation.speed import speed
from lean_jax.training.digest import fingerprint
from lean_jax.weights import Quantized, bare


def measure(model, test, domain, speeds, progress=None):
  """Size, quality and speed.

  Args:
    model: lean_jax.Model.
    test: Windows of the test split.
    domain: None, or Windows of the new domain's test split.
    speeds: settings of `evaluation.speed.speed`.
    progress: as `evaluation.perplexity.perplexity` takes it.

  Returns:
    A dict of figures, as a variant of `report.json` has them, without name and train_seconds.
  """
  quality = perplexity(model.module, model.params, test, progress=progress)
  other = perplexity(model.module, model.params, domain) if domain is not None else None
  base = without_adapters(model.params)
  quantized = [w for w in tree.named_weights(base).values() if isinstance(w, Quantized)]
  dense = lambda w: 4 * tree.parameters({'w': w})
  return dict(
      parameters=tree.parameters(model.params), bytes=tree.nbytes(model.params),
      perplexity=quality['perplexity'], bits_per_byte=quality['bits_per_byte'],
      domain_perplexity=other and other['perplexity'],
      **speed(model.module, model.params, **speeds),
      quantized_bytes=sum(map(tree.nbytes, quantized)) if quantized else None,
      quantized_float32_bytes=sum(map(dense, quantized)) if quantized else None,
      base_digest=fingerprint(base))


def without_adapters(params):
  """The tree of the adapted weights' bases."""
  return jax.tree.map(bare, params, is_leaf=tree.is_weight)
