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

from absl import flags

from tools import dies_with_parent
from tools.launch import job as job_lib
from training.distributed import signals

# (type, name, default, help text, bounds).
FLAGS = (
    ('integer', 'processes', 2, 'The number of processes.', 1),
    ('integer', 'devices', 1, 'The number of devices of each.', 1),
    ('enum', 'platform', '', ('', 'cpu', 'gpu'),
     'The platform; default: $JAX_PLATFORMS, else gpu where there is one.'),
)

# After one process has failed, the others have this time to end by themselves.
PATIENCE_SECONDS = 10
POLL_SECONDS = 0.05
_VARIABLE_OF_GPUS = 'CUDA_VISIBLE_DEVICES'


def count_devices(args: flags.FlagValues) -> int:
  """Returns the number of devices of all processes together."""
  return args.processes * args.devices


def _choose_platform(platform: str) -> str:
  """Returns the platform to run on, cpu or gpu.

  Args:
    platform: the platform of the flags; '': that of $JAX_PLATFORMS, or gpu if
      this machine has one.
  """
  platform = platform or os.environ.get('JAX_PLATFORMS', '')
  if platform == 'cpu':
    return 'cpu'
  # Any other platform of $JAX_PLATFORMS, such as cuda, is taken for a GPU. If
  # none is named, the driver's file of the first NVIDIA GPU tells.
  if platform or os.path.exists('/dev/nvidia0'):
    return 'gpu'
  return 'cpu'


def launch(job: job_lib.Job, args: flags.FlagValues) -> int:
  """Runs a job as processes on this machine, or prints their commands.

  Args:
    job: the job; with `dry_run`, its commands are printed and none is run.
    args: the flags of the launcher.

  Returns:
    The exit code of this program.
  """
  job_lib.check_folders_are_writable(job)
  platform = _choose_platform(args.platform)
  # The job's first word is 'python'; here it is the Python that runs this.
  words = [sys.executable, *job.words[1:]]

  # Print the commands. The port is chosen only when the job starts.
  if job.dry_run:
    envs = environments_of_processes(
        env=job.env, processes=args.processes, devices=args.devices,
        platform=platform, coordinator='127.0.0.1:PORT')
    for env in envs:
      variables = [f'{name}={value}' for name, value in env.items()]
      print(shlex.join(variables + words))
    return 0

  return run_until_complete(
      words, env=job.env, processes=args.processes, devices=args.devices,
      platform=platform, logs=job.logs, max_restarts=job.max_restarts)


def environments_of_processes(env: Mapping[str, str], processes: int,
                              devices: int, platform: str, coordinator: str
                              ) -> list[dict[str, str]]:
  """Returns the environment variables of each process of a run. They tell jax
  where the other processes are, and which devices belong to the process.

  Args:
    env: the variables that all processes have.
    processes: the number of processes.
    devices: the number of devices of each process.
    platform: cpu or gpu.
    coordinator: the host:port of process 0.

  Returns:
    The variables of each process, which are added to those of this program.
  """
  envs = []
  for i in range(processes):
    process_env = dict(env)
    # How the processes find each other, if there are several.
    if processes > 1:
      process_env |= {
          'JAX_COORDINATOR_ADDRESS': coordinator,
          'JAX_NUM_PROCESSES': str(processes), 'JAX_PROCESS_ID': str(i)}
    # The devices of the process. The CPU counts as several devices by a flag of
    # XLA. It is put last, because the last of two equal flags counts, and a
    # user's XLA_FLAGS may have one. Process i has the GPUs from i x devices on.
    if platform == 'cpu':
      flags_of_xla = os.environ.get('XLA_FLAGS', '')
      process_env['JAX_PLATFORMS'] = 'cpu'
      process_env['XLA_FLAGS'] = (
          f'{flags_of_xla} --xla_force_host_platform_device_count={devices}')
    elif processes > 1:
      ids = range(i * devices, (i + 1) * devices)
      process_env['JAX_LOCAL_DEVICE_IDS'] = ','.join(map(str, ids))
    else:
      # A single process does not read JAX_LOCAL_DEVICE_IDS.
      process_env[_VARIABLE_OF_GPUS] = _first_gpus(process_env, devices)
    envs.append(process_env)
  return envs


