"""The launchers: what they refuse, print, and start, here and on stand-ins for
the programs of a cluster."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from common.errors import RequestError
from tests.helpers import forked, terminals
from tests.helpers.launching import args_of, hostile_job, is_running, make_job
from tests.helpers.launching import stand_in, starts, wait_for
from tools.launch import job, local, slurm, tpu_vm

ROOT = pathlib.Path(__file__).parents[3]
# The extra `test` installs it beside Python.
SHELLCHECK = pathlib.Path(sys.executable).with_name('shellcheck')


def test_scripts_pass_shellcheck():
  subprocess.run([SHELLCHECK, slurm.SCRIPT, tpu_vm.SCRIPT], check=True)


# Here.


def supervise(j, processes=2, devices=1):
  return local.run_until_complete(
      list(j.words), j.env, processes, devices, 'cpu', j.logs, j.max_restarts)


@pytest.mark.parametrize('codes, code, count', [
    ('75 75 75 0', 0, 4),  # preempted: as often as it takes
    ('1 0', 0, 2),
    ('1 1 0', 1, 2),  # max_restarts=1
    ('2 0', 2, 1),
])
def test_local_starts_again_by_exit_code(tmp_path, codes, code, count):
  assert supervise(make_job(tmp_path, codes), devices=3) == code
  assert len(starts(tmp_path)) == len(starts(tmp_path, '0-1')) == count
  envs = starts(tmp_path)[-1], starts(tmp_path, '0-1')[-1]
  assert [e['JAX_PROCESS_ID'] for e in envs] == ['0', '1']
  assert envs[0]['JAX_COORDINATOR_ADDRESS'] == envs[1][
      'JAX_COORDINATOR_ADDRESS']
  assert envs[0]['JAX_NUM_PROCESSES'] == '2'
  assert envs[0]['JAX_COMPILATION_CACHE_DIR'].endswith('a cache')
  assert re.findall(r'device_count=(\d)', envs[1]['XLA_FLAGS'])[-1] == '3'
  log = (tmp_path / 'run/logs/process-1.log').read_text()
  assert log.count('output of 1') == count


@pytest.mark.parametrize('variable, flag, platform', [
    ('', '', 'cpu'), ('', 'gpu', 'gpu'), ('', 'cpu', 'cpu'),
    ('cpu', '', 'cpu'), ('cuda', '', 'gpu'), ('cuda', 'cpu', 'cpu'),
    ('cpu', 'gpu', 'gpu')])
def test_local_runs_on_the_platform_that_is_asked_for(
    variable, flag, platform, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('JAX_PLATFORMS', variable)
  monkeypatch.setattr(local.os.path, 'exists', lambda path: False)
  words = ['--processes=2', '--devices=3', f'--platform={flag}']
  job_of_two = make_job(tmp_path, '0', dry_run=True)
  assert local.launch(job_of_two, args_of(local, *words)) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2
  for i, line in enumerate(lines):
    assert f'JAX_PROCESS_ID={i} ' in line
    assert ('JAX_PLATFORMS=cpu ' in line) == (platform == 'cpu')
    ids = ','.join(str(3 * i + n) for n in range(3))
    assert (f'JAX_LOCAL_DEVICE_IDS={ids} ' in line) == (platform == 'gpu')


def test_local_ends_those_who_wait_for_one_that_failed(tmp_path, monkeypatch,
                                                       capfd):
  monkeypatch.setattr(local, 'PATIENCE_SECONDS', 0.5)
  j = make_job(tmp_path, 'wait', max_restarts=0)
  program = tmp_path / 'program.py'
  program.write_text('import os, sys\nif os.environ["JAX_PROCESS_ID"] == "1":\n'
                     '  sys.exit(1)\n' + program.read_text())
  assert supervise(j) == 1
  stderr = capfd.readouterr().err
  assert 'process 1 ended with exit code 1; its output:' in stderr
  assert 'process 0 did not end by itself then, and was killed' in stderr
  assert 'failed 1 times (--max_restarts=0): giving up' in stderr


def test_local_names_a_process_that_is_stopped(tmp_path, monkeypatch, capfd):
  """The others fail for want of it, and it is no less at fault."""
  monkeypatch.setattr(local, 'PATIENCE_SECONDS', 0.5)
  j = make_job(tmp_path, '1', max_restarts=0)
  program = tmp_path / 'program.py'
  program.write_text('import os, signal, time\n'
                     'if os.environ["JAX_PROCESS_ID"] == "1":\n'
                     '  os.kill(os.getpid(), signal.SIGSTOP)\n'
                     'time.sleep(1)\n' + program.read_text())
  assert supervise(j) == 1
  first, second, third = capfd.readouterr().err.splitlines()[:3]
  assert 'process 1 is stopped, as by SIGSTOP: the others wait' in first
  assert 'process 0 ended with exit code 1' in second
  assert 'process 1 did not end by itself then, and was killed' in third


def started(j, processes):
  """Returns a launcher as a process of its own."""
  code = textwrap.dedent(f'''
      import sys
      from tools.launch import local
      sys.exit(local.run_until_complete(
          {list(j.words)!r}, {{}}, {processes}, 1, 'cpu', {j.logs!r}, 1))''')
  return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)


def test_a_local_launcher_that_is_killed_leaves_no_process(tmp_path):
  launcher = started(make_job(tmp_path, 'wait wait'), 2)
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


def test_local_passes_a_signal_on_once_and_does_not_start_again(tmp_path):
  launcher = started(make_job(tmp_path, 'wait wait'), 1)
  wait_for(tmp_path / 'starts-0-0')
  launcher.send_signal(signal.SIGINT)
  assert launcher.wait(60) == job.STOPPED
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
        while not stop.should_stop(1):
          time.sleep(0.01)
        print('saving', flush=True)
        open({str(saved)!r}, 'w').close()
        sys.exit({job.STOPPED})""")
  launcher = textwrap.dedent(f"""
      import sys
      from tools.launch import local
      code = local.run_until_complete(
          [sys.executable, '-c', {run!r}], {{}}, 1, 1, 'cpu', {logs!r}, 0)
      print('ended', flush=True)
      sys.exit(code)""")
  assert terminals.run_until_closed(
      [sys.executable, '-c', launcher], 'ready') == job.STOPPED
  assert saved.exists()


