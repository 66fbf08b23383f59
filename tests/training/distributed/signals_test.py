"""The signals, once and twice, in real processes."""

import os
import signal
import socket
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


def _start(code, *args):
  return subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(code), *map(str, args)],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(name='start')
def _start_and_clean_up():
  processes = []
  def start(code, *args):
    processes.append(_start(code, *args))
    return processes[-1]
  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.long
@pytest.mark.parametrize('number', [
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_signal_finishes_saves_and_exits_0(start, number):
  process = start(_LOOP.format(then='pass'))
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert out == 'saved\n'
  assert f'{number.name}: finishing this step, saving, and leaving' in err
  assert process.returncode == 0


@pytest.mark.parametrize('first, second, code', [
    (signal.SIGTERM, signal.SIGTERM, 143),
    (signal.SIGINT, signal.SIGINT, 130),
    (signal.SIGTERM, signal.SIGINT, 130)])
def test_second_signal_ends_at_once(start, first, second, code):
  process = start(_LOOP.format(then='time.sleep(600)'))
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(first)
  assert process.stdout.readline() == 'saved\n'
  time.sleep(interrupts.ECHO_SECONDS)
  process.send_signal(second)
  _, err = process.communicate(timeout=60)
  assert f'{second.name}: ending at once' in err
  assert process.returncode == code


def test_the_echo_of_a_signal_is_not_a_second_one(start):
  """timeout(1) sends it to the program, and to its group of processes."""
  process = start(
      'from training.distributed import interrupts\n'
      'interrupts.ECHO_SECONDS = 60  # a busy machine is slow\n'
      + textwrap.dedent(_LOOP.format(
          then='time.sleep(0.2); print("more", flush=True)')))
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == 'saved\n'
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert out == 'more\n' and process.returncode == 0
  assert err.count('SIGINT') == 1


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


def test_a_launcher_hears_a_hangup_unless_it_is_ignored():
  """And a second one, which a shell and the system send, is none."""
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
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with interrupts.handled(lambda n: heard.append((n, count.add(n)))):
      os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before[0])
  assert len(heard) == 3


def test_second_signal_ends_even_a_main_thread_deep_in_c(start):
  """As in a compilation, where Python's own handlers are never called."""
  process = start('''
      import hashlib
      from training.distributed import signals
      with signals.Stop():
        print('ready', flush=True)
        hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
      ''')
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  process.stderr.readline()
  assert 'finishing this step' in process.stderr.readline()
  time.sleep(interrupts.ECHO_SECONDS)
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=60)
  assert process.returncode == 130


_START = '''
    import gc, hashlib, sys
    from training import cli
    from training.distributed import interrupts
    def main():
      print('ready', flush=True)
      {then}
    cli.run(main, interrupts.EndAtOnce(lambda: {code}))
    '''
_DEEP_IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
# JAX has one such callback: what is raised there is printed and forgotten.
_IN_A_CALLBACK = (
    'gc.callbacks.append(lambda *_: [None for _ in range(10 ** 6)])\n'
    '      while True: gc.collect()')


@pytest.mark.parametrize('then', [_DEEP_IN_C, _IN_A_CALLBACK])
@pytest.mark.parametrize('number, asked, code', [
    (signal.SIGINT, 0, 130), (signal.SIGTERM, 0, 143), (signal.SIGHUP, 0, 129),
    (signal.SIGTERM, 75, 75)])
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


_PROCESS = '''
    import sys, time
    import jax
    from training.distributed import signals
    port, index = sys.argv[1], int(sys.argv[2])
    jax.distributed.initialize(
        f'127.0.0.1:{port}', 2, index, cluster_detection_method='deactivate',
        coordinator_bind_address=f'127.0.0.1:{port}')
    with signals.Stop() as stop:
      print('ready', flush=True)
      step = 0
      while not stop.agreed(step):
        step += 1
        time.sleep(0.01 * (1 + index))  # they are never at the same step
      print('saved', step, flush=True)
      if sys.argv[3] == 'stay':
        time.sleep(600)
    '''


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize('number', [
    signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_to_one_process_stops_both_at_the_same_step(start, number):
  processes = _start_two(start, 'leave')
  processes[1].send_signal(number)
  outs = [process.communicate(timeout=120)[0] for process in processes]
  assert outs[0].startswith('saved ') and outs[0] == outs[1]
  assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.slow
@pytest.mark.multihost
def test_a_second_sigterm_ends_a_process_once_the_step_is_agreed(start):
  processes = _start_two(start, 'stay')
  processes[1].send_signal(signal.SIGTERM)
  assert processes[1].stdout.readline().startswith('saved')
  processes[1].send_signal(signal.SIGTERM)
  processes[1].communicate(timeout=60)
  assert processes[1].returncode == 143


def _start_two(start, then):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  processes = [start(_PROCESS, port, index, then) for index in range(2)]
  for process in processes:
    assert process.stdout.readline() == 'ready\n'
  return processes
