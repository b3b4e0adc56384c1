"""The rows of every file here: a new family's file needs no other line."""
import importlib
import pkgutil

ROWS = [row for module in sorted(m.name for m in pkgutil.iter_modules(__path__))
        for row in importlib.import_module(f'{__name__}.{module}').ROWS]
