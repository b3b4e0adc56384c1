r"""A teacher, its student distilled, quantized and adapted, and what each step cost.

lean-jax run --config=experiments/lean_pipeline.py --workdir=lean_demo          (= lean-jax demo)
lean-jax run --config=experiments/lean_pipeline.py:tiny --workdir=/tmp/tiny     (under a minute)
lean-jax run --config=experiments/lean_pipeline.py --config.teacher=DIR --config.data.path=FILE

The claims, checked by the run itself: distillation beats hard labels from the same start (Hinton et
al. 2015, arXiv:1503.02531; Sanh et al. 2019, arXiv:1910.01108); W8A8 costs under 1% of perplexity;
quantization-aware training beats rounding at two bits, training for training (Jacob et al. 2018,
arXiv:1712.05877); LoRA and QLoRA reach a new domain, QLoRA within 2% of LoRA (Dettmers et al. 2023,
arXiv:2305.14314); and four bits take less than a fifth of the bytes.
"""
from ml_collections import ConfigDict

MATRICES = 'layers/.*'
SIZES = ('', 'tiny', 'full')


def get_config(size=''):
  """The settings of a size: '' for a laptop in minutes, 'tiny' for a test, 'full' for a TPU VM."""
  if size not in SIZES:
    raise ValueError(f'no size {size!r}; there are: {", ".join(map(repr, SIZES))}')
  c = ConfigDict()
  c.seed = 0
  c.teacher = ''                 # a Hugging Face folder; '' trains one
  c.mesh = dict(data=1, fsdp=1, tensor=1)
  c.data = dict(path='stdlib', kind='auto', field='text', data_dir='',
                window=128, train_tokens=2_000_000, test_tokens=32_768)
  c.domain = dict(path='stdlib:docs', kind='auto', field='text', data_dir='',
                  train_tokens=1_000_000, test_tokens=16_384)
  c.tokenizer = dict(vocabulary=512)
  c.model = dict(width=128, layers=4, heads=4, groups=2, head_width=32, hidden=384,
                 dtype='float32', remat=False)
  c.training = dict(batch=16, accumulate=1, warmup=20, decay='cosine', weight_decay=.1, clip=1.,
                    save_every=200, log_every=10)
  c.phases = dict(
      teacher=dict(steps=600, peak=3e-3),
      student=dict(steps=200, peak=3e-3),
      longer=dict(steps=80, peak=5e-4),
      adapt=dict(steps=60, peak=5e-3),
  )
  # Of temperatures 1 and 2 and weights .5 to 1, measured on one seed, these were the best.
  c.distillation = dict(temperature=1., soft_weight=.5)
  c.lora = dict(rank=8, alpha=16)
  c.speed = dict(prompt=64, decode=64, batch=4)
  c.sample = dict(variant='teacher', prompt='def ', tokens=100, temperature=.6)
  if size == 'tiny':
    c.data.update(window=64, train_tokens=200_000, test_tokens=4096)
    c.domain.update(train_tokens=100_000, test_tokens=4096)
    c.model.update(width=64, layers=2, heads=2, hidden=128)
    c.phases.teacher.steps, c.phases.adapt.steps = 100, 40
    c.phases.student.steps = 50
    c.phases.longer.update(c.phases.student)   # one schedule, so that one compiled step serves both
    c.speed.update(prompt=32, decode=16, batch=2)
    c.sample.tokens = 40
  if size == 'full':
    # About 310 million parameters on Wikipedia: for one TPU VM or one H200, not for a laptop.
    c.data.update(path='tfds:wikipedia/20230601.en', window=2048, train_tokens=2_000_000_000,
                  test_tokens=2 ** 20)
    c.domain.update(train_tokens=10_000_000, test_tokens=2 ** 18)
    c.tokenizer.vocabulary = 32_768
    c.model.update(width=1024, layers=24, heads=16, groups=8, head_width=64, hidden=2816,
                   dtype='bfloat16', remat=True)
    c.training.update(batch=256, accumulate=4, warmup=500, save_every=500)
    c.phases.teacher.update(steps=8000, peak=6e-4)
    c.phases.student.update(steps=4000, peak=4e-4)
    c.phases.longer.update(steps=500, peak=1e-4)
    c.phases.adapt.update(steps=300, peak=1e-3)
    c.speed.update(prompt=1024, decode=256, batch=8)
  c.variants = variants(c)
  c.claims = claims()
  return c.lock()


def variants(c):
  """Each variant: what it starts from, the methods applied, the training, the methods after it."""
  quantized = lambda spec: (dict(where=MATRICES, method='rtn', spec=spec),)
  fake = lambda spec: (dict(where=MATRICES, method='fake_quantize', spec=spec),)
  adapter = (dict(where=MATRICES, method='lora', **c.lora),)
  return (
      dict(name='teacher', start='teacher', phase='teacher'),
      dict(name='student-random', start='random', keep='half', phase='student'),
      dict(name='student-hard', start='teacher', keep='half', phase='student'),
      dict(name='student', start='teacher', keep='half', phase='student', teacher='teacher',
           domain=True),
      dict(name='w8a8', start='student', methods=quantized('w8a8')),
      dict(name='w4', start='student', methods=quantized('w4a16-g64'), domain=True),
      dict(name='w2', start='student', methods=quantized('w2a16-g64')),
      dict(name='student-longer', start='student', phase='longer'),
      dict(name='w2-longer', start='student-longer', methods=quantized('w2a16-g64')),
      dict(name='w2-qat', start='student', methods=fake('w2a16-g64'), phase='longer',
           finish=quantized('w2a16-g64')),
      dict(name='lora', start='student', methods=adapter, phase='adapt', data='domain',
           domain=True),
      dict(name='qlora', start='w4', methods=adapter, phase='adapt', data='domain', domain=True),
  )


def claims():
  """Each claim: left < bound * right, or left = right; 'variant.figure' on either side."""
  less = lambda name, left, right, bound=1.: dict(name=name, left=left, right=right, bound=bound)
  same = lambda name, left, right: dict(name=name, left=left, right=right, equal=True)
  return (
      less('distillation beats hard labels from the same start', 'student.perplexity',
           'student-hard.perplexity'),
      less('W8A8 is within 1% of float', 'w8a8.perplexity', 'student.perplexity', 1.01),
      less('QAT at 2 bits beats rounding, training for training', 'w2-qat.perplexity',
           'w2-longer.perplexity'),
      less('LoRA learns the new domain', 'lora.domain_perplexity', 'student.domain_perplexity'),
      less('QLoRA learns the new domain', 'qlora.domain_perplexity', 'w4.domain_perplexity'),
      less('QLoRA is within 2% of LoRA', 'qlora.domain_perplexity', 'lora.domain_perplexity', 1.02),
      less('4-bit matrices take under 20% of float32', 'w4.quantized_bytes',
           'w4.quantized_float32_bytes', .2),
      same('LoRA leaves its base as it was, bit for bit', 'lora.base_digest',
           'student.base_digest'),
      same('QLoRA leaves its base as it was, bit for bit', 'qlora.base_digest', 'w4.base_digest'),
  )
