r"""Starts a run on GKE: a JobSet, queued by Kueue, shows process 0.

  python -m tools.launch gke --topology=v5e:4x4 --slices=2 --image=IMAGE \
      --queue=QUEUE --config configs/mixtral.py:8x7b --workdir gs://BUCKET/a
  python -m tools.launch gke --gpu=nvidia-h100-mega-80gb:8 --nodes=4 \
      --image=IMAGE --pvc=CLAIM:/data --config configs/gpt.py --workdir /data/a

The image holds this repository in its working directory. Needs JobSet 0.10 or
later, which can tell one exit code from another. A preempted run is started
again as a whole, and so is a failed one, --max_restarts times.
"""

import math
import subprocess
import sys
import time

from configs.errors import RequestError
from tools.launch import job as job_lib
from tools.launch import programs
from tools.plan import chips

# (kind, name, default, what it says).
FLAGS = (
    ('string', 'topology', '', 'TPU:AxB or TPU:AxBxC, as v5p:4x4x8.'),
    ('integer', 'slices', 1, 'Of this topology.'),
    ('integer', 'chips_per_host', 0,
     'Default: 4, or all of a smaller topology.'),
    ('string', 'gpu', '',
     'GKE\'s name of the GPU, and how many a node has: nvidia-h100-80gb:8.'),
    ('integer', 'nodes', 1, 'Of GPUs.'),
    ('string', 'image', '', 'The container image.'),
    ('string', 'queue', '', 'Kueue\'s local queue; none: not queued.'),
    ('string', 'priority', '', 'Kueue\'s workload priority class.'),
    ('string', 'namespace', 'default', 'Of Kubernetes.'),
    ('string', 'pvc', '', 'CLAIM:/PATH, a volume that all pods mount.'),
    ('bool', 'spot', False, 'On spot nodes.'),
    ('integer', 'grace_seconds', 300, 'Between SIGTERM and SIGKILL.'),
    ('bool', 'tail', True, 'Show the output of process 0.'),
)

# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus:
# the name of the node label, and the devices that JAX sees of a chip.
TPUS = {
    'v4': ('tpu-v4-podslice', 1),
    'v5e': ('tpu-v5-lite-podslice', 1),
    'v5p': ('tpu-v5p-slice', 1),
    'v6e': ('tpu-v6e-slice', 1),
    'tpu7x': ('tpu7x', 2),
}
PORT = 8476
POLL_SECONDS = 10
CONTAINER = 'train'


def size(args) -> tuple[int, int]:
  """Returns the number of devices, and of slices."""
  if bool(args.topology) == bool(args.gpu):
    raise RequestError('pass one of --topology (TPUs) and --gpu')
  if not args.image:
    raise RequestError('pass --image, a container image with this repository '
                       'as its working directory')
  if args.logs:
    raise RequestError(f'--logs is {args.logs!r}, but Kubernetes keeps the '
                       'output of each pod: leave it out, and see kubectl logs')
  job_lib.positive(args, 'slices', 'nodes', 'grace_seconds')
  if args.gpu:
    return args.nodes * _gpu(args)[1], 1
  kind, shape = _topology(args)
  return math.prod(shape) * args.slices * TPUS[kind][1], args.slices


def launch(job: job_lib.Job, args) -> int:
  import yaml
  text = yaml.safe_dump(jobset(job, args), sort_keys=False)
  if job.dry_run:
    print(text + '# would be given to: kubectl apply -f -')
    return 0
  programs.need('kubectl')
  print(programs.ask(['kubectl', 'apply', '-f', '-'], text), end='')
  print(f'to end it: kubectl delete jobset {job.name} -n {args.namespace}',
        flush=True)
  return _follow(job, args.namespace) if args.tail else 0


