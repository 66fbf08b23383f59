"""SIGTERM, Ctrl-C, SIGQUIT, the end of a terminal (SIGHUP), and of who reads
what is printed, as `| head` (SIGPIPE): finish the step, save, and leave; a
second signal ends at once, unless it is an echo of the first.

With several processes SIGTERM belongs to JAX's preemption service, which
jax.distributed.initialize starts: it tells all processes, and picks a step
that all of them still have before them, without a word over the devices' own
network. Ctrl-C and SIGHUP are passed on to it. It does not count signals, so
there a second SIGTERM ends a process at once only when the step has been agreed
on.
"""

from collections.abc import Callable, Collection, Iterator
import contextlib
import errno
import os
import select
import signal
import sys
import time
import types
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
_UNREAD = (signal.SIGHUP, signal.SIGPIPE)
ECHO_SECONDS = 0.5
_STDOUT = 1
_STDERR = 2


class Count:
  """How often a process was told to stop. timeout(1) sends a signal to its
  program and to the group of processes that the program is in, and others pass
  on what their children get too: the same signal within ECHO_SECONDS is one.
  SIGHUP and SIGPIPE after any count as none: a shell and the system both send
  the one, standard output and error may both meet the other, and Ctrl-C ends
  `| tee` too, in either order.

  Attributes:
    n: the number of signals that came.
  """

  def __init__(self):
    self.n = 0
    self._last = {}  # by signal: when it came last

  def add(self, number: int) -> bool:
    """Counts a signal; returns whether it was no echo."""
    now = time.monotonic()
    if self._is_echo(number, now):
      return False
    self._last[number] = now
    self.n += 1
    return True

  def _is_echo(self, number: int, now: float) -> bool:
    """Whether a signal says again what one before it has said."""
    if number in _UNREAD and self.n:
      return True
    for other in (number, *_UNREAD):
      if now - self._last.get(other, -ECHO_SECONDS) < ECHO_SECONDS:
        return True
    return False


class _Printed:
  """Standard output or error, which goes nowhere once nobody reads it: a
  terminal may be closed some time before the SIGHUP that says so comes; Python
  has no signal for a pipe, and `unread` is called."""

  def __init__(self, stream: Any, unread: Callable[[], None]):
    self._stream = stream
    self._unread = unread

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._unless_closed():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._unless_closed():
      self._stream.flush()

  @contextlib.contextmanager
  def _unless_closed(self) -> Iterator[None]:
    """Sends what is printed nowhere, once the `with` block cannot print."""
    try:
      yield
    except OSError as error:
      if error.errno not in (errno.EIO, errno.EPIPE):
        raise
      # Standard output and error may be one terminal, which has gone.
      closed = [self._stream.fileno()]
      for other in (_STDOUT, _STDERR):
        if os.path.sameopenfile(closed[0], other):
          closed.append(other)
      print_nowhere(closed)
      if error.errno == errno.EPIPE:
        self._unread()


@contextlib.contextmanager
def handled(heard: Callable[[int], None],
            numbers: Collection[int] = NUMBERS) -> Iterator[None]:
  """Calls heard(number), in the main thread, for each signal while the `with`
  block runs; a SIGHUP that is ignored, as by nohup, stays so. Calls it with
  SIGPIPE where nobody reads what is printed. Must be entered in the main
  thread."""
  on_terminal = [fd for fd in (_STDOUT, _STDERR) if os.isatty(fd)]
  streams = {'stdout': sys.stdout, 'stderr': sys.stderr}

  def handle(number: int, frame: types.FrameType | None) -> None:
    if number == signal.SIGHUP:
      print_nowhere(on_terminal)
    heard(number)

  # The handlers that are there, to be put back at the end.
  old = {}
  for number in numbers:
    is_ignored = signal.getsignal(number) is signal.SIG_IGN
    if number != signal.SIGHUP or not is_ignored:
      old[number] = signal.signal(number, handle)
  try:
    # The main program is told where nobody reads what is printed.
    for name, stream in streams.items():
      printed = _Printed(stream, lambda: heard(signal.SIGPIPE))
      setattr(sys, name, printed)
    yield
  finally:
    for name, stream in streams.items():
      setattr(sys, name, stream)
    for number, handler in old.items():
      # None: not from Python, and Python cannot put it back.
      signal.signal(number, handler or signal.SIG_DFL)


def print_nowhere(fds: Collection[int]) -> None:
  """Sends what is printed nowhere; to be called where the terminal or the
  reader is gone, so that printing would be an error."""
  with open(os.devnull, 'w') as nowhere:
    for fd in fds:
      os.dup2(nowhere.fileno(), fd)


def is_unread(fd: int) -> bool:
  """Whether the reader of a pipe or a terminal is gone; False for a file."""
  poll = select.poll()
  poll.register(fd, 0)
  return bool(poll.poll(0))


class Stop:
  """Knows, while its `with` block runs, whether the run was told to stop.

      with signals.Stop() as stop:
        for step in ...:
          state = train_step(state)
          if stop.agreed(step):
            save and leave

  Must be entered in the main thread, after jax.distributed.initialize.

  Attributes:
    stop_requested: whether this process saw a signal; others may not know of it
      yet.
  """

  def __init__(self):
    """Chooses the signals to listen to; `with` begins to listen."""
    import jax  # late: launchers handle signals too, and need no more
    self.stop_requested = False
    self._count = Count()
    self._several = jax.process_count() > 1
    numbers = list(NUMBERS)
    if self._several:
      numbers.remove(signal.SIGTERM)  # it belongs to the preemption service
    self._handled = handled(self._heard, numbers)

  def __enter__(self) -> 'Stop':
    self._handled.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self._handled.__exit__(*error)

  def agreed(self, step: int) -> bool:
    """Whether to save after `step` and leave: the same on all processes.

    Each process calls it after each step, with rising numbers.
    """
    if not self._several:
      return self.stop_requested
    from jax.experimental import multihost_utils
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    if not self.stop_requested:  # it was SIGTERM, or another process's
      self.stop_requested = True
      self._count.n += 1
      signal.signal(signal.SIGTERM, lambda number, _: self._heard(number))
    return True

  @property
  def at_once(self) -> bool:
    """Whether this process was told to stop and need not agree with others:
    it may leave what it does between two steps."""
    return self.stop_requested and not self._several

  def _heard(self, number: int) -> None:
    """Notes the first signal; ends the process at the second one."""
    if not self._count.add(number):
      return
    name = signal.Signals(number).name
    if self.stop_requested:
      _print(f'{name}: ending at once, without a save')
      os._exit(128 + number)
    self.stop_requested = True
    _print(f'{name}: finishing this step, saving, and leaving; once more ends '
           'at once')
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)  # what the service listens to


def _print(text: str) -> None:
  """Prints to stderr from a handler, which may have come between two halves of
  another print. The reader, such as `| tee`, may be gone."""
  with contextlib.suppress(OSError):
    os.write(_STDERR, f'\n{text}\n'.encode())
