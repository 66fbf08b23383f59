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


def test_an_error_leaves_no_bar_behind(streams):
  streams(Terminal(), Terminal())
  with pytest.raises(ZeroDivisionError):
    for n in progress.each([1, 0], 'dividing'):
      _ = 1 / n
  assert progress._bar is None


def test_plain_lines_without_a_terminal():
  out = io.StringIO()
  lines = progress.bar(1000, first=0, stream=out)
  lines.step(9)
  lines.update(10, {'loss': 3.14159, 'tokens_per_second': 12345.0,
                    'step_seconds': 4.0, 'mfu': None})
  lines.update(11, {'step_seconds': 1.0, 'evaluation_left': 11.0})
  lines.update(20, {'loss': 3.0, 'mfu': 0.4321})
  lines.say('saved step 20')
  lines.close()
  assert out.getvalue().splitlines() == [
      'step 10/1000  loss 3.1416  12,345 tokens/s  1:06:00 left',
      'step 11/1000  0:16:40 left',
      'step 20/1000  loss 3.0000  MFU 43.2%',
      'saved step 20']


def test_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '100')
  out = Terminal()
  bar = progress.bar(1000, first=500, stream=out)
  bar.step(509)
  bar.update(510, {'loss': 3.14159, 'tokens_per_second': 950.0,
                   'step_seconds': 0.5})
  bar.say('saved [bold]step[/bold] 510')
  bar.close()
  text = out.getvalue()
  for wanted in ('510/1000', 'loss 3.1416', '950 tokens/s', '0:04:05 left',
                 'saved [bold]step[/bold] 510'):
    assert wanted in text, text
  assert '\x1b[?25l' not in text  # a killed run could not show the cursor again
