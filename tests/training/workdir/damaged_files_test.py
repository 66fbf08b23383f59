"""What lies in a run's or a sweep's folder and is damaged: each is a sentence
with the file, and nothing is taken for something else."""

import json
import sqlite3

import pytest

from configs import base
from configs.errors import RequestError
from tests.helpers import sweep_folder
from tools.compare import layout
from tools.compare import ledger as ledger_lib
from tools.compare.sweep_report import curves
from training import runs
from training.workdir import metrics, run_config

# What stands for a field of config.json, and the field.
WRONG = {
    'model': 3, 'model.d_model': '128', 'optim.lr': [1], 'seed': True,
    'data.source': None, 'optim.decay_mask': 'all', 'train.steps': 1.5,
}


def _saved(tmp_path):
  run_config.save(tmp_path, base.base(), {'model.max_len': 256})
  return tmp_path / 'config.json'


@pytest.mark.parametrize('name', WRONG)
def test_a_config_of_wrong_types_is_refused(name, tmp_path):
  file = _saved(tmp_path)
  tree = json.loads(file.read_text())
  *groups, last = name.split('.')
  at = tree
  for group in groups:
    at = at[group]
  at[last] = WRONG[name]
  file.write_text(json.dumps(tree))
  with pytest.raises(RequestError, match=f'config.json is damaged: {name} is'):
    run_config.load_config(tmp_path)


@pytest.mark.parametrize('text', [
    b'', b'{', b'[]', b'3', b'{"derived": 3}', b'\xff\xfe', b'[' * 10_000,
    b'{"derived": {"model.max_len": "256"}}', b'{"derived": {}, "a.b": 1}'])
def test_a_config_that_is_none_is_refused(text, tmp_path):
  _saved(tmp_path).write_bytes(text)
  with pytest.raises(RequestError, match='config.json is damaged'):
    run_config.load_config(tmp_path)


def test_a_config_of_an_earlier_version_is_filled_in(tmp_path, capsys):
  file = _saved(tmp_path)
  tree = json.loads(file.read_text())
  del tree['train']['z_loss'], tree['eval']
  file.write_text(json.dumps(tree))
  config = runs.with_new_fields(run_config.load_config(tmp_path))
  assert config.to_dict() == base.base().to_dict()
  told = sorted(capsys.readouterr().out.splitlines())
  assert len(told) == 2  # a field, and a group of fields: a line each
  assert 'config field train.z_loss is newer' in told[1]
  assert 'eval is newer than this run: taken as {' in told[0]


@pytest.mark.parametrize('row', [
    '{"step": 1', '[]', '{"step": "1", "split": "train"}', '{"step": 1}',
    '{"step": 1, "split": "train", "loss": "low"}',
    '{"step": 1, "split": "train", "loss": 1e400}'])
def test_a_line_of_metrics_that_is_no_row_has_its_number(row, tmp_path):
  file = tmp_path / 'metrics.jsonl'
  good = '{"step": 1, "split": "train", "loss": 1}'
  file.write_text(f'{good}\n{row}\n{good}\n')
  with pytest.raises(RequestError, match='metrics.jsonl, line 2,'):
    metrics.read(file)


@pytest.fixture(name='sweep', scope='module')
def _sweep(tmp_path_factory):
  root = tmp_path_factory.mktemp('sweep')
  sweep_folder.write(root, [
      sweep_folder.point('base', seeds=(0,)),
      sweep_folder.point('other', {'optim.lr': 1e-4}, seeds=(0,))])
  return root


@pytest.mark.parametrize('change', [
    dict(points=3), dict(points=[3]), dict(points=[]), dict(base='none'),
    dict(base_config=[]), dict(base_config={'seed': 'a'}), dict(paired='yes'),
    dict(name=None)])
def test_a_damaged_description_is_refused(change, sweep):
  file = sweep / 'sweep.json'
  before = file.read_text()
  try:
    file.write_text(json.dumps(json.loads(before) | change))
    with pytest.raises(RequestError, match='sweep.json.* is damaged'):
      layout.load_description(sweep)
  finally:
    file.write_text(before)


@pytest.mark.parametrize('change', [
    dict(changes=3), dict(changes={'optim.rl': 1}), dict(seeds=['a']),
    dict(changes={'optim.lr': 'a'}), dict(name='../x'), dict(params=1e400),
    dict(params=10**400),
    dict(tokens=None), dict(params=0), dict(flops_per_token=0.0)])
def test_a_damaged_point_is_refused(change, sweep):
  file = sweep / 'sweep.json'
  before = file.read_text()
  description = json.loads(before)
  description['points'][1] |= change
  try:
    file.write_text(json.dumps(description))
    with pytest.raises(RequestError, match='sweep.json'):
      layout.load_description(sweep)
  finally:
    file.write_text(before)


@pytest.mark.parametrize('text', ['{', '3', '{"extrapolation": 3}',
                                  '{"extrapolation": {"length": 1}}'])
def test_a_damaged_evaluation_is_refused(text, sweep):
  file = layout.run_folder(sweep, 'base', 0) / 'eval.json'
  try:
    file.write_text(text)
    with pytest.raises(RequestError, match='eval.json.* is damaged'):
      curves.load_sweep(sweep)
  finally:
    file.unlink()


@pytest.mark.parametrize('statement', [
    "UPDATE runs SET state = 'lost'", "UPDATE runs SET seed = 'a'",
    "UPDATE runs SET seconds = 'a'", "UPDATE runs SET started = 'a'",
    'DROP TABLE runners', 'ALTER TABLE runs RENAME COLUMN point TO place'])
def test_a_ledger_that_says_nonsense_is_refused(statement, tmp_path):
  with ledger_lib.Ledger(tmp_path) as ledger:
    ledger.add([('base', 0, ())])
    runner = ledger.register()
    ledger.claim([1], runner)
  with sqlite3.connect(tmp_path / 'ledger.sqlite') as database:
    database.execute(statement)
  if 'runners' in statement:
    with ledger_lib.Ledger(tmp_path) as ledger:  # which makes it again
      assert ledger.recover() == []
    return
  with pytest.raises(RequestError, match='ledger.sqlite is damaged'):
    with ledger_lib.Ledger(tmp_path) as ledger:
      ledger.runs()


@pytest.mark.parametrize('data', [b'no database at all', b'SQLite format 3\0'])
def test_a_ledger_that_is_none_is_refused(data, tmp_path):
  (tmp_path / 'ledger.sqlite').write_bytes(data * 100)
  with pytest.raises(RequestError, match='ledger.sqlite is damaged'):
    ledger_lib.Ledger(tmp_path)


def test_a_ledger_of_another_sweep_is_refused(sweep, tmp_path):
  description = layout.load_description(sweep)
  with pytest.raises(RequestError, match="no point 'third'"):
    layout.config(description, 'third', 0)
  assert curves.load_sweep(sweep).base.name == 'base'
