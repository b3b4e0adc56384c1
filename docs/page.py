"""What the pages that are written by scripts share: tables, and what made them."""
import importlib.metadata
import platform
import time

import jax


def markdown(titles, rows):
  """A table; numbers stand right where a title ends in a colon."""
  line = lambda cells: '| ' + ' | '.join(map(str, cells)) + ' |\n'
  rule = ['---:' if title.endswith(':') else '---' for title in titles]
  return line(title.removesuffix(':') for title in titles) + line(rule) + ''.join(map(line, rows))


def versions(*packages):
  """The date, the device, and the versions of Python and of packages."""
  found = (f'{p} {importlib.metadata.version(p)}' for p in packages)
  return ', '.join([time.strftime('%Y-%m-%d'), jax.default_backend().upper(),
                    f'Python {platform.python_version()}', *found])
