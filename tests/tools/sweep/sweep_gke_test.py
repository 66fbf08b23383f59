"""A sweep on GKE: the Job of its runners, and what becomes of them."""

import os
import pathlib
import re
import signal
import sys

import pytest
import yaml

from configs.errors import RequestError
from tests.helpers import indexed_job, launching, manifests, sweeps
from tools.sweep import __main__ as command
from tools.sweep import ledger as ledger_lib
from tools.sweep import run
from tools.sweep.launchers import gke

WORDS = ['run', 'f.py', '--workdir=/data/w']
HERE = 'image=i:1,pvc=claim:/data'


def manifest(options='', jobs=3, workdir='/data/w', words=tuple(WORDS)):
  args = gke.parse(','.join(filter(None, (HERE, options))))
  made = gke.manifest(list(words), workdir, jobs, args)
  assert yaml.safe_load(yaml.safe_dump(made)) == made
  manifests.check(made)
  return made


def test_what_is_documented_is_taken():
  page = pathlib.Path(__file__).parents[3] / 'docs/sweeps.md'
  documented = re.findall(r'--gke=(\S+,\S+)', page.read_text())
  assert documented
  for options in documented:
    made = gke.manifest(WORDS, '/data/w', 8, gke.parse(options))
    manifests.check(made)


def container(made):
  return made['spec']['template']['spec']['containers'][0]


@pytest.mark.parametrize('options, limits', [
    ('', None), ('gpu=nvidia-h100-80gb:2', {'nvidia.com/gpu': 2}),
    ('topology=v5e:2x2,spot', {'google.com/tpu': 4}),
    ('topology=v5e:2x4,chips_per_host=8', {'google.com/tpu': 8})])
def test_a_job_of_runners(options, limits):
  made = manifest(options)
  spec = made['spec']
  assert spec['parallelism'] == spec['completions'] == 3
  assert spec['completionMode'] == 'Indexed'
  assert container(made)['command'] == [
      'python', '-u', '-m', 'tools.sweep', *WORDS, '--runner']
  assert container(made)['resources'].get('limits') == limits
  assert {'name': 'shared', 'mountPath': '/data'} in container(
      made)['volumeMounts']
  env = {e['name']: e.get('value', e.get('valueFrom'))
         for e in container(made)['env']}
  assert env['JAX_COMPILATION_CACHE_DIR'] == '/data/w/jax_cache'
  assert env[ledger_lib.POD] == {'fieldRef': {'fieldPath': 'metadata.name'}}
  assert 'controller-uid' in env[ledger_lib.JOB]['fieldRef']['fieldPath']
  # Which local.Runner shares out among --parallel programs.
  assert env.get('CUDA_VISIBLE_DEVICES') == (
      '0,1' if 'gpu' in options else None)


def test_kueue_may_begin_with_fewer_runners():
  made = manifest('queue=q,priority=low,max_restarts=7,env=A=b')
  assert made['metadata']['labels'] == {
      'kueue.x-k8s.io/queue-name': 'q', 'kueue.x-k8s.io/priority-class': 'low'}
  assert made['metadata']['annotations'] == {
      'kueue.x-k8s.io/job-min-parallelism': '1'}
  assert made['spec']['backoffLimitPerIndex'] == 7
  assert {'name': 'A', 'value': 'b'} in container(made)['env']
  # Kueue refuses a least number that is not below the number of pods.
  assert not manifest('queue=q', jobs=1)['metadata']['annotations']


@pytest.mark.parametrize('options, told', [
    ('nodes=2', '--gke has nodes, and each runner'),
    ('topology=v5e:4x4', 'which is 4 hosts'),
    ('gpu=nvidia-l4:1,topology=v5e:2x2', 'gpu and topology'),
    ('imag=a', "Unknown command line flag 'imag'"),
    ('grace_seconds=soon', '--gke is .*grace_seconds'),
    ('max_restarts=-1', '--max_restarts is -1'),
    ('queue=My Queue', "--queue is 'My Queue'"), ('hours=-1', '--hours is -1')])
