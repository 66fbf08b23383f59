r"""Starts a run on SLURM: submits a job of slurm.sh.

  python -m tools.launch slurm --nodes=4 --setup='. .venv/bin/activate' \
      --sbatch='--partition=a100 --time=24:00:00 --mem=0' \
      --config configs/gpt.py:gpt2-xl --workdir runs/a --dry_run

One process a node by default, with all of its GPUs; --per_gpu: one a GPU.
Before the time limit, and at a preemption, the run saves and its job is queued
again. The workdir must be on storage that all nodes share. WORKDIR/logs holds
the output of the job and of each process.
"""

import os
import pathlib
import shlex
import subprocess

from absl import flags

from common.errors import EnvironmentFailure, RequestError
from tools.launch import job as job_lib

# (type, name, default, help text, bounds).
FLAGS = (
    ('integer', 'nodes', 1, 'The number of nodes.', 1),
    ('integer', 'gpus', 8, 'The GPUs of each node; 0: run on its CPU.', 0),
    ('bool', 'per_gpu', False, 'One process for each GPU.'),
    ('integer', 'cpus_per_task', 0, 'CPU cores of each process; 0: what SLURM '
     'gives it, often a single one.', 0),
    ('integer', 'grace_seconds', 300,
     'How long before the time limit the run is told to save.', 1, 65535),
    ('string', 'setup', '', 'A line of shell that each process runs first.'),
    ('string', 'sbatch', '', 'More options of sbatch, in one string; what the '
     'launcher sets itself wins.'),
)

SCRIPT = pathlib.Path(__file__).with_name('slurm.sh')


def count_devices(args: flags.FlagValues) -> int:
  """Returns the number of devices of all nodes together: GPUs, or one CPU for
  each node."""
  if args.per_gpu and not args.gpus:
    raise RequestError('--per_gpu asks for a process for each GPU, and --gpus '
                       'is 0: choose 1 or more')
  return args.nodes * max(args.gpus, 1)


def launch(job: job_lib.Job, args: flags.FlagValues) -> int:
  """Submits a job to SLURM with sbatch, or prints the command.

  Args:
    job: the job; with `dry_run`, the command is printed and not run.
    args: the flags of the launcher.

  Returns:
    The exit code of this program, 0.

  Raises:
    EnvironmentFailure: if sbatch fails; the message holds what it said.
  """
  job_lib.check_folders_are_writable(job)
  command = command_to_launch(job, args)
  if job.dry_run:
    print(shlex.join(command))
    return 0
  job_lib.require_programs('sbatch')

  # The log exists before the job starts, so that it can be followed at once.
  logs = pathlib.Path(job.logs).absolute()
  logs.mkdir(parents=True, exist_ok=True)
  log = logs / 'process-0.log'
  log.touch()
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  if result.returncode:
    reason = ' '.join(result.stderr.split()) or 'it said nothing'
    raise EnvironmentFailure(
        f'sbatch ended with exit code {result.returncode}: {reason}')
  # With --parsable, sbatch prints NUMBER, or NUMBER;CLUSTER.
  job_number = result.stdout.strip().partition(';')[0]
  print(f'job {job_number}; to end it: scancel {job_number}; to see its '
        f'output: tail -n 0 -F {shlex.quote(str(log))}', flush=True)
  return 0


def command_to_launch(job: job_lib.Job, args: flags.FlagValues) -> list[str]:
  """Returns the command that submits a job: sbatch with its options, then the
  script slurm.sh with its arguments, and last the command of the run.

  Args:
    job: the job.
    args: the flags of the launcher.

  Returns:
    The words of the command.

  Raises:
    RequestError: if the quotes of --sbatch are not closed.
  """
  # The user's options of sbatch come first: if an option is given twice, the
  # last one counts.
  try:
    options = shlex.split(args.sbatch)
  except ValueError as error:
    raise RequestError(f'--sbatch is {args.sbatch!r}: {error}') from error

  # The options of the launcher. Before the time limit, SLURM sends SIGTERM, on
  # which the run saves; then the job is queued again, and its next log is added
  # to the first.
  processes_per_node = args.gpus if args.per_gpu else 1
  logs = os.path.abspath(job.logs)
  # sbatch reads % as the start of a placeholder, and %% as the sign itself.
  output = f'{logs}/job.log'.replace('%', '%%')
  options += [
      f'--job-name={job.name}', f'--nodes={args.nodes}',
      f'--ntasks-per-node={processes_per_node}',
      f'--signal=TERM@{args.grace_seconds}', '--requeue',
      '--open-mode=append', f'--output={output}']
  if args.cpus_per_task:
    options.append(f'--cpus-per-task={args.cpus_per_task}')
  if args.gpus:
    options.append(f'--gpus-per-node={args.gpus}')

  # The line of shell in which each process starts. SLURM tells the process its
  # number there.
  variables = 'JAX_PROCESS_ID=$SLURM_PROCID'
  if args.per_gpu:
    variables += ' JAX_LOCAL_DEVICE_IDS=$SLURM_LOCALID'
  shell = f'{args.setup}\nexport {variables}; exec "$@"'

  # slurm.sh takes these arguments in this order.
  num_processes = args.nodes * processes_per_node
  env = [f'{name}={value}' for name, value in job.env.items()]
  return ['sbatch', '--parsable', *options, str(SCRIPT), logs,
          str(num_processes), str(args.grace_seconds),
          str(job.max_restarts), shell, 'env', *env, *job.words]
