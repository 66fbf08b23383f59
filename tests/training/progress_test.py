"""Progress is drawn on a terminal, and nothing of it goes anywhere else; the
meter, and figures that are read a step late."""

import io
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import RequestError
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
  with progress.show_task('reading'):
    for item in progress.show_items([7, 8, 9], 'writing'):
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
  with pytest.raises(ZeroDivisionError):
    for n in progress.show_items([1, 0], 'dividing'):
      _ = 1 / n
  assert progress._tasks_bar is None


def test_plain_lines_without_a_terminal():
  out = io.StringIO()
  lines = progress.make_run_progress(1000, first_step=0, stream=out)
  lines.step(9)
  lines.update(10, {'loss': 3.14159, 'tokens_per_second': 12345.0,
                    'step_seconds': 4.0, 'mfu': None})
  lines.update(20, {'loss': 3.0, 'mfu': 0.4321})
  lines.say('saved step 20')
  lines.close()
  assert out.getvalue().splitlines() == [
      'step 10/1000  loss 3.1416  12,345 tokens/s  1:06:00 left',
      'step 20/1000  loss 3.0000  MFU 43.2%',
      'saved step 20']


def test_milestones_alone(capsys):
  with progress.print_milestones_only(True):
    print('compiling')
    bar = progress.make_run_progress(1000, first_step=500)
    for step in (540, 550, 560):
      bar.update(step, {'loss': 3.0, 'step_seconds': 2.0})
      bar.say(f'step {step}  held-out loss 3.5')
    bar.close()
    progress.print_result('the lowest was 3.4')
  progress.print_milestone('as before')
  print('as before')
  assert capsys.readouterr().out.splitlines() == [
      'began: step 500 of 1000',
      'under way: step 550 of 1000  loss 3.0000  0:15:00 left',
      'ended: step 560  held-out loss 3.5', 'the lowest was 3.4', 'as before']


class Clock:

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_the_meter_by_hand():
  clock = Clock()
  meter = progress.StepTimer(tokens_per_step=1000, flops_per_step=6e9,
                             peak_flops=1e10, clock=clock)
  with meter.compiling():
    clock.now += 30
  meter.begin(0)
  for _ in range(4):
    with meter.waiting():
      clock.now += 0.5
    clock.now += 1.5
  with meter.paused():
    clock.now += 99
  assert meter.lap(4, meter.now()) == pytest.approx(dict(
      step_seconds=2.0, tokens_per_second=500.0, data_seconds=0.5, mfu=0.3,
      compile_seconds=30.0))
  clock.now += 8
  # A step of an evaluation is compiled within its pause.
  with meter.paused():
    clock.now += 10
    with meter.compiling():
      clock.now += 7
    clock.now += 10
  meter.note_work(5, 3000, 2e9)
  assert meter.lap(6, meter.now()) == pytest.approx(dict(
      step_seconds=4.0, tokens_per_second=500.0, data_seconds=0.0, mfu=0.1,
      compile_seconds=7.0))


class Result:
  """An array on a device that notes when the host asks for it."""

  def __init__(self, name, asked):
    self.name, self.asked = name, asked

  def copy_to_host_async(self):
    self.asked.append(f'copy {self.name}')

  def is_ready(self):
    return False

  def __array__(self, dtype=None, copy=None):
    self.asked.append(f'wait {self.name}')
    return np.float32(1.0)


def test_figures_come_one_step_late():
  """None is waited for before the next step is dispatched."""
  deferred = progress.DeferredFigures(lambda: 'now')
  assert deferred.flush() is None
  assert deferred.push(1, {'loss': jnp.float32(1.5)}) is None
  assert deferred.push(2, {'loss': jnp.float32(2.5), 'load': jnp.arange(2)}
                       ) == (1, {'loss': 1.5}, 'now')
  assert deferred.flush() == (2, {'loss': 2.5, 'load': [0, 1]}, 'now')
  asked = []
  deferred.push(1, {'loss': Result('loss 1', asked)})
  assert asked == ['copy loss 1']
  deferred.push(2, {'loss': Result('loss 2', asked)})
  assert [call for call in asked if 'wait' in call] == ['wait loss 1']
  assert asked.index('copy loss 2') < asked.index('wait loss 1')
  # Where the first is late and the next is not, no time goes backwards.
  deferred = progress.DeferredFigures(itertools.count(1).__next__)
  deferred.push(1, {'loss': Result('loss', [])})
  late = deferred.push(2, {'loss': jax.block_until_ready(jnp.float32(1))})
  assert late.done < deferred.flush().done


@pytest.mark.parametrize('steps', ['10', 'a:b', '13:10', '3:3', '20:21'])
def test_profile_steps_that_mean_nothing(steps):
  with pytest.raises(RequestError, match='--profile_steps is'):
    progress.parse_profiled_steps(steps, 20)
