"""The errors that a user can act on."""


class InputError(ValueError):
  """The user's input cannot be used; the message is one line that says what to do.

  Raised where the input enters. The command line prints the message and exits with code 2.
  """