def _follow(job: job_lib.Job, namespace: str) -> int:
  """Shows process 0, over all starts, until the JobSet has ended or is deleted;
  returns 0 if it is complete."""
  which = ','.join((f'jobset.sigs.k8s.io/jobset-name={job.name}',
                    'jobset.sigs.k8s.io/job-index=0',
                    'batch.kubernetes.io/job-completion-index=0'))
  shown = set()  # each start has a pod of another name
  while True:
    _, pods = _kubectl('get', 'pod', '-n', namespace, '-l', which, '-o', 'name')
    for pod in pods.split():
      if pod not in shown and subprocess.run(
          ['kubectl', 'logs', '-f', '-n', namespace, pod],
          check=False).returncode == 0:
        shown.add(pod)
    is_there, state = _kubectl('get', 'jobset', job.name, '-n', namespace, '-o',
                               'jsonpath={.status.terminalState}')
    if state or not is_there:
      print(f'{job.name}: {state or "deleted"}')
      return 0 if state == 'Completed' else 1
    time.sleep(POLL_SECONDS)


def _kubectl(*words: str) -> tuple[bool, str]:
  """Returns whether what was asked for is there, and the answer."""
  result = subprocess.run(['kubectl', *words], capture_output=True, text=True,
                          check=False)
  is_there = 'NotFound' not in result.stderr
  if result.returncode and is_there:
    print(result.stderr, end='', file=sys.stderr)
  return is_there, result.stdout.strip()


def _topology(args) -> tuple[str, tuple[int, ...]]:
  """Returns the kind of TPU and the shape, of those that a slice can have."""
  kind = args.topology.partition(':')[0]
  if kind not in TPUS:
    raise RequestError(f'--topology is {args.topology!r}: choose '
                       f'{", ".join(TPUS)} with its chips, as v5e:4x4 or '
                       'v5p:4x4x8; GPUs have --gpu')
  return kind, chips.parse(args.topology, args.slices).shape


def _volume(args) -> tuple[str, str]:
  """Returns the claim of --pvc and where it is mounted; '': there is none."""
  claim, _, path = args.pvc.partition(':')
  if args.pvc and not (claim and path.startswith('/')):
    raise RequestError(f'--pvc is {args.pvc!r}: write CLAIM:/PATH')
  return claim, path


def _gpu(args) -> tuple[str, int]:
  text = args.gpu
  kind, _, count = text.partition(':')
  if not kind or not count.isdecimal() or not int(count):
    raise RequestError(f'--gpu is {text!r}: choose GKE\'s name of it and how '
                       'many a node has, as nvidia-h100-80gb:8')
  return kind, int(count)


def jobset(job: job_lib.Job, args) -> dict:
  """Returns the manifest."""
  job_lib.require_shared(job, 'a bucket (gs://BUCKET/NAME), or a path under '
                         'that of --pvc', _volume(args)[1])
  labels = {}
  if args.queue:
    labels['kueue.x-k8s.io/queue-name'] = args.queue
  if args.priority:
    labels['kueue.x-k8s.io/priority-class'] = args.priority
  return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
      'metadata': {
          'name': job.name, 'namespace': args.namespace, 'labels': labels,
          # Each slice has a node pool for itself.
          'annotations': {} if args.gpu else {
              'alpha.jobset.sigs.k8s.io/exclusive-topology':
                  'cloud.google.com/gke-nodepool'}},
      'spec': {
          'failurePolicy': {
              'maxRestarts': job.max_restarts, 'rules': _jobset_rules()},
          'network': {'enableDNSHostnames': True,
                      'publishNotReadyAddresses': True},
          'replicatedJobs': [{
              'name': 'slice', 'replicas': 1 if args.gpu else args.slices,
              'template': {'spec': _job_spec(job, args)}}]}}


# Of a Job, by exit code; what no rule matches is a failure like any other.
_POD_RULES = (
    {'action': 'FailJob', 'onExitCodes': {
        'containerName': CONTAINER, 'operator': 'In', 'values': [2]}},
    {'action': 'FailJob', 'onExitCodes': {
        'containerName': CONTAINER, 'operator': 'In',
        'values': [job_lib.STOPPED]}},
    {'action': 'FailJob', 'onPodConditions': [
        {'type': 'DisruptionTarget', 'status': 'True'}]},
)


