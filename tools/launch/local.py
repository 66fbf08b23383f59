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

from collections.abc import Mapping
import contextlib
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from tools import dies_with_parent
from tools.launch import job as job_lib
from training.distributed import signals

# (kind, name, default, what it says, bounds).
FLAGS = (
    ('integer', 'processes', 2, 'The number of processes.', 1),
    ('integer', 'devices', 1, 'The number of devices of each.', 1),
    ('enum', 'platform', '', ('', 'cpu', 'gpu'),
     'The platform; default: $JAX_PLATFORMS, else gpu where there is one.'),
)

PATIENCE_SECONDS = 10  # for the others to end by themselves after one failed
POLL_SECONDS = 0.05
_GPUS = 'CUDA_VISIBLE_DEVICES'


def size(args) -> int:
  """Returns the number of devices."""
  return args.processes * args.devices


def _platform(platform: str) -> str:
  """Returns cpu or gpu: the platform asked for, or the one there is."""
  platform = platform or os.environ.get('JAX_PLATFORMS', '')
  if platform == 'cpu':
    return 'cpu'
  if platform or os.path.exists('/dev/nvidia0'):
    return 'gpu'
  return 'cpu'


def launch(job: job_lib.Job, args) -> int:
  """Runs a job as processes on this machine, or prints their commands.

  Args:
    job: the job; with `dry_run`, its commands are printed and none is run.
    args: the flags of FLAGS.

  Returns:
    The exit code of this program.
  """
  job_lib.check_folders_are_writable(job)
  kind = _platform(args.platform)
  # The job's first word is 'python'; here it is the Python that runs this.
  words = [sys.executable, *job.words[1:]]
  if job.dry_run:
    # The port is chosen only when the job starts.
    envs = environments_of_processes(
        env=job.env, processes=args.processes, devices=args.devices,
        platform=kind, coordinator='127.0.0.1:PORT')
    for env in envs:
      variables = [f'{name}={value}' for name, value in env.items()]
      print(shlex.join(variables + words))
    return 0
  return run_until_complete(
      words, env=job.env, processes=args.processes, devices=args.devices,
      platform=kind, logs=job.logs, max_restarts=job.max_restarts)


def environments_of_processes(env: Mapping[str, str], processes: int,
                              devices: int, platform: str, coordinator: str
                              ) -> list[dict[str, str]]:
  """Returns the variables that each process of a run gets besides those of this
  program: by them jax finds the other processes and its own devices.

  Args:
    env: the variables that all of them have.
    processes: the number of processes.
    devices: the number of devices of each.
    platform: cpu or gpu.
    coordinator: the host:port of process 0.
  """
  envs = []
  for i in range(processes):
    process_env = dict(env)
    # Who the process is, where there are several.
    if processes > 1:
      process_env |= {
          'JAX_COORDINATOR_ADDRESS': coordinator,
          'JAX_NUM_PROCESSES': str(processes), 'JAX_PROCESS_ID': str(i)}
    # Its devices. Of two equal flags of XLA, the last one counts.
    if platform == 'cpu':
      flags_of_xla = os.environ.get('XLA_FLAGS', '')
      process_env['JAX_PLATFORMS'] = 'cpu'
      process_env['XLA_FLAGS'] = (
          f'{flags_of_xla} --xla_force_host_platform_device_count={devices}')
    elif processes > 1:
      ids = range(i * devices, (i + 1) * devices)
      process_env['JAX_LOCAL_DEVICE_IDS'] = ','.join(map(str, ids))
    else:  # JAX reads JAX_LOCAL_DEVICE_IDS only where it joins several
      process_env[_GPUS] = _first_gpus(process_env, devices)
    envs.append(process_env)
  return envs


def _first_gpus(env: Mapping[str, str], devices: int) -> str:
  """Returns the first GPUs of those that a process may see."""
  visible = env.get(_GPUS, os.environ.get(_GPUS))
  if visible is None:
    names = [str(i) for i in range(devices)]
  else:
    names = visible.split(',')
  return ','.join(names[:devices])


def run_until_complete(words: list[str], env: dict[str, str], processes: int,
                       devices: int, platform: str, logs: str,
                       max_restarts: int) -> int:
  """Runs the processes of a job, again and again where they were preempted or
  failed.

  Args:
    words: the command of each process.
    env: the variables that all of them have.
    processes: the number of processes.
    devices: the number of devices of each.
    platform: cpu or gpu.
    logs: the folder of the output of all but process 0.
    max_restarts: how often they are started again after a failure.

  Returns:
    The exit code. 0: complete. STOPPED: a signal came to this process. 2: a
    wrong request, or a loss that was not finite, which would end so again. 1:
    they failed once more than max_restarts.
  """
  codes_of_stopped = {0, job_lib.STOPPED, -signal.SIGTERM, -signal.SIGHUP}
  failures = 0
  received = Signals()
  with signals.handle_signals(received.add):
    while True:
      if received.n:  # between two runs
        return job_lib.STOPPED
      coordinator = f'127.0.0.1:{free_port()}'
      envs = environments_of_processes(
          env=env, processes=processes, devices=devices, platform=platform,
          coordinator=coordinator)
      codes = run_once(words, envs=envs, logs=pathlib.Path(logs),
                       received=received)

      # It is complete, was told to stop, or would end so again. Process 0 stops
      # too where nobody reads its output any more.
      if not any(codes):
        return 0
      has_stopped = set(codes) <= codes_of_stopped
      if received.n or signals.is_reader_gone(1):
        return job_lib.STOPPED if has_stopped else 1
      if 2 in codes:
        return 2

      # It starts again.
      if has_stopped:
        _print_line('stopped before the last step: starting it again')
        continue
      failures += 1
      if failures > max_restarts:
        _print_line(f'failed {failures} times (--max_restarts={max_restarts}): '
                    'giving up')
        return 1
      _print_line(f'failed: starting it again, {failures} of {max_restarts}')


