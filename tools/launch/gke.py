r"""Starts a run on GKE: a JobSet, queued by Kueue, shows process 0.

  python -m tools.launch gke --topology=v5p:4x4x4 --slices=2 \
      --image=my-image --queue=my-queue \
      --config configs/mixtral.py:8x7b --workdir gs://BUCKET/a \
      --config.mesh.fsdp=8 --config.mesh.expert=8 --config.data.batch_size=256
  python -m tools.launch gke --gpu=nvidia-h100-mega-80gb:8 --nodes=4 \
      --image=my-image --pvc=my-claim:/data --workdir /data/a \
      --config configs/gpt.py:gpt2-xl --config.mesh.fsdp=8

The image holds this repository in its working directory. Needs JobSet 0.10 or
later, which can tell one exit code from another. A preempted run is started
again as a whole, and so is a failed one, --max_restarts times. The name of the
JobSet ends in a digest of the workdir: a second one for the same workdir is
refused while the first is there.
"""

import dataclasses
import subprocess
import sys
import time

from configs.errors import RequestError
from tools.launch import job as job_lib
from tools.launch import estimate, jobset, pods, programs
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
    ('string', 'service_account', '', 'Of Kubernetes, that the pods run as; '
     'its rights to the bucket are GKE\'s Workload Identity\'s.'),
    ('string', 'cpu', '', 'Asked for by each pod, as 96 or 1500m.'),
    ('string', 'memory', '', 'Asked for by each pod, as 400Gi.'),
    ('bool', 'spot', False, 'On spot nodes.'),
    ('integer', 'grace_seconds', 300, 'Between SIGTERM and SIGKILL.'),
    ('bool', 'tail', True, 'Show the output of process 0.'),
    *estimate.FLAGS,
)

# GKE's names of GPUs, of those whose memory tools/plan/chips.py knows.
GPUS = {
    'nvidia-a100-80gb': 'a100', 'nvidia-h100-80gb': 'h100',
    'nvidia-h100-mega-80gb': 'h100', 'nvidia-h200-141gb': 'h200',
    'nvidia-b200': 'b200',
}
POLL_SECONDS = 10


def size(args) -> tuple[int, int, chips.Chip | None]:
  """Returns the number of devices, that of slices, and what a device is."""
  if bool(args.topology) == bool(args.gpu):
    raise RequestError('pass one of --topology (TPUs) and --gpu')
  if not args.image:
    raise RequestError('pass --image, a container image with this repository '
                       'as its working directory')
  if args.logs:
    raise RequestError(f'--logs is {args.logs!r}, but Kubernetes keeps the '
                       'output of each pod: leave it out, and see kubectl logs')
  pods.check(args)
  estimate.check(args)
  if args.gpu:
    kind, count = pods.gpu(args)
    if kind not in GPUS:
      print(f'the memory of {kind} is not known here (of '
            f'{", ".join(GPUS)} it is): not compared with what the run needs',
            file=sys.stderr)
      return args.nodes * count, 1, None
    return args.nodes * count, 1, chips.CHIPS[GPUS[kind]]
  _, slices = pods.topology(args)
  return slices.devices, slices.slices, slices.chip


def place(args) -> estimate.Place:
  """Returns what the flags ask for, as tools.plan names it where it can."""
  if not args.gpu:
    kind, slices = pods.topology(args)
    return estimate.Place(
        slices.chips, slices.devices, f'{kind}, {args.slices} x '
        + 'x'.join(map(str, slices.shape)), slices.chip, args.topology,
        args.slices)
  kind, count = pods.gpu(args)
  known = GPUS.get(kind, '')
  return estimate.Place(
      args.nodes * count, args.nodes * count, f'{kind}, {args.nodes} x {count}',
      chips.CHIPS[known] if known else None,
      # What tools.plan has hosts of.
      f'{known}:1x{args.nodes}x{count}' if known and count in (1, 2, 4, 8)
      else '')


def launch(job: job_lib.Job, args) -> int:
  import yaml
  claim, _ = pods.volume(args)
  if claim:
    job = dataclasses.replace(job, name=job_lib.named(job.workdir, claim))
  text = yaml.safe_dump(jobset.jobset(job, args), sort_keys=False)
  if job.dry_run:
    told = estimate.text(place(args), job.config, job.words, args)
    print(f'{text}# would be given to: kubectl create -f -\n{told}')
    return 0
  programs.need('kubectl')
  delete = f'kubectl delete jobset {job.name} -n {args.namespace}'
  # Not apply, which would change a JobSet of this name that is there already.
  print(programs.ask(['kubectl', 'create', '-f', '-'], text,
                     f'where {job.name} exists already, this workdir has a '
                     f'JobSet: {delete} ends it'), end='')
  print(f'to end it: {delete}', flush=True)
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
