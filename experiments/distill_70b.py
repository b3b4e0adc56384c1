r"""A student of 8 billion parameters distilled from a teacher of 70, on a slice of 256 chips.

lean-jax plan --config=experiments/distill_70b.py --topology=v5e:16x16
lean-jax plan --config=experiments/distill_70b.py:v6e --topology=v6e:16x16
lean-jax plan --config=experiments/distill_70b.py:qlora --topology=h200
lean-jax run --config=experiments/distill_70b.py:tiny --workdir=/tmp/tiny      (two minutes, a CPU)

Shapes are those of Llama 3 (Grattafiori et al. 2024, arXiv:2407.21783, table 3). What is planned is
the step that docs/tpu_vm.md starts by `lean.distill`; a pipeline by `lean-jax run` also measures
each model on one device, for which 70 billion parameters are too many. No claim of a paper is here:
docs/scale.md has what the compilers say of memory.
"""
from ml_collections import ConfigDict

SIZES = ('', 'v6e', 'qlora', 'tiny')


def get_config(size=''):
  """The settings of a size: '' for v5e-256, 'v6e' for v6e-256, 'qlora' for one H200, 'tiny'."""
  if size not in SIZES:
    raise ValueError(f'no size {size!r}; there are: {", ".join(map(repr, SIZES))}')
  c = ConfigDict()
  c.seed = 0
  c.teacher = ''                 # a Hugging Face folder; '' starts at random
  c.mesh = dict(data=1, fsdp=256, tensor=1, expert=1, sequence=1)
  c.data = dict(path='stdlib', kind='auto', field='text', data_dir='',
                window=4096, train_tokens=2_000_000, test_tokens=32_768)
  c.domain = dict(path='stdlib:docs', kind='auto', field='text', data_dir='',
                  train_tokens=1_000_000, test_tokens=16_384)
  c.tokenizer = dict(vocabulary=128_256)
  c.model = dict(width=8192, layers=80, heads=64, groups=8, head_width=128, hidden=28_672,
                 tied=False, dtype='bfloat16', remat=True)
  student = dict(width=4096, layers=32, heads=32, groups=8, head_width=128, hidden=14_336)
  c.training = dict(batch=256, accumulate=1, warmup=20, decay='cosine', weight_decay=.1, clip=1.,
                    save_every=200, log_every=10)
  c.phases = dict(student=dict(steps=20_000, peak=1e-4), adapt=dict(steps=1000, peak=1e-4))
  c.distillation = dict(temperature=1., soft_weight=.5)
  c.lora = dict(rank=16, alpha=32)
  if size == 'v6e':
    c.training.batch = 512
  if size == 'qlora':
    c.mesh.fsdp = 1
    c.data.window = 2048
    c.training.update(batch=4, accumulate=4)
  if size == 'tiny':
    c.mesh.fsdp = 1
    c.data.update(window=32, train_tokens=50_000, test_tokens=2048)
    c.domain.update(train_tokens=20_000, test_tokens=1024)
    c.tokenizer.vocabulary = 320
    c.model.update(width=64, layers=2, heads=4, groups=2, head_width=16, hidden=128)
    student = dict(width=32, layers=1, heads=2, groups=1, head_width=16, hidden=64)
    c.training.batch, c.phases.student.steps = 8, 30
  c.speed = dict(prompt=16, decode=16, batch=1)
  c.sample = dict(variant='teacher', prompt='def ', tokens=16, temperature=.6)
  teacher = dict(name='teacher', start='teacher', dtype='bfloat16')
  if size == 'qlora':
    c.variants = (teacher, dict(name='qlora', start='teacher', phase='adapt', methods=(
        dict(where='layers/.*', method='rtn', spec='nf4-g64-dq'),
        dict(where='layers/.*', method='lora', **c.lora))))
    c.claims = ()
  else:
    c.variants = (teacher, dict(name='student', start='random', model=student, phase='student',
                                teacher='teacher'))
    c.claims = (dict(name='the student is smaller', left='student.bytes', right='teacher.bytes',
                     bound=1.),)
  return c.lock()
