"""The same command as an array of jobs: on SLURM, or on Kubernetes."""

import hashlib
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

from configs.errors import EnvironmentFailure, require
from tools import slurm_array
from tools.launch import pods
from training.workdir import storage

# A pod that was evicted is started again without being counted; a wrong
# request ends all.
RETRIES = 6


def slurm(args: Any) -> int:
  """Submits an array through submitit, as sweeps do."""
  require(not storage.in_bucket(args.logs), f'--logs is {args.logs!r}: choose '
          'a folder that the nodes share')
  commands = [_words(args, [sys.executable], ['--job', str(i)])
              for i in range(args.jobs)]
  print('each job of the array:', shlex.join(commands[0]))
  if not args.dry_run:
    slurm_array.submit(commands, pathlib.Path(
        args.logs or f'logs/{_name(args.out)}'), args.slurm, 'tokenize')
  return 0


def gke(args: Any) -> int:
  """Creates an indexed Job."""
  import yaml
  text = yaml.safe_dump(manifest(args), sort_keys=False)
  if args.dry_run:
    print(text + '# would be given to: kubectl create -f -')
    return 0
  try:
    result = subprocess.run(['kubectl', 'create', '-f', '-'], input=text,
                            text=True, capture_output=True, check=False)
  except FileNotFoundError as error:
    raise EnvironmentFailure(
        'kubectl is not on the PATH of this machine: launch where it is, or '
        'only look at what would be done with --dry_run') from error
  if result.returncode:
    raise EnvironmentFailure(f'kubectl: {" ".join(result.stderr.split())}')
  print(result.stdout, end='')
  return 0


def manifest(args: Any) -> dict[str, Any]:
  """Returns the indexed Job, whose pods are the jobs of the array."""
  require(bool(args.image), 'pass --image, a container image with this '
          'repository as its working directory')
  pods.check_texts(args)
  claim, path = pods.volume(args)
  inside = path and pathlib.PurePath(args.out).is_relative_to(path)
  require(storage.in_bucket(args.out) or bool(inside), '--out is '
          f'{args.out!r}, and every pod must find it at the same place: choose '
          'a bucket (gs://BUCKET/NAME), or a path under that of --pvc')
  asked = {key: getattr(args, key) for key in ('cpu', 'memory')}
  asked = {key: value for key, value in asked.items() if value}
  pod: dict[str, Any] = {
      'restartPolicy': 'Never',
      'containers': [{
          'name': 'tokenize', 'image': args.image,
          'command': [pods.literal(word)
                      for word in _words(args, ['python'], [])]}]}
  if asked:
    pod['containers'][0]['resources'] = {'requests': asked}
  if args.service_account:
    pod['serviceAccountName'] = args.service_account
  if args.pvc:
    pod['volumes'] = [{'name': 'shared', 'persistentVolumeClaim': {
        'claimName': claim}}]
    pod['containers'][0]['volumeMounts'] = [
        {'name': 'shared', 'mountPath': path}]
  labels = {'kueue.x-k8s.io/queue-name': args.queue} if args.queue else {}
  return {
      'apiVersion': 'batch/v1', 'kind': 'Job',
      'metadata': {'name': _name(args.out), 'labels': labels,
                   'namespace': args.namespace},
      'spec': {
          'completions': args.jobs, 'parallelism': args.jobs,
          'completionMode': 'Indexed', 'backoffLimitPerIndex': RETRIES,
          'podFailurePolicy': {'rules': [
              {'action': 'Ignore', 'onPodConditions': [
                  {'type': 'DisruptionTarget', 'status': 'True'}]},
              {'action': 'FailJob', 'onExitCodes': {
                  'containerName': 'tokenize', 'operator': 'In',
                  'values': [2]}}]},
          'template': {'spec': pod}}}


def _words(args: Any, python: list[str], more: list[str]) -> list[str]:
  """Returns the command of a job; which one it is, the array tells it."""
  return [*python, '-m', 'tools.tokenize', args.source, '--out', args.out,
          '--tokenizer', args.tokenizer, '--holdout_every',
          str(args.holdout_every), '--shard_mib', str(args.shard_mib),
          '--processes', str(args.processes), '--jobs', str(args.jobs), *more]


def _name(out: str) -> str:
  """Returns a DNS label, another one for each folder."""
  label = re.sub('[^a-z0-9]+', '-', out.rstrip('/').rpartition('/')[2].lower())
  digest = hashlib.sha256(out.encode()).hexdigest()[:8]
  return f'tokenize-{label.strip("-")[:30]}-{digest}'.replace('--', '-')


LAUNCHERS = {'slurm': slurm, 'gke': gke}