def _first_gpus(env: Mapping[str, str], devices: int) -> str:
  """Returns the first of the GPUs that a process may use, as the value of
  CUDA_VISIBLE_DEVICES.

  Args:
    env: the variables that are added to those of this program. Either may
      restrict the GPUs.
    devices: the number of GPUs to return.
  """
  visible_gpus = env.get(_VARIABLE_OF_GPUS, os.environ.get(_VARIABLE_OF_GPUS))
  # Where neither restricts them, the GPUs are numbered from 0.
  if visible_gpus is None:
    names = [str(i) for i in range(devices)]
  else:
    names = visible_gpus.split(',')
  return ','.join(names[:devices])


def run_until_complete(words: list[str], env: dict[str, str], processes: int,
                       devices: int, platform: str, logs: str,
                       max_restarts: int) -> int:
  """Runs the processes of a job, and starts them again if they were preempted
  or failed, until the job is complete.

  Args:
    words: the command of each process.
    env: the variables that all processes have.
    processes: the number of processes.
    devices: the number of devices of each process.
    platform: cpu or gpu.
    logs: the folder of the output of all processes but process 0.
    max_restarts: how often the job is started again after a failure.

  Returns:
    The exit code. 0: the job is complete. STOPPED: a signal to this process
    stopped it. 2: a wrong request, or a loss that was not finite, which would
    happen again. 1: the job failed more often than max_restarts allows.
  """
  codes_of_stopped = {0, job_lib.STOPPED, -signal.SIGTERM, -signal.SIGHUP}
  failures = 0
  received = Signals()
  with signals.handle_signals(received.add):
    while True:
      # A signal may have come between two attempts.
      if received.n:
        return job_lib.STOPPED

      # Run all processes once. Each attempt has a new port.
      coordinator = f'127.0.0.1:{free_port()}'
      envs = environments_of_processes(
          env=env, processes=processes, devices=devices, platform=platform,
          coordinator=coordinator)
      codes = run_once(words, envs=envs, logs=pathlib.Path(logs),
                       received=received)

      # Return if the job is complete, if it was told to stop, or if it would
      # end in the same way again. Process 0 also stops if nobody reads its
      # output any more.
      if not any(codes):
        return 0
      has_stopped = set(codes) <= codes_of_stopped
      if received.n or signals.is_reader_gone(1):
        return job_lib.STOPPED if has_stopped else 1
      if 2 in codes:
        return 2

      # Else start it again. Preemptions are not counted, and failures are.
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
  """Runs the processes of a job once, and waits until all of them have ended.

  Meanwhile, the signals that this process receives are passed on to them. A
  process that is suspended (by SIGSTOP) is reported. If one process fails, the
  others are ended too.

  Args:
    words: the command, the same for all processes.
    envs: for each process, the variables that are added to its environment.
    logs: the folder of the output of all processes but process 0.
    received: the signals that have come to this process. A handler adds to them
      while this function waits.

  Returns:
    The exit code of each process; if a signal killed it, minus the number of
    that signal.
  """
  group = _ProcessGroup(words, envs, logs)
  while group.is_running():
    time.sleep(POLL_SECONDS)
    group.name_stopped_processes()
    group.pass_on_signals(received.to_pass_on)
    group.end_after_a_failure()
  return [process.returncode for process in group.processes]


