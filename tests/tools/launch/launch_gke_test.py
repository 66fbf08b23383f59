"""The JobSet that is given to GKE, against what its API has."""

import re

import pytest
import yaml

from configs.errors import EnvironmentFailure
from tests.helpers import launching
from tools.launch import gke, jobset


@pytest.fixture(name='a_job')
def _a_job(tmp_path):
  return launching.maker(tmp_path)


# What the API has, of what we use: a tuple is a list of such, a set the words
# that a string may be, dict[str] any names. After the CRD of JobSet 0.10 and
# Kubernetes' batch/v1 and core/v1.
_ENV = dict(name=str, value=str,
            valueFrom=dict(fieldRef=dict(fieldPath=str)))
_POD = dict(
    restartPolicy={'Never'}, nodeSelector={str: str}, serviceAccountName=str,
    terminationGracePeriodSeconds=int,
    volumes=(dict(name=str, persistentVolumeClaim=dict(claimName=str),
                  emptyDir=dict(medium={'Memory'})),),
    containers=(dict(
        name=str, image=str, command=(str,), env=(_ENV,),
        resources=dict(limits={str: int}, requests={str: str}),
        volumeMounts=(dict(name=str, mountPath=str),)),))
_RULE = dict(
    action={'FailJob', 'Ignore', 'Count', 'FailIndex'},
    onExitCodes=dict(containerName=str, operator={'In', 'NotIn'},
                     values=(int,)),
    onPodConditions=(dict(type=str, status={'True', 'False', 'Unknown'}),))
SCHEMA = dict(
    apiVersion={'jobset.x-k8s.io/v1alpha2'}, kind={'JobSet'},
    metadata=dict(name=str, namespace=str, labels={str: str},
                  annotations={str: str}),
    spec=dict(
        failurePolicy=dict(maxRestarts=int, rules=(dict(
            name=str, action={'FailJobSet', 'RestartJobSet',
                              'RestartJobSetAndIgnoreMaxRestarts'},
            onJobFailureReasons=(str,), onJobFailureMessagePatterns=(str,)),)),
        network=dict(enableDNSHostnames=bool, publishNotReadyAddresses=bool),
        replicatedJobs=(dict(name=str, replicas=int, template=dict(spec=dict(
            parallelism=int, completions=int, completionMode={'Indexed'},
            backoffLimit=int, podFailurePolicy=dict(rules=(_RULE,)),
            template=dict(spec=_POD)))),)))


# What must be there wherever the API has it.
REQUIRED = {'apiVersion', 'kind', 'metadata', 'spec', 'name', 'replicatedJobs',
            'template', 'containers', 'action', 'operator', 'values', 'type',
            'status', 'claimName', 'mountPath', 'fieldPath'}


def valid(value, schema, where=''):
  if isinstance(schema, dict):
    assert isinstance(value, dict), where
    missing = (REQUIRED & schema.keys()) - value.keys()
    assert not missing, f'{where} lacks {missing}'
    for key, inner in value.items():
      assert isinstance(key, str) and (key in schema or str in schema), (
          f'{where}.{key}')
      valid(inner, schema.get(key, schema.get(str)), f'{where}.{key}')
  elif isinstance(schema, tuple):
    assert isinstance(value, list), where
    for i, inner in enumerate(value):
      valid(inner, schema[0], f'{where}[{i}]')
  elif isinstance(schema, set):
    assert value in schema, f'{where}: {value!r}'
  else:
    assert type(value) is schema, f'{where}: {value!r}'


IN_BUCKET = dict(workdir='gs://b/run',
                 env={'JAX_COMPILATION_CACHE_DIR': 'gs://b/jax_cache'})


def manifest(a_job, *words, **changes):
  args = launching.args_of(gke, '--image=i:1', *words)
  gke.size(args)
  made = jobset.jobset(a_job('0', **IN_BUCKET | changes), args)
  read = yaml.safe_load(yaml.safe_dump(made))
  assert read == made
  valid(read, SCHEMA)
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


@pytest.mark.parametrize('words, told', [
    (['--topology=v5e:3x7'], 'a shape that no v5e slice has'),
    (['--topology=v5e:4x4x4'], 'write the shape of a v5e as v5e:4x8'),
    (['--topology=h100:1x8x8'], 'choose v4, v5e, .*; GPUs have --gpu'),
    (['--topology=v5e:4x4', '--pvc=/data'], "'/data': write CLAIM:/PATH"),
    (['--topology=v5e:4x4', '--logs=logs'], '--logs is .* kubectl logs')])
def test_gke_refuses(a_job, words, told):
  with pytest.raises(ValueError, match=told):
    manifest(a_job, *words)


@pytest.mark.parametrize('path', [
    'metadata/name', 'spec/replicatedJobs', 'spec/failurePolicy/rules/0/action',
    'spec/replicatedJobs/0/template/spec/template/spec/containers'])
def test_a_manifest_that_lacks_something_is_found_out(a_job, path):
  made = manifest(a_job, '--topology=v5e:4x4')
  *parents, last = path.split('/')
  at = made
  for name in parents:
    at = at[int(name) if name.isdigit() else name]
  del at[last]
  with pytest.raises(AssertionError, match=f'lacks .*{last}'):
    valid(made, SCHEMA)


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
  valid(yaml.safe_load((tmp_path / 'applied').read_text()), SCHEMA)
