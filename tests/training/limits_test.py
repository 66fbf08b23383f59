"""Numbers out of range, and fields that nothing reads, are refused before any
device work."""

import pathlib
import subprocess
import sys

import pytest

from configs import base
from configs import errors
from training import limits
from training import runs
from training.workdir import run_config

ROOT = pathlib.Path(__file__).parents[2]
# Fields whose range depends on others, or that another file checks.
ELSEWHERE = ('model.', 'optim.', 'mesh.')


def config_with(**fields):
  c = base.base()
  for name, value in fields.items():
    c.update_from_flattened_dict({name.replace('__', '.'): value})
  return c


def test_every_number_of_a_run_has_a_range():
  numbers = {name for name, value in run_config.flatten(base.base()).items()
             if type(value) in (int, float) and not name.startswith(ELSEWHERE)}
  assert numbers == set(limits.LIMITS) - {'mesh.slices'}


@pytest.mark.parametrize('name', limits.LIMITS)
def test_what_is_below_its_range_is_refused(name):
  config = config_with(**{name: -1 if name != 'span.mean_length' else 0.5})
  with pytest.raises(ValueError, match=f'^{name} is -?[0-9.]+: it must be >'):
    runs.check_config(config)


NUMBERS = {name: value for name, value in run_config.flatten(
    base.base()).items() if type(value) in (int, float)}


@pytest.mark.parametrize('name', NUMBERS)
def test_every_number_has_an_upper_bound(name):
  """Whichever check refuses it: its range, or what it has to divide."""
  value = 10**20 if type(NUMBERS[name]) is int else 1e35
  config = config_with(**{name: value})
  with pytest.raises(errors.RequestError, match=name):
    runs.check_config(config)


@pytest.mark.parametrize('name', [
    name for name, value in NUMBERS.items() if type(value) is int])
def test_a_number_of_5000_digits_is_not_written_out(name):
  with pytest.raises(errors.RequestError, match='of about [0-9]+ digits'):
    runs.check_config(config_with(**{name: 10**5000}))


@pytest.mark.parametrize('name, value', [
    ('log.every_steps', 0), ('train.max_bad_steps', 0), ('checkpoint.keep', 0),
    ('train.label_smoothing', 2.0), ('train.label_smoothing', 1.0),
    ('span.noise_density', 1.0), ('data.mask_rate', 1.5), ('train.steps', 0),
    ('train.z_loss', float('nan')), ('checkpoint.every_minutes', float('inf')),
])
def test_what_is_out_of_its_range_is_refused(name, value):
  with pytest.raises(ValueError, match=f'^{name} is {value}: it must be'):
    runs.check_config(config_with(**{name: value}))


def test_a_batch_of_too_many_tokens_is_refused():
  with pytest.raises(errors.RequestError, match='a batch of 4,294,967,296 tok'):
    runs.check_config(config_with(data__batch_size=2**24, data__length=2**8))


@pytest.mark.parametrize('fields, sentence', [
    (dict(init_partial=True), 'init_partial is True, but init_from names no'),
    (dict(span__noise_density=0.3), "'causal' does not read .*by span"),
    (dict(span__mean_length=2.0), "'causal' does not read .*by span"),
    (dict(data__target_length=8), "'causal' does not read .*by seq2seq"),
    (dict(data__mask_rate=0.3), "'causal' does not read .*by mlm, mlm_nsp"),
    (dict(log__wandb_project='mine'), "'mine', which is not read while log.w"),
    (dict(data__whole_words=True), "'causal' does not read .*by mlm, mlm_nsp"),
    (dict(data__eval_source='sotu', data__holdout_every=7),
     'data.holdout_every is 7, which is not read where data.eval_source'),
])
def test_what_nothing_reads_is_refused(fields, sentence):
  with pytest.raises(ValueError, match=sentence):
    runs.check_config(config_with(**fields))


@pytest.mark.slow
@pytest.mark.parametrize('flag', [
    'data.source=text:no/such/*.txt', 'model.norm=layernrom',
    *(pytest.param(flag, marks=pytest.mark.long) for flag in (
        'data.workers=-1', 'log.every_steps=0', 'data.eval_source=sotuu',
        'data.length=256'))])
def test_a_refusal_comes_before_any_device_work(flag, tmp_path):
  """At the end of a refused run no backend of JAX has been started."""
  result = subprocess.run(
      [sys.executable, '-c', 'import atexit, sys, train; from training import '
       'cli; from jax._src import xla_bridge; atexit.register(lambda: print('
       '"backends", len(xla_bridge._backends))); cli.run(train.main)',
       '--config', 'configs/gpt.py', f'--workdir={tmp_path}/run',
       f'--config.{flag}'], cwd=ROOT, capture_output=True, text=True,
      timeout=100)
  assert result.returncode == 2, result.stderr
  assert result.stdout == 'backends 0\n'
  assert not (tmp_path / 'run').exists()