def test_what_makes_no_pod_of_a_runner_is_refused(options, told):
  with pytest.raises(RequestError, match=told):
    manifest(options)


@pytest.mark.parametrize('options, told', [
    ('pvc=claim:/data', 'names no image'), ('image=i', 'names no volume')])
def test_an_image_and_a_volume_are_needed(options, told):
  with pytest.raises(RequestError, match=told):
    gke.parse(options)


def test_the_ledger_is_on_the_volume():
  for workdir in ('/date/w', 'w', '/data/../w'):
    with pytest.raises(RequestError, match=f"--workdir is '{workdir}'.*/data"):
      manifest(workdir=workdir)
  with pytest.raises(RequestError, match="compile_cache is '/tmp/x'"):
    manifest('compile_cache=/tmp/x')
  with pytest.raises(RequestError, match='--jobs is 10001'):
    manifest(jobs=10_001)


@pytest.mark.parametrize('code, disrupted, action', [
    (143, True, 'Ignore'), (75, False, 'Ignore'), (2, False, 'FailJob'),
    (3, False, 'FailIndex'), (1, False, 'Count'), (137, False, 'Count')])
def test_the_end_of_a_runner_is_told_apart(code, disrupted, action):
  made = manifest()
  made['spec'].update(parallelism=0, completions=0)
  job = indexed_job.IndexedJob(made)
  assert job.action(code, disrupted) == action


def main(monkeypatch, *words):
  monkeypatch.setattr(sys, 'argv', ['sweep', 'run', *words])
  return command.main()


@pytest.mark.slow
def test_a_dry_run_prints_the_manifest_and_the_cost(tmp_path, monkeypatch,
                                                    capsys):
  """No folder of the volume is needed here; nothing is written."""
  file = sweeps.write(tmp_path, "  add('slow', **{'optim.lr': 1e-4})\n")
  there = {*tmp_path.iterdir(), tmp_path / '__pycache__'}
  assert main(monkeypatch, file, '--workdir', '/data/w/', '--launcher', 'gke',
              '--dry_run', '--seeds=2', '--gke', HERE
              + ',gpu=nvidia-h100-80gb:2,hours=3,price=0.5') == 0
  out = capsys.readouterr().out
  made = yaml.safe_load(out)
  manifests.check(made)
  assert container(made)['command'][4:] == [
      'run', file, '--workdir', '/data/w/', '--seeds=2', '--runner']
  assert '# 4 runners for 4 runs; a device needs about ' in out
  assert out.endswith('# 8 chips x 3 hours = 24 chip-hours, x 0.5 a chip-hour '
                      '= 12.00\n')
  assert there.issuperset(tmp_path.iterdir())
  assert not os.path.exists('/data/w')


def test_a_sweep_is_given_to_the_cluster_once(tmp_path, monkeypatch, capsys):
  env = launching.stand_in(tmp_path, 'kubectl', f'''\
      #!/bin/bash
      echo "$*" >>{tmp_path}/asked
      cat >{tmp_path}/applied
      ''')
  monkeypatch.setenv('PATH', env['PATH'])
  gke.submit(manifest('queue=q'))
  assert (tmp_path / 'asked').read_text() == 'create -f -\n'
  manifests.check(yaml.safe_load((tmp_path / 'applied').read_text()))
  name = manifest()['metadata']['name']
  assert re.fullmatch('w-[0-9a-f]{8}', name)
  assert f'kubectl delete job {name} -n default' in capsys.readouterr().out


@pytest.mark.parametrize('words, told', [
    (['--gke=image=i'], '--gke is for --launcher=gke'),
    (['--dry_run'], '--dry_run is for --launcher=gke')])
