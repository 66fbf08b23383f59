"""A mixture of experts as it is run: its panel in the figures, the pictures."""

import json

import pytest

from tests import train_test

texts = train_test.texts
FLAGS = ('--config.model.moe.num_experts=4', '--config.model.moe.d_ff=32',
         '--config.train.steps=4', '--config.log.every_steps=2',
         '--config.mesh.data=2', '--config.mesh.fsdp=2',
         '--config.mesh.expert=2', '--config.log.tensorboard=True',
         '--config.model.num_kv_heads=2')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, texts):
  workdir = tmp_path_factory.mktemp('moe') / 'run'
  train_test.run(train_test.command(workdir, texts, *FLAGS,
                                    config='configs/mixtral.py'))
  return workdir


@pytest.mark.long
def test_the_panel_is_in_the_figures_by_layer(workdir):
  row = [r for r in train_test.rows(workdir) if r['split'] == 'train'][-1]
  assert row['aux/balance'] > 0
  loads = row['health/load_E']
  assert len(loads) == 2 and all(len(load) == 4 for load in loads)
  for load in loads:
    assert sum(load) == pytest.approx(1)
  for name in ('dropped', 'load_max', 'load_entropy', 'confidence',
               'router_entropy', 'shard_imbalance', 'window_unused',
               'window_load_max', 'balance_loss', 'z_loss'):
    assert len(row[f'health/{name}']) == 2, name


@pytest.mark.long
def test_eval_shows_the_routing(workdir):
  target = workdir / 'routing.json'
  result = train_test.evaluate(workdir, '--tasks=routing', '--json',
                               str(target))
  assert 'max/mean' in result.stdout
  assert (workdir / 'routing.png').read_bytes().startswith(b'\x89PNG')
  figures = json.loads(target.read_text())['routing']
  assert len(figures['dropped']) == 2 and max(figures['dropped']) == 0
