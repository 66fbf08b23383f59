"""The launchers: what they refuse, print, and start here."""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from configs.errors import EnvironmentFailure, RequestError
from tests.helpers import forked, terminals
from tests.helpers.launching import args_of, is_running, maker, starts, wait_for
from tools.launch import job, local, programs, slurm, tpu_vm

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(name='a_job')
def _a_job(tmp_path):
  return maker(tmp_path)


# The extra `test` installs it beside Python.
SHELLCHECK = pathlib.Path(sys.executable).with_name('shellcheck')


@pytest.mark.parametrize('module, words', [
    (slurm, ['--per_gpu', '--setup=. .venv/bin/activate']),
    (slurm, ['--cpus_per_task=4', '--gpus=0']),
    (tpu_vm, ['--tpu=a,b', "--folder=a b'"])])
def test_scripts_pass_shellcheck(a_job, tmp_path, module, words):
  path = tmp_path / 'script.sh'
  path.write_text(module.script(a_job('0', 'gs://b/run' if module is tpu_vm
                                      else None), args_of(module, *words)))
  result = subprocess.run([SHELLCHECK, path], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('module, words, part', [
    (local, ['--processes=2', '--platform=cpu'], 'JAX_PROCESS_ID=1'),
    (slurm, ['--nodes=2'], '#SBATCH --nodes=2'),
    (tpu_vm, ['--tpu=a', '--zone=z'], 'gcloud compute tpus')])
def test_a_dry_run_only_prints(a_job, tmp_path, monkeypatch, capsys, module,
                               words, part):
  j = a_job('0', 'gs://b/run', dry_run=True,
            env={'JAX_COMPILATION_CACHE_DIR': 'gs://b/jax_cache'})
  there = sorted(tmp_path.rglob('*'))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(subprocess, 'Popen', None)
  monkeypatch.setattr(os, 'execvp', None)
  assert module.launch(j, args_of(module, *words)) == 0
  assert part in capsys.readouterr().out
  assert sorted(tmp_path.rglob('*')) == there


# Here.


@pytest.mark.parametrize('codes, code, count', [
    ('0', 0, 1),
    ('75 75 75 0', 0, 4),  # preempted: as often as it takes
    ('1 0', 0, 2),
    ('1 1 0', 1, 2),  # max_restarts=1
    ('2 0', 2, 1),
])
def test_local_starts_again_by_exit_code(a_job, tmp_path, codes, code, count):
  j = a_job(codes)
  assert local.supervise(list(j.words), j.env, 2, 3, 'cpu', j.logs,
                         j.max_restarts) == code
  assert len(starts(tmp_path)) == len(starts(tmp_path, '0-1')) == count
  envs = starts(tmp_path)[-1], starts(tmp_path, '0-1')[-1]
  assert [e['JAX_PROCESS_ID'] for e in envs] == ['0', '1']
  assert envs[0]['JAX_COORDINATOR_ADDRESS'] == envs[1][
      'JAX_COORDINATOR_ADDRESS']
  assert envs[0]['JAX_NUM_PROCESSES'] == '2'
  assert envs[0]['JAX_COMPILATION_CACHE_DIR'].endswith('a cache')
  assert 'device_count=3' in envs[1]['XLA_FLAGS']
  assert envs[1]['XLA_FLAGS'].count('device_count') == 1
  log = (tmp_path / 'run/logs/process-1.log').read_text()
  assert log.count('output of 1') == count


def test_local_ends_those_who_wait_for_one_that_failed(a_job, tmp_path,
                                                       monkeypatch, capfd):
  monkeypatch.setattr(local, 'PATIENCE_SECONDS', 0.5)
  j = a_job('wait')
  program = tmp_path / 'program.py'
  program.write_text('import os, sys\nif os.environ["JAX_PROCESS_ID"] == "1":\n'
                     '  sys.exit(1)\n' + program.read_text())
  assert local.supervise(list(j.words), j.env, 2, 1, 'cpu', j.logs, 0) == 1
  said = capfd.readouterr().err
  assert 'process 0 was killed by SIGKILL' in said
  assert 'process 1 ended with exit code 1; its output:' in said
  assert 'failed 1 times (--max_restarts=0): giving up' in said


def started(j, processes):
  """Returns a launcher as a process of its own."""
  code = textwrap.dedent(f'''
      import sys
      from tools.launch import local
      sys.exit(local.supervise({list(j.words)!r}, {{}}, {processes}, 1, 'cpu',
                               {j.logs!r}, 1))''')
  return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)


