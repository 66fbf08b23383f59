"""A terminal that is closed while a program runs in it."""

import os
import pathlib
import pty
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
# Makes its stdin the terminal of its session, and becomes a program.
_IN_TERMINAL = ('import fcntl, os, sys, termios; '
                'fcntl.ioctl(0, termios.TIOCSCTTY, 0); '
                'os.execv(sys.argv[1], sys.argv[1:])')


def run_until_closed(words: list[str], until: str) -> int:
  """Runs a program in a terminal, which is closed as soon as it has printed
  `until`; returns its exit code."""
  terminal, its_end = pty.openpty()
  program = subprocess.Popen(
      [sys.executable, '-IS', '-c', _IN_TERMINAL, *words], cwd=ROOT,
      stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True)
  os.close(its_end)
  shown = b''
  while until.encode() not in shown:
    shown += os.read(terminal, 100)
  os.close(terminal)
  try:
    return program.wait(60)
  finally:
    program.kill()
