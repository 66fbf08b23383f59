r"""Starts a run on all workers of one or more TPU VMs, over ssh.

  python -m tools.launch tpu_vm --tpu=POD --zone=ZONE --folder=archetype \
      --config configs/gpt.py:gpt2 --workdir gs://BUCKET/a
  python -m tools.launch tpu_vm --tpu=POD-0,POD-1 --zone=ZONE --dry_run \
      --config configs/mixtral.py:8x7b --workdir gs://BUCKET/b \
      --config.mesh.fsdp=8 --config.mesh.expert=8 --config.data.batch_size=256

Several names are the slices of one run, in their order. --folder is where this
repository lies on each worker. Runs from here, through tpu_vm.sh: Ctrl-C lets
the run save and leave. A slice that is preempted is waited for, then the run is
started again. What each slice has shown here is kept in --logs (default:
logs/NAME here); the other workers write process-SLICE-WORKER.log in --folder.
"""

import os
import pathlib
import shlex

from common.errors import RequestError, require
from tools.launch import job as job_lib
from training.workdir import storage

# (kind, name, default, what it says).
FLAGS = (
    ('list', 'tpu', [], 'The name of the TPU VM; of several slices, that of '
     'each.'),
    ('string', 'zone', '', 'The zone of Google Cloud.'),
    ('string', 'project', '', 'The project of Google Cloud; default: that of '
     'gcloud.'),
    ('string', 'folder', 'archetype', 'The folder of the repository on the '
     'workers, from the home folder.'),
    ('string', 'setup', '', 'A line of shell that each worker runs first.'),
)

SCRIPT = pathlib.Path(__file__).with_name('tpu_vm.sh')
WAIT_SECONDS = 30
# The shell of each worker: it says who the worker is and how it ended. Only
# worker 0 of slice 0 writes to the terminal; each of the others into a file of
# its own.
_REMOTE = r'''cd {folder} || exit 1
{setup}
worker=$(curl -s -H 'Metadata-Flavor: Google' \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
if [ "$slice-$worker" != 0-0 ]; then exec >"process-$slice-$worker.log" 2>&1; fi
env {command} --cluster &
pid=$!
echo $pid >train.pid.new && mv train.pid.new train.pid  # never half written
wait $pid
code=$?
echo "slice $slice, worker $worker: exit code $code"
exit $code
'''


def size(args) -> int:
  """Returns the number of devices, which only the TPU knows: 0."""
  require(bool(args.tpu and args.zone), 'pass --tpu, the name of the TPU VM '
          '(or of each slice), and --zone')
  return 0


def launch(job: job_lib.Job, args) -> int:
  """Becomes the program that starts the run; returns only if --dry_run."""
  command = words(job, args)
  if job.dry_run:
    print(shlex.join(command))
    return 0
  job_lib.require_programs('gcloud', 'bash')
  os.execvp('bash', command)


def words(job: job_lib.Job, args) -> list[str]:
  """Returns the command that runs here and starts the job on the TPU's workers.

  Args:
    job: the job.
    args: the flags of the launcher.

  Raises:
    RequestError: where a folder is not one that the workers can use.
  """
  _check_shared('--workdir', job.workdir)
  _check_shared('--compile_cache', job.env['JAX_COMPILATION_CACHE_DIR'])
  # Quotes would keep a ~ from being the home folder, where a worker begins.
  folder = args.folder.removeprefix('~/')
  if not folder or folder.startswith(('~', '-')):
    raise RequestError(f'--folder is {args.folder!r}: choose a whole path, or '
                       'one from the home folder')

  # The commands that start and that stop it on a worker.
  env = [f'{name}={value}' for name, value in job.env.items()]
  quoted = shlex.quote(folder)
  start = _REMOTE.format(folder=quoted, setup=args.setup,
                         command=shlex.join([*env, *job.words]))
  stop = f'kill -TERM "$(cat {quoted}/train.pid)"'

  place = [','.join(args.tpu), f'--zone={args.zone}']
  if args.project:
    place.append(f'--project={args.project}')
  return ['bash', str(SCRIPT), args.logs or f'logs/{job.name}',
          str(job.max_restarts), str(WAIT_SECONDS), start, stop, *place]


def _check_shared(name: str, folder: str) -> None:
  """Raises RequestError where hosts may not find a folder at one place."""
  require(storage.is_in_bucket(folder) or os.path.isabs(folder), f'{name} is '
          f'{folder!r}, and every host must find it at the same place: '
          'choose a bucket (gs://BUCKET/NAME), or a whole path that all of '
          'them mount')
