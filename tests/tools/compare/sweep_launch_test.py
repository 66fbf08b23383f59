"""Launchers of a sweep, its status, and a small one that really trains."""

import json
import os
import pathlib
import pickle
import shlex
import signal
import subprocess
import sys
import types

import pytest

from configs.errors import RequestError
from tests.helpers import sweep_folder, sweeps, terminals
from tests.helpers.sweeps import states
from tools.compare import slurm_array
from tools import sweep as command
from tools.compare import layout, run, status
from tools.compare import ledger as ledger_lib
from tools.compare import local, slurm
from tools.compare import curves, sweep_report

ROOT = pathlib.Path(__file__).parents[3]


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
  delayed = slurm_array.Work(words).checkpoint()
  assert isinstance(delayed, submitit.helpers.DelayedSubmission)
  with pytest.raises(ValueError, match='--slurm has .partition'):
    slurm.submit(words, tmp_path, 1, 'partition', 'local')
  for options, words in (('gpus=1', 'gpus'),
                         ('timeout_min=long', 'timeout_min.* type .*int')):
    with pytest.raises(ValueError, match=f'--launcher=slurm: .*{words}'):
      slurm.submit(words, tmp_path, 1, options, 'local')


@pytest.mark.slow
def test_a_job_out_of_time_saves_before_it_is_queued_again(tmp_path):
  """By submitit's own signal, handler and queue, without SLURM. The signal
  comes as soon as the command hears SIGTERM, and it takes some time to save."""
  pytest.importorskip('submitit')
  saved = tmp_path / 'saved'
  jobs = slurm.submit([sys.executable, '-c', f"""
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
"""], tmp_path / 'slurm', 1, 'timeout_min=2', 'local')
  assert jobs[0].result() == 7 and saved.exists()


def test_a_command_may_save_until_submitit_must_queue_its_job(tmp_path):
  pytest.importorskip('submitit')
  assert slurm_array.Work([])._save_seconds == 80
  job, = slurm.submit(['true'], tmp_path, 1,
                      'timeout_min=2,slurm_signal_delay_s=600', 'local')
  work = job.submission().function
  assert job.result() == 0 and work._save_seconds == 590
  assert work.checkpoint().function._save_seconds == 590


@pytest.mark.parametrize('delay', ['10', 'long', 'True'])
def test_no_time_to_save_is_refused(delay, tmp_path):
  pytest.importorskip('submitit')
  with pytest.raises(RequestError, match=f'slurm_signal_delay_s={delay}: '):
    slurm.submit(['true'], tmp_path, 1, f'slurm_signal_delay_s={delay}',
                 'local')


def test_a_command_that_does_not_save_in_time_is_killed():
  pytest.importorskip('submitit')
  work, queued = slurm_array.Work([sys.executable, '-c', """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.kill(os.getppid(), signal.SIGUSR2)
time.sleep(60)
"""], save_seconds=0.3), []
  before = signal.signal(
      signal.SIGUSR2, lambda *_: queued.append(work.checkpoint()))
  try:
    assert work() == -signal.SIGKILL
  finally:
    signal.signal(signal.SIGUSR2, before)
  assert len(pickle.dumps(queued)) > 0  # and not what runs


@pytest.mark.long
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


def test_status_corrects_p_as_the_report_does(tmp_path):
  sweep_folder.write(tmp_path, sweep_folder.POINTS)
  description = layout.load_description(tmp_path)
  with ledger_lib.Ledger(tmp_path) as ledger:
    said = status.figures(description, tmp_path, ledger.runs())
  report = sweep_report.as_json(curves.load_sweep(tmp_path))
  for point, row in zip(said['points'], report['points'], strict=True):
    assert point['point'] == row['variant']
    assert point['corrected p'] == (
        '' if row['p_holm'] is None else f'{row["p_holm"]:.2g}')


_RUNNER = [sys.executable, '-m', 'tests.helpers.sweeps']


@pytest.mark.slow
def test_a_sweep_whose_terminal_is_closed_stops_as_by_sigterm(tmp_path):
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-0').touch()
  assert terminals.run_until_closed(
      [*_RUNNER, file, f'--workdir={workdir}'], 'training') == 0
  assert set(states(workdir).values()) == {'pending'}


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, signal.SIGINT])
def test_a_sweep_that_nobody_reads_stops_likewise(number, tmp_path):
  """Behind `| head`; or `| tee`, which Ctrl-C and SIGHUP end too."""
  file, workdir = sweeps.write(tmp_path, seeds=1), tmp_path / 'w'
  workdir.mkdir()
  (workdir / 'hold-seed-0').touch()
  runner = subprocess.Popen([*_RUNNER, file, f'--workdir={workdir}'], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert b'training' in runner.stdout.readline()
  runner.stdout.close()
  if number:
    runner.send_signal(number)
  else:
    (workdir / 'hold-seed-0').unlink()  # one ends, and this is printed
  assert runner.wait(60) == 0, runner.stderr.read()
  ended = list(states(workdir).values())
  assert sorted(ended) == [*(['done'] if not number else ['pending']),
                           'pending', 'pending']
  runner.stderr.close()


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
  # It ends, as all has ended.
  status._live(layout.load_description(workdir), workdir)
  text = capsys.readouterr().out
  assert '+0.2500' in text and '8 runs: 2 failed, 6 done' in text


def test_status_of_no_sweep_is_a_sentence(tmp_path):
  with pytest.raises(ValueError, match='sweep.json is missing'):
    status.main(types.SimpleNamespace(workdir=tmp_path, file='', json=True))


@pytest.mark.long
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
