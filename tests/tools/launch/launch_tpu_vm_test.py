"""The script of TPU VMs, run here on stand-ins for gcloud and the workers."""

import os
import signal
import subprocess

import pytest

from tests.helpers.launching import args_of, hostile_job, maker, stand_in
from tests.helpers.launching import starts
from tests.helpers.launching import wait_for
from tools.launch import tpu_vm


@pytest.fixture(name='a_job')
def _a_job(tmp_path):
  return maker(tmp_path)


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
        describe*) echo "${{STATE:-READY}}" ;;
        ssh*--worker=all*)
          for WORKER in ${{WORKERS:-0 1}}; do
            export WORKER
            (cd {tmp_path}; bash -c "${{@: -1:1}}" || true) 2>&1 \\
              | sed "s/^/from $5: /" &
          done 2>/dev/null
          wait ;;
        ssh*) cd {tmp_path}; bash -c "${{@: -1:1}}" ;;
      esac
      ''')
  # The command is the last word, as --command=...
  path = tmp_path / 'bin/gcloud'
  path.write_text(path.read_text().replace(
      'bash -c "${@: -1:1}"', 'last="${@: -1:1}"; bash -c "${last#*=}"'))
  (tmp_path / 'archetype').mkdir()
  def start(codes, *words, **changes):
    args = args_of(tpu_vm, '--zone=z', f'--logs={tmp_path}/logs', *words)
    path = tmp_path / 'launch.sh'
    path.write_text(tpu_vm.script(a_job(codes, 'gs://bucket/run', **changes),
                                  args))
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


def test_tpu_vm_passes_on_what_a_shell_would_execute(tpu_run, tmp_path):
  told, changes = hostile_job(tmp_path)
  changes['env'] = {'JAX_X': told, 'JAX_COMPILATION_CACHE_DIR': 'gs://b/c'}
  folder = "a b'$(touch executed);#"
  (tmp_path / folder).mkdir()
  process = tpu_run('0', '--tpu=a', f'--folder=~/{folder}',
                    f'--project=p {told}', **changes)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0, out
  assert [env['argv'][:-1] for env in starts(tmp_path)] == [
      [told, '--x=' + told]]
  assert starts(tmp_path)[0]['JAX_X'] == told
  assert (tmp_path / folder / 'train.pid').exists()
  assert not list(tmp_path.rglob('executed'))


def test_tpu_vm_tells_the_run_in_its_folder_to_save(tpu_run, tmp_path,
                                                    monkeypatch):
  monkeypatch.setenv('WORKERS', '0')
  (tmp_path / "a b'").mkdir()
  process = tpu_run('wait', '--tpu=a', "--folder=a b'")
  wait_for(tmp_path / 'starts-0-0')
  wait_for(tmp_path / "a b'/train.pid")
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and 'the run saves and leaves' in out


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_slice(tpu_run, tmp_path, monkeypatch,
                                            number):
  monkeypatch.setenv('STATE', 'CREATING')
  monkeypatch.setattr(tpu_vm, 'WAIT_SECONDS', 600)
  process = tpu_run('0', '--tpu=a')
  try:
    assert process.stdout.readline() == 'waiting for a\n'
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 0
  assert out == 'stopped while no run was under way\n'
  # No worker is told: the process that it last ran may be another by now.
  assert 'ssh' not in (tmp_path / 'gcloud').read_text()


@pytest.mark.parametrize('folder', ['', '~', '~/', '~other/x', '-x'])
def test_tpu_vm_refuses_a_folder(tpu_run, folder):
  with pytest.raises(ValueError, match='--folder is'):
    tpu_run('0', '--tpu=a', f'--folder={folder}')
