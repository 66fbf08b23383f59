"""The signals, once and twice, in real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.helpers import terminals
from training.distributed import interrupts, signals

_LOOP = '''
    import itertools, time
    from training.distributed import signals
    with signals.Stop() as stop:
      print('ready', flush=True)
      for step in itertools.count(1):
        time.sleep(0.01)  # the step, which is always finished
        if stop.agreed(step):
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


def test_a_signal_saves_its_echo_is_none_and_a_second_one_ends_at_once(start):
  """timeout(1) sends it to the program, and to its group of processes."""
  process = start(
      'from training.distributed import interrupts\n'
      'interrupts.ECHO_SECONDS = 60  # a busy machine is slow\n'
      + textwrap.dedent(_LOOP.format(
          then='time.sleep(0.2); print("more", flush=True); '
          'time.sleep(600)')))
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == 'saved\n'
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == 'more\n'
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert 'SIGINT: finishing this step, saving, and leaving' in err
  assert err.count('SIGINT') == 1 and 'SIGTERM: ending at once' in err
  assert process.returncode == 143


def test_the_end_of_a_terminal_finishes_and_saves(tmp_path):
  """Which the system tells by SIGHUP, and by errors of what is printed. A shell
  sends SIGHUP too."""
  code = textwrap.dedent(_LOOP.format(then=f"""
          os.kill(os.getpid(), signal.SIGHUP)
          time.sleep(0.1)
          print('more', flush=True)
          open({str(tmp_path / 'saved')!r}, 'w').close()"""))
  assert terminals.run_until_closed(
      [sys.executable, '-c', 'import os, signal\n' + code],
      'ready\r\n') == 0  # whole: the rest of a line would be an error
  assert (tmp_path / 'saved').exists()


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
  count = interrupts.Count()
  with interrupts.handled(lambda n: heard.append((n, count.add(n)))):
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(interrupts.ECHO_SECONDS)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
  assert heard == [(signal.SIGHUP, True), (signal.SIGHUP, False),
                   (signal.SIGTERM, True)]
  assert [signal.getsignal(number) for number in numbers] == before


_START = '''
    import gc, hashlib, sys
    from training import cli
    from training.distributed import interrupts
    def main():
      print('ready', flush=True)
      {then}
    cli.run(main, interrupts.EndAtOnce(lambda: {code}))
    '''
# As in a compilation, where Python's own handlers are never called.
_DEEP_IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
# JAX has one such callback: what is raised there is printed and forgotten.
_IN_A_CALLBACK = (
    'gc.callbacks.append(lambda *_: [None for _ in range(10 ** 6)])\n'
    '      while True: gc.collect()')


@pytest.mark.parametrize('then, number, asked, code', [
    (_DEEP_IN_C, signal.SIGINT, 0, 130),
    (_IN_A_CALLBACK, signal.SIGINT, 0, 130),
    (_DEEP_IN_C, signal.SIGTERM, 75, 75)])
def test_before_the_loop_a_signal_ends_at_once(start, then, number, asked,
                                               code):
  process = start(_START.format(then=then, code=asked))
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert err == (f'\n{number.name}: ending at once: there is nothing to save '
                 'yet\n')
  assert process.returncode == code


def test_the_loop_takes_the_signals_over_and_gives_them_back(start):
  process = start('''
      import time
      from training import cli
      from training.distributed import interrupts, signals
      def main():
        with signals.Stop() as stop:
          print('loop', flush=True)
          while not stop.at_once:
            time.sleep(0.01)
        print('after', flush=True)
        time.sleep(600)
      cli.run(main, interrupts.EndAtOnce())
      ''')
  for line, said in (('loop', 'finishing this step'), ('after', 'at once')):
    assert process.stdout.readline() == f'{line}\n'
    process.send_signal(signal.SIGTERM)
    process.stderr.readline()
    assert said in process.stderr.readline()
  process.communicate(timeout=60)
  assert process.returncode == 143


def test_a_handler_of_another_library_is_left_alone(start):
  process = start('''
      import signal, time
      from training import cli
      from training.distributed import interrupts
      def main():
        try:
          signal.signal(signal.SIGINT, signal.default_int_handler)
          print('ready', flush=True)
          time.sleep(600)
        except KeyboardInterrupt:
          print('theirs', flush=True)
      cli.run(main, interrupts.EndAtOnce())
      ''')
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=60)
  assert out == 'theirs\n' and process.returncode == 0


def test_handlers_come_back_and_no_thread_stays():
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with signals.Stop() as stop:
    assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert not stop.stop_requested and not stop.agreed(1)
  assert before == (
      signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
  assert signal.set_wakeup_fd(-1) == -1
  assert 'signals' not in [thread.name for thread in threading.enumerate()]
