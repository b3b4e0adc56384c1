"""The errors that a user can act on. The command line prints their one line; see `cli.py`."""


class LeanError(Exception):
  """Any error of this package that the message explains."""


class InputError(LeanError, ValueError):
  """The user's input cannot be used; the message is one line that says what to do.

  Raised where the input enters. The command line exits with code 2.
  """


class NonFiniteError(LeanError, ArithmeticError):
  """Training met a NaN or an infinity; the message names the step and the batch."""


class PrecisionError(LeanError):
  """A weight is computed, or stored, in another precision than asked; the message names it."""


class Preempted(LeanError):
  """The process was asked to stop (SIGTERM); the training state is saved."""
