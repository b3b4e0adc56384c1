"""What a rounding costs, and which of some candidates costs least."""
import jax
import jax.numpy as jnp


def product_error(off, second=None):
  """The sum of squares of x off, off [*e I O], x having x x^T = second [*e I I]; of off itself
  without.
  """
  return jnp.sum(off * (off if second is None else second @ off))


@jax.jit
def relative_error(before, after, second=None):
  """sqrt(E |x (after - before)|^2 / E |x before|^2) of matrices; see `product_error`."""
  off = jnp.maximum(product_error(after - before, second), 0)
  return jnp.sqrt(off / jnp.maximum(product_error(before, second), 1e-30))


def least(error, candidates, start):
  """Where `error` is least, of candidates [n].

  Args:
    error: a number -> errors, an array of start's shape.
    start: what is taken where no error is finite.
  """
  def better(best, candidate):
    smallest, at = best
    found = error(candidate)
    return (jnp.minimum(found, smallest), jnp.where(found < smallest, candidate, at)), None
  (_, at), _ = jax.lax.scan(better, (jnp.full_like(start, jnp.inf), start),
                            jnp.asarray(candidates))
  return at
