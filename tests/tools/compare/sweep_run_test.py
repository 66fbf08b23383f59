"""Sweeps as they run: launchers, kills, failures, what others leave or add,
evaluations of several runs at once, and status."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
import types

import pytest

from tests.helpers import sweeps
from tests.helpers.sweeps import states
from tools.compare import __main__ as command
from tools.compare import check, layout, ledger, local, run, slurm, spec
from tools.compare import status, worker
from training import vectorised
from training.workdir import run_config

ROOT = pathlib.Path(__file__).parents[3]
_RUNNER = [sys.executable, '-m', 'tests.helpers.sweeps']


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
      (['--jobs=3'], '--jobs is for --launcher=slurm, and --launcher '
       'is local'),
      (['--slurm=a=b'], '--slurm is for --launcher=slurm, '),
      (['--parallel=2', '--launcher=print'], '--parallel is for --launcher=loc'
       'al or slurm, and --launcher is print'),
      (['--seeds=-1'], '--seeds is -1'),
      (['--until=tune'], '--until is of a study, and .* is none'),
      (['--workdir=gs://bucket/w'], 'gs://bucket/w')):
    with pytest.raises(ValueError, match=part):
      run.main(sweeps.arguments(file, f'--workdir={tmp_path}', *words))
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
def test_a_file_changed_under_the_sweep_is_found_out(tmp_path, monkeypatch):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  folder = layout.run_folder(workdir, 'rms', 0)
  args = sweeps.arguments(file, f'--workdir={workdir}')
  description = check.describe(args)
  other = spec.changed(layout.config(description, 'rms', 0),
                       {'optim.lr': 1.0}, 'a test')
  run_config.save(folder, other)
  monkeypatch.setattr(ledger, 'BEAT_SECONDS', 0.1)
  monkeypatch.setattr(sweeps, 'SCRIPT', sweeps.SCRIPT.replace(
      "== 'bad'", "== 'rms' and time.sleep(60)"))
  assert run.main(args) == 1
  with ledger.Ledger(workdir) as opened:
    failed, = opened.runs(ledger.FAILED)
  assert failed.point == 'rms'
  assert 'another config' in failed.error and 'optim.lr' in failed.error


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
@pytest.mark.parametrize('end', ['beats again', 'goes stale'])
def test_a_runner_waits_for_another_that_may_be_dead(
    end, tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  monkeypatch.setattr(ledger, 'STALE_SECONDS', 10_000)
  with ledger.Ledger(workdir) as book, monkeypatch.context() as elsewhere:
    elsewhere.setattr(ledger, '_host', lambda: 'elsewhere')
    book.add([('rms', 0, ())])
    elsewhere.setattr(ledger, '_now', lambda: time.time() - 1000)
    other = book.register()
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
  assert told.out.count('waiting: the runner of rms, seed 0 is silent') == 1
  if end == 'goes stale':
    assert set(states(workdir).values()) == {'done'}
  else:  # we leave, and say so
    assert states(workdir)['rms', 0] == 'running'
    assert '1 running, 2 done' in told.err
    assert 'other runners are at work: elsewhere:' in told.err


@pytest.mark.slow
def test_a_group_that_falls_lets_each_go_on_alone(
    tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file = sweeps.write(tmp_path, "  add('bad', **{'optim.lr': 1.0})\n"
                      "  add('fast', **{'optim.lr': 2e-3})\n", seeds=1)
  workdir = tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}', '--group=8')
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
  monkeypatch.setattr(layout, 'group_command', lambda workdir, runs, tasks: [
      '-c', TOGETHER, str(worker.UNFINISHED),
      *(str(layout.run_folder(workdir, *each)) for each in runs)])
  file = sweeps.write(tmp_path, "  add('bad', **{'optim.lr': 1.0})\n", seeds=2)
  workdir = tmp_path / 'w'
  args = sweeps.arguments(file, f'--workdir={workdir}', '--group=8')
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


@pytest.mark.long
def test_a_task_that_is_added_is_not_lost(tmp_path, monkeypatch):
  """While a run trains, while it evaluates, and once it is done."""
  sweeps.fake(monkeypatch)
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  evaluated = lambda: {
      point: layout.is_evaluated(layout.run_folder(workdir, point, 0), tasks)
      for point in ('base', 'rms', 'swiglu')}

  def adding(name, task):
    of = getattr(layout, name)
    def act(*words):
      with ledger.Ledger(workdir) as book:
        book.add((p, 0, task) for p in ('base', 'rms', 'swiglu'))
      return of(*words)
    monkeypatch.setattr(layout, name, act)

  tasks = ['loss', 'extrapolation']
  adding('train_command', ['loss'])
  adding('evaluate_command', tasks)
  assert run.main(sweeps.arguments(file, f'--workdir={workdir}')) == 0
  assert evaluated() == dict.fromkeys(evaluated(), True)
  assert set(states(workdir).values()) == {'done'}
  # A runner of an earlier version settled it as done, its task left behind.
  (layout.run_folder(workdir, 'rms', 0) / 'eval.json').unlink()
  with ledger.Ledger(workdir) as book:
    local.enter(workdir, book)
  assert states(workdir) == {
      ('base', 0): 'done', ('rms', 0): 'pending', ('swiglu', 0): 'done'}


def test_the_array_is_of_local_runners(tmp_path, monkeypatch):
  file, workdir, submitted = sweeps.write(tmp_path), tmp_path / 'w', []
  monkeypatch.setattr(slurm, 'submit', lambda *args: submitted.append(args))
  monkeypatch.setattr(sys, 'argv', [
      'sweep', 'run', file, f'--workdir={workdir}', '--match=params',
      '--launcher', 'slurm', '--retry', '--slurm=timeout_min=2'])
  assert command.main() == 0
  (jobs, folder, options, _), = submitted
  assert jobs == 6 * [[sys.executable, '-m', 'tools.compare', 'run', file,
                       f'--workdir={workdir}', '--match=params']]
  assert (folder, options) == (workdir / 'slurm', 'timeout_min=2')


def test_slurm_runs_the_runner_as_an_array(tmp_path):
  pytest.importorskip('submitit')
  words = [sys.executable, '-c', f'open({str(tmp_path / "mark")!r}, "a")'
           '.write("x")']
  jobs = slurm.submit(
      2 * [words], tmp_path / 'slurm', 'timeout_min=2', 'x', 'local')
  assert [job.result() for job in jobs] == [0, 0]
  assert (tmp_path / 'mark').read_text() == 'xx'
  for options, told in (
      ('partition', '--slurm has .partition'),
      ('gpus=1', '--launcher=slurm: .*gpus'),
      ('timeout_min=long', '--launcher=slurm: .*timeout_min'),
      ('slurm_signal_delay_s=10', 'slurm_signal_delay_s=10: ')):
    with pytest.raises(ValueError, match=told):
      slurm.submit([words], tmp_path, options, 'x', 'local')


@pytest.mark.slow
def test_a_job_out_of_time_saves_before_it_is_queued_again(tmp_path):
  """By submitit's own signal, handler and queue, without SLURM. The signal
  comes as soon as the command hears SIGTERM, and it takes some time to save."""
  pytest.importorskip('submitit')
  saved = tmp_path / 'saved'
  jobs = slurm.submit([[sys.executable, '-c', f"""
