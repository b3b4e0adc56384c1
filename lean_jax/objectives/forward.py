"""A model on a batch, whatever its architecture: outputs, what they should be, and what counts.

A batch is a dict of arrays: `tokens` [B T], and as the model and the task want them `mask` [B T]
(which tokens are real), `token_types` [B T], `decoder_tokens` [B U], `decoder_mask` [B U], and
`labels`: [B T] or [B], the targets of each position or of each row, negative where none.
"""
import jax
import jax.numpy as jnp

INPUTS = ('tokens', 'mask', 'token_types', 'decoder_tokens', 'decoder_mask')


def forward(module, params, batch):
  """The outputs of a model, [B T V] or [B C], and the sum of its layers' auxiliary losses."""
  given = {k: batch[k] for k in INPUTS if k in batch}
  (outputs, _), sown = module.apply({'params': params}, **given, mutable=['losses'])
  return outputs, sum((jnp.sum(x) for x in jax.tree.leaves(sown)), jnp.zeros(()))


def targets(batch):
  """Integer targets and their mask: the labels if there are any, else the token after each.

  Returns:
    targets, float32 mask: both [B T] or [B].
  """
  if 'labels' in batch:
    labels = batch['labels']
    return jnp.maximum(labels, 0), (labels >= 0).astype(jnp.float32)
  side = 'decoder_' if 'decoder_tokens' in batch else ''
  tokens, mask = batch[f'{side}tokens'], batch.get(f'{side}mask')
  following = jnp.roll(tokens, -1, axis=1)
  inside = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1, tokens.shape)
  if mask is not None:
    inside = inside & mask.astype(bool) & jnp.roll(mask, -1, axis=1).astype(bool)
  return following, inside.astype(jnp.float32)