def test_a_local_launcher_that_is_killed_leaves_no_process(a_job, tmp_path):
  launcher = started(a_job('wait wait'), 2)
  for who in ('0-0', '0-1'):
    wait_for(tmp_path / f'starts-{who}')
  pids = [starts(tmp_path, who)[0]['pid'] for who in ('0-0', '0-1')]
  assert all(map(is_running, pids))
  launcher.kill()
  launcher.wait()
  until = time.monotonic() + 60
  while any(map(is_running, pids)) and time.monotonic() < until:
    time.sleep(0.05)
  assert not any(map(is_running, pids))


def test_local_passes_a_signal_on_once_and_does_not_start_again(a_job,
                                                                tmp_path):
  launcher = started(a_job('wait wait'), 1)
  wait_for(tmp_path / 'starts-0-0')
  launcher.send_signal(signal.SIGINT)
  assert launcher.wait(60) == 0
  assert len(starts(tmp_path)) == 1


@pytest.mark.slow
def test_a_local_run_whose_terminal_is_closed_is_saved(tmp_path):
  """Its first process prints to the terminal too."""
  saved, logs = tmp_path / 'saved', str(tmp_path / 'logs')
  run = textwrap.dedent(f"""
      import sys, time
      from training.distributed import signals
      with signals.Stop() as stop:
        print('ready', flush=True)
        while not stop.agreed(1):
          time.sleep(0.01)
        print('saving', flush=True)
        open({str(saved)!r}, 'w').close()
        sys.exit({job.STOPPED})""")
  launcher = textwrap.dedent(f"""
      import sys
      from tools.launch import local
      code = local.supervise([sys.executable, '-c', {run!r}], {{}}, 1, 1, 'cpu',
                             {logs!r}, 0)
      print('ended', flush=True)
      sys.exit(code)""")
  assert terminals.run_until_closed(
      [sys.executable, '-c', launcher], 'ready') == 0
  assert saved.exists()


@pytest.mark.parametrize('when', ['between', 'starting'])
def test_local_loses_no_signal(a_job, tmp_path, monkeypatch, when):
  """That comes when no process is there to pass it on to."""
  j = a_job('75 0' if when == 'between' else 'wait wait')
  popen, say = subprocess.Popen, local._say
  def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
  def start(*args, **options):
    process = popen(*args, **options)
    wait_for(tmp_path / 'starts-0-0')
    interrupt()
    return process
  if when == 'starting':
    monkeypatch.setattr(local.subprocess, 'Popen', start)
  else:
    monkeypatch.setattr(local, '_say', lambda text: (say(text), interrupt()))
  assert local.supervise(list(j.words), j.env, 1, 1, 'cpu', j.logs, 1) == 0
  assert len(starts(tmp_path)) == 1


def test_local_gives_each_process_its_gpus():
  envs = local.environments({}, 2, 2, 'gpu', 'host:1')
  assert [e['JAX_LOCAL_DEVICE_IDS'] for e in envs] == ['0,1', '2,3']
  assert not any('CUDA_VISIBLE_DEVICES' in e for e in envs)


def test_local_gives_a_single_process_its_gpus(monkeypatch):
  """Without a coordinator JAX does not read JAX_LOCAL_DEVICE_IDS."""
  for outer, own, expected in ((None, None, '0,1'), ('4,GPU-a,6', None,
                                                     '4,GPU-a'),
                               ('4,5,6', '7,8,9', '7,8'), ('', None, '')):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if outer is not None:
      monkeypatch.setenv('CUDA_VISIBLE_DEVICES', outer)
    env = {} if own is None else {'CUDA_VISIBLE_DEVICES': own}
    assert local.environments(env, 1, 2, 'gpu', 'host:1') == [
        {'CUDA_VISIBLE_DEVICES': expected, 'ARCHETYPE_DEVICES': '2'}]


# Before anything is started.


@pytest.mark.parametrize('one, other', [
    ('gs://alice/runs/a', 'gs://bob/runs/a'), ('/alice/runs/a', 'runs/a'),
    ('gs://b/a.b', 'gs://b/a-b'), ('gs://b/' + 60 * 'a', 'gs://b/' + 61 * 'a')])