import os, pathlib, signal, sys, time
saved = pathlib.Path({str(saved)!r})
if saved.exists():
  sys.exit(7)  # the second time it goes on, to its end
def save(number, frame):
  time.sleep(0.5)
  saved.touch()
  sys.exit()
signal.signal(signal.SIGTERM, save)
os.kill(os.getppid(), signal.SIGUSR2)
time.sleep(60)
"""]], tmp_path / 'slurm', 'timeout_min=2', 'x', 'local')
  assert jobs[0].result() == 7 and saved.exists()


@pytest.mark.slow
def test_a_sweep_that_nobody_reads_stops_as_by_sigterm(tmp_path):
  """Behind `| head`."""
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-0').touch()
  runner = subprocess.Popen([*_RUNNER, file, f'--workdir={workdir}'], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert b'training' in runner.stdout.readline()
  runner.stdout.close()
  (workdir / 'hold-seed-0').unlink()  # one ends, and this is printed
  assert runner.wait(60) == 0, runner.stderr.read()
  assert sorted(states(workdir).values()) == ['done', 'pending', 'pending']
  runner.stderr.close()


@pytest.mark.slow
def test_status_tells_states_losses_and_errors(tmp_path, monkeypatch, capsys):
  sweeps.fake(monkeypatch)
  file = sweeps.write(tmp_path, sweeps.POINTS
                      + "  add('bad', **{'optim.lr': 1.0})\n", seeds=3)
  workdir = tmp_path / 'w'
  run.main(sweeps.arguments(file, f'--workdir={workdir}'))
  capsys.readouterr()
  path = layout.run_folder(workdir, 'rms', 1) / 'metrics.jsonl'
  path.write_text(path.read_text().replace('"eval", "loss": 1.0',
                                           '"eval", "loss": 1.5') + '{"st')
  args = types.SimpleNamespace(
      where='', workdir=str(workdir), once=True, json=False)
  assert status.main(args) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = {line.split()[0]: line.split() for line in lines if line}
  assert rows['base'] == ['base', '3', 'done', '100%', '1.0000']
  assert rows['rms'] == ['rms', '3', 'done', '100%', '1.1667', '+0.1667',
                         '0.8453']
  assert rows['bad'][1:4] == ['3', 'failed', '8%']
  assert '12 runs: 3 failed, 9 done' in lines
  assert 'failed: bad, seed 0: this point is bad (exit code 1)' in lines
  args.json = True
  assert status.main(args) == 0
  said = json.loads(capsys.readouterr().out)
  assert said['points'][0]['held-out loss'] == '1.0000'
  assert {(r['point'], r['state']) for r in said['runs']} == {
      ('bad', 'failed'), *((p, 'done') for p in ('base', 'rms', 'swiglu'))}
  # It ends, as all has ended.
  with ledger.Ledger(workdir) as book:
    status._live(layout.load_description(workdir), workdir, book)
  text = capsys.readouterr().out
  assert '+0.1667' in text and '12 runs: 3 failed, 9 done' in text
  with pytest.raises(ValueError, match='sweep.json is missing'):
    status.main(types.SimpleNamespace(where=str(tmp_path), workdir='', json=1))


# What a group of runs leaves: argv holds their folders.
TRAINED = '''
import pathlib, sys
for folder in map(pathlib.Path, sys.argv[1:]):
  (folder / 'checkpoints/12').mkdir(parents=True)
  (folder / 'metrics.jsonl').write_text(
      '{"step": 12, "split": "train", "loss": 1.0, '
      '"bad_in_row": 0}\\n')
'''
# Evaluates all but a point `bad`, and ends as argv says.
EVALUATED = '''
import json, pathlib, sys
code, tasks, *folders = sys.argv[1:]
for folder in map(pathlib.Path, folders):
  if folder.parent.name == 'bad':
    with (folder / 'log.txt').open('a') as log:
      print('error: this task is not for it', file=log)
  else:
    (folder / 'eval.json').write_text(
        json.dumps(dict.fromkeys(tasks.split(','), 1)))
sys.exit(int(code))
'''


@pytest.fixture
def asked(monkeypatch):
  """Fakes trainings and evaluations; holds the names of what was asked for
  together, and `code`, how that ends."""
  sweeps.fake(monkeypatch)
  told = dict(names=[], code=0)

  def together(workdir, names, tasks=''):
    folders = [str(layout.run_folder(workdir, *name)) for name in names]
    if not tasks:
      return ['-c', TRAINED, *folders]
    told['names'].append(names)
    return ['-c', EVALUATED, str(told['code']), tasks, *folders]

  monkeypatch.setattr(layout, 'group_command', together)
  return told


def _run(tmp_path, points, code):
  file = sweeps.write(tmp_path, points, tasks=('loss',))
  workdir = tmp_path / 'w'
  assert run.main(sweeps.arguments(
      file, f'--workdir={workdir}', '--group=8')) == code
  return workdir


@pytest.mark.slow
def test_what_a_group_owes_is_evaluated_in_one_process(asked, tmp_path):
  workdir = _run(tmp_path, "  add('fast', **{'optim.lr': 2e-3})\n", 0)
  assert set(states(workdir).values()) == {'done'}
  names, = asked['names']  # one process, after all have trained
  assert set(names) == set(states(workdir))


@pytest.mark.slow
def test_one_that_cannot_be_evaluated_fails_alone(asked, tmp_path, capsys):
  asked['code'] = worker.UNFINISHED
  workdir = _run(tmp_path, "  add('bad', **{'optim.lr': 2e-3})\n", 1)
  assert states(workdir) == {('base', s): 'done' for s in (0, 1)} | {
      ('bad', s): 'failed' for s in (0, 1)}
  assert len(asked['names']) == 1
  assert 'this task is not for it' in capsys.readouterr().err


@pytest.mark.slow
def test_when_the_process_falls_each_is_evaluated_alone(asked, tmp_path):
  """What it had done is done; the others go on, by eval.py."""
  asked['code'] = 1
  workdir = _run(tmp_path, "  add('bad', **{'optim.lr': 2e-3})\n", 0)
  assert set(states(workdir).values()) == {'done'}
  assert len(asked['names']) == 1
  with ledger.Ledger(workdir) as book:
    assert {r.point for r in book.runs() if r.alone} == {'bad'}


@pytest.mark.long
def test_a_sweep_of_real_runs(tmp_path):
  """Trained alone and as a group, evaluated, and with paired seeds."""
  file = sweeps.write(tmp_path, "  add('slow', **{'optim.lr': 1e-4})\n",
                      seeds=1, tasks=('loss',))
  for name, flag in (('alone', '--group=1'), ('group', '--group=8')):
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
