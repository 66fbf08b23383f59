"""Runs that an earlier commit wrote go on as they would have gone on there.

tests/data/recorded_run holds two small runs of 8 steps, as commit 957bf01
wrote them: the text, metrics.jsonl to the end, and of the checkpoints the one
of step 4. Each was made, there and with this text, by

  python train.py --config configs/NAME.py --workdir ... \
      --config.data.source=text:tests/data/recorded_run/text/*.txt ...

with the fields that its config.json holds.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest

from tests.helpers import forked

ROOT = pathlib.Path(__file__).parents[1]
RECORDED = ROOT / 'tests/data/recorded_run'


def _figures(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return {(line['step'], line['split']): line
          for line in map(json.loads, lines)}


def _fields(tree, prefix='--config'):
  """Yields the flags that repeat a recorded config; lists are the defaults."""
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _fields(value, f'{prefix}.{name}')
    elif not isinstance(value, list):
      yield f'{prefix}.{name}={value}'


@pytest.mark.slow
@pytest.mark.parametrize('system', [
    'gpt', pytest.param('mixtral', marks=pytest.mark.long)])
def test_a_recorded_run_goes_on(system, tmp_path):
  """From its checkpoint, with the losses and norms of its own last steps."""
  workdir = tmp_path / system
  shutil.copytree(RECORDED / system, workdir)
  config = json.loads((workdir / 'config.json').read_text())
  del config['derived']
  said = forked.run('train.py', f'--config=configs/{system}.py',
                    f'--workdir={workdir}', *_fields(config))
  assert said.returncode == 0, said.stderr
  assert 'step 4' in said.stdout
  ours, theirs = _figures(workdir), _figures(RECORDED / system)
  assert ours.keys() == theirs.keys()
  for key, line in theirs.items():
    for name in ('loss', 'accuracy', 'grad_norm', 'param_norm',
                 'learning_rate', 'bits_per_byte'):
      np.testing.assert_allclose(
          ours[key].get(name, 0), line.get(name, 0), rtol=2e-5,
          err_msg=f'{key} {name}')


def test_a_recorded_run_is_evaluated(tmp_path):
  workdir = tmp_path / 'gpt'
  shutil.copytree(RECORDED / 'gpt', workdir)
  said = forked.run('eval.py', f'--workdir={workdir}',
                    f'--json={tmp_path}/figures.json')
  assert said.returncode == 0, said.stderr
  found = json.loads((tmp_path / 'figures.json').read_text())
  assert found['step'] == 4
