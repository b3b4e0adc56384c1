"""What the pages that are written by scripts share: tables, and what made them."""
import importlib.metadata
import pathlib
import platform
import time

import jax

RESULTS = pathlib.Path(__file__).parents[1] / 'experiments' / 'results'


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


def claimed(*names):
  """What experiments printed of their claims, from experiments/results."""
  text = ''
  for name in names:
    file = RESULTS / f'{name}.txt'
    if file.exists():
      head, *rest = file.read_text(encoding='utf-8').splitlines()
      lines = [line for line in rest if line.startswith(('pass ', 'FAIL '))]
      text += f'\n`{head}`\n\n```\n' + '\n'.join(lines) + '\n```\n'
  return text


def refusals(errors, names):
  """A list of errors, where those that begin with one of the names and are else alike are one."""
  alike = {}
  for error in errors:
    name = max((n for n in names if error.startswith(f'{n} ')), key=len, default='')
    alike.setdefault(error.removeprefix(name), []).append(name)
  return ''.join(f'- {", ".join(f"`{n}`" for n in of if n)}{rest}\n' for rest, of in alike.items())
