"""The signals, once and twice, in real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.helpers import terminals
from training.distributed import signals

_LOOP = '''
    import itertools, time
    from training.distributed import signals
    with signals.Stop() as stop:
      print('ready', flush=True)
      for step in itertools.count(1):
        time.sleep(0.01)  # the step, which is always finished
        if stop.should_stop(step):
          print('saved', flush=True)
          {then}
          break
    '''


@pytest.fixture(name='start')
def _start():
  processes = []
  def start(code):
    processes.append(subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(code)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return processes[-1]
  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGQUIT])
def test_a_signal_saves_its_echo_is_none_and_a_second_one_ends_at_once(
    number, start):
  """timeout(1) sends it to the program, and to its group of processes."""
  process = start(
      'from training.distributed import signals\n'
      'signals.ECHO_SECONDS = 60  # a busy machine is slow\n'
      + textwrap.dedent(_LOOP.format(
          then='time.sleep(0.2); print("more", flush=True); '
          'time.sleep(600)')))
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(number)
  assert process.stdout.readline() == 'saved\n'
  process.send_signal(number)
  assert process.stdout.readline() == 'more\n'
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert f'{number.name}: finishing this step, saving, and leaving' in err
  assert err.count(number.name) == 1 and 'SIGTERM: ending at once' in err
  assert process.returncode == 143


def test_the_end_of_a_terminal_finishes_and_saves(tmp_path):
  """Which the system tells by SIGHUP, and before that by errors of what is
  printed. A shell sends SIGHUP too."""
  code = textwrap.dedent(_LOOP.format(then=f"""
          os.kill(os.getpid(), signal.SIGHUP)
          time.sleep(0.1)
          print('more', flush=True)
          open({str(tmp_path / 'saved')!r}, 'w').close()""")).replace(
              'time.sleep(0.01)', """signals.is_reader_gone(1) and (
          print('step', flush=True), print('step', file=sys.stderr),
          signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP]))""")
  assert terminals.run_until_closed(
      [sys.executable, '-c', 'import os, signal, sys\nsignal.pthread_sigmask('
       'signal.SIG_BLOCK, [signal.SIGHUP])\n' + code],
      'ready\r\n') == 0  # whole: the rest of a line would be an error
  assert (tmp_path / 'saved').exists()


def test_who_is_told_by_several_signals_at_once_is_told_once():
  """As by Ctrl-C, which also ends `| tee`."""
  for first in signal.SIGPIPE, signal.SIGHUP, signal.SIGINT:
    count = signals.SignalCount()
    assert [count.add(number) for number in (
        first, signal.SIGINT, signal.SIGPIPE)] == [True, False, False]


def test_a_hangup_that_is_ignored_stays_so(start):
  process = start(
      'import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n'
      + textwrap.dedent(_LOOP.format(then='pass')))
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGHUP)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert out == 'saved\n' and process.returncode == 0
  assert 'SIGTERM: finishing' in err and 'SIGHUP' not in err


def test_a_launcher_hears_a_hangup_and_gives_its_handlers_back():
  """A second hangup, which a shell and the system send, is none."""
  numbers, heard = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM), []
  before = [signal.getsignal(number) for number in numbers]
  count = signals.SignalCount()
  with signals.handle_signals(lambda n: heard.append((n, count.add(n)))):
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(signals.ECHO_SECONDS)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
  assert heard == [(signal.SIGHUP, True), (signal.SIGHUP, False),
                   (signal.SIGTERM, True)]
  assert [signal.getsignal(number) for number in numbers] == before


def test_handlers_come_back():
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with signals.Stop() as stop:
    assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert not stop.stop_requested and not stop.should_stop(1)
  assert before == (
      signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