def _jobset_rules() -> list[dict]:
  """Returns what a failed Job means, told by the rule above that matched."""
  return [
      {'name': 'wrongRequest', 'action': 'FailJobSet',
       'onJobFailureReasons': ['PodFailurePolicy'],
       'onJobFailureMessagePatterns': ['matching FailJob rule at index 0$']},
      {'name': 'preempted', 'action': 'RestartJobSetAndIgnoreMaxRestarts',
       'onJobFailureReasons': ['PodFailurePolicy'],
       'onJobFailureMessagePatterns': [
           'matching FailJob rule at index [12]$']}]


def _job_spec(job: job_lib.Job, args) -> dict:
  if args.gpu:
    kind, per_host = _gpu(args)
    hosts, resource = args.nodes, 'nvidia.com/gpu'
    nodes = {'cloud.google.com/gke-accelerator': kind}
  else:
    kind, shape = _topology(args)
    count, resource = math.prod(shape), 'google.com/tpu'
    per_host = args.chips_per_host or min(4, count)
    if count % per_host:
      raise RequestError(
          f'--chips_per_host is {per_host}, which does not divide the {count} '
          f'chips of --topology {args.topology}')
    hosts = count // per_host
    nodes = {'cloud.google.com/gke-tpu-accelerator': TPUS[kind][0],
             'cloud.google.com/gke-tpu-topology': 'x'.join(map(str, shape))}
  if args.spot:
    nodes['cloud.google.com/gke-spot'] = 'true'
  pod = {
      'restartPolicy': 'Never', 'nodeSelector': nodes,
      'terminationGracePeriodSeconds': args.grace_seconds,
      'containers': [{
          'name': CONTAINER, 'image': args.image,
          # Not through a shell: SIGTERM is for train.py.
          'command': [*job.words, *([] if args.gpu else ['--cluster'])],
          'env': [{'name': k, 'value': v} for k, v in job.env.items()]
                 + (_gpu_env(job, hosts) if args.gpu else []),
          'resources': {'limits': {resource: per_host}}}]}
  volumes = {}  # by the path that they are mounted at
  if args.gpu:  # Docker gives 64 MiB, of which NCCL needs more
    volumes['/dev/shm'] = {'name': 'shm', 'emptyDir': {'medium': 'Memory'}}
  if args.pvc:
    claim, path = _volume(args)
    volumes[path] = {'name': 'shared',
                     'persistentVolumeClaim': {'claimName': claim}}
  if volumes:
    pod['volumes'] = list(volumes.values())
    pod['containers'][0]['volumeMounts'] = [
        {'name': volume['name'], 'mountPath': path}
        for path, volume in volumes.items()]
  return {'parallelism': hosts, 'completions': hosts,
          'completionMode': 'Indexed', 'backoffLimit': 0,
          'podFailurePolicy': {'rules': list(_POD_RULES)},
          'template': {'spec': pod}}


def _gpu_env(job: job_lib.Job, hosts: int) -> list[dict]:
  """Returns who a pod is; TPU pods hear it from GKE (--cluster)."""
  def field(name, path):
    return {'name': name, 'valueFrom': {'fieldRef': {'fieldPath': path}}}
  return [
      field('POD_IP', 'status.podIP'),
      field('JAX_PROCESS_ID', "metadata.annotations['batch.kubernetes.io/"
            "job-completion-index']"),
      {'name': 'JAX_NUM_PROCESSES', 'value': str(hosts)},
      {'name': 'JAX_COORDINATOR_ADDRESS',
       'value': f'{job.name}-slice-0-0.{job.name}:{PORT}'},
      # Its own name may not be known yet when process 0 listens on it.
      {'name': 'JAX_COORDINATOR_BIND_ADDRESS', 'value': f'$(POD_IP):{PORT}'}]
