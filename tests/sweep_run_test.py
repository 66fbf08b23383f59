"""Sweeps as they run: the ledger, kills, failures, launchers, status."""

import os
import pathlib
import shlex
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from tests import sweeps
from tools.sweep import check, layout, ledger, local, run, slurm, spec, status
from training import run_config

ROOT = pathlib.Path(__file__).parents[1]
ROWS = [('a', 0, ()), ('a', 1, ()), ('b', 0, ('routing',))]
CLAIM = '''
import sys
from tools.sweep import ledger
with ledger.Ledger(sys.argv[1]) as book:
  me = book.register()
  print('ready', flush=True)
  sys.stdin.readline()
  print(*(id for run in book.runs('pending')
          for id in book.claim([run.id], me)), flush=True)
  sys.stdin.readline()
'''


@pytest.fixture
def book(tmp_path):
  with ledger.Ledger(tmp_path) as opened:
    yield opened


def states(workdir):
  with ledger.Ledger(workdir) as opened:
    return {(r.point, r.seed): r.state for r in opened.runs()}


def test_a_run_goes_through_its_states(book):
  book.add(ROWS)
  book.add(ROWS)  # again: the same rows
  assert [(r.point, r.seed) for r in book.runs()] == [
      ('a', 0), ('b', 0), ('a', 1)]
  me = book.register()
  first = next(r.id for r in book.runs() if r.point == 'b')
  assert book.claim([first], me, now=10) == [first]
  assert book.claim([first], me) == []  # it is taken
  assert book.settle(first, me, ledger.OWED, now=13)
  assert not book.settle(first, me, ledger.DONE)  # no claim of ours any more
  assert book.claim([first], me, ledger.OWED, now=20) == [first]
  assert book.runs(ledger.EVALUATING)[0].attempts == 2
  assert book.settle(first, me, ledger.DONE, now=21)
  assert book.runs(ledger.DONE)[0].seconds == 4


def test_a_new_task_is_owed_by_what_is_done(book):
  book.add(ROWS)
  me = book.register()
  for row in book.runs():
    book.claim([row.id], me)
    book.settle(row.id, me, ledger.DONE)
  book.add([('a', 0, ('extrapolation',))])
  assert [(r.point, r.tasks) for r in book.runs(ledger.OWED)] == [
      ('a', 'extrapolation')]


def test_a_ledger_of_an_earlier_version_is_read(tmp_path):
  old = ledger.SCHEMA.replace('  seconds REAL NOT NULL DEFAULT 0,\n', '')
  assert old != ledger.SCHEMA
  with sqlite3.connect(tmp_path / 'ledger.sqlite') as made:
    made.executescript(old)
    made.execute("INSERT INTO runs (point, seed, tasks) VALUES ('a', 0, '')")
  made.close()
  for _ in range(2):
    with ledger.Ledger(tmp_path) as opened:
      assert [(r.point, r.seconds) for r in opened.runs()] == [('a', 0)]


