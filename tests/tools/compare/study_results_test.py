"""What stands in a study's files while it goes on: results, notes, hours."""

import dataclasses
import json

import pytest

from configs.errors import RequestError
from tests.helpers import studies
from tools.compare import costs, phases, results, show
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from tools.compare import study_run as run_lib
from tools.compare import ledger as ledger_lib


@pytest.fixture
def frozen():
  return studies.frozen(studies.plan())


class Killed(Exception):
  """Stands for the end of a process."""


class Mortal(studies.Trainer):
  """Dies when a phase begins."""

  def __init__(self, frozen, dies):
    super().__init__(frozen)
    self._dies = dies

  def train(self, folder, runs):
    if folder == self._dies:
      raise Killed
    return super().train(folder, runs)


def go(workdir, frozen, dies='', **args):
  run_lib.save(workdir, frozen)
  run_lib.go(workdir, frozen, Mortal(frozen, dies), studies.arguments(**args))


def test_results_do_not_lose_what_is_known_by_now(frozen, tmp_path):
  go(tmp_path, frozen)
  whole = (tmp_path / results.FILE).read_bytes()
  assert json.loads(whole)['phases']['confirm']['finished']
  go(tmp_path, frozen, until='noise')
  assert (tmp_path / results.FILE).read_bytes() == whole
  with pytest.raises(Killed):  # while it walks through its phases again
    go(tmp_path, frozen, dies='screen')
  assert (tmp_path / results.FILE).read_bytes() == whole
  # Of another plan they are others.
  go(tmp_path, dataclasses.replace(frozen, sources={'file': 'b'}),
     until='noise')
  found = json.loads((tmp_path / results.FILE).read_text())
  assert [name for name, row in found['phases'].items()
          if row['finished']] == ['noise']


def test_what_was_looked_at_is_what_any_run_has_shown(tmp_path):
  for folder, state in (('noise', ledger_lib.DONE), ('tune-1', ledger_lib.DONE),
                        ('screen', ledger_lib.FAILED),
                        ('confirm', ledger_lib.PENDING)):
    with ledger_lib.Ledger(tmp_path / folder) as ledger:
      ledger.add([('p', 0, ())])
      run, = ledger.runs()
      ledger.adopt(run.id, ledger_lib.PENDING, state)
    (tmp_path / folder / 'sweep.json').write_text('{}')
  assert run_lib._seen(tmp_path) == ['noise', 'tune', 'screen']


def test_a_weak_study_tells_that_it_went_on_however_it_ends(tmp_path):
  weak = studies.frozen(studies.plan(effect=1e-4))
  with pytest.raises(phases.TooWeak):
    go(tmp_path, weak)
  assert not frozen_lib.load(tmp_path).notes
  with pytest.raises(Killed):
    go(tmp_path, weak, anyway=True, dies='tune-1')
  kept = frozen_lib.load(tmp_path)
  assert len(kept.notes) == 1
  told, = json.loads((tmp_path / results.FILE).read_text())['as_planned'][
      'differences']
  assert told.startswith('The study went on although it was too weak')
  go(tmp_path, kept)  # and needs not be told so again
  go(tmp_path, kept, anyway=True)
  assert len(frozen_lib.load(tmp_path).notes) == 1


def test_tokens_are_those_of_the_runs(frozen, tmp_path):
  go(tmp_path, frozen, until='tune')
  found = json.loads((tmp_path / results.FILE).read_text())['phases']
  assert found['noise']['tokens'] == pytest.approx(3 * 2 * 2 * 6 * 10_000)
  assert found['confirm']['tokens'] == 0


def test_hours_leave_out_what_the_plan_has_no_more(frozen, tmp_path):
  assert costs.known(tmp_path, frozen) is None
  go(tmp_path, frozen)
  whole = costs.known(tmp_path, frozen)
  kept = dataclasses.replace(frozen, points=[
      row for row in frozen.points if row['variant'] in ('base', 'same')])
  assert costs.known(tmp_path, kept).step.keys() == whole.step.keys()
  less = dataclasses.replace(frozen, points=[
      row for row in frozen.points if row['size'] != 'm'])
  assert costs.known(tmp_path, less) is None


def test_hours_are_timed_or_taken_from_runs_and_not_both():
  with pytest.raises(RequestError, match="--workdir is 'w', and --time is set"):
    show.main(studies.arguments(file='made.py', time=True, workdir='w',
                                json=False))


def test_damaged_results_are_told_before_anything_runs(frozen, tmp_path):
  go(tmp_path, frozen, until='noise')
  path = tmp_path / results.FILE
  found = json.loads(path.read_text())
  del found['outcomes'][0]['seed']
  path.write_text(json.dumps(found))
  with pytest.raises(RequestError, match=r"outcomes\[0\] is damaged: it has no "
                     "'seed'"):
    go(tmp_path, frozen, dies='noise')


def test_the_constants_of_results_are_what_is_written(frozen, tmp_path):
  go(tmp_path, frozen, until='noise')
  assert set(json.loads((tmp_path / results.FILE).read_text())) == set(
      plans.RESULTS)
