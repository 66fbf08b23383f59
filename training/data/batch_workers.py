"""How Grain's worker processes end: when their parent says so, or is gone.

Ctrl-C and SIGHUP reach every process of a terminal, and a cluster's SIGTERM
every process of a job. The parent then finishes its step, for which it needs
the batches: so its workers must not take the signal for theirs. They are deaf
to it from their first instruction, before any of Python's own could be told.
"""

import contextlib
import multiprocessing
from multiprocessing import connection, resource_tracker
import os
import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def deaf_to_signals():
  """Blocks these signals in this thread, and for good in every thread and
  process that is started from it meanwhile. One that arrives is taken by
  another thread, or afterwards."""
  # Python's, which every worker needs; its start would unblock the signals.
  resource_tracker.ensure_running()
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin(index: int, count: int) -> None:
  """What a worker does first: it sees to it that it ends with its parent,
  which may be killed before it can say so."""
  del index, count
  threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),),
                   name='parent', daemon=True).start()


def _end_with(parent: Any) -> None:
  connection.wait([parent.sentinel])
  os._exit(1)