def test_local_loses_no_signal_between_two_starts(tmp_path, monkeypatch):
  say = local._print_line
  monkeypatch.setattr(local, '_print_line', lambda text: (
      say(text), os.kill(os.getpid(), signal.SIGINT)))
  assert supervise(make_job(tmp_path, '75 0'), 1) == job.STOPPED
  assert len(starts(tmp_path)) == 1


def test_local_gives_each_process_its_gpus(monkeypatch):
  """Without a coordinator JAX does not read JAX_LOCAL_DEVICE_IDS."""
  envs = local.environments_of_processes({}, 2, 2, 'gpu', 'host:1')
  assert [e['JAX_LOCAL_DEVICE_IDS'] for e in envs] == ['0,1', '2,3']
  for outer, expected in ((None, '0,1'), ('4,GPU-a,6', '4,GPU-a')):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if outer is not None:
      monkeypatch.setenv('CUDA_VISIBLE_DEVICES', outer)
    [env] = local.environments_of_processes({}, 1, 2, 'gpu', 'host:1')
    assert env['CUDA_VISIBLE_DEVICES'] == expected


# On SLURM: the batch script runs as on a node, on stand-ins.


SRUN = '''\
    #!{python}
    import os, re, subprocess, sys
    words = sys.argv[1:]
    output = next(w for w in words if w.startswith('--output='))[9:]
    command = words[[w.startswith('--') for w in words].index(False):]
    def log(i):
      return re.sub('%(.)', lambda m: {{'t': str(i), '%': '%'}}[m[1]], output)
    running = [subprocess.Popen(
        command, stdout=open(log(i), 'ab'),
        env=os.environ | {{'SLURM_PROCID': str(i),
                           'SLURM_LOCALID': str(i % 2)}})
        for i in range(int(os.environ['JAX_NUM_PROCESSES']))]
    with open(os.environ['PIDS'], 'w') as file:
      print(*(p.pid for p in running), file=file)
    sys.exit(max(p.wait() for p in running))
    '''


