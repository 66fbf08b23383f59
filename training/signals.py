"""SIGTERM and Ctrl-C: finish the step, save, exit 0; a second ends at once.

A Python signal handler runs between two bytecodes of the main thread, which a
compilation or a wait for a device can keep away from them for minutes. So the
signals are read by a thread of their own, from the pipe that the interpreter
writes each one to as it arrives (signal.set_wakeup_fd).

With several processes SIGTERM belongs to JAX's preemption service, which
jax.distributed.initialize starts: it tells all processes, and picks a step
that all of them still have before them, without a word over the devices' own
network. Ctrl-C is passed on to it. It does not count signals, so there a
second SIGTERM ends a process at once only when the step has been agreed on,
while a second Ctrl-C always does.
"""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stop:
  """Knows, while its `with` block runs, whether the run was told to stop.

      with signals.Stop() as stop:
        for step in ...:
          state = train_step(state)
          if stop.agreed(step):
            save and leave

  Must be entered in the main thread, after jax.distributed.initialize.
  """

  def __init__(self):
    self._first = None  # the first signal's number
    self._old_handlers = {}
    self._several = jax.process_count() > 1

  @property
  def stop_requested(self) -> bool:
    """Whether this process saw a signal; others may not know of it yet."""
    return self._first is not None

  def agreed(self, step: int) -> bool:
    """Whether to save after `step` and leave: the same on all processes.

    Each process calls it after each step, with rising numbers.
    """
    if not self._several:
      return self.stop_requested
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    if self._first is None:  # the signal was SIGTERM, or another process's
      self._first = signal.SIGTERM
      self._handle(signal.SIGTERM)
    return True

  def __enter__(self) -> 'Stop':
    self._reader, self._writer = os.pipe()
    os.set_blocking(self._writer, False)
    self._old_fd = signal.set_wakeup_fd(
        self._writer, warn_on_full_buffer=False)
    self._thread = threading.Thread(
        target=self._listen, name='signals', daemon=True)
    self._thread.start()
    self._handle(signal.SIGINT)
    if not self._several:
      self._handle(signal.SIGTERM)
    return self

  def __exit__(self, *error):
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self._old_fd)
    os.write(self._writer, _END)  # a closed pipe may live on in a fork
    self._thread.join()
    os.close(self._writer)
    os.close(self._reader)

  def _handle(self, number: int):
    # Python writes to the pipe only for signals that have a handler of its
    # own; this one is called later, and has nothing left to do.
    old = signal.signal(number, lambda *_: None)
    # None: not from Python, and Python cannot put it back.
    self._old_handlers[number] = signal.SIG_DFL if old is None else old

  def _listen(self):
    while (byte := os.read(self._reader, 1)) != _END:
      number = byte[0]
      if number not in (signal.SIGINT, signal.SIGTERM):
        continue  # another library's signal
      name = signal.Signals(number).name
      if self._first is not None:
        _say(f'{name}: ending at once, without a save')
        os._exit(128 + number)
      self._first = number
      _say(f'{name}: finishing this step, saving, and leaving; '
           'once more ends at once')
      if self._several:
        os.kill(os.getpid(), signal.SIGTERM)  # what the service listens to


_END = b'\0'  # no signal has the number 0


def _say(text: str):
  # Not print: the main thread may hold the lock of the stream.
  os.write(_STDERR, f'\n{text}\n'.encode())


_STDERR = 2
