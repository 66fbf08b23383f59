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

from absl import flags

from common.errors import RequestError, require
from tools.launch import job as job_lib
from training.workdir import storage

# (type, name, default, help text).
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
# The shell commands that each worker runs. They end with a line that says which
# worker it is and how it ended. Only worker 0 of slice 0 writes to the
# terminal, and each other worker into a file of its own.
_SHELL_OF_WORKER = r'''cd {folder} || exit 1
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


def count_devices(args: flags.FlagValues) -> int:
  """Returns 0 for the number of devices, which only the TPU knows.

  Raises:
    RequestError: if the flags do not name a TPU VM and its zone.
  """
  require(bool(args.tpu and args.zone), 'pass --tpu, the name of the TPU VM '
          '(or of each slice), and --zone')
  return 0


def launch(job: job_lib.Job, args: flags.FlagValues) -> int:
  """Starts a job on TPU VMs, or prints the command.

  This process is replaced by the command, so that it returns only with
  `dry_run`.

  Args:
    job: the job; with `dry_run`, the command is printed and not run.
    args: the flags of the launcher.

  Returns:
    The exit code of this program, 0, with `dry_run`.

  Raises:
    RequestError: if gcloud or bash is not installed here.
  """
  command = command_to_launch(job, args)
  if job.dry_run:
    print(shlex.join(command))
    return 0
  job_lib.require_programs('gcloud', 'bash')
  os.execvp('bash', command)


def command_to_launch(job: job_lib.Job, args: flags.FlagValues) -> list[str]:
  """Returns the command that runs here and starts the job on the TPU's workers:
  the script tpu_vm.sh, with the shell commands that each worker runs.

  Args:
    job: the job.
    args: the flags of the launcher.

  Returns:
    The words of the command.

  Raises:
    RequestError: for a folder that the workers cannot use.
  """
  # All workers must find the same folders.
  _check_hosts_share_folder('--workdir', job.workdir)
  compile_cache = job.env['JAX_COMPILATION_CACHE_DIR']
  _check_hosts_share_folder('--compile_cache', compile_cache)
  # Quotes would keep a ~ from being the home folder, where a worker begins.
  folder = args.folder.removeprefix('~/')
  if not folder or folder.startswith(('~', '-')):
    raise RequestError(f'--folder is {args.folder!r}: choose a whole path, or '
                       'one from the home folder')

  # The commands that start and stop the run on a worker. The first one writes
  # the number of the run's process to train.pid, which the second one reads.
  env = [f'{name}={value}' for name, value in job.env.items()]
  quoted_folder = shlex.quote(folder)
  start = _SHELL_OF_WORKER.format(
      folder=quoted_folder, setup=args.setup,
      command=shlex.join([*env, *job.words]))
  stop = f'kill -TERM "$(cat {quoted_folder}/train.pid)"'

  # tpu_vm.sh takes these arguments in this order, and passes the last ones on
  # to gcloud.
  tpu_options = [','.join(args.tpu), f'--zone={args.zone}']
  if args.project:
    tpu_options.append(f'--project={args.project}')
  return ['bash', str(SCRIPT), args.logs or f'logs/{job.name}',
          str(job.max_restarts), str(WAIT_SECONDS), start, stop, *tpu_options]


def _check_hosts_share_folder(name: str, folder: str) -> None:
  """Raises RequestError for a folder that not all hosts find by the same name.

  Args:
    name: the flag that names the folder.
    folder: the path of the folder.
  """
  require(storage.is_in_bucket(folder) or os.path.isabs(folder), f'{name} is '
          f'{folder!r}, and every host must find it at the same place: '
          'choose a bucket (gs://BUCKET/NAME), or a whole path that all of '
          'them mount')
