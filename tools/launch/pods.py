"""The pods of a run or a sweep on GKE: where they run, what they ask for."""

import pathlib
import re

from configs.errors import RequestError, require
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
CONTAINER = 'train'
SHARED_MEMORY = '/dev/shm'

# How Kubernetes writes an amount, and what it takes for a name or for the value
# of a label: RFC 1123, as its page 'Object Names and IDs' has it.
_AMOUNT = re.compile(r'[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?')
_NAME = re.compile(r'[a-z0-9]([-a-z0-9]*[a-z0-9])?'
                   r'(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')
_VALUE = re.compile(r'[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?')
# Flags that name something, and of how many letters at most: a queue and a
# priority become labels, a namespace is a part of names in DNS.
_NAMES = {'namespace': 63, 'queue': 63, 'priority': 63, 'service_account': 253}
# More than any cluster has, and few enough for the names of pods.
_MOST = {'slices': 1024, 'nodes': 65_000, 'chips_per_host': 8,
         'grace_seconds': 86_400}


def check(args) -> None:
  """Raises RequestError for what the API of Kubernetes would refuse: its
  schemas know neither names nor amounts."""
  job_lib.positive(args, 'slices', 'nodes', 'grace_seconds')
  require(args.chips_per_host >= 0, f'--chips_per_host is '
          f'{args.chips_per_host}: choose 0 or more')
  for flag, mine, theirs in (('--gpu', 'nodes', 'slices'),
                             ('--topology', 'slices', 'nodes')):
    require(not args[flag[2:]].value or args[theirs].value == 1,
            f'--{theirs} is {args[theirs].value}, and {flag} asks for '
            f'{"GPUs" if flag == "--gpu" else "TPUs"}: say with --{mine} how '
            'many')
  for name, most in _MOST.items():
    require(args[name].value <= most,
            f'--{name} is {args[name].value}: choose {most:,} or less')
  check_texts(args)


def check_texts(args) -> None:
  """Raises RequestError for a name or an amount that Kubernetes would refuse:
  of flags that any pod has, whether it trains or not."""
  for name in ('cpu', 'memory'):
    text = getattr(args, name)
    require(not text or _AMOUNT.fullmatch(text) is not None, f'--{name} is '
            f'{text!r}: write an amount of Kubernetes, as 96, 1500m or 400Gi')
  require(bool(args.namespace) and '.' not in args.namespace, '--namespace is '
          f'{args.namespace!r}: choose small letters, digits and dashes')
  for name, most in _NAMES.items():
    text = getattr(args, name, '')
    _check_name(f'--{name}', text, text, most)
  require(not re.search(r'\s', args.image), f'--image is {args.image!r}: a '
          'name of an image has no blanks')
  volume(args)


def _check_name(flag: str, given: str, name: str, most: int) -> None:
  require(not name or len(name) <= most and _NAME.fullmatch(name) is not None,
          f'{flag} is {given!r}: Kubernetes takes {most} small letters, '
          'digits, dashes and dots at most, with a letter or digit at both '
          'ends')


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
  _check_name('--pvc', args.pvc, claim, 253)
  require(':' not in path, f'--pvc is {args.pvc!r}: Kubernetes mounts nothing '
          'at a path with a colon')
  gpu = getattr(args, 'gpu', '')
  require(not gpu or not path or pathlib.PurePosixPath(path)
          != pathlib.PurePosixPath(SHARED_MEMORY), f'--pvc is {args.pvc!r}, '
          f'and the GPUs of a pod exchange data in {SHARED_MEMORY}: choose '
          'another path')
  return claim, path


def gpu(args) -> tuple[str, int]:
  """Returns GKE's name of the GPU, and how many a node has."""
  text = args.gpu
  kind, _, count = text.partition(':')
  if (not count.isdecimal() or not 0 < int(count) <= 64 or len(kind) > 63
      or not _VALUE.fullmatch(kind)):
    raise RequestError(f'--gpu is {text!r}: choose GKE\'s name of it and how '
                       'many a node has, as nvidia-h100-80gb:8')
  return kind, int(count)


def labels(args) -> dict[str, str]:
  """Returns what tells Kueue which queue to take."""
  found = {'kueue.x-k8s.io/queue-name': args.queue,
           'kueue.x-k8s.io/priority-class': args.priority}
  return {name: value for name, value in found.items() if value}


def hosts(args) -> tuple[int, int, str, dict[str, str]]:
  """Returns how many hosts a slice has (or how many nodes of GPUs there are),
  the chips of each, Kubernetes' name of these, and the labels of the nodes."""
  if args.gpu:
    kind, per_host = gpu(args)
    return args.nodes, per_host, 'nvidia.com/gpu', {
        'cloud.google.com/gke-accelerator': kind}
  kind, slices = topology(args)
  count = slices.chips // args.slices
  per_host = args.chips_per_host or min(4, count)
  if count % per_host:
    raise RequestError(
        f'--chips_per_host is {per_host}, which does not divide the {count} '
        f'chips of --topology {args.topology}')
  return count // per_host, per_host, 'google.com/tpu', {
      'cloud.google.com/gke-tpu-accelerator': TPUS[kind],
      'cloud.google.com/gke-tpu-topology': 'x'.join(map(str, slices.shape))}


def pod(command: list[str], env: list[dict], args) -> dict:
  """Returns a pod's template.

  Args:
    command: its words, as the program is to hear them.
    env: of Kubernetes' form: what each process finds in its environment.
    args: the flags.
  """
  nodes, chip = {}, {}
  if args.gpu or args.topology:
    _, per_host, resource, nodes = hosts(args)
    chip = {resource: per_host}
  if args.spot:
    nodes['cloud.google.com/gke-spot'] = 'true'
  asked = {'cpu': args.cpu, 'memory': args.memory}
  resources = {
      'limits': chip,
      'requests': {key: value for key, value in asked.items() if value}}
  made = {
      'restartPolicy': 'Never', 'nodeSelector': nodes,
      'terminationGracePeriodSeconds': args.grace_seconds,
      'containers': [{
          'name': CONTAINER, 'image': args.image,
          # Not through a shell: SIGTERM is for the program.
          'command': [literal(word) for word in command], 'env': env,
          'resources': {k: v for k, v in resources.items() if v}}]}
  if args.service_account:
    made['serviceAccountName'] = args.service_account
  volumes = {}  # by the path that they are mounted at
  if args.gpu:  # Docker gives 64 MiB, of which NCCL needs more
    volumes[SHARED_MEMORY] = {'name': 'shm', 'emptyDir': {'medium': 'Memory'}}
  if args.pvc:
    claim, path = volume(args)
    volumes[path] = {'name': 'shared',
                     'persistentVolumeClaim': {'claimName': claim}}
  if volumes:
    made['volumes'] = list(volumes.values())
    made['containers'][0]['volumeMounts'] = [
        {'name': volume['name'], 'mountPath': path}
        for path, volume in volumes.items()]
  return {'spec': made}


def environment(env: dict[str, str]) -> list[dict]:
  """Returns an environment as Kubernetes writes it."""
  return [{'name': k, 'value': literal(v)} for k, v in env.items()]


def field(name: str, path: str) -> dict:
  """Returns a variable that holds what Kubernetes knows of the pod."""
  return {'name': name, 'valueFrom': {'fieldRef': {'fieldPath': path}}}


def literal(text: str) -> str:
  """Returns what Kubernetes takes for `text`: it would put variables in place
  of $(NAME), and a dollar in place of two."""
  return text.replace('$', '$$')
