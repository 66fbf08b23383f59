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

STOP_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
# The signals that come when the reader of what is printed is gone.
_READER_GONE = (signal.SIGHUP, signal.SIGPIPE)
# A signal that comes again within this time is one signal: other programs pass
# on what they get.
ECHO_SECONDS = 0.5
_STDOUT = 1  # file descriptors
_STDERR = 2


class SignalCount:
  """The number of times that a process was told to stop.

  An echo does not count. timeout(1) sends a signal to its program and to the
  group of processes that the program is in, and others pass on what their
  children get too: the same signal within ECHO_SECONDS is one.
  SIGHUP and SIGPIPE after any count as none: a shell and the system both send
  the one, standard output and error may both meet the other, and Ctrl-C ends
  `| tee` too, in either order.

  Attributes:
    n: the number of signals that came.
  """

  def __init__(self):
    self.n = 0
    self._time_of_last = {}  # by signal

  def add(self, number: int) -> bool:
    """Counts a signal; returns whether it was no echo."""
    now = time.monotonic()
    if self._is_echo(number, now):
      return False
    self._time_of_last[number] = now
    self.n += 1
    return True

  def _is_echo(self, number: int, now: float) -> bool:
    """Returns whether a signal only repeats what an earlier one has said. For
    instance, the end of a terminal sends SIGHUP and also closes the pipe to
    which the program prints.

    Args:
      number: the number of the signal.
      now: the time at which it arrived, in seconds.
    """
    # After any other signal, it says nothing new that the reader of our output
    # is gone.
    if number in _READER_GONE and self.n:
      return True
    # Another signal is an echo if it comes shortly after the same signal, or
    # after the loss of the reader.
    for earlier in (number, *_READER_GONE):
      time_of_last = self._time_of_last.get(earlier, -ECHO_SECONDS)
      if now - time_of_last < ECHO_SECONDS:
        return True
    return False


class _StreamWithoutReader:
  """Standard output or error, which goes nowhere once nobody reads it.

  A terminal may be closed some time before the SIGHUP that says so comes. There
  is no signal for a pipe in Python, so `on_closed_pipe` is called.
  """

  def __init__(self, stream: Any, on_closed_pipe: Callable[[], None]):
    self._stream = stream
    self._on_closed_pipe = on_closed_pipe

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with self._discard_if_closed():
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    with self._discard_if_closed():
      self._stream.flush()

  @contextlib.contextmanager
  def _discard_if_closed(self) -> Iterator[None]:
    """Handles a loss of the reader while the `with` block prints: from then on,
    all output is discarded.
    """
    try:
      yield
    except OSError as error:
      if error.errno not in (errno.EIO, errno.EPIPE):
        raise
      # Standard output and error may be the same terminal, which is gone. Then
      # both are discarded.
      closed_fds = [self._stream.fileno()]
      for fd in (_STDOUT, _STDERR):
        if os.path.sameopenfile(closed_fds[0], fd):
          closed_fds.append(fd)
      discard_output(closed_fds)
      if error.errno == errno.EPIPE:
        self._on_closed_pipe()


@contextlib.contextmanager
def handle_signals(on_signal: Callable[[int], None],
                   numbers: Collection[int] = STOP_SIGNALS) -> Iterator[None]:
  """Calls a function for each signal that arrives while the `with` block runs.

  If the program that reads our output has ended, the function is called with
  SIGPIPE. A SIGHUP that the user has chosen to ignore, as by nohup, stays
  ignored. The context must be entered in the main thread.

  Args:
    on_signal: the function, called in the main thread with the number of a
      signal.
    numbers: the numbers of the signals to handle.
  """
  terminal_fds = [fd for fd in (_STDOUT, _STDERR) if os.isatty(fd)]
  streams = {'stdout': sys.stdout, 'stderr': sys.stderr}

  def handle(number: int, frame: types.FrameType | None) -> None:
    # After a SIGHUP the terminal is gone, and printing to it would fail.
    if number == signal.SIGHUP:
      discard_output(terminal_fds)
    on_signal(number)

  # Install the handlers, and keep the old ones to restore them at the end.
  old_handlers = {}
  for number in numbers:
    is_ignored = signal.getsignal(number) is signal.SIG_IGN
    if number != signal.SIGHUP or not is_ignored:
      old_handlers[number] = signal.signal(number, handle)
  try:
    # Printing to a closed pipe counts as a signal too.
    for name, stream in streams.items():
      guarded = _StreamWithoutReader(
          stream, on_closed_pipe=lambda: on_signal(signal.SIGPIPE))
      setattr(sys, name, guarded)
    yield
  finally:
    for name, stream in streams.items():
      setattr(sys, name, stream)
    for number, handler in old_handlers.items():
      # A handler that was not installed from Python is None here. Python cannot
      # restore it, so the default takes its place.
      signal.signal(number, handler or signal.SIG_DFL)


