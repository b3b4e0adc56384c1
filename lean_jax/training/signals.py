"""SIGTERM as a question that a loop can ask."""
import contextlib
import signal
import threading

from lean_jax.training import hosts


@contextlib.contextmanager
def termination():
  """Gives a function that says whether SIGTERM has come; outside, the signal is as it was.

  Only the main thread can receive signals; in another the answer is always no. So it is on several
  hosts, where JAX hears the signal: `hosts.asked_to_stop` is what to ask there.
  """
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread() or hosts.several():
    yield asked.is_set
    return
  before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  try:
    yield asked.is_set
  finally:
    signal.signal(signal.SIGTERM, before)
