"""An evaluation that a signal kept from being done is done when the run goes
on, once."""

import pytest

from tests.training import loop_test
from training import endings, evaluating
from training.distributed import signals
from training.evals import in_training

train, _rows, _steps = loop_test._train, loop_test._rows, loop_test._steps
BOTH = dict(eval__every_steps=2, eval__tasks='x', eval__tasks_every_steps=2)


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
  monkeypatch.setattr(evaluating, 'evaluate', lambda *_, stop: (
      None if stop() else [{'nll': [1.0, 1.0]}]))
  monkeypatch.setattr(evaluating, 'means', lambda sums, _: {
      'loss': sums[0]['nll']})
  monkeypatch.setattr(
      in_training.Tasks, 'of', lambda self, params, n, workdir, stop: (
          None if stop() else in_training.Found({'x/score': n}, [])))


def _signal(monkeypatch, at_once):
  """Lets a signal be there where `at_once`, of the step that was asked about,
  says so."""
  asked = [0]
  monkeypatch.setattr(signals.Stop, 'agreed', lambda self, step: (
      asked.append(step)))
  monkeypatch.setattr(signals.Stop, 'at_once', property(
      lambda self: at_once(asked[-1])))


@pytest.mark.parametrize('rows', [1, 2])
@pytest.mark.parametrize('stop', [3, 4])
def test_no_row_is_missing_and_none_is_there_twice(
    train, monkeypatch, stop, rows):
  """Whether or not an evaluation was due when the signal came."""
  train(*[{}] * rows, stop=stop, **BOTH)
  monkeypatch.setattr(signals.Stop, 'agreed', lambda self, n: False)
  n, members, _ = train(*[{}] * rows, start=stop, **BOTH)
  assert n == loop_test.STEPS
  for member in members:
    assert [(row['step'], row['loss'], row['x/score'])
            for row in _rows(member, 'eval')] == [
                (2, 1.0, 2), (4, 1.0, 4), (6, 1.0, 6)]


def test_one_that_is_cut_short_leaves_no_part(train, monkeypatch):
  """The held-out data were through when the signal came during the task."""
  _signal(monkeypatch, lambda step: False)
  came = []
  monkeypatch.setattr(in_training.Tasks, 'of', lambda self, params, n, *_,
                      **__: came.append(n))  # None: cut short
  monkeypatch.setattr(signals.Stop, 'at_once', property(
      lambda self: bool(came)))
  n, (member,), _ = train({}, **BOTH)
  assert (n, member.code, came) == (2, endings.STOPPED, [2])
  assert not _rows(member, 'eval')


def test_a_signal_meanwhile_trains_no_further(train, monkeypatch):
  """Otherwise the evaluation of that step would never be done."""
  train({}, stop=4, **BOTH)
  _signal(monkeypatch, lambda step: True)
  n, (member,), program = train({}, start=4, **BOTH)
  assert (n, member.code) == (4, endings.STOPPED)
  assert not program.done and _steps(member) == [1, 2, 3, 4]
  _signal(monkeypatch, lambda step: False)
  n, (member,), _ = train({}, start=4, **BOTH)
  assert _steps(member, 'eval') == [2, 4, 6]
