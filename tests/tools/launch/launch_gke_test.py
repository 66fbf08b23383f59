"""The JobSet that is given to GKE, against what its API has."""

import os
import pathlib
import re

import jsonschema
import pytest
import yaml

from configs.errors import EnvironmentFailure
from tests.helpers import launching, manifests
from tools.launch import gke, jobset


@pytest.fixture(name='a_job')
def _a_job(tmp_path):
  return launching.maker(tmp_path)


IN_BUCKET = dict(workdir='gs://b/run',
                 env={'JAX_COMPILATION_CACHE_DIR': 'gs://b/jax_cache'})


def manifest(a_job, *words, **changes):
  args = launching.args_of(gke, '--image=i:1', *words)
  gke.size(args)
  made = jobset.jobset(a_job('0', **IN_BUCKET | changes), args)
  read = yaml.safe_load(yaml.safe_dump(made))
  assert read == made
  manifests.check(read)
  return read


def test_gke_slices_of_tpus(a_job):
  made = manifest(a_job, '--topology=v5e:4x4', '--slices=2', '--queue=q')
  assert made['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'q'}
  [slices] = made['spec']['replicatedJobs']
  assert slices['replicas'] == 2
  spec = slices['template']['spec']
  assert spec['parallelism'] == spec['completions'] == 4  # hosts of 4 chips
  pod = spec['template']['spec']
  assert pod['nodeSelector'] == {
      'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
      'cloud.google.com/gke-tpu-topology': '4x4'}
  [container] = pod['containers']
  assert container['resources'] == {'limits': {'google.com/tpu': 4}}
  assert container['command'][-1] == '--cluster'


def test_gke_gpus_are_told_who_they_are(a_job):
  made = manifest(a_job, '--gpu=nvidia-h100-80gb:8', '--nodes=3', '--spot',
                  '--pvc=claim:/data', workdir='/data/run')
  spec = made['spec']['replicatedJobs'][0]['template']['spec']
  assert spec['parallelism'] == 3
  pod = spec['template']['spec']
  assert {v['name']: v for v in pod['volumes']} == {
      'shared': {'name': 'shared',
                 'persistentVolumeClaim': {'claimName': 'claim'}},
      'shm': {'name': 'shm', 'emptyDir': {'medium': 'Memory'}}}
  assert pod['containers'][0]['volumeMounts'] == [
      {'name': 'shm', 'mountPath': '/dev/shm'},
      {'name': 'shared', 'mountPath': '/data'}]
  env = {e['name']: e.get('value') for e in pod['containers'][0]['env']}
  assert env['JAX_COORDINATOR_ADDRESS'] == 'a-run-slice-0-0.a-run:8476'
  assert env['JAX_NUM_PROCESSES'] == '3' and 'JAX_PROCESS_ID' in env
  assert '--cluster' not in pod['containers'][0]['command']


def pod_of(made):
  job_spec = made['spec']['replicatedJobs'][0]['template']['spec']
  return job_spec['template']['spec']


def expanded(text, variables):
  """What Kubernetes makes of a command's word or a variable's value (core/v1:
  $$ is a dollar, $(NAME) a variable where there is one of that name)."""
  return re.sub(
      r'\$\$|\$\((\w+)\)', lambda m: '$' if m[0] == '$$' else
      variables.get(m[1], m[0]), text)


def test_gke_passes_on_what_kubernetes_would_put_variables_into(a_job):
  told = '$(X) $$(X) $X $ $$ $'
  made = manifest(a_job, '--gpu=nvidia-h100-80gb:8', words=('python', told),
                  env=IN_BUCKET['env'] | {'X': 'x', 'Y': told})
  pod = pod_of(made)
  [container] = pod['containers']
  assert expanded(container['command'][1], {'X': 'x'}) == told
  env = {e['name']: e['value'] for e in container['env'] if 'value' in e}
  assert expanded(env['Y'], {'X': 'x'}) == told
  assert expanded(env['JAX_COORDINATOR_BIND_ADDRESS'],
                  {'POD_IP': '10.0.0.5'}) == '10.0.0.5:8476'


def test_gke_asks_for_cores_memory_and_an_account(a_job):
  made = manifest(a_job, '--topology=v5e:4x4', '--cpu=96', '--memory=400Gi',
                  '--service_account=trainer')
  pod = pod_of(made)
  assert pod['serviceAccountName'] == 'trainer'
  assert pod['containers'][0]['resources'] == {
      'limits': {'google.com/tpu': 4},
      'requests': {'cpu': '96', 'memory': '400Gi'}}


@pytest.mark.parametrize('words, memory', [
    (['--topology=tpu7x:2x2x1'], 94.75 * 2 ** 30),
    (['--gpu=nvidia-h100-mega-80gb:8'], 84.9e9),
    (['--gpu=nvidia-l4:8'], None)])
def test_gke_knows_what_a_device_has(words, memory, capfd):
  *count, chip = gke.size(launching.args_of(gke, '--image=i', *words))
  assert count == [8, 1] and (chip and chip.hbm) == memory
  assert ('the memory of nvidia-l4 is not known' in capfd.readouterr().err) == (
      memory is None)


def test_gke_leaves_a_jobset_alone_that_is_there(a_job, tmp_path, monkeypatch):
  env = launching.stand_in(tmp_path, 'kubectl', f'''\
      #!/bin/bash
      echo "$1" >>{tmp_path}/asked
      echo 'Error from server (AlreadyExists)' >&2
      exit 1
      ''')
  monkeypatch.setenv('PATH', env['PATH'])
  args = launching.args_of(gke, '--image=i:1', '--topology=v5e:4x4')
  with pytest.raises(EnvironmentFailure, match='kubectl delete jobset a-run'):
    gke.launch(a_job('0', **IN_BUCKET), args)
  assert (tmp_path / 'asked').read_text() == 'create\n'


@pytest.mark.parametrize('code, action', [
    (2, 'FailJobSet'), (75, 'RestartJobSetAndIgnoreMaxRestarts'), (1, None)])
def test_gke_tells_exit_codes_apart(a_job, code, action):
  """As Kubernetes does: the first rule that matches is named in the message,
  which JobSet's rules read."""
  made = manifest(a_job, '--topology=v6e:2x2')
  job_spec = made['spec']['replicatedJobs'][0]['template']['spec']
  index = next((i for i, r in enumerate(job_spec['podFailurePolicy']['rules'])
                if code in r.get('onExitCodes', {}).get('values', [])), None)
  assert (index is None) == (action is None)
  message = (f'Container train for pod default/a failed with exit code {code} '
             f'matching FailJob rule at index {index}')
  found = [r['action'] for r in made['spec']['failurePolicy']['rules']
           if any(re.search(p, message)
                  for p in r['onJobFailureMessagePatterns'])]
  assert found[:1] == ([action] if action else [])


def test_a_folder_that_hosts_do_not_share_is_refused(a_job):
  pvc = '--pvc=claim:/data'
  for words, folder in (((), 'runs/a'), ((), '/data/a'), ((pvc,), '/date/a'),
                        ((pvc,), 'data/a')):
    with pytest.raises(ValueError, match=f"--workdir is '{folder}'.*bucket"):
      manifest(a_job, '--topology=v5e:4x4', *words, workdir=folder)
    with pytest.raises(ValueError, match=f"--compile_cache is '{folder}'"):
      manifest(a_job, '--topology=v5e:4x4', *words,
               env={'JAX_COMPILATION_CACHE_DIR': folder})
  manifest(a_job, '--topology=v5e:4x4', pvc, workdir='/data/a',
           env={'JAX_COMPILATION_CACHE_DIR': '/data/jax_cache'})


TPUS, GPUS = '--topology=v5e:4x4', '--gpu=nvidia-h100-80gb:8'


@pytest.mark.parametrize('words, told', [
    (['--topology=v5e:3x7'], 'a shape that no v5e slice has'),
    (['--topology=v5e:4x4x4'], 'write the shape of a v5e as v5e:4x8'),
    (['--topology=h100:1x8x8'], 'choose v4, v5e, .*; GPUs have --gpu'),
    ([TPUS, '--pvc=/data'], "'/data': write CLAIM:/PATH"),
    ([TPUS, '--logs=logs'], '--logs is .* kubectl logs'),
    ([TPUS, '--nodes=2'], '--nodes is 2.*TPUs: .*--slices'),
    ([GPUS, '--slices=2'], '--slices is 2.*GPUs: .*--nodes'),
    ([TPUS, '--chips_per_host=-4'], '--chips_per_host is -4')])
def test_gke_refuses(a_job, words, told):
  with pytest.raises(ValueError, match=told):
    manifest(a_job, *words)


@pytest.mark.parametrize('words, told', [
    ([TPUS, '--namespace=Team_A'], "--namespace is 'Team_A'"),
    ([TPUS, '--namespace=a.b'], "--namespace is 'a.b'"),
    ([TPUS, '--queue=my queue'], "--queue is 'my queue'"),
    ([TPUS, '--queue=' + 64 * 'q'], '63 small letters'),
    ([TPUS, '--priority=-high'], "--priority is '-high'"),
    ([TPUS, '--service_account=a@b.iam'], '--service_account is'),
    ([TPUS, '--pvc=my_claim:/data'], "--pvc is 'my_claim:/data'"),
    ([TPUS, '--pvc=claim:/a:ro'], 'path with a colon'),
    ([GPUS, '--pvc=claim:/dev/shm/'], 'exchange data in /dev/shm'),
    ([GPUS + ' '], "'nvidia-h100-80gb:8 '"), (['--gpu=a b:8'], "'a b:8'"),
    ([TPUS, '--image=my image'], '--image is .* no blanks'),
    ([TPUS, '--slices=5000000000'], '--slices is 5000000000')])
def test_gke_refuses_what_kubernetes_would(a_job, words, told):
  """Its schemas say nothing of these: a name is of RFC 1123, a label's value
  has 63 letters, a mount path no colon, a count 32 bits."""
  with pytest.raises(ValueError, match=told):
    manifest(a_job, *words)


JOB = 'spec/replicatedJobs/0/template/spec/'
POD = JOB + 'template/spec/'


def changed(made, path, **changes):
  """Changes what lies at a path; None: is not there."""
  at = made
  for name in path.rstrip('/').split('/'):
    at = at[int(name) if name.isdigit() else name]
  for name, value in changes.items():
    at.pop(name, None)
    if value is not None:
      at[name] = value


@pytest.mark.parametrize('path, changes', [
    ('metadata', dict(name=None)), ('spec', dict(replicatedJobs=None)),
    ('spec/failurePolicy/rules/0', dict(action='GiveUp')),
    (JOB, dict(completionMode=3)), (JOB, dict(template=None)),
    (POD, dict(containers=None)), (POD, dict(nodeselector={})),
    (POD, dict(terminationGracePeriodSeconds='300')),
    (POD + 'containers/0', dict(env=[{'name': 'A', 'value': 1}])),
    (JOB + 'podFailurePolicy/rules/0/onExitCodes', dict(operator=None))])
def test_a_wrong_manifest_is_found_out(a_job, path, changes):
  made = manifest(a_job, TPUS)
  changed(made, path, **changes)
  with pytest.raises((AssertionError, jsonschema.ValidationError)):
    manifests.check(made)


@pytest.mark.skipif(manifests.CRD not in os.environ, reason=(
    f'${manifests.CRD} names no definition of JobSet: see docs/pods.md'))
def test_what_we_know_of_jobset_is_so(a_job):
  """JOBSET's fields are all in the definition, which refuses others."""
  path = pathlib.Path(os.environ[manifests.CRD])
  manifests.check_known(manifests.definition(path))
  made = manifest(a_job, TPUS)
  for where in ('spec', 'spec/failurePolicy/rules/0', POD):
    changed(made, where, neverHeardOf=1)
    with pytest.raises(jsonschema.ValidationError, match='neverHeardOf'):
      manifests.check_definition(made, path)
    changed(made, where, neverHeardOf=None)


def test_gke_shows_every_start_once_until_the_end(a_job, tmp_path, monkeypatch,
                                                  capfd):
  """Pod b comes after a; its container is late, and JobSet too at the end."""
  monkeypatch.setattr(gke, 'POLL_SECONDS', 0)
  env = launching.stand_in(tmp_path, 'kubectl', f'''\
      #!/bin/bash
      echo "$*" >>{tmp_path}/asked
      count=$(grep -c terminalState {tmp_path}/asked)
      case "$*" in
        create*) cat >{tmp_path}/applied ;;
        *terminalState*) if [ "$count" = 5 ]; then echo -n Completed; fi ;;
        "get pod"*) [ "$count" -lt 2 ] && echo pod/a || echo pod/b ;;
        logs*pod/b) [ "$count" -ge 3 ] && echo output of b ;;
        logs*) echo "output of ${{*: -1}}" ;;
      esac
      ''')
  monkeypatch.setenv('PATH', env['PATH'])
  args = launching.args_of(gke, '--image=i:1', '--topology=v5e:4x4')
  assert gke.launch(a_job('0', **IN_BUCKET), args) == 0
  out = capfd.readouterr().out
  assert out.count('output of') == 2 and out.count('output of b') == 1
  assert out.endswith('a-run: Completed\n')
  manifests.check(yaml.safe_load((tmp_path / 'applied').read_text()))
