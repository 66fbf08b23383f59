"""Averages of parameters in whole runs: of optim.ema, and of checkpoints."""

import math
import shutil
import types

import numpy as np
import pytest

from configs.errors import RequestError
from tests.training import loop_test
from tests.training import vectorised_test as group
from training import endings, evals, evaluating, vectorised
from training.distributed import signals
from training.evals import checkpoint
from training.workdir import checkpoints, parameters

texts = group.texts
train, _rows = loop_test._train, loop_test._rows
AVERAGE = dict(checkpoint__average=3, checkpoint__every_steps=2)


@pytest.fixture
def saved(monkeypatch):
  """Lets held-out losses be 1, and of a mean the steps of its checkpoints, as
  digits; returns the steps that members have not saved, by name."""
  lacking = {}
  monkeypatch.setattr(checkpoints, 'steps', lambda folder: [
      step for step in (2, 4) if step not in lacking.get(folder.parent.name, ())
  ])
  monkeypatch.setattr(parameters, 'restore', lambda folder, params, step: (
      types.SimpleNamespace(state=step)))
  monkeypatch.setattr(parameters, 'mean', lambda trees: float(
      ''.join(map(str, trees[:-1]))))
  monkeypatch.setattr(loop_test.Program, 'joined', lambda self, trees: trees,
                      raising=False)
  monkeypatch.setattr(loop_test.Program, 'single', types.SimpleNamespace(
      abstract=types.SimpleNamespace(params=None)))
  monkeypatch.setattr(evaluating, 'evaluate', lambda _, params, *__, stop: (
      None if stop() else [{'nll': params or [1.0] * 3}]))
  monkeypatch.setattr(evaluating, 'means', lambda sums, _: {
      'loss': sums[0]['nll']})
  return lacking


def _means(member):
  """The rows that have a mean."""
  return [row for row in _rows(member, 'eval') if 'mean/loss' in row]


def test_a_mean_of_checkpoints_that_are_gone_is_refused_before_a_step(
    train, saved, tmp_path):
  saved['0'] = [2]
  with pytest.raises(RequestError, match='checkpoint.average is 3, .* step 4, '
                     'but step 2 is not saved: choose a smaller mean'):
    train({}, start=4, **AVERAGE)
  assert not (tmp_path / '0' / 'metrics.jsonl').read_text()


def test_a_mean_lacks_a_step_that_could_not_be_saved(train, saved, capsys):
  saved['0'] = [2]
  n, (member,), _ = train({2: dict(param_norm=math.nan)}, due=(2, 4),
                          **AVERAGE, eval__every_steps=6)
  assert (n, member.code) == (loop_test.STEPS, 0)
  assert _rows(member, 'eval') == [{'step': 6, 'split': 'eval', 'loss': 1.0}]
  assert ('no mean of checkpoints: step 2 is not saved'
          in capsys.readouterr().out)


def test_members_that_have_all_checkpoints_have_a_mean(train, saved, capsys):
  saved['1'] = [4]
  _, members, _ = train({}, {}, {}, **AVERAGE, eval__every_steps=6)
  mean = [{'step': 6, 'split': 'eval', 'loss': 1.0, 'mean/loss': 24.0}]
  assert [_means(member) for member in members] == [mean, [], mean]
  assert len(_rows(members[1], 'eval')) == 1
  assert ('run 1: no mean of checkpoints: step 4 is not saved'
          in capsys.readouterr().out)


def test_a_run_that_ends_early_has_a_mean(train, saved, monkeypatch, capsys):
  """Each member where it ends, also where a signal comes meanwhile; there may
  be too few checkpoints by then."""
  scores = [[0.1, 0.2, 0.3, 0.3, 0.3, 0.3], [0.3] * 6,
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]
  loop_test._scores(monkeypatch, *scores)
  early = AVERAGE | loop_test.BEST | dict(
      eval__patience=2, eval__every_steps=3)
  _, members, _ = train({}, {}, {}, **early)
  assert [m.code for m in members] == [endings.EARLY, endings.EARLY, 0]
  five, three, six = members
  assert _means(five) == [
      {'step': 5, 'split': 'eval', 'mean/loss': 24.0, 'x/f1': 0.3}]
  assert not _means(three) and _rows(three, 'eval')[-1]['step'] == 3
  assert [row['step'] for row in _means(six)] == [6]
  assert ('run 1: no mean of checkpoints: there are fewer than 3 up to step 3'
          in capsys.readouterr().out)
  asked = []
  monkeypatch.setattr(signals.Stop, 'agreed', lambda self, n: asked.append(n))
  monkeypatch.setattr(signals.Stop, 'at_once', property(
      lambda self: asked[-1:] == [5]))
  n, (member,), _ = train({}, **early)
  assert (n, member.code) == (5, endings.EARLY)
  assert [row['step'] for row in _means(member)] == [5]


@pytest.mark.slow
@pytest.mark.long
def test_all_figures_are_those_of_the_run_alone(texts, tmp_path):
  """Also where it goes on, and of eval.py's task."""
  configs = [
      group.config(
          texts, seed=seed, optim__lr=lr, optim__ema=0.75, eval__live=True,
          eval__batches=0, eval__every_steps=5, data__batch_size=8,
          checkpoint__average=2, checkpoint__every_steps=3, checkpoint__keep=1)
      for seed, lr in ((0, 1e-2), (1, 3e-2))]
  assert vectorised.groups(configs) == [[0, 1]]
  vectorised.train(configs, [tmp_path / '0', tmp_path / '1'])
  alone = tmp_path / 'alone'
  group.alone(configs[1], alone)
  group.assert_same(tmp_path / '1', alone)
  ours, theirs = (group.rows(at, 'eval') for at in (tmp_path / '1', alone))
  names = {'loss', 'live/loss', 'mean/loss'}
  for row, other in zip(ours, theirs, strict=True):
    found = names & row.keys()
    assert names - found == ({'mean/loss'} if row['step'] == 5 else set())
    for name in found:
      np.testing.assert_allclose(row[name], other[name], rtol=1e-5)
    assert len({row[name] for name in found}) == len(found)
  # From the checkpoint of step 6, which is one of those to be averaged.
  shutil.rmtree(alone / 'checkpoints/8')
  group.alone(configs[1], alone)
  assert group.rows(alone, 'eval') == theirs
  for name, options in (('loss', {}), ('live/loss', {'live': True}),
                        ('mean/loss',
                         {'step': checkpoints.named_step('last:2')})):
    figures = checkpoint.evaluate(
        alone, ['loss'], evals.defaults(), text='', programs={},
        **{'step': None} | options)
    np.testing.assert_allclose(figures['loss']['loss'], theirs[-1][name],
                               rtol=1e-5)
    assert ('parameters' in figures) == (name != 'live/loss')
