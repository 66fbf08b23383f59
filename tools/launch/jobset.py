"""The manifest of a run on GKE: a JobSet, its pods and what they ask for."""

from configs.errors import RequestError
from tools.launch import job as job_lib
from tools.plan import chips

# The label of their nodes, as
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus has it.
TPUS = {
    'v4': 'tpu-v4-podslice',
    'v5e': 'tpu-v5-lite-podslice',
    'v5p': 'tpu-v5p-slice',
    'v6e': 'tpu-v6e-slice',
    'tpu7x': 'tpu7x',
}
PORT = 8476
CONTAINER = 'train'


def topology(args) -> tuple[str, chips.Topology]:
  """Returns the kind of TPU and the slices, of a shape that they can have."""
  kind = args.topology.partition(':')[0]
  if kind not in TPUS:
    raise RequestError(f'--topology is {args.topology!r}: choose '
                       f'{", ".join(TPUS)} with its chips, as v5e:4x4 or '
                       'v5p:4x4x8; GPUs have --gpu')
  return kind, chips.parse(args.topology, args.slices)


def volume(args) -> tuple[str, str]:
  """Returns the claim of --pvc and where it is mounted; '': there is none."""
  claim, _, path = args.pvc.partition(':')
  if args.pvc and not (claim and path.startswith('/')):
    raise RequestError(f'--pvc is {args.pvc!r}: write CLAIM:/PATH')
  return claim, path


def gpu(args) -> tuple[str, int]:
  """Returns GKE's name of the GPU, and how many a node has."""
  text = args.gpu
  kind, _, count = text.partition(':')
  if not kind or not count.isdecimal() or not int(count):
    raise RequestError(f'--gpu is {text!r}: choose GKE\'s name of it and how '
                       'many a node has, as nvidia-h100-80gb:8')
  return kind, int(count)


def jobset(job: job_lib.Job, args) -> dict:
  """Returns the manifest."""
  job_lib.require_shared(job, 'a bucket (gs://BUCKET/NAME), or a path under '
                         'that of --pvc', volume(args)[1])
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
    kind, per_host = gpu(args)
    hosts, resource = args.nodes, 'nvidia.com/gpu'
    nodes = {'cloud.google.com/gke-accelerator': kind}
  else:
    kind, slices = topology(args)
    count, resource = slices.chips // args.slices, 'google.com/tpu'
    per_host = args.chips_per_host or min(4, count)
    if count % per_host:
      raise RequestError(
          f'--chips_per_host is {per_host}, which does not divide the {count} '
          f'chips of --topology {args.topology}')
    hosts = count // per_host
    nodes = {'cloud.google.com/gke-tpu-accelerator': TPUS[kind],
             'cloud.google.com/gke-tpu-topology':
                 'x'.join(map(str, slices.shape))}
  if args.spot:
    nodes['cloud.google.com/gke-spot'] = 'true'
  pod = {
      'restartPolicy': 'Never', 'nodeSelector': nodes,
      'terminationGracePeriodSeconds': args.grace_seconds,
      'containers': [{
          'name': CONTAINER, 'image': args.image,
          # Not through a shell: SIGTERM is for train.py.
          'command': [*map(_literal, job.words),
                      *([] if args.gpu else ['--cluster'])],
          'env': [{'name': k, 'value': _literal(v)}
                  for k, v in job.env.items()]
                 + (_gpu_env(job, hosts) if args.gpu else []),
          'resources': _resources(resource, per_host, args)}]}
  if args.service_account:
    pod['serviceAccountName'] = args.service_account
  volumes = {}  # by the path that they are mounted at
  if args.gpu:  # Docker gives 64 MiB, of which NCCL needs more
    volumes['/dev/shm'] = {'name': 'shm', 'emptyDir': {'medium': 'Memory'}}
  if args.pvc:
    claim, path = volume(args)
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


def _resources(name: str, count: int, args) -> dict:
  asked = {'cpu': args.cpu, 'memory': args.memory}
  asked = {key: value for key, value in asked.items() if value}
  return {'limits': {name: count}} | ({'requests': asked} if asked else {})


def _literal(text: str) -> str:
  """Returns what Kubernetes takes for `text`: it would put variables in place
  of $(NAME), and a dollar in place of two."""
  return text.replace('$', '$$')


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