def test_two_processes_never_share_a_run(book, tmp_path):
  book.add(('p', seed, ()) for seed in range(200))
  claimers = [subprocess.Popen(
      [sys.executable, '-c', CLAIM, str(tmp_path)], cwd=ROOT, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
  for process in claimers:
    assert process.stdout.readline() == 'ready\n'
  for process in claimers:
    process.stdin.write('go\n')
    process.stdin.flush()
  got = [process.stdout.readline().split() for process in claimers]
  assert sorted(int(x) for taken in got for x in taken) == sorted(
      row.id for row in book.runs())
  assert book.recover() == []  # both live
  claimers[0].kill()
  claimers[0].wait()
  freed = book.recover()
  assert len(freed) == len(got[0]) == len(book.runs('pending'))
  claimers[1].communicate('end\n')
  book.recover()
  assert len(book.runs('pending')) == 200


def test_a_silent_runner_of_another_host_is_dead(book, monkeypatch):
  book.add(ROWS)
  monkeypatch.setattr(ledger, '_host', lambda: 'elsewhere')
  other = book.register(now=1000)
  book.claim([1, 2], other)
  monkeypatch.undo()
  assert book.recover(now=1000 + ledger.STALE_SECONDS - 1) == []
  assert book.beat(other, now=2000) == {1, 2}
  assert book.recover(now=2000 + ledger.STALE_SECONDS - 1) == []
  assert book.recover(now=2001 + ledger.STALE_SECONDS) == [
      'a, seed 0', 'a, seed 1']
  assert book.beat(other) == set()  # and the runner finds out


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
      [sys.executable, '-m', 'tests.sweeps', file, f'--workdir={workdir}',
       *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True)


def _wait(condition, seconds=60):
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='prctl is of Linux')
def test_kill_in_the_middle_then_two_runners_redo_nothing(tmp_path):
  file, workdir = sweeps.write(tmp_path), tmp_path / 'w'
  workdir.mkdir()
  runner = _start(file, workdir, '--parallel=2')
  _wait(lambda: (workdir / 'ledger.sqlite').exists() and
        sum(s == 'done' for s in states(workdir).values()) >= 2)
  (workdir / 'hold').touch()
  # The finished ones make room for two that hang.
  if 'running' in states(workdir).values():
    _wait(lambda: _running(workdir))
  runner.kill()
  runner.communicate()
  _wait(lambda: not _running(workdir))  # its children died with it
  done = {k for k, v in states(workdir).items() if v == 'done'}
  before = {p: p.stat().st_mtime_ns
            for name, seed in done
            for p in layout.run_folder(workdir, name, seed).glob('*')}
  (workdir / 'hold').unlink()
  runners = [_start(file, workdir) for _ in range(2)]
  said = [process.communicate(timeout=100)[0] for process in runners]
  assert [p.returncode for p in runners] == [0, 0], said
  assert set(states(workdir).values()) == {'done'}
  assert before == {p: p.stat().st_mtime_ns for p in before}
  ended = [line for text in said for line in text.splitlines()
           if line.endswith(': done')]
  assert len(ended) == len(set(ended)) == 6 - len(done)


def test_a_signal_stops_and_the_next_runner_goes_on(tmp_path):
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold').touch()
  runner = _start(file, workdir)
  _wait(lambda: (workdir / 'ledger.sqlite').exists() and _running(workdir))
  runner.send_signal(signal.SIGTERM)
  text, _ = runner.communicate(timeout=60)
  assert runner.returncode == 0 and 'the same command goes on' in text
  assert set(states(workdir).values()) == {'pending'}


def test_a_file_changed_under_the_sweep_is_found_out(tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  folder = layout.run_folder(workdir, 'rms', 0)
  args = sweeps.arguments(file, f'--workdir={workdir}')
  description = check.check(args)
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


def test_print_gives_a_line_a_run_and_runs_none(tmp_path, capsys):
  file, workdir = sweeps.write(tmp_path, tasks=('extrapolation',)), tmp_path
  args = sweeps.arguments(file, f'--workdir={workdir}', '--launcher=print')
  assert run.main(args) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 6 and set(states(workdir).values()) == {'pending'}
  words = shlex.split(lines[-1])
  assert words[:4] == ['python', 'train.py', '--config', file]
  assert '--config.model.ffn=swiglu' in words and '--config.seed=1' in words
  assert words[words.index('&&'):][1:3] == ['python', 'eval.py']
  assert '--tasks=extrapolation' in words


def test_a_wrong_request_is_a_sentence(tmp_path):
  file = sweeps.write(tmp_path)
  for words, part in (
      (['--launcher=slrum'], "Did you mean 'slurm'"),
      (['--parallel=0'], '--parallel is 0'),
      (['--seeds=-1'], '-1 seeds'),
      (['--workdir=gs://bucket/w'], 'gs://bucket/w')):
    with pytest.raises(ValueError, match=part):
      run.main(sweeps.arguments(file, f'--workdir={tmp_path}', *words))
  with pytest.raises(ValueError, match='no sweep .* choose from .*parts.py'):
    run.main(sweeps.arguments('configs/sweeps/prats.py',
                              f'--workdir={tmp_path}'))
  assert not (tmp_path / 'ledger.sqlite').exists()


def test_cores_are_shared_out(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {1, 2, 5, 7},
                      raising=False)
  assert [local._cores(i, 2) for i in range(2)] == ['1,5', '2,7']
  assert local._cores(5, 6) == ''  # more runs than cores
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6')
  assert [local._environment(i, 2)['CUDA_VISIBLE_DEVICES']
          for i in range(2)] == ['4,6', '5']
  assert local._environment(3, 4)['CUDA_VISIBLE_DEVICES'] == '4,5,6'


def test_slurm_runs_the_runner_as_an_array(tmp_path):
  submitit = pytest.importorskip('submitit')
  words = [sys.executable, '-c', f'open({str(tmp_path / "mark")!r}, "a")'
           '.write("x")']
  jobs = slurm.submit(words, tmp_path / 'slurm', 2, 'timeout_min=2', 'local')
  assert [job.result() for job in jobs] == [0, 0]
  assert (tmp_path / 'mark').read_text() == 'xx'
  delayed = slurm.Work(words).checkpoint()
  assert isinstance(delayed, submitit.helpers.DelayedSubmission)
  with pytest.raises(ValueError, match='--slurm has .partition'):
    slurm.submit(words, tmp_path, 1, 'partition', 'local')
  with pytest.raises(ValueError, match='gpus'):
    slurm.submit(words, tmp_path, 1, 'gpus=1', 'local')


def test_a_job_runs_what_we_were_asked_less_the_launcher():
  assert run._as_local(
      ['run', 'f.py', '--workdir', 'w', '--launcher', 'slurm', '--retry',
       '--slurm=partition=a,timeout_min=3', '--jobs', '4', '--match=params']
      ) == ['run', 'f.py', '--workdir', 'w', '--match=params']


@pytest.mark.slow
def test_status_tells_states_losses_and_errors(tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file = sweeps.write(tmp_path, sweeps.POINTS
                      + "  add('bad', **{'optim.lr': 1.0})\n")
  workdir = tmp_path / 'w'
  run.main(sweeps.arguments(file, f'--workdir={workdir}'))
  capsys.readouterr()
  path = layout.run_folder(workdir, 'rms', 1) / 'metrics.jsonl'
  path.write_text(path.read_text().replace('"eval", "loss": 1.0',
                                           '"eval", "loss": 1.5') + '{"st')
  args = type('Args', (), dict(workdir=workdir, once=True))
  assert status.main(args) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = {line.split()[0]: line.split() for line in lines if line}
  assert rows['base'] == ['base', '2', 'done', '100%', '1.0000']
  assert rows['rms'] == ['rms', '2', 'done', '100%', '1.2500', '+0.2500']
  assert rows['bad'][1:4] == ['2', 'failed', '8%']
  assert '8 runs: 2 failed, 6 done' in lines
  assert 'failed: bad, seed 0: this point is bad (exit code 1)' in lines
  status._live(layout.load(workdir), workdir)  # ends, as all has ended
  text = capsys.readouterr().out
  assert '+0.2500' in text and '8 runs: 2 failed, 6 done' in text


def test_status_of_no_sweep_is_a_sentence(tmp_path):
  with pytest.raises(ValueError, match='sweep.json is missing'):
    status.main(type('Args', (), dict(workdir=tmp_path, once=True)))


@pytest.mark.slow
def test_a_sweep_of_real_runs(tmp_path):
  """Trained alone and as a group, evaluated, and with paired seeds."""
  file = sweeps.write(tmp_path, "  add('slow', **{'optim.lr': 1e-4})\n",
                      seeds=1, tasks=('loss',))
  for name, flag in (('alone', '--novectorised'), ('group', '--vectorised')):
    result = subprocess.run(
        [sys.executable, '-m', 'tools.sweep', 'run', file, '--seeds=1',
         f'--workdir={tmp_path / name}', flag], cwd=ROOT, capture_output=True,
        text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(states(tmp_path / name).values()) == {'done'}
  first = {}
  for name in ('alone', 'group'):
    for point in ('base', 'slow'):
      folder = layout.run_folder(tmp_path / name, point, 0)
      losses = [row['loss'] for row in layout.metrics(folder, 'train')]
      assert len(losses) == 12 and (folder / 'eval.json').exists()
      first[name, point] = losses
  for point in ('base', 'slow'):
    assert first['alone', point] == pytest.approx(first['group', point], 1e-4)
  # Paired: the same first batch, before the learning rate tells.
  assert first['alone', 'base'][0] == first['alone', 'slow'][0]
  assert first['alone', 'base'][-1] != first['alone', 'slow'][-1]
