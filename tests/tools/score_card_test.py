"""python -m tools.probes: suites, their runs, and the score card."""

import json
import pathlib
import types

from etils import epath
import numpy as np
import pytest
from scipy import special, stats

from common.errors import RequestError, Stopped
from configs import gpt
from tools.probes import suites
from training import begin, loop, vectorised
from training.data import probes
from training.workdir import run_config

SUITE = '''
SEEDS = 2
LRS = (1e-3, 1e-2)

def suite(add):
  add('parity', **{'data.length': 9, 'probe.levels': (4, 8), 'train.steps': 2,
                   'data.batch_size': 64, 'probe.held_out': 8})
'''
SMALL = {'model.num_layers': 1, 'model.d_model': 16, 'model.num_heads': 2,
         'model.d_ff': 16, 'model.position': 'none'}


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'suite.py'
  path.write_text(SUITE)
  return path


def base(**fields):
  config = gpt.get_config('tiny')
  config.update_from_flattened_dict(SMALL | fields)
  return config


@pytest.mark.parametrize('file', sorted(
    pathlib.Path('configs/probes').glob('[a-z]*.py')), ids=lambda p: p.stem)
def test_every_suite_can_be_run(file):
  suite = suites.load_suite(str(file), base())
  assert len(suite.seeds) >= 3
  for task, config in suite.configs.items():
    assert task.startswith(probes.parse_probe_name(config.data.source))


def test_a_run_for_each_rate_and_seed(file):
  """Of a suite that has a probe twice."""
  file.write_text(SUITE + """
  add('parity', label='bits_4', **{'data.length': 5, 'probe.levels': (4,)})
""")
  suite = suites.load_suite(str(file), base(), seeds=3)
  runs = list(suite.runs('bits_4'))
  assert [(run.lr, run.seed) for run in runs] == [
      (lr, seed) for lr in (1e-3, 1e-2) for seed in (0, 1, 2)]
  assert runs[4].config.optim.lr == 1e-2 and runs[4].config.seed == 1
  assert str(runs[4].folder(epath.Path('w'))) == 'w/bits_4/lr_0.01/seed_1'
  assert [config.data.source for config in suite.configs.values()] == [
      'probe:parity'] * 2
  assert suite.configs['parity'].eval.tasks == 'probe'


@pytest.mark.parametrize('old, new, words', [
    ("add('parity'", "add('copy', label='a/b'", "'a/b' names a folder"),
    ("add('parity'", "add('parity')\n  add('parity'", "adds 'parity' twice"),
    ("add('parity'", "add('party'", "Did you mean 'parity'"),
    ('LRS', 'RATES', 'has no LRS'),
    ('1e-2)', '-1e-2)', 'optim.lr is -0.01'),
    ("'probe.levels'", "'probe.level'", 'probe.levels'),
    ('(4, 8)', '(4, 9)', '10 tokens or more')])
def test_suites_that_are_refused(file, old, new, words):
  file.write_text(SUITE.replace(old, new))
  with pytest.raises(RequestError, match=words):
    suites.load_suite(str(file), base())


@pytest.mark.parametrize('old, new, field', [
    ('(4, 8)', '(4, 7)', 'probe.levels'),
    ("'data.length': 9", "'data.length': 10", 'data.length'),
    ("'train.steps': 2", "'train.steps': 3", 'train.steps'),
    ("'parity',", "'s3', label='parity',", 'data.source')])
def test_a_suite_that_has_changed_is_noticed(file, tmp_path, old, new, field):
  """A run that has begun is refused, and the card has another hash."""
  suite = suites.load_suite(str(file), base())
  run = next(suite.runs('parity'))
  request = begin.check_request(run.config, run.folder(epath.Path(tmp_path)))
  run_config.save_config(request.workdir, run.config, request.derived)
  (request.workdir / 'checkpoints/1').mkdir(parents=True)
  begin.check_request(run.config, request.workdir)

  assert old in SUITE
  file.write_text(SUITE.replace(old, new))
  changed = suites.load_suite(str(file), base())
  assert changed.digest != suite.digest
  with pytest.raises(RequestError, match=f'config differs.* in .*{field}'):
    begin.check_request(next(changed.runs('parity')).config, request.workdir)


