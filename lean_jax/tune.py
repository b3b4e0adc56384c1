"""What is fastest of an op's ways: `lean-jax tune`.

Of a TPU, tiles by the compiler's own schedule, with no TPU: every candidate is compiled by libtpu
(extra `aot`) and its cycles are counted; see `kernels/platforms/schedule.py` for what they are and
are not. Of the machine itself, the op's forms by the clock: `lean_jax/timing.py`.
"""
import json
import pathlib

from lean_jax.errors import InputError

# (inputs, outputs) of the layers' matrices: Llama 2 7B, Llama 3 8B and 70B; of the experts of
# Mixtral 8x7B.
MODELS = {'7B': ((4096, 4096), (4096, 11008), (11008, 4096)),
          '8B': ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
          '70B': ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
          '8x7B': ((4096, 14336), (14336, 4096))}
EXPERTS = {'8x7B': 8}
_VMEM = 40 * 2 ** 20                  # bytes of a candidate's tiles, of the 64 MiB that it may take


def add_arguments(parser):
  """The settings, as flags."""
  flag = parser.add_argument
  flag('--device', metavar='D', help='v5e, v5p or v6e: its tiles; without it, the forms that run '
       'here are timed')
  flag('--op', default='int8_matmul', help='int8_matmul or weight_only_matmul (%(default)s)')
  flag('--bits', type=int, help='of a weight: 8, 4 or 2 (8 of int8_matmul, 4 of the other)')
  flag('--group', type=int, help='rows of the weight that share a scale (none; 128 of the other)')
  flag('--m', type=int, nargs='+', help='rows of activations: tokens (16 512 4096; 1 32 512 here)')
  flag('--k', type=int, help='inputs of the weight, with --n; or --model')
  flag('--n', type=int, help='outputs of the weight')
  flag('--experts', type=int, help='weights as many, each of its own rows; --model 8x7B has 8')
  flag('--model', choices=MODELS, help="in their place: the shapes of a common model's layers")
  flag('--out', metavar='F', help='JSON that is added to, case by case')
  flag('--json', action='store_true')


def run(arguments, console):
  """Compiles the candidates of each case, and prints and keeps the best.

  Raises:
    InputError: no libtpu, no such device or op, or shapes are missing.
  """
  if arguments.device is None:
    from lean_jax import timing
    if arguments.out:
      raise InputError('--out keeps the tiles of a --device; nothing reads times')
    requests = shapes(arguments, [1, 32, 512])
    if requests[0]['experts']:
      raise InputError('the products of experts are timed by benchmarks/grouped_matmul.py; give '
                       '--device, or another model')
    timing.run(requests, arguments.json, console)
    return
  from lean_jax.kernels.platforms import device
  requests, rows = cases(arguments), []
  try:
    for row in search(requests):
      rows.append(row)
      if arguments.out:
        keep(pathlib.Path(arguments.out), row)
  except ModuleNotFoundError as error:
    raise InputError(str(error)) from error
  if arguments.json:
    print(json.dumps(rows))
    return
  from rich.table import Table
  out = Table(caption=f'{device.full_name(arguments.device)}: cycles without waiting for memory, '
              'cycles of its bytes, and the share of the peak')
  for title in ('case', 'blocks', 'cycles', 'memory', 'share', 'tried', 'by rule'):
    out.add_column(title, justify='left' if title == 'case' else 'right')
  for r in rows:
    out.add_row(r['case'], ' '.join(map(str, r['blocks'])), f'{r["cycles"]:,}',
                f'{r["memory_cycles"]:,}', f'{r["share"]:.1%}', str(r['tried']),
                ' '.join(map(str, _by_rule(r))))
  console().print(out)


def cases(a):
  """The requests for a TPU that the arguments ask for, without tiles."""
  from lean_jax.kernels.platforms import device, schedule
  try:
    kind = device.full_name(a.device)
  except ValueError as error:
    raise InputError(str(error)) from error
  if kind not in schedule.CLOCK:
    raise InputError(f'no cycles are known of {kind}; there are: v5e, v5p, v6e')
  return [case | dict(device=a.device) for case in shapes(a, [16, 512, 4096])]


def shapes(a, rows):
  """The op and shapes that the arguments ask for; `rows` of activations if they name none."""
  from lean_jax.kernels.platforms import calls
  if a.op not in calls.OPS:
    raise InputError(f'no op {a.op!r}; there are: {", ".join(calls.OPS)}')
  if (a.model is None) == (a.k is None or a.n is None):
    raise InputError('give --k and --n, or --model in their place')
  floats = a.op == 'weight_only_matmul'
  bits, group = a.bits or (4 if floats else 8), a.group or (128 if floats else None)
  if bits not in (2, 4, 8):
    raise InputError(f'--bits {bits}; expected 2, 4 or 8')
  if group is not None and group % 32:
    raise InputError(f'--group {group}; the kernels take multiples of 32')
  weights, rows = MODELS[a.model] if a.model else ((a.k, a.n),), a.m or rows
  experts = EXPERTS.get(a.model, a.experts)
  small = [n for n in (*rows, *sum(weights, ()), 1 if experts is None else experts) if n < 1]
  if small:
    raise InputError(f'a shape of {small[0]}; expected 1 or more')
  return [dict(op=a.op, m=m, k=k, n=n, group=group, bits=bits, experts=experts)
          for k, n in weights for m in rows]


