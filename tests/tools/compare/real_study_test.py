"""A whole study of real runs: killed, then taken up by two runners at once."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import studies
from tools.compare import decide
from tools.compare import plan as plans

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROOT = pathlib.Path(__file__).parents[3]
SECONDS = 1500  # that a process may take beside other tests


def _start(file, workdir):
  return subprocess.Popen(
      [sys.executable, '-m', 'tools.study', 'run', file, '--workdir',
       str(workdir), '--group=16', '--anyway'], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ | {'XLA_FLAGS': ''})


def test_an_a_a_study_goes_through_all_phases(tmp_path):
  """The variant is the base with other first parameters. Q lets it pass, so
  that there is something to confirm."""
  file = studies.write(
      tmp_path, "TUNING['rungs'] = 1\nQ = 0.999\nQUESTION = 'Is it better?'",
      base="c.model.update(parametrization='mup', mup_base_width=8)",
      sweep="add('twin', init_seed=2)")
  workdir = tmp_path / 'study'
  first = _start(file, workdir)
  until = time.monotonic() + SECONDS
  while not list(workdir.glob('noise/points/*/*/metrics.jsonl')):
    assert first.poll() is None, first.communicate()[0]
    assert time.monotonic() < until
    time.sleep(0.1)
  first.send_signal(signal.SIGKILL)
  first.communicate()

  both = [_start(file, workdir) for _ in range(2)]
  told = [process.communicate(timeout=SECONDS)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], told

  found = json.loads((workdir / 'results.json').read_text())
  assert all(row['finished'] and row['done'] == row['planned']
             for row in found['phases'].values())
  assert [found['phases'][phase]['done'] for phase in plans.PHASES] == [
      3 * 2 * 3, 2 * 2, 2 * 3, 2 * 3 * 3]
  assert not any(x['diverged'] for x in found['outcomes'])
  verdict, = found['confirm']
  assert verdict['variant'] == 'twin'
  assert verdict['verdict'] != decide.UNSTABLE and verdict['n'] == 3
  # Base and twin have the same data, but not the same parameters.
  values = {(x['variant'], x['seed']): x['values']['loss']
            for x in found['outcomes'] if x['phase'] == 'screen'}
  assert len(set(values.values())) == 6
  # With muP, what was tuned at the smallest size holds for all.
  best = {row['variant']: row['changes'] for row in found['tuned']}
  assert len(found['tuned']) == 2
  for x in found['outcomes']:
    if x['phase'] == 'confirm':
      assert best[x['variant']].items() <= x['changes'].items()
  assert found['provenance']['devices'] and found['provenance']['versions']
  assert (workdir / 'report' / 'index.html').is_file()
