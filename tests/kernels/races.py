"""Pallas' TPU interpreter on two cores, which share a grid's parallel steps: it sees them race."""
import jax
from jax.experimental.pallas import tpu as pltpu

# One core takes the steps one after the other, and nothing races.
WATCHED = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def seen():
  """Whether the last kernel that was watched had a race."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
  assert interpreter.races is not None
  return interpreter.races.races_found


def raced(run):
  """Whether a call of a watched kernel has a race; from JAX 0.11 on it is an error too."""
  try:
    jax.block_until_ready(run())
  except jax.errors.JaxRuntimeError as error:
    pltpu.reset_tpu_interpret_mode_state()
    if 'RACE DETECTED' not in str(error):
      raise
    return True
  return seen()
