"""SIGTERM, Ctrl-C and the end of a terminal (SIGHUP): finish the step, save,
exit 0; a second signal ends at once, unless it is an echo of the first
(interrupts.Count).

They are heard by a thread (interrupts.py), whatever the main one does.

With several processes SIGTERM belongs to JAX's preemption service, which
jax.distributed.initialize starts: it tells all processes, and picks a step
that all of them still have before them, without a word over the devices' own
network. Ctrl-C and SIGHUP are passed on to it. It does not count signals, so
there a second SIGTERM ends a process at once only when the step has been agreed
on, while a second Ctrl-C always does.
"""

import os
import signal

import jax
from jax.experimental import multihost_utils

from training.distributed import interrupts


class Stop(interrupts.Listener):
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
    self._count = interrupts.Count()
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
      self._count.n += 1
      self.handle(signal.SIGTERM)
    return True

  @property
  def at_once(self) -> bool:
    """Whether this process was told to stop and need not agree with others:
    it may leave what it does between two steps."""
    return self.stop_requested and not self._several

  def __enter__(self) -> 'Stop':
    super().__enter__()
    for number in interrupts.NUMBERS:
      if number != signal.SIGTERM or not self._several:
        self.handle(number)
    return self

  def heard(self, number: int) -> None:
    name = signal.Signals(number).name
    if not self._count.add(number):
      return
    if self._first is not None:
      interrupts.print_from_thread(f'{name}: ending at once, without a save')
      os._exit(128 + number)
    self._first = number
    interrupts.print_from_thread(
        f'{name}: finishing this step, saving, and leaving; once more ends at '
        'once')
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)  # what the service listens to
