"""How the processes of a run learn that one of them has failed.

Left alone, a process whose peer has raised waits for it in a collective, for
minutes, and JAX's own heartbeat ends it without a word on whose fault it was.
So each process keeps a connection to process 0. A process that fails says so
on it; one that is killed is betrayed by the kernel, which closes the
connection at once; and a host that is lost by TCP's keep-alive. Process 0
passes it on, and all end with a sentence that names the process. Nothing here
knows of JAX.
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

# A silent host is asked after 4 s, and given up on after 4 questions: 12 s.
KEEP_ALIVE = {'TCP_KEEPIDLE': 4, 'TCP_KEEPINTVL': 2, 'TCP_KEEPCNT': 4}
CONNECT_SECONDS = 20
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
    self._ending = threading.Lock()  # taken once, and never given back
    if index == 0:
      self._server = _listen(host)
      self._token = secrets.token_hex(8)
      self.address = f'{self._server.getsockname()[1]} {self._token}'
      _thread(self._accept)
    else:
      self.address = address
      port, token = address.split()
      connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
      connection.settimeout(None)
      _keep_alive(connection)
      _send(connection, dict(index=index, token=token))
      self._connections[0] = connection
      _thread(self._read, connection, connection.makefile('rb'), 0)

  def fail(self, why: str, code: int = 1) -> None:
    """Tells the others that this process has failed, and ends it."""
    time.sleep(GRACE_SECONDS)
    self._end(dict(index=self._index, why=f'failed: {why}', code=code))

  def bye(self) -> None:
    """Tells the others that this process leaves in good order."""
    for connection in list(self._connections.values()):
      _send(connection, dict(bye=True))

  def _accept(self):
    while True:
      connection, _ = self._server.accept()
      _keep_alive(connection)
      _thread(self._greet, connection)

  def _greet(self, connection):
    lines = connection.makefile('rb')
    hello = _receive(lines)
    if hello is None or hello.get('token') != self._token:
      connection.close()  # a stranger
      return
    self._connections[hello['index']] = connection
    self._read(connection, lines, hello['index'])

  def _read(self, connection, lines, index: int):
    message = _receive(lines)
    if message is None:
      self._end(dict(index=index, code=1, why='is gone: it was killed, or its '
                     'host was lost'))
    elif 'bye' not in message:
      self._end(message)

  def _end(self, failure: dict):
    """Says which process failed, here and to the others, and ends."""
    if not self._ending.acquire(blocking=False):
      threading.Event().wait()  # another thread is about to end this process
    for index, connection in list(self._connections.items()):
      if index != failure['index']:
        _send(connection, failure)
    own = failure['index'] == self._index
    say(f'error: process {failure["index"]} {failure["why"]}'
        + ('' if own else f'; process {self._index} ends with it'))
    flushing = _thread(sys.stdout.flush)  # which the main thread may hold
    flushing.join(1)
    self._leave(failure['code'])


def say(text: str) -> None:
  """Writes to stderr. Not print: the main thread may hold the stream."""
  os.write(2, f'{text}\n'.encode())


def _thread(target, *args) -> threading.Thread:
  thread = threading.Thread(target=target, args=args, name='peers', daemon=True)
  thread.start()
  return thread


def _listen(host: str) -> socket.socket:
  try:
    family, *_, address = socket.getaddrinfo(host, 0,
                                             type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=1024)
  except OSError:  # the name of a gateway, not of this host
    return socket.create_server(('', 0), backlog=1024)


def _keep_alive(connection: socket.socket):
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in KEEP_ALIVE.items():
    if hasattr(socket, name):  # not on every system
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict):
  with contextlib.suppress(OSError):  # gone as well: its reader sees to it
    connection.sendall(json.dumps(message).encode() + b'\n')


def _receive(lines) -> dict | None:
  """Returns the next message, or None where the connection has broken, or
  what came is none of ours."""
  try:
    message = json.loads(lines.readline())
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) else None
