"""What a compiled program says of itself: its memory, its products, what chips tell each other."""
import math
import re

import jax

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BITS = dict(pred=8, s2=2, u2=2, s4=4, u4=4, s8=8, u8=8, f8e4m3fn=8, f8e5m2=8, f8e4m3=8, bf16=16,
             f16=16, s16=16, u16=16, f32=32, s32=32, u32=32, f64=64, s64=64, u64=64)
_OPERATION = re.compile(r'^(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(')
_CALLED = re.compile(r'(?:body|condition|calls|to_apply|called_computations|'
                     r'true_computation|false_computation|branch_computations)='
                     r'(?:\{([^}]*)\}|%?([\w.\-]+))')


def collectives(text):
  """{kind: (count, bytes)} a step of what a chip receives or sums, from a program's HLO text.

  A loop's body counts as often as it runs, where the compiler knows how often; bytes are those of
  the results, on one chip.
  """
  bodies, entry = _computations(text)
  found = {}

  def visit(name, times):
    for line in bodies.get(name, ()):
      match = _OPERATION.match(line)
      if match is None:
        continue
      result, operation = match.groups()
      kind = operation.removesuffix('-start')
      if kind in COLLECTIVES:
        count, size = found.get(kind, (0, 0))
        found[kind] = count + times, size + times * _result_bytes(result, operation)
      if operation in ('while', 'fusion', 'call', 'conditional', 'async-start'):
        n = _trips(line, bodies) if operation == 'while' else 1
        for several, one in _CALLED.findall(line):
          for called in (several or one).split(','):
            visit(called.strip().lstrip('%'), times * n)
  visit(entry, 1)
  return {kind: found[kind] for kind in COLLECTIVES if kind in found}


def operations(jaxpr):
  """Operations of all products of a traced program, on all devices, two for a multiply-add.

  What is computed again for the gradient counts again, and so does what the compiler will find that
  nobody needs. A scan counts as often as it runs; a loop
  without a known end counts once; a kernel counts what it says of itself.
  """
  total = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      left = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[k] for k in contracted)
      continue
    if name == 'pallas_call':
      cost = eqn.params.get('cost_estimate')
      total += cost.flops if cost else 0
      continue
    times = eqn.params['length'] if name == 'scan' else 1
    if name == 'shard_map':
      times = eqn.params['mesh'].size
    inner = [operations(sub) for sub in _inner(eqn.params)]
    total += times * (max(inner, default=0) if name == 'cond' else sum(inner))
  return total


def replicated(trees, mesh):
  """[(name, bytes on each chip, axis)] of arrays that a free axis of the mesh could share.

  The largest first. An axis is free if it has several devices, the array is on all of them whole,
  and it divides one of its dimensions that nothing divides yet.

  Args:
    trees: {name: tree of ShapeDtypeStructs with NamedShardings}.
  """
  out = []
  for title, t in trees.items():
    for path, x in jax.tree_util.tree_leaves_with_path(t):
      spec = [*x.sharding.spec, *[None] * (len(x.shape) - len(x.sharding.spec))]
      used = {a for s in spec if s for a in ((s,) if isinstance(s, str) else s)}
      open_ = [n for n, s in zip(x.shape, spec) if not s]
      axis = next((a for a in ('fsdp', 'tensor', 'expert', 'data') if mesh.shape[a] > 1
                   and a not in used and any(n % mesh.shape[a] == 0 for n in open_)), None)
      if axis is not None:
        size = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        out.append((title + jax.tree_util.keystr(path, simple=True, separator='/'), size, axis))
  return sorted(out, key=lambda row: -row[1])


def explained(error):
  """What the compiler's out-of-memory message says, in a dict; None of another error.

  used, limit: bytes on a chip; arguments: of them what the program is given, where it says so.
  """
  text = ' '.join(str(error).split())
  found = re.search(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) (hbm|vmem|smem)', text)
  if found is None or found[5] != 'hbm':
    return None
  out = dict(used=_bytes(found[1], found[2]), limit=_bytes(found[3], found[4]))
  given = re.search(r'arguments\s+([\d.]+)([KMGT]?)', text)
  return out if given is None else dict(out, arguments=_bytes(given[1], given[2]))


def _trips(line, bodies):
  """How often a loop runs: what the compiler notes, or what its counter is compared with."""
  noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
  if noted:
    return int(noted[1])
  condition = re.search(r'condition=%?([\w.\-]+)', line)
  found = [int(n) for test in bodies.get(condition[1] if condition else None, ())
           for n in re.findall(r'= s32\[\][^=]*? constant\((\d+)\)', test)]
  return max(found, default=1)


def _computations(text):
  """{name: lines} of the computations of a module, and the name of the entry."""
  bodies, name, entry = {}, None, None
  for line in text.splitlines():
    head = re.match(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$', line) or re.match(
        r'^(ENTRY )?%?([\w.\-]+) \{\s*$', line)
    if head and not line.startswith(' '):
      name = head[2]
      bodies[name] = []
      entry = name if head[1] else entry
    elif line.startswith('}'):
      name = None
    elif name is not None:
      bodies[name].append(line.strip())
  return bodies, entry


def _result_bytes(result, operation):
  """Bytes of a result; of one that starts, a tuple, those of its largest part."""
  sizes = [math.prod(map(int, filter(None, dims.split(',')))) * _BITS[kind] // 8
           for kind, dims in re.findall(r'\b([a-z]+\d*\w*)\[([\d,]*)\]', result) if kind in _BITS]
  if not sizes:
    return 0
  return max(sizes) if operation.endswith('-start') else sum(sizes)


def _inner(params):
  for value in params.values():
    for x in value if isinstance(value, tuple | list) else [value]:
      x = getattr(x, 'jaxpr', x)
      if hasattr(x, 'eqns'):
        yield x


def _bytes(number, unit):
  return round(float(number) * 1024 ** ' KMGT'.index(unit or ' '))
