"""Progress is drawn on a terminal, and nothing of it goes anywhere else."""

import io
import sys

import pytest

from training import progress


class Terminal(io.StringIO):

  def isatty(self):
    return True


@pytest.fixture
def streams(monkeypatch):
  """Sets stdout and stderr to a pipe or a terminal each; returns the two."""
  def set_(out, err):
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', err)
    return out, err
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '100')
  return set_


def _work():
  with progress.during('reading'):
    for item in progress.each([7, 8, 9], 'writing'):
      print('item', item)
      print('warning', file=sys.stderr)


def test_without_a_terminal_there_is_none(streams):
  out, err = streams(io.StringIO(), io.StringIO())
  _work()
  assert out.getvalue() == 'item 7\nitem 8\nitem 9\n'
  assert err.getvalue() == 'warning\n' * 3


def test_a_pipe_gets_what_is_printed_alone(streams):
  out, err = streams(io.StringIO(), Terminal())
  _work()
  assert out.getvalue() == 'item 7\nitem 8\nitem 9\n'
  assert 'item' not in err.getvalue()


def test_a_terminal_shows_what_is_done(streams):
  _, err = streams(Terminal(), Terminal())
  _work()
  text = err.getvalue()
  for wanted in 'reading', 'writing', 'warning', '0:00:00':
    assert wanted in text, text
  assert 'item 9' in text  # rich prints it above the bar
  assert '\x1b[?25l' not in text  # a killed process could not undo that
  assert progress._bar is None


def test_what_is_done_is_counted(streams):
  _, err = streams(Terminal(), Terminal())
  for _ in progress.each(iter('abc'), 'letters', 3):
    progress._bar.refresh()
  assert [f'{n}/3' in err.getvalue() for n in range(4)] == [True] * 3 + [False]


def test_an_error_leaves_no_bar_behind(streams):
  streams(Terminal(), Terminal())
  with pytest.raises(ZeroDivisionError):
    for n in progress.each([1, 0], 'dividing'):
      _ = 1 / n
  assert progress._bar is None
