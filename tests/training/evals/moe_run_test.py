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


def test_eval_shows_the_routing(workdir):
  target = workdir / 'routing.json'
  result = train_test.evaluate(workdir, '--tasks=routing', '--json',
                               str(target))
  assert 'max/mean' in result.stdout
  assert (workdir / 'routing.png').read_bytes().startswith(b'\x89PNG')
  figures = json.loads(target.read_text())['routing']
  assert len(figures['dropped']) == 2 and max(figures['dropped']) == 0
