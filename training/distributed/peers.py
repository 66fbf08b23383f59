"""How the processes of a run learn that one of them has failed.

Left alone, a process whose peer has raised waits for it in a collective, for
minutes, and JAX's own heartbeat ends it without a word on whose fault it was.
So each process keeps a connection to process 0, and sends a beat on it. A
process that fails says so; one that is killed is betrayed by the kernel, which
closes the connection at once; a host that is lost by TCP's keep-alive; and a
process that hangs, as when it is stopped, by its silence. Process 0 passes it
on, and all end with a sentence that names the process. Nothing here knows of
JAX.
"""

from collections.abc import Callable
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import BinaryIO

from training.distributed import greeting

# A host is lost once what was sent to it, or the question whether it is there,
# has gone unanswered for so long.
LOST_SECONDS = 12
KEEP_ALIVE = {'TCP_KEEPIDLE': 4, 'TCP_KEEPINTVL': 2, 'TCP_KEEPCNT': 4,
              'TCP_USER_TIMEOUT': 1000 * LOST_SECONDS}
BEAT_SECONDS = 2.0
# Without a beat for so long, a process hangs. A host that pages, or is starved
# for some seconds, does not end a run.
SILENT_SECONDS = 40.0
CONNECT_SECONDS = 20
MOST_BYTES = 2 ** 16  # of a message
# An error of this process may only be the echo of another's end, word of
# which is then on its way.
GRACE_SECONDS = 1.0


class Peers:
  """The connections of one process.

  Attributes:
    address: 'port token', what the others need to reach process 0.
  """

  def __init__(self, index: int, host: str, address: str = '',
               leave: Callable[[int], None] = os._exit):
    """Listens (process 0), or connects to process 0.

    Args:
      index: of this process.
      host: of process 0.
      address: what process 0 has published; of process 0 itself ''.
      leave: ends this process with an exit code.

    Raises:
      OSError: process 0 cannot be reached.
    """
    self._index = index
    self._leave = leave
    self._connections = {}
    self._heard = {}  # by process: when, by `_now`
    self._absent = 0.0  # seconds in which this process did not listen
    self._ending = threading.Lock()  # taken once, and never given back
    if index == 0:
      server = greeting.listen(host)
      token = secrets.token_hex(8)
      self.address = f'{server.getsockname()[1]} {token}'
      _thread(greeting.Door(server, token, self._admit).serve)
    else:
      self.address = address
      port, token = address.split()
      self._admit(greeting.enter(host, int(port), token, index,
                                 CONNECT_SECONDS), 0)
    _thread(self._watch)

  def fail(self, why: str, code: int = 1) -> None:
    """Tells the others that this process has failed, and ends it."""
    time.sleep(GRACE_SECONDS)
    self._end(dict(index=self._index, why=f'failed: {why}', code=code))

  def bye(self) -> None:
    """Tells the others that this process leaves in good order."""
    for connection in list(self._connections.values()):
      _send(connection, dict(bye=True))

  def _admit(self, connection: socket.socket, index: int):
    """Takes up a connection to a process that knows the token."""
    connection.settimeout(None)
    _keep_alive(connection)
    self._heard[index] = self._now()
    self._connections[index] = connection
    _thread(self._read, connection, index)

  def _read(self, connection: socket.socket, index: int):
    lines = connection.makefile('rb')
    while True:
      message = _receive(lines)
      if message is None:
        self._end(dict(index=index, code=1, why='is gone: it was killed, or '
                       'its host was lost'))
        return
      if 'bye' in message:
        del self._heard[index]
        return
      if 'beat' not in message:
        self._end(message)
        return
      self._heard[index] = self._now()

  def _now(self) -> float:
    return time.monotonic() - self._absent

  def _watch(self):
    """Sends the beat, and ends the run when another's does not come."""
    while True:
      before = time.monotonic()
      for connection in list(self._connections.values()):
        _send(connection, dict(beat=True))
      time.sleep(BEAT_SECONDS)
      late = time.monotonic() - before - BEAT_SECONDS
      if late > BEAT_SECONDS:  # this process itself was stopped, or starved
        self._absent += late
      for index, heard in list(self._heard.items()):
        silent = self._now() - heard
        if silent > SILENT_SECONDS:
          self._end(dict(index=index, code=1, why='hangs: nothing was heard of '
                         f'it for {silent:.0f} s'))

  def _end(self, failure: dict):
    """Says which process failed, here and to the others, and ends."""
    if not self._ending.acquire(blocking=False):
      threading.Event().wait()  # another thread is about to end this process
    for index, connection in list(self._connections.items()):
      if index != failure['index']:
        _send(connection, failure)
    own = failure['index'] == self._index
    _write_to_stderr(f'error: process {failure["index"]} {failure["why"]}'
                     + ('' if own else f'; process {self._index} ends with it'))
    flushing = _thread(sys.stdout.flush)  # which the main thread may hold
    flushing.join(1)
    self._leave(failure['code'])


def _write_to_stderr(text: str) -> None:
  """Writes to stderr. Not print: the main thread may hold the stream."""
  os.write(2, f'{text}\n'.encode())


def _thread(target: Callable, *args) -> threading.Thread:
  thread = threading.Thread(target=target, args=args, name='peers', daemon=True)
  thread.start()
  return thread


def _keep_alive(connection: socket.socket):
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in KEEP_ALIVE.items():
    if hasattr(socket, name):  # not on every system
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict):
  with contextlib.suppress(OSError):  # gone as well: its reader sees to it
    connection.sendall(json.dumps(message).encode() + b'\n')


def _receive(lines: BinaryIO) -> dict | None:
  """Returns the next message, or None where the connection has broken, or
  what came is none of ours."""
  try:
    message = json.loads(lines.readline(MOST_BYTES))
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) else None
