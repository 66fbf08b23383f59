"""Several processes as one run: joining, showing, and ending together."""

from collections.abc import Mapping
import contextlib
import os
import socket
import sys
import time
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from common.errors import RequestError, require
from training import cli
from training.distributed import devices

# JAX's coordination service counts a process as lost after so long without a
# word of it, and ends the others, with its number. A host that pages or is
# starved for some seconds does not end the run.
HEARTBEAT_SECONDS = 40
# An error of this process may be the echo of another's, which is to be read
# first: the launcher ends all soon after the first has ended.
GRACE_SECONDS = 1.0
# The bytes of the line by which a process presents itself: all send as many.
_BYTES_OF_A_LINE = 256


def arguments_to_join(coordinator: str = '', num_processes: int = 0,
                      process_id: int = -1, cluster: bool = False
                      ) -> dict[str, Any] | None:
  """Returns the arguments with which jax.distributed.initialize joins the
  processes of a run; None where this process is alone.

  Args:
    coordinator: host:port of process 0; '': $JAX_COORDINATOR_ADDRESS.
    num_processes: the number of processes on all hosts; 0: $JAX_NUM_PROCESSES.
    process_id: the number of this process; -1: $JAX_PROCESS_ID.
    cluster: let JAX ask the cluster (SLURM, TPU metadata) for all three.

  Raises:
    RequestError: where only some of the three are given, or one is no such
      thing.
  """
  # The environment says what is not given.
  coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS', '')
  num_processes = num_processes or int(os.environ.get('JAX_NUM_PROCESSES', 0))
  if process_id < 0:
    process_id = int(os.environ.get('JAX_PROCESS_ID', -1))
  is_set = bool(coordinator), bool(num_processes), process_id >= 0
  if not any(is_set):
    return {} if cluster else None

  # The three go together.
  if cluster or not all(is_set):
    raise RequestError(
        'a run of several processes needs '
        '--coordinator, --num_processes and --process_id (or '
        'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or '
        f'--cluster alone; given: coordinator {coordinator!r}, '
        f'{num_processes} processes, id {process_id}, cluster {cluster}')
  host, _, port = coordinator.rpartition(':')
  require(bool(host) and port.isdecimal(), f'--coordinator is {coordinator!r}: '
          'write HOST:PORT of process 0')
  require(process_id < num_processes, f'--process_id is {process_id} of '
          f'--num_processes {num_processes}: choose an id below it')

  # JAX's service listens on every interface, unless it is told where.
  bind_address = None
  if host in ('localhost', '127.0.0.1', '[::1]'):
    bind_address = coordinator
  return dict(
      coordinator_address=coordinator, num_processes=num_processes,
      process_id=process_id, cluster_detection_method='deactivate',
      coordinator_bind_address=bind_address)


def join_processes(arguments: Mapping[str, Any] | None) -> None:
  """Connects this process with the other processes of a run.

  From then on, a process that fails ends at once. By default it would wait at
  its exit for the others, which wait for it.

  Args:
    arguments: the arguments of jax.distributed.initialize, from
      `arguments_to_join`; None: there are no other processes.

  Raises:
    RequestError: where JAX should ask the cluster for the other processes, and
      finds no cluster that it knows.
  """
  if arguments is None:
    return
  try:
    jax.distributed.initialize(
        **arguments, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:  # no environment that JAX knows says who is who
    raise RequestError(
        '--cluster asks the cluster for the coordinator, and here is none '
        f'that JAX knows ({error}): pass --coordinator, --num_processes and '
        '--process_id, or run it by SLURM, Open MPI, Kubernetes or on a TPU'
    ) from error

  # Replace both ways in which a failing process ends: cli.exit_after_failure
  # for errors that are reported in a sentence, and sys.excepthook for all
  # others, which have a traceback.
  cli.exit_after_failure = _exit_at_once

  def print_and_exit(*error: Any) -> None:
    traceback.print_exception(*error)
    _exit_at_once(1)
  sys.excepthook = print_and_exit


def _exit_at_once(code: int) -> None:
  """Ends this process without waiting for the others, after flushing what it
  has printed."""
  time.sleep(GRACE_SECONDS)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
      stream.flush()
  os._exit(code)


def meet_and_print_processes() -> None:
  """Waits for all processes of a run. Then process 0 prints a line for each of
  them, with its devices and its host.

  It must be called before any process uses its devices.
  """
  if jax.process_count() == 1:
    return
  local_devices = jax.local_devices()
  device_kind = local_devices[0].device_kind
  slice_index = devices.slice_index(local_devices[0])
  line = (f'process {jax.process_index()}: {len(local_devices)} x '
          f'{device_kind}, slice {slice_index}, pid {os.getpid()} on '
          f'{socket.gethostname()}')
  # Gather the lines, as arrays of bytes. Arrays of one shape are needed, so
  # each line is padded with spaces. This is also where the devices first meet:
  # Gloo waits only 30 s for that, too short for a process that has yet to
  # compile.
  padded = line.encode()[:_BYTES_OF_A_LINE].ljust(_BYTES_OF_A_LINE)
  line_as_bytes = np.frombuffer(padded, np.uint8)
  all_lines = multihost_utils.process_allgather(line_as_bytes)
  if devices.is_primary_process():
    for line_as_bytes in np.asarray(all_lines):
      text = bytes(line_as_bytes).decode()
      print(text.rstrip(), flush=True)
