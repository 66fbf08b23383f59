"""Sweeps as they run: kills, failures, what others leave or add."""

import os
import pathlib
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from tests.helpers import sweeps
from tests.helpers.sweeps import states
from tools.compare import check, layout, ledger, run, spec, worker
from tools.compare import local
from training import vectorised
from training.workdir import run_config

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.slow
def test_a_failing_point_is_recorded_and_the_others_go_on(
    tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file = sweeps.write(tmp_path, sweeps.POINTS
                      + "  add('bad', **{'optim.lr': 1.0})\n",
                      tasks=('extrapolation',))
  workdir = tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}', '--parallel=3')
  assert run.main(args) == 1
  done = states(workdir)
  assert {k for k, v in done.items() if v == 'failed'} == {
      ('bad', 0), ('bad', 1)}
  assert sorted(set(done.values())) == ['done', 'failed']
  told = capsys.readouterr().err
  assert 'bad, seed 1: this point is bad (exit code 1)' in told

  # Again: what is done is not touched, what failed only with --retry.
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}
  assert len(before) == 8
  assert run.main(args) == 1
  after = {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}
  assert before == after
  monkeypatch.setattr(sweeps, 'SCRIPT', sweeps.SCRIPT.replace("'bad'", "''"))
  args.retry = True
  assert run.main(args) == 0
  assert set(states(workdir).values()) == {'done'}
  rewritten = {p.parents[1].name for p in workdir.rglob('*.jsonl')
               if p.stat().st_mtime_ns != before[p]}
  assert rewritten == {'bad'}


