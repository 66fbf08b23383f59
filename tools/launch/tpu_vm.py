r"""Starts a run on all workers of one or more TPU VMs, over ssh.

  python -m tools.launch tpu_vm --tpu=POD --zone=ZONE --folder=archetype \
      --config configs/gpt.py:gpt2 --workdir gs://BUCKET/a
  python -m tools.launch tpu_vm --tpu=POD-0,POD-1 --zone=ZONE --dry_run \
      --config configs/mixtral.py:8x7b --workdir gs://BUCKET/b \
      --config.mesh.fsdp=8 --config.mesh.expert=8 --config.data.batch_size=256

Several names are the slices of one run, in their order. --folder is where this
repository lies on each worker. Runs from here, through a script: Ctrl-C lets
the run save and leave. A slice that is preempted is waited for, then the run is
started again. The script and what each slice has shown here are kept in --logs
(default: logs/NAME here); the other workers write process-SLICE-WORKER.log in
--folder.
"""

import os
import pathlib
import shlex

from configs.errors import RequestError, require
from tools.launch import job as job_lib
from tools.launch import programs

# (kind, name, default, what it says).
FLAGS = (
    ('list', 'tpu', [], 'The name of the TPU VM; several: of each slice.'),
    ('string', 'zone', '', 'Of Google Cloud.'),
    ('string', 'project', '', 'Of Google Cloud; default: gcloud\'s.'),
    ('string', 'folder', 'archetype', 'Of the repository, on the workers; from '
     'the home folder.'),
    ('string', 'setup', '', 'A line of shell that each worker runs first.'),
)

# libtpu's default port between slices.
_MEGASCALE_PORT = 8081
# On each worker: who it is, what it prints, and how it ended. Only worker 0 of
# slice 0 writes to the terminal; each of the others into a file of its own.
_REMOTE = r'''cd {folder} || exit 1
{setup}
{exports}
worker=$(curl -s -H 'Metadata-Flavor: Google' \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
if [ "$slice-$worker" != 0-0 ]; then exec >"process-$slice-$worker.log" 2>&1; fi
{command} --cluster &
pid=$!
echo $pid >train.pid.new && mv train.pid.new train.pid  # never half written
wait $pid
code=$?
echo "slice $slice, worker $worker: exit code $code"
exit $code
'''
_SCRIPT = r'''#!/bin/bash
# Written by python -m tools.launch tpu_vm.
names=({names})
where=({where})
logs={logs}
mkdir -p "$logs"
# shellcheck disable=SC2016 # the variables are those of each worker
remote={remote}
# shellcheck disable=SC2016
tell={tell}

on() {{  # NAME WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$1" "${{where[@]}}" --worker="$2" \
    --command="$3"
}}

describe() {{  # NAME FORMAT
  gcloud compute tpus tpu-vm describe "$1" "${{where[@]}}" --format="value($2)"
}}

stopping=0
running=0
pause=  # the process that is waited for while no run is under way
stop() {{
  stopping=1
  if [ "$running" = 1 ]; then
    echo 'the run saves and leaves'
    on "${{names[0]}}" 0 "$tell"
  elif [ -n "$pause" ]; then
    kill "$pause" 2>/dev/null
  fi
}}
trap stop INT TERM

run() {{  # sets code, to that of worker 0 of slice 0
  local coordinator pids=() i pid
  coordinator=$(describe "${{names[0]}}" 'networkEndpoints[0].ipAddress')
  for i in "${{!names[@]}}"; do
    local who="export slice=$i;"
    if [ "${{#names[@]}}" -gt 1 ]; then
      who+=" export MEGASCALE_COORDINATOR_ADDRESS=$coordinator:{port}"
      who+=" MEGASCALE_NUM_SLICES=${{#names[@]}} MEGASCALE_SLICE_ID=$i;"
    fi
    # In the background, so that Ctrl-C is for this script alone.
    on "${{names[$i]}}" all "$who $remote" 2>&1 | if [ "$i" = 0 ]; then
      tee -i "$logs/slice-0.log"
    else
      cat >"$logs/slice-$i.log"
    fi &
    pids+=($!)
  done
  for pid in "${{pids[@]}}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  done
  code=$(sed -n 's/.*slice 0, worker 0: exit code \([0-9]*\).*/\1/p' \
    "$logs/slice-0.log" | tail -n 1)
  code=${{code:-1}}  # the host was lost
}}

leave() {{  # if a signal came while nothing ran
  if [ "$stopping" = 1 ]; then
    if [ -n "$pause" ]; then kill "$pause" 2>/dev/null; fi
    echo 'stopped while no run was under way'
    exit 0
  fi
}}

failures=0
while true; do
  for name in "${{names[@]}}"; do
    until [ "$(describe "$name" state)" = READY ]; do
      leave
      echo "waiting for $name"
      sleep {wait} &
      pause=$!
      leave
      wait "$pause"
      pause=
    done
  done
  running=1
  leave
  run
  running=0
  case $code in
    0) exit 0 ;;
    2) exit 2 ;;
    {stopped})
      if [ "$stopping" = 1 ]; then exit 0; fi
      echo 'stopped before the last step: starting it again'
      ;;
    *)
      failures=$((failures + 1))
      if [ "$stopping" = 1 ] || [ "$failures" -gt {max_restarts} ]; then
        echo "failed with exit code $code: giving up"
        exit 1
      fi
      echo "failed with exit code $code: starting it again"
      ;;
  esac
done
'''
WAIT_SECONDS = 30


def size(args) -> tuple[int, int]:
  """Returns the number of devices, which only the TPU knows: 0, and slices."""
  if not args.tpu or not args.zone:
    raise RequestError('pass --tpu, the name of the TPU VM (or of each slice), '
                       'and --zone')
  return 0, len(args.tpu)


def launch(job: job_lib.Job, args) -> int:
  text = script(job, args)
  if job.dry_run:
    print(text)
    return 0
  programs.need('gcloud', 'bash')
  folder = _logs(job, args)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'launch.sh'
  path.write_text(text)
  print(f'running {path}', flush=True)
  os.execvp('bash', ['bash', str(path.absolute())])


def _logs(job: job_lib.Job, args) -> pathlib.Path:
  return pathlib.Path(args.logs or f'logs/{job.name}')


def _folder(text: str) -> str:
  """Returns --folder without a ~/ in front, which quotes would keep from being
  the home folder: that is where a worker's shell begins anyway."""
  folder = text.removeprefix('~/')
  require(bool(folder) and not folder.startswith(('~', '-')), f'--folder is '
          f'{text!r}: choose a whole path, or one from the home folder')
  return folder


def script(job: job_lib.Job, args) -> str:
  """Returns the script that runs here."""
  job_lib.require_shared(job, 'a bucket (gs://BUCKET/NAME), or a whole path '
                         'that all of them mount', '/')
  where = [f'--zone={args.zone}']
  if args.project:
    where.append(f'--project={args.project}')
  folder = _folder(args.folder)
  remote = _REMOTE.format(
      folder=shlex.quote(folder), setup=args.setup,
      exports=job_lib.exports(job.env), command=job.command)
  return _SCRIPT.format(
      names=shlex.join(args.tpu), where=shlex.join(where),
      logs=shlex.quote(str(_logs(job, args))), remote=shlex.quote(remote),
      tell=shlex.quote(f'kill -TERM "$(cat {shlex.quote(folder)}/train.pid)"'),
      port=_MEGASCALE_PORT, wait=WAIT_SECONDS,
      stopped=job_lib.STOPPED, max_restarts=job.max_restarts)
