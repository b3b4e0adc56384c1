"""Size against perplexity, every variant a labelled point."""
import math

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from lean_jax.errors import InputError


def pareto_front(points):
  """Indices of the (size, perplexity) points that no other is at least as good as in both."""
  better = lambda a, b: a[0] <= b[0] and a[1] <= b[1] and a != b
  return [k for k, p in enumerate(points) if not any(better(q, p) for q in points)]


def pareto(variants):
  """A matplotlib Figure of variants, as `report.json` has them; the front is joined by a line."""
  if not variants:
    raise InputError('no variants to draw; give at least one')
  points = [(v['bytes'], v['perplexity']) for v in variants]
  front = sorted(pareto_front(points), key=lambda k: points[k])
  with matplotlib.rc_context({'font.size': 9}):
    figure = Figure(figsize=(8, 5), dpi=130, layout='constrained')
    axes = figure.add_subplot()
    axes.set(xscale='log', yscale='log', xlabel='bytes of weights, as stored',
             ylabel='test perplexity', title='Size against perplexity')
    axes.plot(*zip(*(points[k] for k in front)), color='tab:blue', alpha=.4, zorder=1)
    others = [k for k in range(len(points)) if k not in front]
    for marks, color in ((front, 'tab:blue'), (others, 'tab:gray')):
      axes.scatter([points[k][0] for k in marks], [points[k][1] for k in marks], color=color,
                   zorder=2)
    _labels(axes, points, [v['name'] for v in variants])
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    axes.set_xlim(low / 1.2, high * 1.6)
    axes.grid(True, which='both', alpha=.2)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter('B'))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    for kind in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
      kind(ticker.ScalarFormatter())
  return figure


def _labels(axes, points, names):
  """Names beside their points; where they would overlap, the later ones go up."""
  taken = []
  spread = lambda k: max(math.log(max(p[k] for p in points) / min(p[k] for p in points)), 1e-6)
  dx, dy = spread(0) / 3, spread(1) / 22
  for k in sorted(range(len(points)), key=lambda k: points[k][1]):
    x, y = math.log(points[k][0]), math.log(points[k][1])
    at = y
    while any(abs(at - b) < dy and abs(x - a) < dx for a, b in taken):
      at += dy
    taken.append((x, at))
    axes.annotate(names[k], points[k], (points[k][0] * 1.04, math.exp(at)),
                  arrowprops=dict(arrowstyle='-', alpha=.3, lw=.6) if at != y else None,
                  va='center', fontsize=8,
                  bbox=dict(boxstyle='round,pad=.1', facecolor='white', edgecolor='none', alpha=.7))
