"""What a training step takes of devices that are not there: `lean-jax plan`.

The real step is compiled ahead of time, by libtpu (extra `aot`) for a TPU slice, by the CUDA plugin
(extra `aot-gpu`) for an H200; parameters are shapes, and take no memory.
"""
import json

from lean_jax import topology


def add_arguments(parser):
  """The settings, as flags."""
  flag = parser.add_argument
  flag('--topology', required=True, metavar='T', help='v5e:16x16, v6e:2x2, v5p:2x2x1, ... or h200, '
       'h200:8')
  flag('--variant', metavar='NAME', help='of the config; the last that trains, without it')
  flag('--json', action='store_true')


def run(arguments, config, console):
  """Compiles, prints, and returns the exit code: 1 where the step does not fit.

  Args:
    config: a function that gives the ConfigDict; called once the environment is set.
  """
  topology.environment()
  settings = config()
  from lean_jax.pipeline.plan import plan
  found = plan(settings, *topology.devices(arguments.topology), arguments.variant)
  if arguments.json:
    print(json.dumps(found))
  else:
    for line in lines(found):
      console.print(line, markup=False, soft_wrap=True)
  return 0 if found['fits'] else 1


def lines(found):
  """What a plan says, for a console."""
  from lean_jax.pipeline.plan import advice
  axes = ' x '.join(f'{k} {n}' for k, n in found['mesh'].items()) or 'one device'
  yield (f'{found["variant"]} on {found["devices"]} x {found["device"]} ({axes}): '
         f'{found["tokens"]:,} tokens a step, {found["parameters"] / 1e9:.2f} B parameters, '
         f'{found["trained"] / 1e9:.3f} B trained; compiled in {found["seconds"]:.0f} s')
  limit = found['limit']
  if 'total' in found:
    yield (f'a device: {gib(found["total"])} GiB' + (f' of {gib(limit)}' if limit else '')
           + f' = arguments {gib(found["arguments"])} + temporaries {gib(found["temporaries"])} + '
           f'output {gib(found["output"])}, of which {gib(found["alias"])} in the place of '
           'arguments')
  else:
    given = f', of which arguments {gib(found["arguments"])}' if 'arguments' in found else ''
    yield (f'a device: the compiler needs {gib(found["used"])} GiB of {gib(limit)}{given}')
  yield (f'products: {found["operations"] / 1e12:.2f} TFLOP a device and step as traced, '
         f'{found["model_operations"] / 1e12:.2f} of the model alone')
  for kind, (count, size) in found.get('collectives', {}).items():
    yield f'{kind}: {count:,} a step, {gib(size)} GiB on a device'
  rows = found['replicated']
  if rows:
    yield (f'whole on devices that could share it: {gib(sum(r[1] for r in rows))} GiB in '
           f'{len(rows)} arrays; ' + ', '.join(
               f'{name} {size / 2 ** 20:.2f} MiB ({axis})' for name, size, axis in rows[:3]))
  yield 'fits' if found['fits'] else f'does not fit: {advice(found)}'


def gib(size):
  """Bytes as GiB, two decimals."""
  return f'{size / 2 ** 30:.2f}'
