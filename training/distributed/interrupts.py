"""SIGTERM, Ctrl-C and the end of a terminal (SIGHUP) as they arrive, and what
they do before a run's loop.

A Python signal handler runs between two bytecodes of the main thread, which a
compilation or a wait for a device can keep away from them for minutes; and a
KeyboardInterrupt that is raised where a library calls back is printed and
forgotten. So the signals are read by a thread of their own, from the pipe that
the interpreter writes each one to as it arrives (signal.set_wakeup_fd).
"""

from collections.abc import Callable, Iterator
import abc
import contextlib
import os
import signal
import threading
import time
import types

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = 0.5
_END = b'\0'  # no signal has the number 0
_STDOUT, _STDERR = 1, 2


class Count:
  """How often a process was told to stop. timeout(1) sends a signal to its
  program and to the group of processes that the program is in, and others pass
  on what their children get too: the same signal within ECHO_SECONDS is one. So
  is SIGHUP after any: a shell and the system both send it.

  Attributes:
    n: how many signals came.
  """

  def __init__(self):
    self.n = 0
    self._last = {}

  def add(self, number: int) -> bool:
    """Counts a signal; returns whether it was no echo."""
    now = time.monotonic()
    new = (now - self._last.get(number, -ECHO_SECONDS) >= ECHO_SECONDS
           and not (number == signal.SIGHUP and self.n))
    if new:
      self._last[number] = now
      self.n += 1
    return new


@contextlib.contextmanager
def handled(heard: Callable[[int], None]) -> Iterator[None]:
  """Calls heard(number), in the main thread, for each signal while the `with`
  block runs: for a launcher, whose main thread only waits. Must be entered
  there."""
  on_terminal = _on_terminal()

  def handle(number: int, frame: types.FrameType | None) -> None:
    if number == signal.SIGHUP:
      print_nowhere(on_terminal)
    heard(number)

  old = {number: signal.signal(number, handle) for number in NUMBERS
         if not _stays_ignored(number)}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


class Listener(abc.ABC):
  """Calls heard(number), in a thread, for each signal that `handle` names
  while its `with` block runs. Must be entered in the main thread; the inner
  of two hears alone."""

  def __enter__(self):
    self._old_handlers = {}
    self._on_terminal = _on_terminal()
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._old_fd = signal.set_wakeup_fd(
        self._writer, warn_on_full_buffer=False)
    self._thread = threading.Thread(
        target=self._listen, name='signals', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *error):
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_fd)
    os.write(self._writer, _END)  # a closed pipe may live on in a fork
    self._thread.join()
    os.close(self._writer)
    os.close(self._reader)

  def handle(self, number: int) -> None:
    """Takes over a signal. Python writes to the pipe only for those that have
    a handler of its own; this one is called later, with nothing left to do."""
    if _stays_ignored(number):
      return
    old = signal.signal(number, _nothing)
    # None: not from Python, and Python cannot put it back.
    self._old_handlers[number] = signal.SIG_DFL if old is None else old

  @abc.abstractmethod
  def heard(self, number: int) -> None:
    """Called in the thread, with the signal's number."""

  def _listen(self):
    while (byte := os.read(self._reader, 1)) != _END:
      # Another library may have taken a signal over, or want another one.
      if byte[0] in NUMBERS and signal.getsignal(byte[0]) is _nothing:
        if byte[0] == signal.SIGHUP:
          print_nowhere(self._on_terminal)
        self.heard(byte[0])


class EndAtOnce(Listener):
  """Ends the process with a sentence: where no step is under way, as when a
  run starts, there is nothing to save.

  Args:
    code: returns the exit code; 0 or none: 128 + the signal's number.
  """

  def __init__(self, code: Callable[[], int] = lambda: 0):
    self._code = code

  def __enter__(self):
    super().__enter__()
    for number in NUMBERS:
      self.handle(number)
    return self

  def heard(self, number: int) -> None:
    print_from_thread(
        f'{signal.Signals(number).name}: ending at once: there is nothing to '
        'save yet')
    os._exit(self._code() or 128 + number)


def print_nowhere(fds: list[int]) -> None:
  """To be called where the terminal or who reads is gone: what is printed
  would be an error."""
  with open(os.devnull, 'w') as nowhere:
    for fd in fds:
      os.dup2(nowhere.fileno(), fd)


def print_from_thread(text: str) -> None:
  """Prints to stderr from a thread: the main one may hold print's lock. A
  signal that ended who reads it, as `| tee`, is heard all the same."""
  with contextlib.suppress(OSError):
    os.write(_STDERR, f'\n{text}\n'.encode())


def _stays_ignored(number: int) -> bool:
  """Whether it is a SIGHUP that is ignored, as by nohup."""
  return (number == signal.SIGHUP
          and signal.getsignal(number) is signal.SIG_IGN)


def _on_terminal() -> list[int]:
  return [fd for fd in (_STDOUT, _STDERR) if os.isatty(fd)]


def _nothing(number: int, frame: types.FrameType | None):
  pass