def written(suite, workdir, figures):
  for run in suite.runs('parity'):
    folder = run.folder(workdir)
    folder.mkdir(parents=True)
    value = figures[run.lr][run.seed]
    rows = [{'step': 1, 'split': 'eval', 'probe/accuracy': 0.9},
            {'step': 2, 'split': 'eval', 'probe/accuracy': value,
             'probe/rows_right': value / 2, 'probe/rows': 512,
             'probe/level/4': value, 'probe/level/8': value / 2,
             'probe/beyond/2x': 0.5},
            {'step': 2, 'split': 'train', 'loss': 1.0}]
    (folder / 'metrics.jsonl').write_text(
        ''.join(json.dumps(row) + '\n' for row in rows))


def test_the_card_has_the_best_rate_and_the_interval_of_its_logit(
    file, tmp_path):
  suite = suites.load_suite(str(file), base(), seeds=3)
  workdir = epath.Path(tmp_path)
  written(suite, workdir, {1e-3: [0.5, 0.6, 0.7], 1e-2: [0.4, 0.9, 0.2]})
  row = suites.make_card(suite, workdir)['tasks']['parity']
  assert row['lr'] == 1e-3 and row['accuracy']['seeds'] == [0.5, 0.6, 0.7]
  low, high = stats.t.interval(0.95, 2, 0.6, stats.sem([0.5, 0.6, 0.7]))
  of_logit = special.logit([row['accuracy'][end] for end in ('low', 'high')])
  np.testing.assert_allclose(  # the slope of a logit is 1 / (p (1 - p))
      of_logit - special.logit(0.6), np.array([low - 0.6, high - 0.6]) / 0.24)
  np.testing.assert_allclose(row['level']['8']['mean'], 0.3)
  assert list(row['beyond']) == ['2x']
  assert abs(row['commonest'] - 0.5) < 0.02  # of a bit


@pytest.mark.long  # it compiles a group of runs
def test_a_suite_is_trained_once(file, tmp_path, capsys):
  suite = suites.load_suite(str(file), base())
  workdir = epath.Path(tmp_path)
  suites.train_suite(suite, workdir)
  card = suites.make_card(suite, workdir)
  assert len(card['tasks']['parity']['accuracy']['seeds']) == 2
  capsys.readouterr()
  suites.train_suite(suite, workdir)
  assert '4 of 4 runs are complete' in capsys.readouterr().out


def test_a_suite_that_is_stopped_is_not_done(file, tmp_path, monkeypatch):
  monkeypatch.setattr(vectorised, 'train_group', lambda configs, folders: [
      types.SimpleNamespace(code=loop.STOPPED, stop_requested=True)])
  with pytest.raises(Stopped):
    suite = suites.load_suite(str(file), base())
    suites.train_suite(suite, epath.Path(tmp_path))


def test_a_rate_at_which_a_run_diverges_is_left_out(
    file, tmp_path, monkeypatch):
  file.write_text(SUITE + "  add('copy', **{'train.steps': 2})\n")
  suite = suites.load_suite(str(file), base())
  workdir, asked = epath.Path(tmp_path / 'w'), []
  def train(configs, folders):
    """Stands in for the training: both tasks diverge at a rate or all."""
    for config, folder in zip(configs, folders):
      task = folder.parents[1].name
      bad = config.optim.lr == 1e-2 and config.seed == 1 or task == 'copy'
      asked.append((task, bad))
      folder.mkdir(parents=True, exist_ok=True)
      value = 50 * config.optim.lr + 0.5 + config.seed / 10  # best where bad
      (folder / 'metrics.jsonl').write_text('' if bad else json.dumps({
          'step': 2, 'probe/accuracy': value, 'probe/rows_right': value}))
    return [types.SimpleNamespace(
        code=loop.DIVERGED * bad, stop_requested=False)
            for _, bad in asked[-len(configs):]]
  monkeypatch.setattr(vectorised, 'train_group', train)
  suites.train_suite(suite, workdir)
  assert [task for task, _ in asked] == ['parity'] * 4 + ['copy'] * 4
  card = suites.make_card(suite, workdir)
  parity = card['tasks']['parity']
  assert parity['lr'] == 1e-3 and parity['diverged'] == {1e-2: [1]}
  assert parity['accuracy']['seeds'] == pytest.approx([0.55, 0.65])
  lines = suites.card_as_text(card).splitlines()
  assert 'parity, lr 0.001: 0.6000 (the' in lines[1]  # two seeds: no interval
  assert lines[2] == '  left out, since runs diverged: lr 0.01 (1 of 2 runs)'
  suites.write_card(card, workdir)
  kept = json.loads((workdir / suites.CARD_FILE).read_text())
  assert kept['suite_digest'] == suite.digest
  assert kept['tasks']['copy']['lr'] is None
  assert (workdir / suites.PICTURE_FILE).read_bytes()[:4] == b'\x89PNG'
