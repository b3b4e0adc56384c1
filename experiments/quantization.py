r"""Rounding after training, method against method, where the papers' effects show on a small model.

lean-jax run --config=experiments/quantization.py --workdir=runs/quantization          (minutes)
lean-jax run --config=experiments/quantization.py --workdir=runs/stories \
    --config.teacher=stories260K --config.data.path=stories.jsonl
lean-jax run --config=experiments/quantization.py:full ...              (as lean_pipeline:full)

Some claims need activations with outlier channels, which small models lack: they are made, with no
output of the float model changed (quantization/outliers.py).

The claims, checked by the run itself:
  GPTQ (arXiv:2210.17323, table 3): at 3 bits OPT-125M has a perplexity of 53.85, rounded to nearest
    1.3e3, in float 27.65; the order by size of inputs (--act-order) helps.
  AWQ (arXiv:2306.00978, table 4): at 3 bits in groups Llama-2-7B has 6.24, rounded to nearest 6.66.
  QLoRA (arXiv:2305.14314, table 2, section 3): NF4 27.41, FP4 31.07, Int4 34.34; scales in eight
    bits take 0.127 bits a parameter, not 0.5. FP4 is taken as the float e2m1; the table of that
    name in bitsandbytes (fp4-g64 here) has a larger error, of normal numbers too.
  SmoothQuant (arXiv:2211.10438, table 4): where activations have outliers, eight bits for both are
    as good as float once they are smoothed, and destroy the model if not.
  LLM.int8() (arXiv:2208.07339, table 1): with inputs from 6.0 on left in floats, eight bits are as
    good as float: 12.45 at 13 billion parameters, 19.08 by absmax.
"""
import importlib

MATRICES = 'layers/.*'
READERS = 'layers/.*/(q|k|v|gate|up)/kernel'
SIZES = ('', 'tiny', 'full')


def get_config(size=''):
  """The settings of a size: '' for a laptop in minutes, 'tiny' for a test, 'full' for a TPU VM."""
  if size not in SIZES:
    raise ValueError(f'no size {size!r}; there are: {", ".join(map(repr, SIZES))}')
  c = importlib.import_module('lean_jax.experiments.lean_pipeline').get_config(size).unlock()
  if not size:
    c.phases.teacher.steps = 400
    c.data.train_tokens = 1_000_000
  c.speed.update(prompt=32, decode=16, batch=2)
  c.sample.update(variant='w2-gptq', tokens=40)
  c.variants = variants()
  c.claims = claims()
  return c.lock()


def variants():
  """The float model, one with outliers, and each of them rounded."""
  one = lambda method, spec, **kw: dict(where=MATRICES, method=method, spec=spec, **kw)
  rounded = lambda name, start, *steps: dict(name=name, start=start, methods=steps)
  large = dict(where=READERS, method='outliers', channels=3, factor=30.)
  found = [dict(name='teacher', start='teacher', phase='teacher'),
           rounded('outliers', 'teacher', large),
           rounded('w8a8', 'teacher', one('rtn', 'w8a8')),
           rounded('w4-hqq', 'teacher', one('hqq', 'w4a16-g64-asym'))]
  for spec in ('nf4-g64', 'nf4-g64-dq', 'fp4-g64', 'fp4_e2m1-g64', 'w4a16-g64'):
    found.append(rounded(spec, 'teacher', one('rtn', spec)))
  for name, method, kw in (('rtn', 'rtn', {}), ('mse', 'rtn', dict(clip='mse')), ('awq', 'awq', {}),
                           ('gptq', 'gptq', dict(clip='mse'))):
    found += [rounded(f'w2-{name}', 'teacher', one(method, 'w2a16-g64', **kw)),
              rounded(f'w3-{name}', 'outliers', one(method, 'w3a16-g64', **kw))]
  for name, order in (('given', False), ('act', True)):
    found.append(rounded(f'w3-gptq-{name}', 'outliers', one('gptq', 'w3a16', act_order=order)))
  for name, method in (('absmax', 'rtn'), ('smooth', 'smoothquant'), ('llm', 'llm_int8')):
    found.append(rounded(f'w8a8-{name}', 'outliers', one(method, 'w8a8')))
  return tuple(found)


def claims():
  """Each claim: left < bound * right."""
  less = lambda name, left, right, bound=1.: dict(
      name=name, left=f'{left}.perplexity', right=f'{right}.perplexity', bound=bound)
  return (
      less('outliers change no output', 'outliers', 'teacher', 1.0001),
      less('W8A8 is within 0.5% of float', 'w8a8', 'teacher', 1.005),
      less('NF4 beats FP4', 'nf4-g64', 'fp4-g64'),
      less('NF4 beats symmetric Int4', 'nf4-g64', 'w4a16-g64'),
      less('FP4 (e2m1) beats symmetric Int4', 'fp4_e2m1-g64', 'w4a16-g64'),
      dict(name='double quantization takes 4.127 bits where float scales take 4.5',
           left='nf4-g64-dq.quantized_bytes', right='nf4-g64.quantized_bytes', bound=4.15 / 4.5),
      less('double quantization costs less than 0.5%', 'nf4-g64-dq', 'nf4-g64', 1.005),
      less('GPTQ beats AWQ at 2 bits', 'w2-gptq', 'w2-awq'),
      less('AWQ beats rounding at 2 bits', 'w2-awq', 'w2-rtn'),
      less('the best ranges beat whole ones at 2 bits', 'w2-mse', 'w2-rtn'),
      less('GPTQ beats AWQ at 3 bits with outliers', 'w3-gptq', 'w3-awq'),
      less('AWQ beats rounding at 3 bits with outliers', 'w3-awq', 'w3-rtn'),
      less('the order by size helps GPTQ by channel at 3 bits', 'w3-gptq-act', 'w3-gptq-given'),
      less('SmoothQuant beats absmax with outliers', 'w8a8-smooth', 'w8a8-absmax'),
      less('SmoothQuant is within 0.5% of float', 'w8a8-smooth', 'teacher', 1.005),
      less('LLM.int8() beats absmax with outliers', 'w8a8-llm', 'w8a8-absmax'),
      less('LLM.int8() is within 0.5% of float', 'w8a8-llm', 'teacher', 1.005),
  )