class _ProcessGroup:
  """Processes that end together: if one fails, the others must end too."""

  def __init__(self, words: list[str], envs: list[dict[str, str]],
               logs: pathlib.Path):
    """Starts the processes.

    Args:
      words: the command of each process.
      envs: the variables that are added to the environment of each process.
      logs: the folder of the output of all processes but process 0.
    """
    self.processes: list[subprocess.Popen] = []
    self._logs = logs
    self._failed_processes: set[int] = set()  # by number
    self._stopped_processes: set[int] = set()  # by number
    self._sent_signals: set[int] = set()  # by number
    self._deadline: float | None = None  # when the remaining ones are killed

    # Process 0 writes to the terminal of this program (to Popen, None stands
    # for that), and each other process to a file. Each is in a session of its
    # own, so that Ctrl-C in the terminal reaches it only once, passed on by
    # this program.
    logs.mkdir(parents=True, exist_ok=True)
    for i, env in enumerate(envs):
      output: Any = contextlib.nullcontext()
      if i > 0:
        output = open(logs / f'process-{i}.log', 'ab')
      with output as out:
        process = subprocess.Popen(
            dies_with_parent.words(words), env=os.environ | env, stdout=out,
            stderr=out, start_new_session=True)
        self.processes.append(process)

  def is_running(self) -> bool:
    """Whether any of the processes has not ended."""
    return any(process.poll() is None for process in self.processes)

  def name_stopped_processes(self) -> None:
    """Prints which processes a signal has stopped since the last call."""
    stopped = set()
    for i, process in enumerate(self.processes):
      if process.poll() is None and _is_stopped_by_signal(process.pid):
        stopped.add(i)
    for i in sorted(stopped - self._stopped_processes):
      _print_line(f'process {i} is stopped, as by SIGSTOP: the others wait for '
                  'it, and end without it; kill -CONT '
                  f'{self.processes[i].pid} lets it go on')
    self._stopped_processes = stopped

  def pass_on_signals(self, numbers: set[int]) -> None:
    """Sends signals to all processes, each signal only once, although this is
    called again and again while they run.

    Args:
      numbers: the numbers of all signals that they should have received by now.
    """
    for number in numbers - self._sent_signals:
      self._sent_signals.add(number)
      for process in self.processes:
        process.send_signal(number)

  def end_after_a_failure(self) -> None:
    """Prints which processes failed, and kills those that outlive a failure.

    The first failure sets a deadline PATIENCE_SECONDS later, because the others
    usually end by themselves when they lose the connection. This is called
    again and again while processes run, so `_failed_processes` keeps each from
    being named twice.
    """
    for i, process in enumerate(self.processes):
      code = process.poll()
      # A process that still runs is killed after the deadline.
      if code is None:
        if self._deadline and time.monotonic() > self._deadline:
          self._failed_processes.add(i)
          process.kill()
          _print_line(f'process {i} did not end by itself then, and was killed')
      # A process that has failed sets the deadline, and is named.
      elif code not in (0, job_lib.STOPPED) and i not in self._failed_processes:
        self._failed_processes.add(i)
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
  # WNOWAIT leaves its state as it is, so that the next call sees it again.
  options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
  try:
    return os.waitid(os.P_PID, pid, options) is not None
  except ChildProcessError:
    # It has ended since the caller looked, and can no longer be stopped.
    return False


class Signals(signals.SignalCount):
  """The signals that have come to this process, and those to pass on.

  The first signal is passed on as SIGTERM, or as SIGHUP if the terminal has
  ended, since process 0 prints to it too. A second signal kills the processes.
  """

  def __init__(self):
    super().__init__()
    self.to_pass_on = set()

  def add(self, number: int) -> bool:
    """Counts a signal that this process received, and chooses the signal that
    is passed on to the processes of the job.

    Args:
      number: the number of the signal that was received.

    Returns:
      Whether it counts as a new signal, as SignalCount.add says.
    """
    is_new = super().add(number)

    # The first signal asks the processes to stop, and a second one, from an
    # impatient user, kills them. SIGHUP, which says that the terminal is gone,
    # stays SIGHUP, so that process 0 no longer prints to it.
    signal_to_pass_on = signal.SIGTERM
    if self.n > 1:
      signal_to_pass_on = signal.SIGKILL
    elif number == signal.SIGHUP:
      signal_to_pass_on = signal.SIGHUP
    self.to_pass_on.add(signal_to_pass_on)
    return is_new


def free_port() -> int:
  """Returns a port of this machine that nothing listens on."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def _print_line(text: str) -> None:
  print(f'launch: {text}', file=sys.stderr, flush=True)
