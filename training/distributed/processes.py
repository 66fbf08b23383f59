"""Several processes as one run: joining, showing, and ending together."""

import atexit
import json
import os
import re
import socket
import sys
import traceback
import types
from typing import NamedTuple

import jax

from configs.errors import RequestError, require
from training import cli
from training.distributed import devices, greeting, peers

# After so long without one, JAX counts a process as lost. It is the second
# line of defence, behind peers.py: so it need not be short, and a
# host that pages or is starved for some seconds does not end the run.
HEARTBEAT_SECONDS = 100
LOOKUP_MS = 60_000
MOST_PROCESSES = 2**16
MOST_ROWS = 64  # of the table


def _number(variable: str, default: int) -> int:
  text = os.environ.get(variable, '').strip() or str(default)
  require(re.fullmatch('-?[0-9]{1,9}', text) is not None,
          f'${variable} is {text!r}: it must be a number')
  return int(text)


class Several(NamedTuple):
  """How this process joins the others of a run.

  Attributes:
    coordinator: host:port of process 0.
    num_processes: of all hosts.
    process_id: this one's.
    cluster: whether JAX asks the cluster for these three.
  """
  coordinator: str
  num_processes: int
  process_id: int
  cluster: bool


def how_to_join(coordinator: str = '', num_processes: int = 0,
                process_id: int = -1, cluster: bool = False) -> Several | None:
  """Returns how to join the processes of a run; None where it is alone.

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
  if not any(given) and not cluster:
    return None
  if cluster:
    require(not any(given), '--cluster asks the cluster for the coordinator: '
            'pass no --coordinator, --num_processes or --process_id with it')
    return Several('', 0, -1, True)
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
  return Several(coordinator, num_processes, process_id, False)


def initialize(several: Several | None) -> None:
  """Joins the processes of a run, if it was launched as several."""
  if several is None:
    return
  if several.cluster:
    try:
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:  # no environment that JAX knows says who is who
      raise RequestError(
          '--cluster asks the cluster for the coordinator, and here is none '
          f'that JAX knows ({error}): pass --coordinator, --num_processes and '
          '--process_id, or run it by SLURM, Open MPI, Kubernetes or on a TPU'
      ) from error
  else:
    jax.distributed.initialize(
        several.coordinator, several.num_processes, several.process_id,
        cluster_detection_method='deactivate',
        coordinator_bind_address=os.environ.get(
            'JAX_COORDINATOR_BIND_ADDRESS', _bind(several.coordinator)),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  _end_together()


def _bind(coordinator: str) -> str | None:
  """Returns what JAX's service listens on, on process 0; None: everywhere,
  which is also JAX's default."""
  host = coordinator.rpartition(':')[0].strip('[]')
  return coordinator if greeting.interface(host) else None


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
  # Gloo gives a group of devices 30 s to meet for the first time, which a
  # process that still compiles would miss: they meet here.
  devices.sync('joined')
  rows = _rows()
  if devices.primary():
    print(table(rows), flush=True)


def _end_together() -> None:
  """Ends this process when another one fails, and the other way round."""
  client, host, index = _service()
  if index == 0:
    others = peers.Peers(0, host)
    client.key_value_set('archetype/peers', others.address)
  else:
    address = client.blocking_key_value_get('archetype/peers', LOOKUP_MS)
    try:
      others = peers.Peers(index, host, address)
    except OSError as error:
      print(f'warning: process {index} cannot reach process 0 at {host}:'
            f'{address.split()[0]} ({error}): when a process is lost, the '
            f'others notice after {HEARTBEAT_SECONDS} s, and are not told '
            'which it was', file=sys.stderr)
      sys.excepthook = _end_alone
      return
  def fail(kind: type[BaseException], error: BaseException,
           trace: types.TracebackType | None):
    traceback.print_exception(kind, error, trace)
    others.fail(f'{kind.__name__}: {_first_line(error)}')
  sys.excepthook = fail
  cli.at_failure.append(others.fail)
  atexit.register(others.bye)


def _end_alone(kind: type[BaseException], error: BaseException,
               trace: types.TracebackType | None):
  """Without this, others would wait for the process that failed."""
  traceback.print_exception(kind, error, trace)
  sys.stdout.flush()
  os._exit(1)


def _first_line(error: BaseException) -> str:
  return (str(error) or 'no message').splitlines()[0][:300]


def _service():
  """Returns JAX's key-value client, the host of process 0, and our index.

  JAX has no public name for it; Orbax takes it from here too.
  """
  from jax._src import distributed
  state = distributed.global_state
  host = state.coordinator_address.rpartition(':')[0].strip('[]')
  return state.client, host, state.process_id


def _rows() -> list[dict]:
  """Returns what each process is, on process 0; on the others nothing."""
  client, _, index = _service()
  own = jax.local_devices()
  client.key_value_set(f'archetype/process/{index}', json.dumps(
      dict(process=index, host=socket.gethostname(),
           pid=os.getpid(), devices=f'{len(own)} x {own[0].device_kind}',
           slices=sorted({devices.slice_index(d) for d in own}))))
  if not devices.primary():
    return []
  return [json.loads(client.blocking_key_value_get(
      f'archetype/process/{i}', LOOKUP_MS)) for i in range(jax.process_count())]


def table(rows: list[dict]) -> str:
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
