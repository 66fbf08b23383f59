"""The report of a sweep whose points do tasks and have no held-out losses."""

import json

import pytest

from tests.helpers import sweep_folder
from tests.helpers.sweep_folder import point
from tools.sweep.report import curves, tables, write


@pytest.fixture
def sweep(tmp_path):
  labels = lambda *f1: {'labels': {
      seed: {'f1': x} for seed, x in enumerate(f1)}}
  sweep_folder.write(tmp_path, [
      point('base', tasks=labels(0.5, 0.6, 0.7)),
      point('norm', {'model.norm': 'rmsnorm'}, tasks=labels(0.6, 0.8, 0.7))],
                     states={('norm', 2): ('failed', 'no luck')})
  for file in tmp_path.rglob('config.json'):
    tree = json.loads(file.read_text())
    tree['eval']['every_steps'] = 0
    file.write_text(json.dumps(tree))
  for file in tmp_path.rglob('metrics.jsonl'):
    rows = [line for line in file.read_text().splitlines()
            if '"split": "eval"' not in line]
    file.write_text('\n'.join([*rows, '']))
  return curves.load_sweep(tmp_path)


def test_runs_that_were_to_have_no_loss_are_not_called_failed(sweep, tmp_path):
  missing = [[cell.text for cell in row] for row in tables.missing(sweep).rows]
  assert missing == [['norm', '2', 'failed', 'none', 'no luck']]
  text = write.text(sweep)
  assert 'No held-out losses were asked for' in text
  assert 'has no finished run' not in text
  assert '3/3' in text and '2/3' in text
