"""The scripts of clusters are run here, on stand-ins for their programs."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.launching import args_of, maker, stand_in, starts, wait_for
from tools.launch import slurm, tpu_vm


@pytest.fixture(name='a_job')
def _a_job(tmp_path):
  return maker(tmp_path)


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


@pytest.mark.parametrize('state, codes', [
    ('COMPLETING', '75'), ('CANCELLED', '75'), ('COMPLETING', '1')])
def test_slurm_queues_no_job_again_that_was_cancelled(slurm_job, tmp_path,
                                                      state, codes):
  stand_in(tmp_path, 'squeue', f'#!/bin/bash\necho {state}\n')
  out, _ = slurm_job(codes, '--gpus=0').communicate(timeout=60)
  assert ': cancelled' in out and not requeued(tmp_path)


def test_slurm_counts_the_failures_of_one_job(slurm_job, tmp_path):
  logs = tmp_path / 'run/logs'
  logs.mkdir(parents=True)
  (logs / 'failures-4099').write_text('7')
  slurm_job('1', '--gpus=0').communicate(timeout=60)
  assert requeued(tmp_path) == ['requeue 4100']


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


@pytest.mark.slow
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
