"""The kernels; in a checkout their source is the top-level folder `kernels/`."""
import pathlib

__path__.append(str(pathlib.Path(__file__).parents[2] / 'kernels'))
