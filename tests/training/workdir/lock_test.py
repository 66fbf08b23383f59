"""One process trains in a workdir, where the file system can see to it."""

import errno
import fcntl

import pytest

from training.workdir import lock


def test_a_second_process_is_refused(tmp_path):
  with lock.held(tmp_path):
    with pytest.raises(ValueError, match='another process trains in'):
      lock.hold(tmp_path)
  lock.hold(tmp_path)
  lock._held.pop().close()


@pytest.mark.parametrize('code', [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(code, tmp_path, monkeypatch,
                                                  capsys):
  def flock(*_):
    raise OSError(code, 'no locks here')
  monkeypatch.setattr(fcntl, 'flock', flock)
  with lock.held(tmp_path):
    assert 'has no file locks (no locks here)' in capsys.readouterr().err


def test_another_failure_is_one(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.EIO, 'broken')
  monkeypatch.setattr(fcntl, 'flock', flock)
  with pytest.raises(OSError, match='broken'), lock.held(tmp_path):
    pass
