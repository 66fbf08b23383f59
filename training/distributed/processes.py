"""Several processes as one run: joining, showing, and ending together."""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import re
import socket
import sys
import time
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from configs.errors import RequestError, require
from training import cli
from training.distributed import devices

# JAX's coordination service counts a process as lost after so long without a
# word of it, and ends the others, with its number. A host that pages or is
# starved for some seconds does not end the run.
HEARTBEAT_SECONDS = 40
# An error of this process may be the echo of another's, which is to be read
# first: the launcher ends all soon after the first has ended.
GRACE_SECONDS = 1.0
MOST_PROCESSES = 2**16
MOST_ROWS = 64  # of the table
_ROW_BYTES = 512


def _number(variable: str, default: int) -> int:
  text = os.environ.get(variable, '').strip() or str(default)
  require(re.fullmatch('-?[0-9]{1,9}', text) is not None,
          f'${variable} is {text!r}: it must be a number')
  return int(text)


def how_to_join(coordinator: str = '', num_processes: int = 0,
                process_id: int = -1, cluster: bool = False
                ) -> dict[str, Any] | None:
  """Returns the arguments with which jax.distributed.initialize joins the
  processes of a run; None where this process is alone.

  Args:
    coordinator: host:port of process 0; '': $JAX_COORDINATOR_ADDRESS.
    num_processes: of all hosts; 0: $JAX_NUM_PROCESSES.
    process_id: this one's; -1: $JAX_PROCESS_ID.
    cluster: let JAX ask the cluster (SLURM, TPU metadata) for all three.

  Raises:
    RequestError: where only some of the three are given, or one is no such
      thing.
  """
  coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS', '')
  num_processes = num_processes or _number('JAX_NUM_PROCESSES', 0)
  if process_id < 0:
    process_id = _number('JAX_PROCESS_ID', -1)
  given = bool(coordinator), bool(num_processes), process_id >= 0
  if not any(given):
    return {} if cluster else None
  require(not cluster, '--cluster asks the cluster for the coordinator: '
          'pass no --coordinator, --num_processes or --process_id with it')
  require(all(given), 'a run of several processes needs --coordinator, '
          '--num_processes and --process_id (or JAX_COORDINATOR_ADDRESS, '
          f'JAX_NUM_PROCESSES, JAX_PROCESS_ID); given: coordinator '
          f'{coordinator!r}, {num_processes} processes, id {process_id}')
  host, _, port = coordinator.rpartition(':')
  require(bool(host) and bool(re.fullmatch('[0-9]{1,5}', port))
          and 0 < int(port) < 2**16, f'--coordinator is {coordinator!r}: write '
          'HOST:PORT of process 0, with a port from 1 to 65535')
  require(process_id < num_processes <= MOST_PROCESSES,
          f'--process_id is {process_id} of --num_processes {num_processes}: '
          f'choose an id below the number of processes, which is at most '
          f'{MOST_PROCESSES:,}')
  # JAX's service listens on every interface, unless it is told where.
  own_machine = host in ('localhost', '127.0.0.1', '[::1]')
  return dict(
      coordinator_address=coordinator, num_processes=num_processes,
      process_id=process_id, cluster_detection_method='deactivate',
      coordinator_bind_address=coordinator if own_machine else None)


def initialize(how: Mapping[str, Any] | None) -> None:
  """Joins the processes of a run as `how_to_join` says. From then on a process
  that fails ends at once, without waiting for the others at its exit, and so
  ends them too."""
  if how is None:
    return
  try:
    jax.distributed.initialize(
        **how, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:  # no environment that JAX knows says who is who
    raise RequestError(
        '--cluster asks the cluster for the coordinator, and here is none '
        f'that JAX knows ({error}): pass --coordinator, --num_processes and '
        '--process_id, or run it by SLURM, Open MPI, Kubernetes or on a TPU'
    ) from error
  cli.at_failure = _end

  def fail(*error: Any) -> None:
    traceback.print_exception(*error)
    _end(1)
  sys.excepthook = fail


def _end(code: int) -> None:
  time.sleep(GRACE_SECONDS)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
      stream.flush()
  os._exit(code)


def meet() -> None:
  """Waits for all processes; then process 0 prints who they are. Until here
  no process has touched a device.

  Raises:
    RequestError: where this one sees not as many devices as its launcher was
      told.
  """
  wanted = _number('ARCHETYPE_DEVICES', 0)
  own = jax.local_devices()
  require(wanted in (0, len(own)), f'--devices of the launcher is {wanted}, '
          f'but a process sees {len(own)} ({own[0].device_kind}): choose '
          f'{len(own)}, or let it see {wanted}')
  if jax.process_count() == 1:
    return
  row = json.dumps(dict(
      process=jax.process_index(), host=socket.gethostname()[:64],
      pid=os.getpid(), devices=f'{len(own)} x {own[0].device_kind}',
      slices=sorted({devices.slice_index(d) for d in own}))).encode()
  # Gloo gives a group of devices 30 s to meet for the first time, which a
  # process that still compiles would miss: they meet here.
  rows = multihost_utils.process_allgather(np.frombuffer(
      row.ljust(_ROW_BYTES), np.uint8))
  if devices.primary():
    print(table([json.loads(bytes(row)) for row in np.asarray(rows)]),
          flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Renders the processes of a run for a terminal."""
  total = sum(int(r['devices'].split()[0]) for r in rows)
  cells = [('process', 'host', 'pid', 'devices', 'slice')]
  cells += [(str(r['process']), r['host'], str(r['pid']), r['devices'],
             ','.join(map(str, r['slices']))) for r in rows[:MOST_ROWS]]
  widths = [max(map(len, column)) for column in zip(*cells)]
  lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip()
           for row in cells]
  if len(rows) > MOST_ROWS:
    lines.append(f'and {len(rows) - MOST_ROWS} more')
  return '\n'.join([*lines, f'{len(rows)} processes, {total} devices'])
