"""Asks a side in a process of its own, which ends after its answer. So its
memory is free for the other side, and if it dies, that is an answer too."""

from collections.abc import Mapping
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from tools import tether

ROOT = pathlib.Path(__file__).parents[2]
SIDES = {'ours': 'benchmarks.gpu.ours', 'theirs': 'benchmarks.gpu.theirs'}


def ask(side: str, request: Mapping[str, Any], seconds: float,
        python: str = sys.executable) -> list[dict[str, Any]]:
  """Returns the rows that a side answered with, the last of which has an
  'error' where the process did not come to its end.

  Args:
    side: of SIDES.
    request: what it is to do, as JSON takes it.
    seconds: after which it is ended.
    python: the interpreter that it runs under.
  """
  # A side that is still at work does not outlive this process.
  words = tether.words([python, '-m', SIDES[side]])
  try:
    ended = subprocess.run(
        words, input=json.dumps(request), capture_output=True, text=True,
        env=environment(), cwd=ROOT, timeout=seconds)
  except subprocess.TimeoutExpired as late:
    return [*rows(_text(late.stdout)), dict(
        error=f'it was ended after {seconds:.0f} s')]
  found = rows(ended.stdout)
  if ended.returncode:
    found.append(dict(error=f'exit code {ended.returncode}: '
                      f'{last_line(ended.stderr)}'))
  return found


def environment() -> dict[str, str]:
  """Returns the environment of a side: this process's, with one GPU."""
  return {
      'CUDA_VISIBLE_DEVICES': '0',
      # JAX takes so much of a GPU's memory at its start; by itself, 0.75.
      'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92'} | os.environ | {
          'PYTHONPATH': os.pathsep.join(filter(None, (
              str(ROOT), os.environ.get('PYTHONPATH', ''))))}


def rows(text: str) -> list[dict[str, Any]]:
  """Returns the rows in what a side printed; libraries may print too, and the
  last line may have been cut off."""
  found = []
  for line in text.splitlines():
    if line.startswith('{') and line.endswith('}'):
      try:
        found.append(json.loads(line))
      except json.JSONDecodeError:
        continue
  return found


def last_line(text: str) -> str:
  """Returns the last line of an output that says something."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return lines[-1][-400:] if lines else 'it printed nothing'


def _text(output: bytes | str | None) -> str:
  """Returns as text what a process printed before it was ended: subprocess
  gives bytes then, even if text was asked for."""
  return (output or b'').decode(errors='replace') if not isinstance(
      output, str) else output
