"""The launchers: what they write is run here, on stand-ins for the clusters."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

from absl import flags
import pytest

from tools.launch import gke, job, local, slurm, tpu_vm

ROOT = pathlib.Path(__file__).parents[1]
# A run that notes its environment, and ends with the codes that a file lists,
# a word for each start: 75, 1, ... or `wait`, for SIGTERM.
PROGRAM = '''
    import json, os, pathlib, signal, sys, time
    folder, me = pathlib.Path(__file__).parent, os.environ.get(
        'JAX_PROCESS_ID', os.environ.get('WORKER', '0'))
    starts = folder / f'starts-{os.environ.get("slice", "0")}-{me}'
    n = len(starts.read_text().splitlines()) if starts.exists() else 0
    note = {k: v for k, v in os.environ.items() if k.startswith(
        ('JAX', 'XLA', 'MEGASCALE'))} | {'argv': sys.argv[1:]}
    code = (folder / 'codes').read_text().split()[n]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    with open(starts, 'a') as file:
      print(json.dumps(note), file=file)
    print('output of', me, flush=True)
    time.sleep(60 if code == 'wait' else 0)
    sys.exit(int(code))
    '''


def args_of(module, *words):
  args = flags.FlagValues()
  job.define(job.FLAGS + module.FLAGS, args)
  args(['launch', *words])
  return args


@pytest.fixture
def a_job(tmp_path):
  def make(codes, workdir=None, **changes):
    (tmp_path / 'program.py').write_text(textwrap.dedent(PROGRAM))
    (tmp_path / 'codes').write_text(codes)
    return job.Job(**dict(
        name='a-run', words=(sys.executable, str(tmp_path / 'program.py'), "'"),
        workdir=workdir or str(tmp_path / 'run'),
        logs=str(tmp_path / 'run/logs'),
        env={'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'a cache')},
        max_restarts=1, dry_run=False) | changes)
  return make


def starts(tmp_path, who='0-0'):
  path = tmp_path / f'starts-{who}'
  return [json.loads(line) for line in path.read_text().splitlines()]


def stand_in(tmp_path, name, text):
  """An executable of the cluster, that the script finds first."""
  path = tmp_path / 'bin' / name
  path.parent.mkdir(exist_ok=True)
  path.write_text(textwrap.dedent(text))
  path.chmod(0o755)
  return {'PATH': f'{path.parent}:{os.environ["PATH"]}'}


@pytest.mark.skipif(not shutil.which('shellcheck'),
                    reason='shellcheck is not installed')
@pytest.mark.parametrize('module, words', [
    (slurm, ['--per_gpu', '--setup=. .venv/bin/activate']),
    (tpu_vm, ['--tpu=a,b'])])
def test_scripts_pass_shellcheck(a_job, tmp_path, module, words):
  path = tmp_path / 'script.sh'
  path.write_text(module.script(a_job('0', 'gs://b/run' if module is tpu_vm
                                      else None), args_of(module, *words)))
  result = subprocess.run(['shellcheck', path], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('module, words, part', [
    (local, ['--processes=2', '--platform=cpu'], 'JAX_PROCESS_ID=1'),
    (slurm, ['--nodes=2'], '#SBATCH --nodes=2'),
    (gke, ['--topology=v5e:4x4', '--image=i'], 'kind: JobSet'),
    (tpu_vm, ['--tpu=a', '--zone=z'], 'gcloud compute tpus')])
def test_a_dry_run_only_prints(a_job, tmp_path, monkeypatch, capsys, module,
                               words, part):
  j = a_job('0', 'gs://b/run', dry_run=True)
  there = sorted(tmp_path.rglob('*'))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(subprocess, 'Popen', None)
  monkeypatch.setattr(os, 'execvp', None)
  assert module.launch(j, args_of(module, *words)) == 0
  assert part in capsys.readouterr().out
  assert sorted(tmp_path.rglob('*')) == there


def wait_for(path):
  until = time.monotonic() + 30
  while not path.exists():
    assert time.monotonic() < until, f'no {path}'
    time.sleep(0.02)


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


def test_local_passes_a_signal_on_once_and_does_not_start_again(a_job,
                                                                tmp_path):
  j = a_job('wait wait')
  code = textwrap.dedent(f'''
      import sys
      from tools.launch import local
      sys.exit(local.supervise({list(j.words)!r}, {{}}, 1, 1, 'cpu',
                               {j.logs!r}, 1))''')
  launcher = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT)
  wait_for(tmp_path / 'starts-0-0')
  launcher.send_signal(signal.SIGINT)
  assert launcher.wait(30) == 0
  assert len(starts(tmp_path)) == 1


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


# SLURM.


SRUN = '''\
    #!{python}
    import os, subprocess, sys
    words = sys.argv[1:]
    output = next(w for w in words if w.startswith('--output='))[9:]
    command = words[[w.startswith('--') for w in words].index(False):]
    tasks = int(os.environ['TASKS'])
    running = [subprocess.Popen(
        command, stdout=open(output.replace('%t', str(i)), 'ab'),
        env=os.environ | {{'SLURM_PROCID': str(i),
                           'SLURM_LOCALID': str(i % 2)}})
        for i in range(tasks)]
    with open(os.environ['PIDS'], 'w') as file:
      print(*(p.pid for p in running), file=file)
    sys.exit(max(p.wait() for p in running))
    '''


@pytest.fixture(name='slurm_job')
def _slurm_job(a_job, tmp_path):
  """Returns a function that runs the batch script as a node would."""
  env = stand_in(tmp_path, 'srun', SRUN.format(python=sys.executable))
  env |= stand_in(tmp_path, 'scontrol', f'''\
      #!/bin/bash
      if [ "$1" = show ]; then printf 'node-7\\nnode-8\\n'
      else echo "$@" >>{tmp_path}/scontrol; fi
      ''')
  def start(codes, *words, **changes):
    text = slurm.script(a_job(codes, **changes), args_of(slurm, *words))
    path = tmp_path / 'job.sh'
    path.write_text(text)
    return subprocess.Popen(
        ['bash', path], text=True, stdout=subprocess.PIPE,
        env=os.environ | env | {
            'TASKS': re.search(r'NUM_PROCESSES=(\d+)', text)[1],
            'PIDS': str(tmp_path / 'pids'), 'SLURM_JOB_ID': '4100',
            'SLURM_JOB_NODELIST': 'node-[7-8]'})
  return start


def requeued(tmp_path):
  path = tmp_path / 'scontrol'
  return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize('per_gpu', [False, True])
def test_slurm_tells_each_process_who_it_is(slurm_job, tmp_path, per_gpu):
  process = slurm_job('0', '--nodes=2', '--gpus=2', *['--per_gpu'] * per_gpu,
                      "--setup=export JAX_X='a b'")
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and 'complete' in out
  count = 4 if per_gpu else 2
  for i in range(count):
    [env] = starts(tmp_path, f'0-{i}')
    assert env['JAX_COORDINATOR_ADDRESS'] == 'node-7:61100'
    assert env['JAX_NUM_PROCESSES'] == str(count)
    assert env['JAX_PROCESS_ID'] == str(i) and env['JAX_X'] == 'a b'
    assert env.get('JAX_LOCAL_DEVICE_IDS') == (str(i % 2) if per_gpu else None)
    assert env['argv'] == ["'"]  # quoted all the way
    log = tmp_path / f'run/logs/process-{i}.log'
    assert log.read_text() == f'output of {i}\n'
  text = (tmp_path / 'job.sh').read_text()
  for line in ('--nodes=2', f'--ntasks-per-node={count // 2}', '--requeue',
               '--gpus-per-node=2', '--signal=TERM@300'):
    assert f'#SBATCH {line}\n' in text
  assert not requeued(tmp_path)


@pytest.mark.parametrize('codes, queued', [
    ('75', True), ('2', False), ('1 1', True)])
def test_slurm_queues_again_by_exit_code(slurm_job, tmp_path, codes, queued):
  for code in codes.split():
    process = slurm_job(codes, '--gpus=0')
    out, _ = process.communicate(timeout=60)
    assert process.returncode == int(code)
    # The second failure is one more than max_restarts.
    assert requeued(tmp_path) == ['requeue 4100'] * queued
  assert ('giving up' in out) == (codes == '1 1')


def test_slurm_outlives_the_signal_that_its_processes_get(slurm_job, tmp_path):
  process = slurm_job('wait', '--gpus=0')
  wait_for(tmp_path / 'starts-0-0')
  process.send_signal(signal.SIGTERM)
  time.sleep(0.3)
  assert process.poll() is None
  for pid in (tmp_path / 'pids').read_text().split():
    os.kill(int(pid), signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75 and requeued(tmp_path) == ['requeue 4100']


def test_slurm_shows_process_0_until_the_job_has_left_the_queue(
    a_job, tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(slurm, 'POLL_SECONDS', 0.1)
  j = a_job('0')
  stand_in(tmp_path, 'sbatch', '#!/bin/bash\necho "4100;cluster"\n')
  env = stand_in(tmp_path, 'squeue', f'''\
      #!/bin/bash
      echo "$@" >>{tmp_path}/squeue
      case $(wc -l <{tmp_path}/squeue) in
        2) echo "nobody answers" >&2; exit 1 ;;
        20) echo "Invalid job id specified" >&2; exit 1 ;;
        *) echo output of a step >>{j.logs}/process-0.log; echo 4100 RUNNING ;;
      esac
      ''')
  monkeypatch.setenv('PATH', env['PATH'])
  assert slurm.launch(j, args_of(slurm)) == 0
  assert len((tmp_path / 'squeue').read_text().splitlines()) == 20
  assert '--jobs=4100\n' in (tmp_path / 'squeue').read_text()
  assert 'output of a step' in capfd.readouterr().out
  assert (tmp_path / 'run/logs/job.sh').exists()


# TPU VMs.


@pytest.fixture(name='tpu_run')
def _tpu_run(a_job, tmp_path, monkeypatch):
  """Returns a function that runs the script on slices of two workers."""
  monkeypatch.setattr(tpu_vm, 'WAIT_SECONDS', 0.1)
  env = stand_in(tmp_path, 'curl', '#!/bin/bash\necho "$WORKER"\n')
  env |= stand_in(tmp_path, 'gcloud', f'''\
      #!/bin/bash
      echo "$@" >>{tmp_path}/gcloud
      case "$4 $*" in
        describe*networkEndpoints*) echo 10.0.0.5 ;;
        describe*) echo READY ;;
        ssh*--worker=all*)
          for WORKER in 0 1; do
            export WORKER
            (cd {tmp_path}; bash -c "${{@: -1:1}}" || true) 2>&1 \\
              | sed "s/^/from $5: /" &
          done 2>/dev/null
          wait ;;
      esac
      ''')
  # The command is the last word, as --command=...
  path = tmp_path / 'bin/gcloud'
  path.write_text(path.read_text().replace(
      'bash -c "${@: -1:1}"', 'last="${@: -1:1}"; bash -c "${last#*=}"'))
  (tmp_path / 'archetype').mkdir()
  def start(codes, *words):
    args = args_of(tpu_vm, '--zone=z', f'--logs={tmp_path}/logs', *words)
    path = tmp_path / 'launch.sh'
    path.write_text(tpu_vm.script(a_job(codes, 'gs://bucket/run'), args))
    return subprocess.Popen(['bash', path], text=True, env=os.environ | env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  return start


@pytest.mark.parametrize('codes, code, count', [
    ('0', 0, 1), ('75 1 0', 0, 3), ('1 1 0', 1, 2), ('2', 2, 1)])
def test_tpu_vm_runs_all_workers_and_starts_again(tpu_run, tmp_path, codes,
                                                  code, count):
  process = tpu_run(codes, '--tpu=a,b')
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


def test_one_slice_has_no_megascale(tpu_run, tmp_path):
  tpu_run('0', '--tpu=a', '--project=p').communicate(timeout=60)
  assert not any('MEGASCALE' in k for k in starts(tmp_path, '0-0')[0])
  assert '--zone=z --project=p --worker=all' in (
      tmp_path / 'gcloud').read_text()


# Before anything is started.


@pytest.mark.parametrize('module, words, parts', [
    (gke, ['--topology=v5e:4by4', '--image=i'], ["'v5e:4by4'", 'v6e']),
    (gke, ['--image=i'], ['--topology', '--gpu']),
    (gke, ['--gpu=h100', '--image=i'], ["'h100'", ':8']),
    (slurm, ['--nodes=0'], ['--nodes is 0']),
    (slurm, ['--gpus=0', '--per_gpu'], ['--per_gpu', '--gpus is 0']),
    (tpu_vm, ['--tpu=a'], ['--zone']),
    (local, ['--devices=0'], ['--devices is 0']),
])
def test_what_no_place_has_is_refused(module, words, parts):
  with pytest.raises(ValueError) as error:
    module.size(args_of(module, *words))
  assert all(part in str(error.value) for part in parts), error.value


def launch(*words, code=0):
  result = subprocess.run(
      [sys.executable, '-m', 'tools.launch', *words], cwd=ROOT, text=True,
      capture_output=True, timeout=120)
  assert result.returncode == code, result.stderr
  return result


@pytest.mark.slow
def test_the_command_line(tmp_path):
  dry = launch('local', '--processes', '2', '--config', 'configs/gpt.py',
               '--workdir', f'{tmp_path}/run', '--dry_run', '--devices=4',
               '--config.optim.lr', '3e-4', '--config.data.batch_size=8',
               '--allow_config_change').stdout
  assert '--config.optim.lr=3e-4 --config.data.batch_size=8 --allow' in dry
  assert '--processes' not in dry and len(dry.splitlines()) == 2
  assert not (tmp_path / 'run').exists()
  error = launch('gke', '--topology=v5e:4x4', '--slices=2', '--image=i',
                 '--config=configs/gpt.py', '--workdir=gs://b/run',
                 '--config.mesh.fsdp=3', '--dry_run', code=2).stderr
  assert 'mesh.fsdp=3' in error and '32 devices' in error
  assert "choose from local" in launch('moon', code=2).stderr