@pytest.fixture(name='slurm_job')
def _slurm_job(tmp_path):
  """Returns a function that runs slurm.sh with the words of sbatch."""
  env = stand_in(tmp_path, 'srun', SRUN.format(python=sys.executable))
  env |= stand_in(tmp_path, 'scontrol', f'''\
      #!/bin/bash
      if [ "$1" = show ]; then printf 'node-7\\nnode-8\\n'
      else echo "$@" >>{tmp_path}/scontrol; fi
      ''')
  def start(j, *words):
    command = slurm.command_to_launch(j, args_of(slurm, *words))
    return subprocess.Popen(
        ['bash', *command[command.index(str(slurm.SCRIPT)):]], text=True,
        stdout=subprocess.PIPE, env=os.environ | env | {
            'PIDS': str(tmp_path / 'pids'), 'SLURM_JOB_ID': '4100',
            'SLURM_JOB_NODELIST': 'node-[7-8]'})
  return start


def requeued(folder):
  path = folder / 'scontrol'
  return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize('per_gpu', [False, True])
def test_slurm_tells_each_process_who_it_is(slurm_job, tmp_path, per_gpu):
  process = slurm_job(make_job(tmp_path, '0'), '--nodes=2', '--gpus=2',
                      *['--per_gpu'] * per_gpu, "--setup=export JAX_X='a b'")
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and 'complete' in out
  count = 4 if per_gpu else 2
  for i in range(count):
    [env] = starts(tmp_path, f'0-{i}')
    assert env['JAX_COORDINATOR_ADDRESS'] == 'node-7:61100'
    assert env['JAX_NUM_PROCESSES'] == str(count)
    assert env['JAX_PROCESS_ID'] == str(i) and env['JAX_X'] == 'a b'
    assert env.get('JAX_LOCAL_DEVICE_IDS') == (str(i % 2) if per_gpu else None)
    log = tmp_path / f'run/logs/process-{i}.log'
    assert log.read_text() == f'output of {i}\n'
  assert not requeued(tmp_path)


def test_what_sbatch_is_told(tmp_path):
  j = make_job(tmp_path, '0', logs=f'{tmp_path}/a b%j')
  words = slurm.command_to_launch(j, args_of(
      slurm, '--nodes=2', '--gpus=4', '--per_gpu', '--cpus_per_task=12',
      "--sbatch=--comment='two words' --mem=0"))
  assert words[:words.index(str(slurm.SCRIPT))] == [
      'sbatch', '--parsable', '--comment=two words', '--mem=0',
      '--job-name=a-run', '--nodes=2', '--ntasks-per-node=4',
      '--signal=TERM@300', '--requeue', '--open-mode=append',
      f'--output={tmp_path}/a b%%j/job.log', '--cpus-per-task=12',
      '--gpus-per-node=4']


@pytest.mark.parametrize('codes, queued', [
    ('75', True), ('2', False), ('1 1', True)])
def test_slurm_queues_again_by_exit_code(slurm_job, tmp_path, codes, queued):
  for code in codes.split():
    process = slurm_job(make_job(tmp_path, codes), '--gpus=0')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == int(code)
    # The second failure is one more than max_restarts.
    assert requeued(tmp_path) == ['requeue 4100'] * queued
  assert ('giving up' in out) == (codes == '1 1')


def test_slurm_queues_no_job_again_that_was_cancelled(slurm_job, tmp_path):
  stand_in(tmp_path, 'squeue', '#!/bin/bash\necho COMPLETING\n')
  out, _ = slurm_job(make_job(tmp_path, '75'), '--gpus=0').communicate(
      timeout=60)
  assert ': cancelled' in out and not requeued(tmp_path)