def discard_output(fds: Collection[int]) -> None:
  """Sends what is printed to these file descriptors nowhere. Where the terminal
  or the reader is gone, printing would be an error."""
  with open(os.devnull, 'w') as devnull:
    for fd in fds:
      os.dup2(devnull.fileno(), fd)


def is_reader_gone(fd: int) -> bool:
  """Whether the reader of a pipe or a terminal is gone; False for a file."""
  poll = select.poll()
  poll.register(fd, 0)
  return bool(poll.poll(0))


class Stop:
  """The request to stop a run: knows, while its `with` block runs, whether a
  signal came, and at which step all processes stop.

      with signals.Stop() as stop:
        for step in ...:
          state = train_step(state)
          if stop.should_stop(step):
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
    self._signal_count = SignalCount()
    self._has_other_processes = jax.process_count() > 1
    numbers = list(STOP_SIGNALS)
    if self._has_other_processes:
      numbers.remove(signal.SIGTERM)  # it belongs to the preemption service
    self._handler = handle_signals(self._on_signal, numbers)

  def __enter__(self) -> 'Stop':
    self._handler.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self._handler.__exit__(*error)

  def should_stop(self, step: int) -> bool:
    """Returns whether to save after this step and end the run. All processes
    get the same answer.

    Each process must call it after each step, in order. With several processes,
    JAX's preemption service tells all of them of a SIGTERM, and lets them agree
    on a step that none of them has passed.

    Args:
      step: the number of steps done.
    """
    if not self._has_other_processes:
      return self.stop_requested
    from jax.experimental import multihost_utils
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    # If no signal has reached our own handler, the service has taken the
    # SIGTERM, or another process had it. Count it as the first signal, and
    # handle SIGTERM from here on: a second one ends the process at once.
    if not self.stop_requested:
      self.stop_requested = True
      self._signal_count.n += 1
      signal.signal(signal.SIGTERM, lambda number, _: self._on_signal(number))
    return True

  @property
  def can_stop_at_once(self) -> bool:
    """Whether this process was told to stop and need not agree with others:
    it may leave what it does between two steps."""
    return self.stop_requested and not self._has_other_processes

  def _on_signal(self, number: int) -> None:
    """Handles a signal that asks the run to end. After the first one, the run
    saves and ends; a second one ends the process at once, without saving.

    Args:
      number: the number of the signal.
    """
    # Ignore a signal that only repeats an earlier one, for which add() returns
    # False.
    if not self._signal_count.add(number):
      return
    name = signal.Signals(number).name
    if self.stop_requested:
      _print_to_stderr(f'{name}: ending at once, without a save')
      os._exit(128 + number)
    self.stop_requested = True
    _print_to_stderr(f'{name}: finishing this step, saving, and leaving; once '
                     'more ends at once')
    # JAX's preemption service, which tells the other processes, waits for a
    # SIGTERM.
    if self._has_other_processes:
      os.kill(os.getpid(), signal.SIGTERM)


def _print_to_stderr(text: str) -> None:
  """Prints to stderr from a handler, which may have come between two halves of
  another print. The reader, such as `| tee`, may be gone."""
  with contextlib.suppress(OSError):
    os.write(_STDERR, f'\n{text}\n'.encode())
