"""How far a program is, for who watches it in a terminal.

It is drawn on stderr, below what is printed, and leaves nothing behind. Where
stderr is no terminal nothing is drawn at all, so a log, a pipe and --json hold
what the program prints and no more.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
import contextlib
import sys
from typing import TypeVar

Item = TypeVar('Item')
_DRAWN_A_SECOND = 2  # by a thread, which takes time from the host's cores

_bar = None  # of this process: what is done inside another task has its line


@contextlib.contextmanager
def during(text: str, total: int | None = None
           ) -> Iterator[Callable[[], None]]:
  """Shows what is being done while the `with` block runs, and for how long.

  Args:
    text: what is being done.
    total: in how many parts, where that is known.

  Yields:
    A function to call when one more part is done.
  """
  global _bar
  if not sys.stderr.isatty():
    yield lambda: None
    return
  outermost = _bar is None
  if outermost:
    _bar = _make()
    _bar.start()
  task = _bar.add_task(text, total=total,
                       parts='' if total is None else f'0/{total}')
  done = 0

  def advance() -> None:
    nonlocal done
    done += 1
    of = '' if total is None else f'/{total}'
    _bar.update(task, completed=done, parts=f'{done}{of}')

  try:
    yield advance
  finally:
    _bar.remove_task(task)
    if outermost:
      _bar.stop()
      _bar = None


def each(items: Iterable[Item], text: str, total: int | None = None
         ) -> Iterator[Item]:
  """Yields `items`, and shows how many of them are done.

  Args:
    items: any.
    text: what is being done with them.
    total: how many there are; None: as len() says, if it does.
  """
  if total is None and isinstance(items, Sized):
    total = len(items)
  with during(text, total) as advance:
    for item in items:
      yield item
      advance()


def console(stream):
  """Returns rich's console, which leaves the cursor alone: a process that is
  killed could not show it again."""
  from rich import console as rich_console

  class Console(rich_console.Console):

    def show_cursor(self, show: bool = True) -> bool:
      return False

  return Console(file=stream)


def _make():
  from rich import progress
  return progress.Progress(
      progress.TextColumn('{task.description}', markup=False),
      progress.BarColumn(), progress.TextColumn('{task.fields[parts]}'),
      progress.TimeElapsedColumn(), console=console(sys.stderr),
      transient=True, refresh_per_second=_DRAWN_A_SECOND,
      # What rich redirects goes to its console: to stderr.
      redirect_stdout=sys.stdout.isatty())
