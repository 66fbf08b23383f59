r"""Starts a run on SLURM: writes a batch script, submits it, shows process 0.

  python -m tools.launch slurm --nodes=4 --setup='. .venv/bin/activate' \
      --sbatch='--partition=a100 --time=24:00:00 --mem=0' \
      --config configs/gpt.py:gpt2-xl --workdir runs/a --dry_run

One process a node by default, with all of its GPUs; --per_gpu: one a GPU.
Before the time limit, and at a preemption, the run saves and its job is queued
again. The workdir must be on storage that all nodes share. The script lies in
WORKDIR/logs, with the output of each process.
"""

import os
import pathlib
import shlex
import subprocess
import sys
import time

from configs.errors import RequestError, require
from tools.launch import job as job_lib
from tools.launch import programs, sbatch

# (kind, name, default, what it says).
FLAGS = (
    ('integer', 'nodes', 1, 'How many.'),
    ('integer', 'gpus', 8, 'GPUs of each node; 0: run on its CPU.'),
    ('bool', 'per_gpu', False, 'One process for each GPU.'),
    ('integer', 'cpus_per_task', 0, 'CPU cores of each process; 0: what SLURM '
     'gives it, often a single one.'),
    ('integer', 'grace_seconds', 300,
     'The run is told to save so long before the time limit.'),
    ('string', 'setup', '', 'A line of shell that each process runs first.'),
    ('string', 'sbatch', '', 'More options of sbatch, in one string.'),
    ('bool', 'tail', True, 'Show the output of process 0.'),
)

POLL_SECONDS = 10
MOST_GRACE_SECONDS = 65535  # that --signal takes
# The port follows from the job's number, so that two jobs may share a node.
_SCRIPT = r'''#!/bin/bash
{directives}

# Written by python -m tools.launch slurm.
cd {folder} || exit 1
logs={logs}
mkdir -p "$logs"
{exports}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((61000 + SLURM_JOB_ID % 4000))
export JAX_COORDINATOR_ADDRESS="${{nodes%%$'\n'*}}:$port"
export JAX_NUM_PROCESSES={processes}

# A limit that is the partition's own is known only here.
limit=$((${{SLURM_JOB_END_TIME:-0}} - ${{SLURM_JOB_START_TIME:-0}}))
if [ "$limit" -gt 0 ] && [ "$limit" -lt {least_seconds} ]; then
  echo "the time limit is $limit s, and the run is told to save {grace} s" \
    "before its end (--grace_seconds): choose {least_seconds} s or more"
  exit 2
fi

# SIGTERM is for the processes, who save; this script must outlive them.
trap 'echo "SIGTERM: the processes save and leave"' TERM
# --kill-on-bad-exit=0: the processes end each other, with a sentence, and what
# has not joined them yet is ended by --wait.
# shellcheck disable=SC2016 # the variables are those of each process
srun --kill-on-bad-exit=0 --wait=60{cores} \
  --output="${{logs//%/%%}}/process-%t.log" \
  bash -c {process} process {command} &
step=$!
while true; do
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break
done

# After scancel, which ends it for good, the job is COMPLETING.
again() {{
  case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) in
    COMPLETING|CANCELLED) echo "$1: cancelled" ;;
    *) echo "$1: queued again"; scontrol requeue "$SLURM_JOB_ID" ;;
  esac
}}

# The number of a job outlives its being queued again.
failed="$logs/failures-$SLURM_JOB_ID"
failures=$(cat "$failed" 2>/dev/null || echo 0)
case $code in
  0)
    echo 'complete'
    rm -f "$failed"
    ;;
  {stopped})
    again 'stopped before the last step'
    ;;
  2)
    echo "it would end so again: see $logs/process-0.log"
    ;;
  *)
    echo $((failures + 1)) >"$failed"
    if [ "$failures" -lt {max_restarts} ]; then
      again "failed with exit code $code"
    else
      echo "failed with exit code $code: giving up"
    fi
    ;;
esac
exit "$code"
'''


