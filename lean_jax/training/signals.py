"""SIGTERM as a question that a loop can ask."""
import contextlib
import signal
import threading


@contextlib.contextmanager
def termination():
  """Gives a function that says whether SIGTERM has come; outside, the signal is as it was.

  Only the main thread can receive signals; in another the answer is always no.
  """
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield asked.is_set
    return
  before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  try:
    yield asked.is_set
  finally:
    signal.signal(signal.SIGTERM, before)
