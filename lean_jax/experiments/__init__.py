"""The experiments; in a checkout their source is the top-level folder `experiments/`."""
import pathlib

__path__.append(str(pathlib.Path(__file__).parents[2] / 'experiments'))
