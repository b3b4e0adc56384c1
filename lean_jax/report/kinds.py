"""What a weight is, in a word."""
from lean_jax.weights import Dense, Outliers, Prepared, Quantized, Wrapper


def kind(w):
  """'float32', 'w4a16-g64', 'LowRank(w4a16-g64)', ..."""
  if isinstance(w, Dense):
    return str(w.value.dtype)
  if isinstance(w, Quantized):
    return str(w.spec)
  if isinstance(w, Wrapper):
    return f'{type(w).__name__}({kind(w.base)})'
  if isinstance(w, Outliers):
    return f'Outliers({kind(w.rest)})'
  if isinstance(w, Prepared):
    return f'Prepared({kind(w.rest)})'
  return type(w).__name__