def _start(file, workdir, *words):
  return subprocess.Popen(
      [sys.executable, '-m', 'tests.helpers.sweeps', file,
       f'--workdir={workdir}', *words], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _wait(condition, seconds=240):
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until, 'waited in vain'
    time.sleep(0.05)


def _running(workdir):
  """Numbers of the processes that train in `workdir`."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      words = path.read_bytes().split(b'\0')
    except OSError:
      continue
    if b'-c' in words and any(
        word.startswith(f'{workdir}/points'.encode()) for word in words):
      found.append(int(path.parent.name))
  return found


@pytest.mark.long
@pytest.mark.skipif(sys.platform != 'linux', reason='prctl is of Linux')
def test_kill_in_the_middle_then_two_runners_redo_nothing(tmp_path):
  file, workdir = sweeps.write(tmp_path), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-1').touch()
  runner = _start(file, workdir, '--parallel=2')
  _wait(lambda: len(_running(workdir)) == 2 and
        sum(s == 'done' for s in states(workdir).values()) == 3)
  runner.kill()
  runner.communicate()
  _wait(lambda: not _running(workdir))  # its children died with it
  before = {p: p.stat().st_mtime_ns for name in ('base', 'rms', 'swiglu')
            for p in layout.run_folder(workdir, name, 0).glob('*')}
  assert len(before) == 3 * 4
  runners = [_start(file, workdir) for _ in range(2)]
  _wait(lambda: len(_running(workdir)) == 2)  # the ledger may say so too soon
  (workdir / 'hold-seed-1').unlink()
  said = [process.communicate(timeout=100)[0] for process in runners]
  assert [p.returncode for p in runners] == [0, 0], said
  assert set(states(workdir).values()) == {'done'}
  assert before == {p: p.stat().st_mtime_ns for p in before}
  ended = [[line for line in text.splitlines() if line.endswith(': done')]
           for text in said]
  assert sorted(sum(ended, [])) == [
      f'{name}, seed 1: done' for name in ('base', 'rms', 'swiglu')]
  assert all(ended)  # each had its share


@pytest.mark.slow
def test_a_signal_stops_and_the_next_runner_goes_on(tmp_path):
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-0').touch()
  runner = _start(file, workdir)
  _wait(lambda: (workdir / 'ledger.sqlite').exists() and _running(workdir))
  runner.send_signal(signal.SIGTERM)
  text, _ = runner.communicate(timeout=60)
  assert runner.returncode == 0 and 'the same command goes on' in text
  assert text.count('stopping: what is under way is saved first') == 1
  assert set(states(workdir).values()) == {'pending'}


@pytest.mark.slow
def test_a_file_changed_under_the_sweep_is_found_out(tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  folder = layout.run_folder(workdir, 'rms', 0)
  args = sweeps.arguments(file, f'--workdir={workdir}')
  description = check.describe(args)
  other = spec.changed(layout.config(description, 'rms', 0),
                       {'optim.lr': 1.0}, 'a test')
  run_config.save(folder, other)
  monkeypatch.setattr(sweeps, 'SCRIPT', sweeps.SCRIPT.replace(
      "== 'bad'", "== 'rms' and time.sleep(60)"))
  assert run.main(args) == 1
  with ledger.Ledger(workdir) as opened:
    failed, = opened.runs(ledger.FAILED)
  assert failed.point == 'rms'
  assert 'another config' in failed.error and 'optim.lr' in failed.error


@pytest.mark.slow
def test_what_is_done_on_disk_is_adopted(tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path), tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}')
  assert run.main(args) == 0
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*.jsonl')}
  (workdir / 'ledger.sqlite').unlink()
  assert run.main(args) == 0
  assert set(states(workdir).values()) == {'done'}
  assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.slow
def test_a_run_of_another_config_on_disk_is_not_adopted(tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}')
  assert run.main(args) == 0
  (workdir / 'ledger.sqlite').unlink()
  description = layout.load_description(workdir)
  run_config.save(layout.run_folder(workdir, 'rms', 0), spec.changed(
      layout.config(description, 'rms', 0),
      {'optim.lr': 1.0, 'eval.batches': 3}, 'a test'))
  (layout.run_folder(workdir, 'swiglu', 0) / 'config.json').unlink()
  assert run.main(args) == 1
  with ledger.Ledger(workdir) as opened:
    errors = {r.point: r.error for r in opened.runs(ledger.FAILED)}
  assert errors.keys() == {'rms', 'swiglu'}
  assert 'another config' in errors['rms']
  assert 'in eval.batches, optim.lr:' in errors['rms']
  assert 'config.json is missing' in errors['swiglu']


@pytest.mark.slow
def test_a_runner_takes_up_what_another_lost_meanwhile(tmp_path, monkeypatch):
  """And not only when it happens to look at the heartbeats."""
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}')
  with ledger.Ledger(workdir) as book:
    book.add([('rms', 0, ()), ('swiglu', 0, ())])
  other = subprocess.Popen(
      [sys.executable, '-c', sweeps.CLAIM, str(workdir)], cwd=ROOT, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  assert other.stdout.readline() == 'ready\n'
  other.stdin.write('go\n')
  other.stdin.flush()
  assert other.stdout.readline() == '1 2\n'
  train = sweeps.commands.train

  def kill_and_train(*words):
    other.kill()
    other.wait()
    return train(*words)

  monkeypatch.setattr(sweeps.commands, 'train', kill_and_train)
  assert run.main(args) == 0
  assert set(states(workdir).values()) == {'done'}


@pytest.mark.slow
@pytest.mark.parametrize('end', ['is alive', 'beats again', 'goes stale'])
def test_a_runner_waits_for_another_that_may_be_dead(
    end, tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  monkeypatch.setattr(ledger, 'STALE_SECONDS', 10_000)
  silence = 1000 if end != 'is alive' else -1000
  with ledger.Ledger(workdir) as book, monkeypatch.context() as elsewhere:
    elsewhere.setattr(ledger, '_host', lambda: 'elsewhere')
    book.add([('rms', 0, ())])
    other = book.register(now=time.time() - silence)
    book.claim([1], other)
  say = local._say

  def heard(text):
    say(text)
    if 'waiting' in text and end == 'goes stale':
      monkeypatch.setattr(ledger, 'STALE_SECONDS', 500)
    elif 'waiting' in text:
      with ledger.Ledger(workdir) as book:
        book.beat(other)

  monkeypatch.setattr(local, '_say', heard)
  assert run.main(sweeps.arguments(file, f'--workdir={workdir}')) == 0
  told = capsys.readouterr()
  assert told.out.count('waiting: the runner of rms, seed 0 is silent') == (
      end != 'is alive')
  if end == 'goes stale':
    assert set(states(workdir).values()) == {'done'}
  else:  # we leave, and say so
    assert states(workdir)['rms', 0] == 'running'
    assert '1 running, 2 done' in told.err
    assert '1 runs are with other runners: elsewhere:' in told.err


@pytest.mark.slow
def test_a_group_that_falls_lets_each_go_on_alone(
    tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file = sweeps.write(tmp_path, "  add('bad', **{'optim.lr': 1.0})\n"
                      "  add('fast', **{'optim.lr': 2e-3})\n", seeds=1)
  workdir = tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}', '--vectorised')
  assert run.main(args) == 1
  assert states(workdir) == {
      ('base', 0): 'done', ('bad', 0): 'failed', ('fast', 0): 'done'}
  told = capsys.readouterr()
  assert told.out.count('goes on alone, since its group failed') == 3
  assert 'base, seed 0: goes on alone, since its group failed: one of us' in (
      told.out)
  assert 'failed: bad, seed 0: this point is bad (exit code 1)' in told.err


TOGETHER = '''
import pathlib, sys
for folder in map(pathlib.Path, sys.argv[2:]):
  if folder.parent.name == 'bad':
    with (folder / 'log.txt').open('a') as log:
      print('error: the loss was not finite', file=log)
  else:
    (folder / 'checkpoints/12').mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text(
        '{"step": 12, "split": "train", "loss": 1.0, '
        '"bad_in_row": 0}\\n')
sys.exit(int(sys.argv[1]))
'''


@pytest.mark.slow
def test_a_group_of_which_one_blew_up_is_not_tried_again(
    tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  monkeypatch.setattr(sweeps.commands, 'train_together', lambda workdir, runs: [
      '-c', TOGETHER, str(worker.UNFINISHED),
      *(str(layout.run_folder(workdir, *each)) for each in runs)])
  file = sweeps.write(tmp_path, "  add('bad', **{'optim.lr': 1.0})\n", seeds=2)
  workdir = tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}', '--vectorised')
  assert run.main(args) == 1
  with ledger.Ledger(workdir) as book:
    ended = [(r.point, r.state, r.attempts, r.error) for r in book.runs()]
  error = f'the loss was not finite (exit code {worker.UNFINISHED})'
  assert ended == 2 * [('base', 'done', 1, ''), ('bad', 'failed', 1, error)]


@pytest.mark.slow
def test_the_worker_says_which_runs_did_not_end(tmp_path, monkeypatch):
  workdir = tmp_path / 'w'
  check.save(workdir, check.describe(sweeps.arguments(
      sweeps.write(tmp_path), f'--workdir={workdir}')))

  def train(configs, folders):
    raise vectorised.Unfinished({1: 'not finite'}, folders)

  monkeypatch.setattr(vectorised, 'train', train)
  monkeypatch.setattr(sys, 'argv', [
      'worker', f'--workdir={workdir}', '--runs=rms/0,swiglu/1'])
  assert worker.main() == worker.UNFINISHED
  logs = {path.parents[1].name: path.read_text()
          for path in workdir.rglob('log.txt')}
  assert logs == {'swiglu': 'error: not finite\n'}


@pytest.mark.slow
def test_a_signal_reaches_a_job_that_is_just_being_started(
    tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-0').touch()
  start = subprocess.Popen

  def signalled(*args, **options):
    process = start(*args, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    return process

  monkeypatch.setattr(local.subprocess, 'Popen', signalled)
  assert run.main(sweeps.arguments(file, f'--workdir={workdir}')) == 0
  assert 'the same command goes on' in capsys.readouterr().out
  assert set(states(workdir).values()) == {'pending'}


@pytest.mark.long
def test_a_task_that_is_added_is_not_lost(tmp_path, monkeypatch):
  """While a run trains, while it evaluates, and once it is done."""
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  evaluated = lambda: {
      point: layout.is_evaluated(layout.run_folder(workdir, point, 0), tasks)
      for point in ('base', 'rms', 'swiglu')}

  def adding(name, task):
    of = getattr(sweeps.commands, name)
    def act(*words):
      with ledger.Ledger(workdir) as book:
        book.add((p, 0, task) for p in ('base', 'rms', 'swiglu'))
      return of(*words)
    monkeypatch.setattr(sweeps.commands, name, act)

  tasks = ['loss', 'extrapolation']
  adding('train', ['loss'])
  adding('evaluate', tasks)
  assert run.main(sweeps.arguments(file, f'--workdir={workdir}')) == 0
  assert evaluated() == dict.fromkeys(evaluated(), True)
  assert set(states(workdir).values()) == {'done'}
  # A runner of an earlier version settled it as done, its task left behind.
  (layout.run_folder(workdir, 'rms', 0) / 'eval.json').unlink()
  with ledger.Ledger(workdir) as book:
    run.adopt(workdir, book)
  assert states(workdir) == {
      ('base', 0): 'done', ('rms', 0): 'owed', ('swiglu', 0): 'done'}


def test_two_that_add_to_a_sweep_do_so_in_turn(tmp_path, monkeypatch):
  """Else the later one's sweep.json would lack what the earlier one added."""
  file, workdir = sweeps.write(tmp_path), tmp_path / 'w'
  description = check.describe(sweeps.arguments(file, f'--workdir={workdir}'))
  merge = check._merge

  def busy(*args):
    with sqlite3.connect(workdir / 'ledger.sqlite', timeout=0) as other:
      with pytest.raises(sqlite3.OperationalError, match='locked'):
        other.execute('BEGIN IMMEDIATE')
    other.close()
    merge(*args)

  monkeypatch.setattr(check, '_merge', busy)
  check.save(workdir, description)
  assert layout.load_description(workdir)['name'] == 'mini'


@pytest.mark.long
def test_a_point_that_is_added_while_a_runner_runs_is_trained(
    tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}')
  train = sweeps.commands.train

  def add_and_train(*words):
    sweeps.write(tmp_path, sweeps.POINTS
                 + "  add('late', **{'optim.lr': 1.0})\n", seeds=1)
    check.save(workdir, check.describe(args))
    with ledger.Ledger(workdir) as book:
      book.add([('late', 0, ())])
    return train(*words)

  monkeypatch.setattr(sweeps.commands, 'train', add_and_train)
  assert run.main(args) == 0
  assert states(workdir)['late', 0] == 'done'