def size(args) -> tuple[int, int]:
  """Returns the number of devices, and of slices."""
  job_lib.positive(args, 'nodes', 'grace_seconds')
  require(args.grace_seconds <= MOST_GRACE_SECONDS, '--grace_seconds is '
          f'{args.grace_seconds}: choose {MOST_GRACE_SECONDS} or less')
  require(args.cpus_per_task >= 0, '--cpus_per_task is '
          f'{args.cpus_per_task}: choose 0 or more')
  if args.gpus < 0:
    raise RequestError(f'--gpus is {args.gpus}: choose 0 or more')
  if args.per_gpu and not args.gpus:
    raise RequestError('--per_gpu asks for a process for each GPU, and --gpus '
                       'is 0: choose 1 or more')
  return args.nodes * max(args.gpus, 1), 1


def launch(job: job_lib.Job, args) -> int:
  job_lib.require_here(job)
  text = script(job, args)
  path = pathlib.Path(job.logs).absolute() / 'job.sh'
  if job.dry_run:
    print(f'{text}\n# would be written to {path}, and then: sbatch '
          + shlex.quote(str(path)))
    return 0
  programs.need('sbatch', 'squeue')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  log = path.with_name('process-0.log')
  log.touch()
  number = programs.ask(['sbatch', '--parsable', str(path)])
  number = number.strip().partition(';')[0]  # what follows is the cluster
  print(f'job {number}; its output: {path.parent}; to end it: '
        f'scancel {number}', flush=True)
  if args.tail:
    _show(log, number)
  return 0


def _show(log: pathlib.Path, number: str) -> None:
  """Shows the log, over all starts, until the job has left the queue."""
  tail = subprocess.Popen(['tail', '-n', '0', '-F', log])
  try:
    while _is_queued(number):
      time.sleep(POLL_SECONDS)
  except KeyboardInterrupt:
    print(f'job {number} goes on', file=sys.stderr)
  finally:
    tail.terminate()
    tail.wait()


def _is_queued(number: str) -> bool:
  result = subprocess.run(['squeue', '--noheader', f'--jobs={number}'],
                          capture_output=True, text=True, check=False)
  if result.returncode:  # an old number, or nobody has answered
    return 'Invalid job id' not in result.stderr
  return bool(result.stdout.strip())


def script(job: job_lib.Job, args) -> str:
  """Returns the batch script."""
  per_node = args.gpus if args.per_gpu else 1
  extra = sbatch.options(args.sbatch)
  sbatch.check_time(extra, args.grace_seconds)
  log = sbatch.file_name(f'{os.path.abspath(job.logs)}/job.log')
  cores = ([f'--cpus-per-task={args.cpus_per_task}'] if args.cpus_per_task
           else [])
  directives = [
      f'--job-name={job.name}', f'--nodes={args.nodes}',
      f'--ntasks-per-node={per_node}', *cores,
      *([f'--gpus-per-node={args.gpus}'] if args.gpus else []),
      f'--signal=TERM@{args.grace_seconds}', '--requeue', '--open-mode=append',
      f'--output={log}']
  lines = [*map(sbatch.line, directives),
           *(sbatch.line(*option.words) for option in extra)]
  who = ['JAX_PROCESS_ID=$SLURM_PROCID']
  if args.per_gpu:
    who.append('JAX_LOCAL_DEVICE_IDS=$SLURM_LOCALID')
  process = '\n'.join([*([args.setup] if args.setup else []),
                       f'export {" ".join(who)}; exec "$@"'])
  return _SCRIPT.format(
      directives='\n'.join(lines),
      # Since SLURM 22.05 srun does not take it from the job.
      cores=''.join(f' {option}' for option in cores),
      least_seconds=sbatch.least_seconds(args.grace_seconds),
      grace=args.grace_seconds,
      folder=shlex.quote(os.getcwd()), logs=shlex.quote(job.logs),
      process=shlex.quote(process), exports=job_lib.exports(job.env),
      processes=args.nodes * per_node,
      command=job.command, stopped=job_lib.STOPPED,
      max_restarts=job.max_restarts)