def test_slurm_outlives_the_signal_that_its_processes_get(slurm_job, tmp_path):
  process = slurm_job(make_job(tmp_path, 'wait'), '--gpus=0')
  wait_for(tmp_path / 'starts-0-0')
  process.send_signal(signal.SIGTERM)
  time.sleep(0.3)
  assert process.poll() is None
  for pid in (tmp_path / 'pids').read_text().split():
    os.kill(int(pid), signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75 and requeued(tmp_path) == ['requeue 4100']


def test_slurm_passes_on_what_a_shell_would_execute(slurm_job, tmp_path):
  logs = tmp_path / "lo gs '$(touch executed)%j%%;#"
  j, word = hostile_job(tmp_path, logs=str(logs))
  process = slurm_job(j, '--gpus=0')
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0, out
  [env] = starts(tmp_path)
  assert env['argv'] == [word, '--x=' + word] and env['JAX_X'] == word
  assert (logs / 'process-0.log').exists()
  assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('limit, code', [(419, 2), (420, 0)])
def test_slurm_ends_where_the_time_limit_is_too_short(
    slurm_job, tmp_path, monkeypatch, limit, code):
  monkeypatch.setenv('SLURM_JOB_START_TIME', '1700000000')
  monkeypatch.setenv('SLURM_JOB_END_TIME', str(1700000000 + limit))
  process = slurm_job(make_job(tmp_path, '0'), '--gpus=0')
  out, _ = process.communicate(timeout=60)
  assert process.returncode == code and not requeued(tmp_path)
  assert ('choose 420 s or more' in out) == bool(code)


# On TPU VMs: the script runs on stand-ins for gcloud and the workers.


@pytest.fixture(name='tpu_run')
def _tpu_run(tmp_path, monkeypatch):
  """Returns a function that runs the script on slices of two workers."""
  monkeypatch.setattr(tpu_vm, 'WAIT_SECONDS', 0.1)
  env = stand_in(tmp_path, 'curl', '#!/bin/bash\necho "$WORKER"\n')
  env |= stand_in(tmp_path, 'gcloud', f'''\
      #!/bin/bash
      echo "$@" >>{tmp_path}/gcloud
      last="${{@: -1:1}}"
      case "$4 $*" in
        describe*networkEndpoints*) echo 10.0.0.5 ;;
        describe*) echo "${{STATE:-READY}}" ;;
        ssh*--worker=all*)
          for WORKER in ${{WORKERS:-0 1}}; do
            export WORKER
            (cd {tmp_path}; bash -c "${{last#*=}}" || true) 2>&1 \\
              | sed "s/^/from $5: /" &
          done 2>/dev/null
          wait ;;
        ssh*) cd {tmp_path}; bash -c "${{last#*=}}" ;;
      esac
      ''')
  (tmp_path / 'archetype').mkdir()
  def start(j, *words):
    args = args_of(tpu_vm, '--zone=z', f'--logs={tmp_path}/logs', *words)
    return subprocess.Popen(
        tpu_vm.command_to_launch(j, args), text=True, env=os.environ | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  return start


@pytest.mark.parametrize('codes, code, count', [
    ('75 1 0', 0, 3), ('1 1 0', 1, 2), ('2', 2, 1)])
def test_tpu_vm_runs_all_workers_and_starts_again(tpu_run, tmp_path, codes,
                                                  code, count):
  process = tpu_run(make_job(tmp_path, codes, 'gs://bucket/run'), '--tpu=a,b')
  out, _ = process.communicate(timeout=60)
  assert process.returncode == code, out
  for slice_ in (0, 1):
    for worker in (0, 1):
      notes = starts(tmp_path, f'{slice_}-{worker}')
      assert len(notes) == count
      assert notes[0]['argv'] == ["'", '--cluster']
      assert notes[0]['MEGASCALE_SLICE_ID'] == str(slice_)
      assert notes[0]['MEGASCALE_NUM_SLICES'] == '2'
      assert notes[0]['MEGASCALE_COORDINATOR_ADDRESS'] == '10.0.0.5:8081'
      assert notes[0]['JAX_COMPILATION_CACHE_DIR'].endswith('a cache')
  # Process 0 is shown, and only it.
  assert out.count('output of') == out.count('from a: output of 0') == count
  kept = tmp_path / 'archetype/process-1-0.log'
  assert 'output of 0' in kept.read_text()


def test_tpu_vm_passes_on_what_a_shell_would_execute(tpu_run, tmp_path):
  j, word = hostile_job(tmp_path, workdir='gs://bucket/run')
  folder = "a b'$(touch executed);#"
  (tmp_path / folder).mkdir()
  process = tpu_run(j, '--tpu=a', f'--folder=~/{folder}', f'--project=p {word}')
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0, out
  [env] = starts(tmp_path)
  assert env['argv'][:-1] == [word, '--x=' + word] and env['JAX_X'] == word
  assert not any('MEGASCALE' in name for name in env)
  assert (tmp_path / folder / 'train.pid').exists()
  assert not list(tmp_path.rglob('executed'))


def test_tpu_vm_tells_the_run_in_its_folder_to_save(tpu_run, tmp_path,
                                                    monkeypatch):
  monkeypatch.setenv('WORKERS', '0')
  (tmp_path / "a b'").mkdir()
  process = tpu_run(make_job(tmp_path, 'wait', 'gs://bucket/run'), '--tpu=a',
                    "--folder=a b'")
  wait_for(tmp_path / 'starts-0-0')
  wait_for(tmp_path / "a b'/train.pid")
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and 'the run saves and leaves' in out


def test_a_signal_ends_the_wait_for_a_slice(tpu_run, tmp_path, monkeypatch):
  monkeypatch.setenv('STATE', 'CREATING')
  monkeypatch.setattr(tpu_vm, 'WAIT_SECONDS', 600)
  process = tpu_run(make_job(tmp_path, '0', 'gs://bucket/run'), '--tpu=a')
  try:
    assert process.stdout.readline() == 'waiting for a\n'
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0
  assert out == 'stopped while no run was under way\n'
  # No worker is told: the process that it last ran may be another by now.
  assert 'ssh' not in (tmp_path / 'gcloud').read_text()


# Before anything is started.


@pytest.mark.parametrize('one, other', [
    ('gs://alice/runs/a', 'gs://bob/runs/a'), ('/alice/runs/a', 'runs/a'),
    ('gs://b/' + 60 * 'a', 'gs://b/' + 61 * 'a')])
def test_two_workdirs_have_two_names(one, other):
  names = [job.job_name_of_workdir(one), job.job_name_of_workdir(other)]
  assert names[0] != names[1] and names[0] == job.job_name_of_workdir(one + '/')
  assert all(re.fullmatch('[a-z][a-z0-9-]{,39}', name) for name in names)


@pytest.mark.parametrize('module, words, message', [
    (slurm, ['--gpus=0', '--per_gpu'], '--per_gpu .* --gpus is 0'),
    (slurm, ['--sbatch=--comment="a'], 'No closing quotation'),
    (slurm, ['--env=JAX_PROCESS_ID=0'], 'does not set itself'),
    (tpu_vm, ['--tpu=a'], '--zone'),
    (tpu_vm, ['--tpu=a', '--zone=z'], "--workdir is 'runs/a', and every host"),
])
def test_what_no_place_has_is_refused(tmp_path, module, words, message):
  with pytest.raises(RequestError, match=message):
    args = args_of(module, *words)
    module.count_devices(args)
    job.environment_of_processes(args, '')
    module.command_to_launch(make_job(
        tmp_path, '0', 'runs/a' if 'workdir' in message else 'gs://b/a'), args)


@pytest.mark.slow
def test_the_command_line(tmp_path):
  def launch(*words, code=0):
    result = forked.run('-m', 'tools.launch', *words,
                        f'--workdir={tmp_path}/run', '--dry_run')
    assert result.returncode == code, result.stderr
    return result
  (tmp_path / 'flags').write_text('--config.seed\n3\n--devices=4\n')
  dry = launch('local', '--processes', '2', '--config', 'configs/gpt.py',
               f'--flagfile={tmp_path}/flags', '--config.optim.lr', '3e-4',
               '--config.data.batch_size=8', '--noconfig.model.tie_embeddings',
               '--allow_config_change').stdout
  assert ('--config.seed=3 --config.optim.lr=3e-4 --config.data.batch_size=8 '
          '--config.model.tie_embeddings=False ' in dry)
  assert ' --allow_config_change ' in dry
  assert '--processes' not in dry and len(dry.splitlines()) == 2
  config = '--config=configs/gpt.py'
  assert launch('slurm', config).stdout.startswith('sbatch --parsable')
  error = launch('slurm', config, '--nodes=4', '--config.mesh.fsdp=3',
                 code=2).stderr
  assert 'mesh.fsdp=3' in error and '32 devices' in error
  assert '--nodes' in launch('slurm', config, '--nodes=0', code=2).stderr
  assert not (tmp_path / 'run').exists()
  assert 'choose from local' in launch('moon', code=2).stderr


def test_a_cluster_whose_programs_are_missing(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  for module, words in ((slurm, []), (tpu_vm, ['--tpu=a', '--zone=b'])):
    with pytest.raises(RequestError, match='is not on the PATH .*--dry_run'):
      module.launch(make_job(tmp_path, '0'), args_of(module, *words))
  assert not (tmp_path / 'run').exists()