def test_two_workdirs_have_two_names(one, other):
  names = [job.named(one), job.named(other)]
  assert names[0] != names[1] and names[0] == job.named(one + '/')
  # Pods are named NAME-slice-0-0-12345, in 63 characters.
  assert all(re.fullmatch('[a-z][a-z0-9-]{,39}', name) for name in names)


@pytest.mark.parametrize('env, told', [
    ('A', "--env is 'A': write NAME=VALUE"), ('a b=c', 'write NAME=VALUE'),
    ('JAX_PROCESS_ID=0', 'JAX_PROCESS_ID, which the launcher sets itself'),
    ('JAX_COMPILATION_CACHE_DIR=x', 'use --compile_cache')])
def test_an_environment_that_is_none_is_refused(env, told):
  with pytest.raises(ValueError, match=told):
    job.environment(args_of(local, f'--env={env}'), '')
  args = args_of(local, '--env=A=b=c', '--env=D=')
  assert {'A': 'b=c', 'D': ''}.items() <= job.environment(args, '').items()


@pytest.mark.parametrize('module, words, parts', [
    (slurm, ['--nodes=0'], ['--nodes is 0']),
    (slurm, ['--gpus=0', '--per_gpu'], ['--per_gpu', '--gpus is 0']),
    (slurm, ['--cpus_per_task=-1'], ['--cpus_per_task is -1']),
    (slurm, ['--grace_seconds=100000'], ['--grace_seconds is 100000', '65535']),
    (tpu_vm, ['--tpu=a'], ['--zone']),
    (local, ['--devices=0'], ['--devices is 0']),
])
def test_what_no_place_has_is_refused(module, words, parts):
  with pytest.raises(ValueError) as error:
    module.size(args_of(module, *words))
  assert all(part in str(error.value) for part in parts), error.value


def launch(*words, code=0):
  result = forked.run('-m', 'tools.launch', *words)
  assert result.returncode == code, result.stderr
  return result


@pytest.mark.slow
def test_the_command_line(tmp_path):
  (tmp_path / 'flags').write_text('--config.seed\n3\n--devices=4\n')
  dry = launch('local', '--processes', '2', '--config', 'configs/gpt.py',
               '--workdir', f'{tmp_path}/run', '--dry_run',
               f'--flagfile={tmp_path}/flags', '--config.optim.lr', '3e-4',
               '--config.data.batch_size=8', '--noconfig.model.tie_embeddings',
               '--allow_config_change').stdout
  assert ('--config.seed=3 --config.optim.lr=3e-4 --config.data.batch_size=8 '
          '--config.model.tie_embeddings=False --allow_config_change ' in dry)
  assert '--processes' not in dry and len(dry.splitlines()) == 2
  assert not (tmp_path / 'run').exists()
  error = launch('slurm', '--config=configs/gpt.py', '--nodes=4', '--dry_run',
                 f'--workdir={tmp_path}/x', '--config.mesh.fsdp=3',
                 code=2).stderr
  assert 'mesh.fsdp=3' in error and '32 devices' in error
  error = launch('slurm', '--config=configs/gpt.py', f'--workdir={tmp_path}/x',
                 '--profile_steps=5:2', '--dry_run', code=2).stderr
  assert "--profile_steps is '5:2', which holds no step" in error
  assert "choose from local" in launch('moon', code=2).stderr


@pytest.mark.parametrize('module, words', [
    (slurm, []), (tpu_vm, ['--tpu=a', '--zone=b'])])
def test_a_cluster_whose_programs_are_missing(a_job, tmp_path, monkeypatch,
                                              module, words):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  job = a_job('0', 'gs://b/run' if module is not slurm else None)
  with pytest.raises(RequestError, match='is not on the PATH .*--dry_run'):
    module.launch(dataclasses.replace(job, env={
        'JAX_COMPILATION_CACHE_DIR': 'gs://b/cache'}),
                  args_of(module, *words))
  assert not list(tmp_path.glob('logs/*'))


def test_what_a_cluster_refuses_is_the_environments_failure():
  with pytest.raises(EnvironmentFailure, match='^sh ended .* code 3: no, a$'):
    programs.ask(['sh', '-c', 'echo no, $(cat) >&2; exit 3'], 'a')
  assert programs.ask(['cat'], 'a') == 'a'
