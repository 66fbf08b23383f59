r"""Starts a run as several processes on this machine.

  python -m tools.launch local --processes=2 --devices=2 --platform=cpu \
      --config configs/gpt.py --workdir runs/a --config.mesh.fsdp=2

On a CPU each process has --devices virtual devices; on GPUs, process i has the
GPUs i x devices to (i + 1) x devices - 1, of those that CUDA_VISIBLE_DEVICES
names if it is set. Process 0 writes here, the others to WORKDIR/logs. Ctrl-C,
SIGTERM or the end of the terminal: all finish the step, save and leave, and the
exit code is 75; once more ends them at once. Where this program is killed
(SIGKILL), so are they, on Linux.
"""

import contextlib
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

from tools import dies_with_parent
from tools.launch import job as job_lib
from training.distributed import signals

# (kind, name, default, what it says, bounds).
FLAGS = (
    ('integer', 'processes', 2, 'How many.', 1),
    ('integer', 'devices', 1, 'Devices of each.', 1),
    ('enum', 'platform', '', ('', 'cpu', 'gpu'),
     'Default: $JAX_PLATFORMS, else gpu where there is one.'),
)

PATIENCE_SECONDS = 10  # for the others to end by themselves after one failed
POLL_SECONDS = 0.05
_GPUS = 'CUDA_VISIBLE_DEVICES'


def size(args) -> int:
  """Returns the number of devices."""
  return args.processes * args.devices


def _platform(platform: str) -> str:
  if platform := platform or os.environ.get('JAX_PLATFORMS', ''):
    return 'cpu' if platform == 'cpu' else 'gpu'
  return 'gpu' if os.path.exists('/dev/nvidia0') else 'cpu'


def launch(job: job_lib.Job, args) -> int:
  job_lib.require_here(job)
  kind = _platform(args.platform)
  words = [sys.executable, *job.words[1:]]
  if job.dry_run:
    for env in environments(job.env, args.processes, args.devices, kind,
                            '127.0.0.1:PORT'):
      print(shlex.join([f'{k}={v}' for k, v in env.items()] + words))
    return 0
  return supervise(words, job.env, args.processes, args.devices, kind,
                   job.logs, job.max_restarts)


def environments(env, processes: int, devices: int, kind: str,
                 coordinator: str) -> list[dict[str, str]]:
  """Returns what is added to the environment of each process."""
  result = []
  for i in range(processes):
    process_env = dict(env)
    if processes > 1:
      process_env |= {
          'JAX_COORDINATOR_ADDRESS': coordinator,
          'JAX_NUM_PROCESSES': str(processes), 'JAX_PROCESS_ID': str(i)}
    if kind == 'cpu':
      process_env |= {
          'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS':  # of two, the last counts
              f'{os.environ.get("XLA_FLAGS", "")} '
              f'--xla_force_host_platform_device_count={devices}'}
    elif processes > 1:
      process_env['JAX_LOCAL_DEVICE_IDS'] = ','.join(
          str(i * devices + k) for k in range(devices))
    else:  # JAX reads that only where it joins several
      visible = process_env.get(_GPUS, os.environ.get(_GPUS))
      process_env[_GPUS] = ','.join((
          list(map(str, range(devices))) if visible is None
          else visible.split(','))[:devices])
    result.append(process_env)
  return result


def supervise(words: list[str], env: dict[str, str], processes: int,
              devices: int, kind: str, logs: str, max_restarts: int) -> int:
  """Runs the processes, again where they were preempted or failed.

  Returns:
    0: complete; STOPPED: by a signal to this process; 2: a wrong request, or a
    loss that was not finite: it would end so again; 1: failed once more than
    max_restarts.
  """
  failures, heard = 0, Signals()
  with signals.handled(heard.add):
    while True:
      if heard.n:  # between two runs
        return job_lib.STOPPED
      codes = run(words, environments(env, processes, devices, kind,
                                      f'127.0.0.1:{free_port()}'),
                  pathlib.Path(logs), heard)
      if not any(codes):
        return 0
      stopped = set(codes) <= {0, job_lib.STOPPED, -signal.SIGTERM,
                               -signal.SIGHUP}
      if heard.n or signals.is_unread(1):  # which process 0 prints to
        return job_lib.STOPPED if stopped else 1
      if 2 in codes:
        return 2
      if stopped:
        _say('stopped before the last step: starting it again')
        continue
      failures += 1
      if failures > max_restarts:
        _say(f'failed {failures} times (--max_restarts={max_restarts}): '
             'giving up')
        return 1
      _say(f'failed: starting it again, {failures} of {max_restarts}')


def run(words: list[str], envs: list[dict[str, str]], logs: pathlib.Path,
        heard: 'Signals') -> list[int]:
  """Runs the processes once; returns their exit codes."""
  logs.mkdir(parents=True, exist_ok=True)
  running = []
  for i, env in enumerate(envs):
    with contextlib.nullcontext() if i == 0 else open(
        logs / f'process-{i}.log', 'ab') as out:
      running.append(subprocess.Popen(
          dies_with_parent.words(words), env=os.environ | env, stdout=out,
          stderr=out,
          start_new_session=True))  # so that Ctrl-C is passed on only once
  failed, passed_on, deadline = set(), set(), None
  stopped: set[int] = set()
  while any(process.poll() is None for process in running):
    time.sleep(POLL_SECONDS)
    before, stopped = stopped, _stopped(running)
    for i in sorted(stopped - before):
      _say(f'process {i} is stopped, as by SIGSTOP: the others wait for it, '
           f'and end without it; kill -CONT {running[i].pid} lets it go on')
    for number in heard.to_pass_on - passed_on:
      passed_on.add(number)
      for process in running:
        process.send_signal(number)
    for i, process in enumerate(running):
      code = process.poll()
      if code not in (None, 0, job_lib.STOPPED) and i not in failed:
        failed.add(i)
        deadline = deadline or time.monotonic() + PATIENCE_SECONDS
        how = (f'was killed by {signal.Signals(-code).name}' if code < 0 else
               f'ended with exit code {code}')
        _say(f'process {i} {how}'
             + f'; its output: {logs}/process-{i}.log' * (i > 0))
      elif code is None and deadline and time.monotonic() > deadline:
        failed.add(i)
        process.kill()
        _say(f'process {i} did not end by itself then, and was killed')
  return [process.returncode for process in running]


def _stopped(running: list[subprocess.Popen]) -> set[int]:
  """Returns the numbers of the processes that a signal has stopped, and that
  have not ended."""
  how = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
  return {i for i, process in enumerate(running) if process.poll() is None
          and os.waitid(os.P_PID, process.pid, how) is not None}


class Signals(signals.Count):
  """The signals that came: the first is passed on to the processes, the end of
  the terminal as such, since process 0 prints to it too; a second one kills."""

  def __init__(self):
    super().__init__()
    self.to_pass_on = set()

  def add(self, number: int) -> bool:
    new = super().add(number)
    self.to_pass_on.add(
        signal.SIGKILL if self.n > 1 else
        signal.SIGHUP if number == signal.SIGHUP else signal.SIGTERM)
    return new


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _say(text: str):
  print(f'launch: {text}', file=sys.stderr, flush=True)
