"""A process that fails, is killed, hangs, or leaves: what the others do; and
what strangers can do to them."""

import contextlib
import ipaddress
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from training.distributed import greeting

_PROCESS = '''
    import sys
    from training.distributed import peers
    peers.BEAT_SECONDS, peers.SILENT_SECONDS = 0.1, 1.5
    peers.CONNECT_SECONDS = 5
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


def _is_well(process):
  _say(process, 'still here')
  return process.stdout.readline() == 'still here\n'


def _ended(process):
  code = process.wait(timeout=60)
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


@pytest.mark.parametrize('stopped', [0, 1])
def test_a_hung_process_ends_all_and_is_named(three, stopped):
  three[stopped].send_signal(signal.SIGSTOP)
  for index, process in enumerate(three):
    if index != stopped:
      code, err = _ended(process)
      assert code == 1
      assert f'process {stopped} hangs: nothing was heard of it for' in err
      assert f'process {index} ends with it' in err
  assert three[stopped].poll() is None


def test_a_process_that_was_stopped_itself_blames_nobody(three):
  """As when all of a machine is stopped for a while."""
  for process in three:
    process.send_signal(signal.SIGSTOP)
  time.sleep(2)
  for process in three:
    process.send_signal(signal.SIGCONT)
  time.sleep(1)
  assert all(_is_well(process) for process in three)


def test_a_process_that_leaves_in_order_ends_no_other(three):
  _say(three[1], 'bye')
  assert _ended(three[1]) == (0, '')
  time.sleep(2)  # its silence is none, and the others beat
  assert _is_well(three[0])
  for process in (three[0], three[2]):
    _say(process, 'bye')
    assert _ended(process) == (0, '')


# Strangers.


def _connect(address):
  return socket.create_connection(('127.0.0.1', int(address.split()[0])), 15)


def _is_closed(connection):
  with contextlib.suppress(ConnectionResetError):
    return connection.recv(1) == b''
  return True


@pytest.mark.parametrize(
    'line', [b'[1]', b'"token"', b'3', b'{}', b'\xff', b'',
             b'{"index": 1, "token": "no-token"}', b'{"index": 1, "token": 1}',
             b'{"index": 1, "token": "\\ud800"}', b'[' * 250])
def test_what_is_no_greeting_of_ours_is_turned_away(start, line):
  first, address = start(0)
  with _connect(address) as stranger:
    stranger.sendall(line + b'\n')
    assert _is_closed(stranger)
  _say(first, 'bye')
  assert _ended(first) == (0, '')  # and no trace


def test_of_a_stranger_only_so_much_is_read(start):
  first, address = start(0)
  with _connect(address) as stranger:
    with pytest.raises(OSError):  # it is closed; the kernel holds some MB
      for _ in range(300):
        stranger.sendall(b'x' * 2 ** 20)
  assert _peak_mb(first.pid) < 200
  assert _is_well(first)


def test_a_stranger_is_not_waited_for(monkeypatch):
  monkeypatch.setattr(greeting, 'GREETING_SECONDS', 0.3)
  port = _serve(lambda *_: None)
  with _connect(str(port)) as silent, _connect(str(port)) as slow:
    began = time.monotonic()
    with pytest.raises(OSError):
      while time.monotonic() - began < 60:
        slow.sendall(b'x')
        time.sleep(0.05)
    assert _is_closed(silent) and time.monotonic() - began < 30


def test_many_strangers_cost_no_threads_and_keep_nobody_out(start):
  first, address = start(0)
  crowd = [_connect(address) for _ in range(500)]
  second, ready = start(1, address)
  assert ready == 'ready'
  assert len(os.listdir(f'/proc/{first.pid}/task')) < 10
  assert len(os.listdir(f'/proc/{first.pid}/fd')) < 100
  for stranger in crowd:
    stranger.close()
  assert _is_well(first) and _is_well(second)


def test_a_process_that_is_crowded_out_tries_again():
  """Its first connection is closed before its greeting is read."""
  server = socket.create_server(('127.0.0.1', 0))
  admitted = queue.Queue()
  def crowded():
    server.accept()[0].close()
    greeting.Door(server, 'secret', lambda *found: admitted.put(found)).serve()
  threading.Thread(target=crowded, daemon=True).start()
  with greeting.enter('127.0.0.1', server.getsockname()[1], 'secret', 3, 10):
    assert admitted.get(timeout=10)[1] == 3


def test_a_process_that_is_never_let_in_is_told_so():
  port = _serve(lambda *_: None)
  with pytest.raises(OSError, match='turned it away'):
    greeting.enter('127.0.0.1', port, 'another', 3, 0.3)


def _serve(admit):
  server = socket.create_server(('127.0.0.1', 0))
  threading.Thread(target=greeting.Door(server, 'secret', admit).serve,
                   daemon=True).start()
  return server.getsockname()[1]


def _peak_mb(pid):
  with open(f'/proc/{pid}/status') as file:
    [peak] = [line.split()[1] for line in file if line.startswith('VmHWM')]
  return int(peak) / 1024


# Where process 0 listens.


@pytest.mark.parametrize('host, found, everywhere', [
    ('node-0', '127.0.1.1', True),  # as Debian's /etc/hosts has it
    ('node-0', '127.0.0.1', True),
    ('node-0', '::1', True),
    ('node-0', '10.0.0.7', False),
    ('node-0', 'fe80::1%eth0', False),
    ('10.0.0.7', '10.0.0.7', False),
    ('localhost', '127.0.0.1', False),
    ('127.0.0.1', '127.0.0.1', False),
    ('127.0.1.1', '127.0.1.1', False)])
def test_a_name_of_loopback_that_others_use_is_listened_for_everywhere(
    monkeypatch, host, found, everywhere):
  monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: [
      (socket.AF_INET, socket.SOCK_STREAM, 6, '', (found, 0))])
  assert greeting.interface(host) == ('' if everywhere else host)


def test_a_host_named_127_0_1_1_is_reached_by_its_address(monkeypatch):
  """127.0.0.1 stands for the address that other hosts know."""
  true = socket.getaddrinfo
  monkeypatch.setattr(socket, 'getaddrinfo', lambda host, *args, **options:
                      true({'node-0': '127.0.1.1'}.get(host, host), *args,
                           **options))
  with greeting.listen('node-0') as server:
    assert ipaddress.ip_address(server.getsockname()[0]).is_unspecified
    _connect(str(server.getsockname()[1])).close()


def test_a_name_that_is_not_this_hosts_is_listened_for_everywhere():
  with greeting.listen('192.0.2.1') as server:
    assert ipaddress.ip_address(server.getsockname()[0]).is_unspecified
