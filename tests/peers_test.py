"""A process that fails, is killed, or leaves: what the others do."""

import signal
import socket
import subprocess
import sys
import textwrap

import pytest

_PROCESS = '''
    import sys
    from training import peers
    index = int(sys.argv[1])
    if index == 0:
      watch = peers.Peers(0, '127.0.0.1')
      print(watch.address, flush=True)
    else:
      watch = peers.Peers(index, '127.0.0.1', sys.argv[2])
      print('ready', flush=True)
    for line in sys.stdin:
      if line == 'fail\\n':
        watch.fail('ValueError: no such thing', 2)
      elif line == 'bye\\n':
        watch.bye()
        break
      print(line, end='', flush=True)
    '''


@pytest.fixture(name='start')
def _start():
  processes = []
  def start(index, address=''):
    processes.append(subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(_PROCESS), str(index), address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True))
    return processes[-1], processes[-1].stdout.readline().strip()
  yield start
  for process in processes:
    process.kill()
    process.communicate()


@pytest.fixture(name='three')
def _three(start):
  first, address = start(0)
  return [first] + [start(i, address)[0] for i in (1, 2)]


def _say(process, word):
  process.stdin.write(f'{word}\n')
  process.stdin.flush()


def _ended(process):
  code = process.wait(timeout=15)
  return code, process.stderr.read()


@pytest.mark.parametrize('failing', [0, 2])
def test_a_failure_ends_all_with_its_name_and_code(three, failing):
  _say(three[failing], 'fail')
  for process in three:
    code, err = _ended(process)
    assert code == 2
    assert f'process {failing} failed: ValueError: no such thing' in err


@pytest.mark.parametrize('killed', [0, 1])
def test_a_killed_process_ends_all_and_is_named(three, killed):
  three[killed].kill()
  for index, process in enumerate(three):
    code, err = _ended(process)
    if index == killed:
      assert code == -signal.SIGKILL
    else:
      assert code == 1
      assert f'process {killed} is gone: it was killed, or its host' in err
      assert f'process {index} ends with it' in err


def test_a_process_that_leaves_in_order_ends_no_other(three):
  _say(three[1], 'bye')
  assert _ended(three[1]) == (0, '')
  _say(three[0], 'still here')
  assert three[0].stdout.readline() == 'still here\n'
  for process in (three[0], three[2]):
    _say(process, 'bye')
    assert _ended(process) == (0, '')


def test_a_stranger_ends_nobody(start):
  first, address = start(0)
  stranger, ready = start(1, address.split()[0] + ' no-token')
  assert ready in ('ready', '')  # it may be turned away before it says so
  stranger.kill()
  _say(first, 'still here')
  assert first.stdout.readline() == 'still here\n'


@pytest.mark.parametrize(
    'line', [b'[1]', b'"token"', b'3', b'{}', b'\xff', b''])
def test_what_is_no_message_of_ours_is_turned_away(start, line):
  first, address = start(0)
  with socket.create_connection(
      ('127.0.0.1', int(address.split()[0])), 15) as stranger:
    stranger.sendall(line + b'\n')
    assert stranger.recv(1) == b''  # closed
  _say(first, 'bye')
  assert _ended(first) == (0, '')  # and no trace
