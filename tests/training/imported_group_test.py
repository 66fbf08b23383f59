"""Runs as one program whose workdirs hold the parameters of an import."""

import dataclasses

import jax
import pytest

from configs import sharding as tables
from tests.training import vectorised_test as alike
from training import runs, vectorised
from training.data import tokenizers
from training.distributed import devices
from training.workdir import checkpoints, run_config

pytestmark = pytest.mark.slow
texts = alike.texts


def imported(c, workdir, seed):
  """A workdir with parameters alone, those that another seed draws."""
  model, derived = runs.resolve(c, tokenizers.load(c.data.tokenizer))
  run = runs.build(c, model, devices.make_mesh(
      dict.fromkeys(tables.MESH_AXES, 1), jax.devices()[:1]))
  params = dataclasses.replace(run, config=vectorised.with_values(
      c, {'seed': seed})).new_state().params
  run_config.save(workdir, c, derived)
  with checkpoints.Checkpoints(workdir, every_steps=0, every_minutes=0.0,
                               keep=1, keep_every=0) as saved:
    saved.save(0, {'params': params}, next_batch=0, tokens=0, config=c)


@pytest.mark.long
def test_a_workdir_with_parameters_alone_is_begun_with_them(texts, tmp_path):
  """As tools.convert leaves it, beside a run that begins with its own."""
  configs = [alike.config(texts, seed=i) for i in range(3)]
  for name in ('group', 'alone'):
    for i in (1, 2):
      imported(configs[i], tmp_path / f'{name}{i}', seed=40 + i)
  vectorised.train(configs, [tmp_path / f'group{i}' for i in range(3)])
  for i, c in enumerate(configs):
    alike.alone(c, tmp_path / f'alone{i}')
    alike.assert_same(tmp_path / f'group{i}', tmp_path / f'alone{i}')
  first = [alike.rows(tmp_path / f'group{i}')[0]['loss']
           for i in range(3)]
  assert len(set(first)) == 3, first