def test_gkes_flags_are_for_gke(tmp_path, monkeypatch, words, told):
  with pytest.raises(RequestError, match=told):
    main(monkeypatch, 'f.py', f'--workdir={tmp_path}/w', *words)


def pod(monkeypatch, job, index, name):
  for key, value in ((ledger_lib.JOB, job), (ledger_lib.INDEX, index),
                     (ledger_lib.POD, name)):
    monkeypatch.setenv(key, value)


@pytest.mark.parametrize('job, index, at_once', [
    ('job', '0', True),  # Kubernetes had seen the end of the one before
    ('job', '1', False), ('job-made-again', '0', False)])
def test_a_pod_follows_that_of_its_index(tmp_path, monkeypatch, job, index,
                                         at_once):
  """Both are process 1 of a host of one name; of other pods only the heartbeat
  says whether they live."""
  with ledger_lib.Ledger(tmp_path) as book:
    book.add([('a', 0, ())])
    pod(monkeypatch, 'job', '0', 'w-0-abcde')
    first = book.register(now=0)
    assert first.startswith('job-0:') and first.endswith('@w-0-abcde')
    assert book.claim([1], first, now=0) == [1]
    assert not book.recover(now=1)  # it lives
    pod(monkeypatch, job, index, f'w-{index}-fghij')
    assert bool(book.recover(now=ledger_lib.STALE_SECONDS - 1)) == at_once
    assert bool(book.recover(now=ledger_lib.STALE_SECONDS + 1)) != at_once


@pytest.mark.slow
@pytest.mark.parametrize('index, retried', [('0', True), ('1', False)])
def test_the_first_runner_takes_up_what_failed(tmp_path, monkeypatch, index,
                                               retried):
  sweeps.fake(monkeypatch)
  file = sweeps.write(tmp_path, "  add('bad', **{'optim.lr': 1.0})\n", seeds=1)
  words = (file, f'--workdir={tmp_path}/w', '--runner')
  monkeypatch.setenv(ledger_lib.INDEX, index)
  assert run.main(sweeps.arguments(*words)) == gke.RUN_FAILED
  code = run.main(sweeps.arguments(*words, '--retry'))
  assert code == (gke.RUN_FAILED if retried else 0)
  with ledger_lib.Ledger(tmp_path / 'w') as book:
    failed, = book.runs(ledger_lib.FAILED)
  assert failed.attempts == 1 + retried


@pytest.mark.long
def test_runners_are_lost_and_the_sweep_ends(tmp_path):
  """One is preempted in the middle of a run, one killed; a third index has
  nothing to do. All runs are done, each by one runner at a time."""
  file, workdir = sweeps.write(tmp_path), tmp_path / 'w'
  workdir.mkdir()
  for seed in range(2):
    (workdir / f'hold-seed-{seed}').touch()
  args = gke.parse(f'image=i,pvc=claim:{tmp_path}')
  made = gke.manifest(['run', file, f'--workdir={workdir}'], str(workdir), 2,
                      args)
  job = indexed_job.IndexedJob(
      made, lambda words: [sys.executable, '-u', '-m', 'tests.helpers.sweeps',
                           *words[words.index(file):]])
  held = lambda: sorted(s for s in sweeps.states(workdir).values()).count(
      'running') if (workdir / 'ledger.sqlite').exists() else 0
  try:
    job.wait(120, until=lambda job: held() == 2)
    job.preempt(0)
    job.wait(120, until=lambda job: job.starts == [2, 1])
    job.wait(120, until=lambda job: held() == 2)
    job.running[1].send_signal(signal.SIGKILL)
    job.wait(120, until=lambda job: job.starts == [2, 2])
    for seed in range(2):
      (workdir / f'hold-seed-{seed}').unlink()
    job.wait(300)
  finally:
    job.close()
  assert job.ended == {0: 'complete', 1: 'complete'}
  assert job.starts == [2, 2] and job.failures == [0, 1]
  assert set(sweeps.states(workdir).values()) == {'done'}
