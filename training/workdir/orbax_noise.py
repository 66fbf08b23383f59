"""Keeps Orbax from printing what it also raises.

Where a read or a save fails, Orbax closes its event loop while TensorStore
still works on the other arrays. Each of those then finds the loop closed, and
prints a traceback: hundreds of lines around the one sentence that says what
happened, and, by sys.excepthook, the end of a process of several. Orbax's
threads log the same exception once each, on its way to whoever waits for them,
and asyncio logs those of the arrays that failed after the first.
"""

import asyncio
from collections.abc import Callable
import functools
import logging
import os
from typing import Any
import warnings

from training.workdir import writing


class _Loop(asyncio.SelectorEventLoop):
  """Ends its tasks before it closes, and hears nothing afterwards."""

  def close(self):
    pending = set() if self.is_closed() else asyncio.all_tasks(self)
    for task in pending:
      task.cancel()
    if pending:
      self.run_until_complete(
          asyncio.gather(*pending, return_exceptions=True))
    super().close()

  def call_soon_threadsafe(self, callback: Callable, *args, context: Any = None
                           ):
    if self.is_closed():  # TensorStore is done with an array nobody waits for
      return None
    return super().call_soon_threadsafe(callback, *args, context=context)


  def call_exception_handler(self, context):
    # Of the arrays that failed, Orbax waits for the first, and raises that.
    if context['message'].endswith('was never retrieved') and (
        _ORBAX in repr(context) or writing.reason(context['exception'])):
      return
    super().call_exception_handler(context)


class _Policy(asyncio.DefaultEventLoopPolicy):
  _loop_factory = _Loop


def _is_told_elsewhere(record: logging.LogRecord) -> bool:
  """Whether a line of the log is an exception that Orbax raises as well."""
  return bool(record.exc_info) and _ORBAX in record.pathname


_ORBAX = os.path.join('', 'orbax', 'checkpoint', '')


@functools.cache  # once a process
def silence() -> None:
  """Call it before Orbax reads or saves."""
  asyncio.set_event_loop_policy(_Policy())
  logging.getLogger('absl').addFilter(
      lambda record: not _is_told_elsewhere(record))
  # What a save had yet to begin when it failed.
  warnings.filterwarnings(
      'ignore', "coroutine '.*' was never awaited", RuntimeWarning)