def search(requests):
  """The best of each case's candidates, case by case.

  A step's program is the same, but for some per cent of its bundles, however many steps there are:
  so a tile is compiled for the first case that tries it, and for another only where it is its best.

  Args:
    requests: as `cases` gives them.

  Yields:
    What `best` returns, of a tile that was compiled for the case.

  Raises:
    InputError: no tile of a case compiles.
    ModuleNotFoundError: libtpu is not installed.
  """
  from lean_jax.kernels.platforms import schedule
  known = {}

  def compiled(case, tiles):
    return list(schedule.measure([case | dict(blocks=tile) for tile in tiles]))
  for case in requests:
    tiles = {tile: _step(case, tile) for tile in candidates(case)}
    new = [tile for tile, step in tiles.items() if step not in known]
    known.update(zip((tiles[tile] for tile in new), compiled(case, new)))
    row = best(case, [_scaled(known[step], case, tile) for tile, step in tiles.items()])
    if tuple(row['blocks']) not in new:
      row = best(case, compiled(case, [row['blocks']]))
    yield row | dict(tried=len(tiles))


def _step(case, tile):
  """What a step's program depends on."""
  over = tuple(case[of] > size for of, size in zip('mnk', tile))
  return tile, over, *(case[of] for of in ('device', 'op', 'bits', 'group', 'experts', 'k'))


def _scaled(found, case, tile):
  """What was found of a tile in another case, for the steps and bytes of this one."""
  if not found.get('cycles'):
    return found
  from lean_jax.kernels.platforms import calls
  here, there = (calls.call(c | dict(blocks=tile)) for c in (case, found))
  times = dict(cycles=found['bundles'] * here.steps(), steps=here.steps(),
               unit_cycles=found['unit_cycles'] * here.operations / there.operations,
               memory_cycles=found['memory_cycles'] * here.bytes / there.bytes)
  return found | times


def candidates(case):
  """Tiles to try: all of K where VMEM has room for it, and parts of it."""
  from lean_jax.kernels.platforms import tuned
  M, K, N, group = (case[x] for x in ('m', 'k', 'n', 'group'))
  if case['experts']:
    tiles = [tuned.fitted((bm, bn, K), M, K, N, group)
             for bm in (32, 64, 128, 256) for bn in (256, 512, 1024)]
    return [t[:2] for t in dict.fromkeys(tiles) if _bytes(case, t) <= _VMEM]
  depths = dict.fromkeys([K, -(-K // 2), 4096, 2048])
  tiles = [tuned.fitted((bm, bn, bk), M, K, N, group)
           for bk in depths for bm in (256, 512, 1024) for bn in (256, 512, 1024)]
  room = [t for t in dict.fromkeys(tiles) if _bytes(case, t) <= _VMEM]
  whole = [t for t in room if t[2] >= K]
  return whole or room                                   # sums in memory were never the best


def _bytes(case, tile):
  """Of the tiles of a step, each twice: one is read while the other is used."""
  bm, bn, bk = tile
  x = bm * bk * (1 if case['op'] == 'int8_matmul' else 2)
  wide = bk * bn * (1 if case['op'] == 'int8_matmul' else 2)            # once, as it is multiplied
  return 2 * (x + bk * bn * case['bits'] // 8 + 2 * bm * bn) + wide + 4 * bm * bn


def best(case, found):
  """The candidate that takes the least time; of several, the one with the fewest steps.

  A tile's rows of x meet all of the weight, so the weight is read once for each of them. Reading
  and multiplying go on at once, but for the first step's tile and the last one's product.
  """
  from lean_jax.kernels.platforms import tuned
  worked = [r for r in found if r.get('cycles')]
  if not worked:
    raise InputError(f'no tile of {case} compiles; the last says: {found[-1].get("error")}')

  def time(r):
    weights = case['k'] * case['n'] * case['bits'] / 8
    # Rows of an expert are neighbours: its weight is read once.
    again = 0 if case['experts'] else -(-case['m'] // r['blocks'][0]) - 1
    of_bytes = r['memory_cycles'] * (1 + again * weights / _moved(case))
    of_units = max(r['cycles'], r['unit_cycles'])
    return (max(of_units, of_bytes) + min(of_units, of_bytes) / r['steps'], r['steps'])
  top = min(worked, key=time)
  name = tuned.case(case['op'], f'int{case["bits"]}', case['m'], case['k'], case['n'],
                    case['group'], case['experts'])
  keys = ('blocks', 'cycles', 'memory_cycles', 'unit_cycles', 'share', 'spills')
  return case | {k: top[k] for k in keys} | dict(case=name, tried=len(found))


def _by_rule(case):
  if case['experts']:
    from lean_jax.kernels.grouped_matmul import tpu
    return tpu.by_rule(case['m'], case['experts'], case['k'])
  from lean_jax.kernels.platforms import tuned
  return tuned.by_rule(case['m'], case['k'], case['n'])


def _moved(case):
  from lean_jax.kernels.platforms import calls
  return calls.call(case).bytes


def keep(file, row):
  """Adds what was found to a file of cases."""
  found = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
  keys = ('blocks', 'cycles', 'memory_cycles', 'unit_cycles', 'share')
  found[row['case']] = {k: row[k] for k in keys}
  lines = (f'  {json.dumps(k)}: {json.dumps(v)}' for k, v in sorted(found.items()))
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