def run_once(words: list[str], envs: list[dict[str, str]], logs: pathlib.Path,
             received: 'Signals') -> list[int]:
  """Runs the processes of a job once, and returns their exit codes.

  While they run, signals to this process are passed on to them, one that is
  stopped is named, and where one fails the others are ended.

  Args:
    words: the command of each process.
    envs: what is added to the environment of each.
    logs: the folder of the output of all but process 0.
    received: the signals that came to this process.

  Returns:
    The exit code of each process; where a signal killed it, minus its number.
  """
  group = _ProcessGroup(words, envs, logs)
  while group.runs():
    time.sleep(POLL_SECONDS)
    group.say_who_is_stopped()
    group.pass_on(received.to_pass_on)
    group.end_after_a_failure()
  return [process.returncode for process in group.processes]


class _ProcessGroup:
  """Processes that end together: where one fails, the others must end too."""

  def __init__(self, words: list[str], envs: list[dict[str, str]],
               logs: pathlib.Path):
    self.processes: list[subprocess.Popen] = []
    self._logs = logs
    self._failed: set[int] = set()
    self._stopped: set[int] = set()
    self._passed_on: set[int] = set()
    self._deadline: float | None = None  # when those left are killed

    logs.mkdir(parents=True, exist_ok=True)
    for i, env in enumerate(envs):
      output: Any = contextlib.nullcontext()  # process 0 writes to ours
      if i > 0:
        output = open(logs / f'process-{i}.log', 'ab')
      with output as out:
        self.processes.append(subprocess.Popen(
            dies_with_parent.words(words), env=os.environ | env, stdout=out,
            stderr=out,
            start_new_session=True))  # so that Ctrl-C is passed on only once

  def runs(self) -> bool:
    """Whether any of the processes has not ended."""
    return any(process.poll() is None for process in self.processes)

  def say_who_is_stopped(self) -> None:
    """Names the processes that a signal has stopped since the last call."""
    stopped = set()
    for i, process in enumerate(self.processes):
      if process.poll() is None and _is_stopped_by_signal(process.pid):
        stopped.add(i)
    for i in sorted(stopped - self._stopped):
      _print_line(f'process {i} is stopped, as by SIGSTOP: the others wait for '
                  'it, and end without it; kill -CONT '
                  f'{self.processes[i].pid} lets it go on')
    self._stopped = stopped

  def pass_on(self, numbers: set[int]) -> None:
    """Sends each signal to all processes, once."""
    for number in numbers - self._passed_on:
      self._passed_on.add(number)
      for process in self.processes:
        process.send_signal(number)

  def end_after_a_failure(self) -> None:
    """Prints which processes failed, and kills those that outlive a failure.

    The first failure sets a deadline PATIENCE_SECONDS later: the others usually
    end by themselves, as they lose the connection. It is called again and again
    while processes run, so `_failed` keeps each from being named twice.
    """
    for i, process in enumerate(self.processes):
      code = process.poll()
      if code is None:
        if self._deadline and time.monotonic() > self._deadline:
          self._failed.add(i)
          process.kill()
          _print_line(f'process {i} did not end by itself then, and was killed')
      elif code not in (0, job_lib.STOPPED) and i not in self._failed:
        self._failed.add(i)
        if self._deadline is None:
          self._deadline = time.monotonic() + PATIENCE_SECONDS
        # Popen gives minus the number of the signal that killed a process.
        how = f'ended with exit code {code}'
        if code < 0:
          how = f'was killed by {signal.Signals(-code).name}'
        if i > 0:
          how += f'; its output: {self._logs}/process-{i}.log'
        _print_line(f'process {i} {how}')


def _is_stopped_by_signal(pid: int) -> bool:
  """Whether a signal has stopped a process that has not ended."""
  how = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
  return os.waitid(os.P_PID, pid, how) is not None


class Signals(signals.SignalCount):
  """The signals that came: the first is passed on to the processes, the end of
  the terminal as such, since process 0 prints to it too; a second one kills."""

  def __init__(self):
    super().__init__()
    self.to_pass_on = set()

  def add(self, number: int) -> bool:
    is_new = super().add(number)
    passed_on = signal.SIGTERM
    if self.n > 1:
      passed_on = signal.SIGKILL
    elif number == signal.SIGHUP:
      passed_on = signal.SIGHUP
    self.to_pass_on.add(passed_on)
    return is_new


def free_port() -> int:
  """Returns a port that nothing listens on."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _print_line(text: str) -> None:
  print(f'launch: {text}', file=sys.stderr, flush=True)
