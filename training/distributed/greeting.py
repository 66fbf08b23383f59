"""Who may speak to process 0: the port of peers.py, and its token.

Anyone who reaches the port may connect. So until a connection has shown the
token, little is read of it and little is kept for it: all of them are served by
one thread; each may send one short line, and has some seconds for it; and when
too many wait, the one that has waited longest is closed. A process of ours
that is crowded out tries again.
"""

from collections.abc import Callable
import contextlib
import ipaddress
import json
import secrets
import selectors
import socket
import time

GREETING_SECONDS = 5.0
MOST_BYTES = 256  # of a greeting
MOST_STRANGERS = 64
RETRY_SECONDS = 0.1
_WELCOME = b'welcome\n'


def interface(host: str) -> str:
  """Returns the address of process 0's own to listen on, of the name by which
  the others reach it; '': all of its addresses.

  Debian gives a host's own name the address 127.0.1.1, where no other host
  would reach it; and the name may be that of a gateway.
  """
  try:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0]
    local = ipaddress.ip_address(found.partition('%')[0]).is_loopback
  except (OSError, ValueError):
    return ''
  return '' if local and not _means_loopback(host) else host


def _means_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost' or host.endswith('.localhost')


def listen(host: str) -> socket.socket:
  """Returns a socket that listens on a free port of process 0's host."""
  own = interface(host)
  if own:
    family, *_, address = socket.getaddrinfo(own, 0,
                                             type=socket.SOCK_STREAM)[0]
    with contextlib.suppress(OSError):  # the address of a gateway
      return socket.create_server(address[:2], family=family, backlog=1024)
  return socket.create_server(('', 0), backlog=1024)


class Door:
  """Lets in who knows the token."""

  def __init__(self, server: socket.socket, token: str,
               admit: Callable[[socket.socket, int], None]):
    """Args:
      server: listens.
      token: what a greeting must hold.
      admit: called with a connection that has shown it, and its index.
    """
    self._server = server
    self._token = token
    self._admit = admit
    self._waiting = {}  # connection: (since when, what it has sent), in order

  def serve(self) -> None:
    """Serves for ever."""
    self._server.setblocking(False)
    with selectors.DefaultSelector() as selector:
      selector.register(self._server, selectors.EVENT_READ)
      while True:
        for key, _ in selector.select(GREETING_SECONDS):
          if key.fileobj is self._server:
            self._accept(selector)
          elif key.fileobj in self._waiting:  # not crowded out meanwhile
            self._read(selector, key.fileobj)
        late = time.monotonic() - GREETING_SECONDS
        for connection, (since, _) in list(self._waiting.items()):
          if since < late:
            self._forget(selector, connection).close()

  def _accept(self, selector: selectors.BaseSelector):
    try:
      connection, _ = self._server.accept()
    except OSError:  # it has gone, or there are no more files to open
      time.sleep(RETRY_SECONDS)
      return
    if len(self._waiting) >= MOST_STRANGERS:
      self._forget(selector, next(iter(self._waiting))).close()
    connection.setblocking(False)
    self._waiting[connection] = time.monotonic(), b''
    selector.register(connection, selectors.EVENT_READ)

  def _read(self, selector: selectors.BaseSelector, connection: socket.socket):
    since, sent = self._waiting[connection]
    try:
      more = connection.recv(MOST_BYTES - len(sent))
    except BlockingIOError:
      return
    except OSError:
      more = b''
    sent += more
    if more and not sent.endswith(b'\n') and len(sent) < MOST_BYTES:
      self._waiting[connection] = since, sent
      return
    self._forget(selector, connection)
    index = self._index(sent)
    if index is None:
      connection.close()
      return
    with contextlib.suppress(OSError):  # its reader sees to it
      connection.sendall(_WELCOME)
    self._admit(connection, index)

  def _index(self, greeting: bytes) -> int | None:
    """Returns which process has sent this; None: a stranger."""
    try:
      hello = json.loads(greeting)
      token = hello['token'].encode()
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
      return None
    known = secrets.compare_digest(token, self._token.encode())
    return hello['index'] if known else None

  def _forget(self, selector: selectors.BaseSelector, connection: socket.socket
              ):
    selector.unregister(connection)
    del self._waiting[connection]
    return connection


def enter(host: str, port: int, token: str, index: int,
          seconds: float) -> socket.socket:
  """Returns a connection to process 0, which has taken it up.

  Raises:
    OSError: it could not be had within `seconds`.
  """
  until = time.monotonic() + seconds
  hello = json.dumps(dict(index=index, token=token)).encode() + b'\n'
  while True:
    left = max(until - time.monotonic(), RETRY_SECONDS)
    connection = socket.create_connection((host, port), left)
    try:
      connection.sendall(hello)
      answer = b''
      while len(answer) < len(_WELCOME) and (
          more := connection.recv(len(_WELCOME) - len(answer))):
        answer += more
      if answer == _WELCOME:
        return connection
      error = ConnectionRefusedError('process 0 has turned it away')
    except OSError as cause:
      error = cause
    connection.close()
    if time.monotonic() > until:
      raise error
    time.sleep(RETRY_SECONDS)
