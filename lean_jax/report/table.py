"""The result of a run as a table, on the console and in Markdown."""
from rich.table import Table

COLUMNS = (
    ('variant', lambda v: v['name']),
    ('parameters', lambda v: f'{v["parameters"]:,}'),
    ('bytes', lambda v: f'{v["bytes"]:,}'),
    ('perplexity', lambda v: f'{v["perplexity"]:.3f}'),
    ('bits/byte', lambda v: f'{v["bits_per_byte"]:.4f}'),
    ('new domain', lambda v: f'{v["domain_perplexity"]:.3f}' if v.get('domain_perplexity') else ''),
    ('prefill tok/s', lambda v: f'{v["prefill_tokens_per_second"]:,.0f}'),
    ('decode tok/s', lambda v: f'{v["decode_tokens_per_second"]:,.0f}'),
    ('peak memory', lambda v: f'{v["peak_memory_bytes"] / 2 ** 20:.1f} MiB'),
    ('trained', lambda v: f'{v["train_seconds"]:.0f} s'),
)


def console_table(variants):
  """A rich table of variants, as `report.json` has them."""
  table = Table()
  for title, _ in COLUMNS:
    table.add_column(title, justify='left' if title == 'variant' else 'right')
  for v in variants:
    table.add_row(*(cell(v) for _, cell in COLUMNS))
  return table


def markdown_table(variants):
  """The same in Markdown."""
  lines = ['| ' + ' | '.join(t for t, _ in COLUMNS) + ' |',
           '|' + '|'.join(' --- ' if k == 0 else ' ---: ' for k in range(len(COLUMNS))) + '|']
  lines += ['| ' + ' | '.join(cell(v) for _, cell in COLUMNS) + ' |' for v in variants]
  return '\n'.join(lines)


def markdown_report(report):
  """The whole report in Markdown.

  Args:
    report: what `report.json` holds: variants, claims, settings, versions, sample.
  """
  claims = '\n'.join(f'| {c["name"]} | {figures(c["figures"])} | '
                     f'{"pass" if c["passed"] else "**FAIL**"} |' for c in report['claims'])
  versions = ', '.join(f'{k} {v}' for k, v in report['versions'].items())
  return f'''# What being lean cost

{markdown_table(report['variants'])}

Perplexity and bits per byte are on the test split, `new domain` is the perplexity on text of
another kind; bytes are those of the weights as stored. How each is measured: docs/evaluation.md.

![size against perplexity](pareto.png)

## Claims

| claim | figures | |
| --- | --- | --- |
{claims}

## A sample of {report['sample']['variant']}

```
{report['sample']['text']}
```

Made with {versions}; all settings are in `report.json`.
'''


def figures(values):
  """{name: figure} as 'name 1.234, ...'."""
  show = lambda v: f'{v:,.4g}' if isinstance(v, float) else f'{v:,}' if isinstance(v, int) else v
  return ', '.join(f'{k} {show(v)}' for k, v in values.items())
