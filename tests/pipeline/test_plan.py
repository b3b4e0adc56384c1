"""Plans: the step of a config for devices that are not there, or are."""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from lean_jax import plan as command
from lean_jax import topology
from lean_jax.errors import InputError
from lean_jax.pipeline.plan import advice, plan

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / 'experiments' / 'distill_70b.py'


def config(size='tiny', **mesh):
  spec = importlib.util.spec_from_file_location('distill_70b', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(size)
  c.mesh.update(mesh)
  return c


def test_a_distillation_step_is_planned():
  found = plan(config(fsdp=4, tensor=2), jax.devices(), 'cpu')
  assert found['variant'] == 'student' and found['mesh'] == dict(fsdp=4, tensor=2)
  assert found['fits'] and found['total'] >= found['arguments'] > 0
  assert found['collectives']['all-gather'][0] > 0
  # the student with two moments, in float32, and the teacher in bfloat16: an eighth, nearly
  assert found['trained'] == found['parameters']
  teacher = 320 * 64 * 2 + 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)
  assert found['arguments'] < 1.3 * (12 * found['parameters'] + 2 * teacher) / 8
  assert found['operations'] > .9 * found['model_operations']
  text = '\n'.join(command.lines(found))
  assert 'student on 8 x' in text and 'all-gather: ' in text and text.endswith('fits')


def test_the_parameters_of_70_billion_are_shapes():
  c = config('')
  from lean_jax import tree
  from lean_jax.pipeline.plan import _finished, _made
  teacher, known = _finished(c, 'teacher')
  student, shapes = _made(c, 'random', dict(c.variants[1]))
  assert 70e9 < tree.parameters(known) < 71e9 and 8e9 < tree.parameters(shapes) < 8.1e9
  assert {x.dtype for x in jax.tree.leaves(known)} == {jax.numpy.dtype('bfloat16')}
  assert teacher.layers == 80 and student.layers == 32


@pytest.mark.parametrize(('call', 'match'), [
    (lambda: plan(config(), jax.devices(), 'cpu', 'teacher'), "no variant 'teacher' that trains"),
    (lambda: plan(config(fsdp=16), jax.devices(), 'cpu'), 'needs 16 devices, there are 8'),
    (lambda: plan(config(data=3), jax.devices(), 'cpu'), 'does not divide over'),
    (lambda: topology.devices('v5e'), "no topology 'v5e'; expected chips of a slice"),
    (lambda: topology.devices('cpu:2x2'), 'expected chips of a slice')])
def test_what_cannot_be_planned_is_one_line(call, match):
  with pytest.raises(InputError, match=match) as caught:
    call()
  assert '\n' not in str(caught.value)


def test_what_to_change_follows_from_what_fills_the_device():
  assert 'mesh.fsdp' in advice(dict(limit=16, arguments=15))
  assert 'training.batch' in advice(dict(limit=16, arguments=2))


def run(*arguments):
  done = subprocess.run([sys.executable, '-m', 'lean_jax', 'plan', *arguments, '--json'],
                        capture_output=True, text=True, cwd=ROOT,
                        env=dict(os.environ, XLA_FLAGS='', PYTHONPATH=os.pathsep.join(sys.path)))
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_slice_that_is_not_there_says_what_a_step_takes():
  pytest.importorskip('libtpu')
  tiny = f'--config={PATH}:tiny'
  code, out, err = run(tiny, '--topology=v5e:2x2', '--config.mesh.fsdp=4')
  assert code == 0, err
  found = json.loads(out)
  assert found['device'] == 'TPU v5 lite' and found['fits'] and found['arguments'] > 0
  # a batch whose states alone are more than the chips have
  code, out, err = run(tiny, '--topology=v5e:2x2', '--config.mesh.fsdp=4',
                       '--config.training.batch=2097152', '--config.model.remat=False')
  assert code == 1, err
  found = json.loads(out)
  assert not found['fits'] and found['used'] > found['limit']
