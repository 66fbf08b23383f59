"""Sweeps as they run: the ledger, kills, failures, launchers, status."""

import json
import os
import pathlib
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
import types

import pytest

from tests import sweeps
from tools.sweep import __main__ as command
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
  old = ledger.SCHEMA
  for name, kind in ledger.LATER.items():
    assert (column := f'  {name} {kind},\n') in old
    old = old.replace(column, '')
  with sqlite3.connect(tmp_path / 'ledger.sqlite') as made:
    made.executescript(old)
    made.execute("INSERT INTO runs (point, seed, tasks) VALUES ('a', 0, '')")
  made.close()
  for _ in range(2):
    with ledger.Ledger(tmp_path) as opened:
      assert [(r.point, r.seconds, r.alone) for r in opened.runs()] == [
          ('a', 0, 0)]


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
  _wait(lambda: list(states(workdir).values()).count('running') == 2)
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


def test_a_signal_stops_and_the_next_runner_goes_on(tmp_path):
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-0').touch()
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


@pytest.mark.slow
def test_a_run_of_another_config_on_disk_is_not_adopted(tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}')
  assert run.main(args) == 0
  (workdir / 'ledger.sqlite').unlink()
  description = layout.load(workdir)
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
      [sys.executable, '-c', CLAIM, str(workdir)], cwd=ROOT, text=True,
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


@pytest.mark.slow
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
  description = check.check(sweeps.arguments(file, f'--workdir={workdir}'))
  merge = check._merge

  def busy(*args):
    with sqlite3.connect(workdir / 'ledger.sqlite', timeout=0) as other:
      with pytest.raises(sqlite3.OperationalError, match='locked'):
        other.execute('BEGIN IMMEDIATE')
    other.close()
    merge(*args)

  monkeypatch.setattr(check, '_merge', busy)
  check.save(workdir, description)
  assert layout.load(workdir)['name'] == 'mini'


@pytest.mark.slow
def test_a_point_that_is_added_while_a_runner_runs_is_trained(
    tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}')
  train = sweeps.commands.train

  def add_and_train(*words):
    sweeps.write(tmp_path, sweeps.POINTS
                 + "  add('late', **{'optim.lr': 1.0})\n", seeds=1)
    check.save(workdir, check.check(args))
    with ledger.Ledger(workdir) as book:
      book.add([('late', 0, ())])
    return train(*words)

  monkeypatch.setattr(sweeps.commands, 'train', add_and_train)
  assert run.main(args) == 0
  assert states(workdir)['late', 0] == 'done'


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


@pytest.mark.parametrize('words', [
    ['--launcher=slurm', '--jobs=2', '--slurm=timeout_min=2'],
    ['--launcher', 'slurm', '--retry', '--slurm', 'timeout_min=2']])
def test_the_array_is_of_local_runners(words, tmp_path, monkeypatch):
  file, workdir, submitted = sweeps.write(tmp_path), tmp_path / 'w', []
  monkeypatch.setattr(slurm, 'submit', lambda *args: submitted.append(args))
  monkeypatch.setattr(sys, 'argv', [
      'sweep', 'run', file, f'--workdir={workdir}', '--match=params', *words])
  assert command.main() == 0
  (job, folder, jobs, options), = submitted
  assert job == [sys.executable, '-m', 'tools.sweep', 'run', file,
                 f'--workdir={workdir}', '--match=params']
  assert (folder, options) == (workdir / 'slurm', 'timeout_min=2')
  assert jobs == (2 if '--jobs=2' in words else 6)


@pytest.mark.parametrize('word', ['--launch=slurm', '--job=2', '--slur=a=b'])
def test_the_beginning_of_a_flag_is_no_flag(word, tmp_path, monkeypatch,
                                            capsys):
  """Each job of the array would submit an array itself."""
  monkeypatch.setattr(sys, 'argv', [
      'sweep', 'run', 'f.py', f'--workdir={tmp_path}', word])
  with pytest.raises(SystemExit):
    command.main()
  assert f'unrecognized arguments: {word}' in capsys.readouterr().err


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
  args = types.SimpleNamespace(workdir=workdir, file='', once=True, json=False)
  assert status.main(args) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = {line.split()[0]: line.split() for line in lines if line}
  assert rows['base'] == ['base', '2', 'done', '100%', '1.0000']
  assert rows['rms'] == ['rms', '2', 'done', '100%', '1.2500', '+0.2500']
  assert rows['bad'][1:4] == ['2', 'failed', '8%']
  assert '8 runs: 2 failed, 6 done' in lines
  assert 'failed: bad, seed 0: this point is bad (exit code 1)' in lines
  args.json, args.file = True, file
  assert status.main(args) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['points'][0]['held-out loss'] == '1.0000'
  assert {(r['point'], r['state']) for r in said['runs']} == {
      ('bad', 'failed'), *((p, 'done') for p in ('base', 'rms', 'swiglu'))}
  args.file = 'configs/sweeps/parts.py'
  with pytest.raises(ValueError, match='holds the sweep .*mini.py, not'):
    status.main(args)
  status._live(layout.load(workdir), workdir)  # ends, as all has ended
  text = capsys.readouterr().out
  assert '+0.2500' in text and '8 runs: 2 failed, 6 done' in text


def test_status_of_no_sweep_is_a_sentence(tmp_path):
  with pytest.raises(ValueError, match='sweep.json is missing'):
    status.main(types.SimpleNamespace(workdir=tmp_path, file='', json=True))


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
