"""A run that loses one of its processes again and again reaches the losses of
one that loses none: `make soak`.

Every SOAK_EVERY seconds, for SOAK_SECONDS, a process of the run that is drawn
at random is killed, or, one time in four, told to stop as a preempted one is.
The launcher starts all of them again. Steps are slowed down meanwhile, so that
the run does not end before.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest

from tests import train_test
from tools.launch import job, local

texts = train_test.texts
pytestmark = [pytest.mark.soak, pytest.mark.multihost]
SECONDS = float(os.environ.get('SOAK_SECONDS', '600'))
EVERY = float(os.environ.get('SOAK_EVERY', '20'))
PROCESSES = int(os.environ.get('SOAK_PROCESSES', '2'))
SEED = int(os.environ.get('SOAK_SEED', '0'))
PACE = 0.5  # seconds that a step takes more, while processes are lost
STEPS = int(SECONDS / PACE)
KINDS = (signal.SIGKILL,) * 3 + (signal.SIGTERM,)


TERMINAL = os.dup(2)  # beside what pytest captures of the processes


def tell(text: str) -> None:
  os.write(TERMINAL, f'soak: {text}\n'.encode())


class Losing(threading.Thread):
  """Signals a process of `running`, which the launcher sets, every EVERY
  seconds; `lost` says of each whom, by which signal, and at which step."""

  def __init__(self, workdir, until: float):
    super().__init__(daemon=True)
    self.running: list = []
    self.lost: list[tuple[int, str, int]] = []
    self._workdir, self._until = workdir, until
    self._draw = random.Random(SEED)

  def run(self):
    while time.monotonic() + EVERY < self._until:
      time.sleep(EVERY)
      alive = [i for i, process in enumerate(self.running)
               if process.poll() is None]
      if alive:  # else they are just being started again
        index, kind = self._draw.choice(alive), self._draw.choice(KINDS)
        self.running[index].send_signal(kind)
        self.lost.append((index, kind.name, last_step(self._workdir)))
        tell(f'process {index} gets {kind.name}, at step {self.lost[-1][2]} '
             f'of {STEPS}')


def last_step(workdir) -> int:
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  try:
    return json.loads(lines[-1])['step'] if lines else 0
  except ValueError:  # half written
    return json.loads(lines[-2])['step'] if len(lines) > 1 else 0


def train(folder, workdir, texts, pace=None, every_steps=STEPS) -> int:
  words = [
      '--config=configs/gpt.py', f'--workdir={workdir}', texts,
      *train_test.SMALL, f'--config.train.steps={STEPS}',
      f'--config.checkpoint.every_steps={every_steps}',
      '--config.eval.every_steps=0', f'--stopped_exit_code={job.STOPPED}',
      f'--config.mesh.data={PROCESSES}', '--config.mesh.fsdp=2']
  command = [sys.executable, '-m', 'tests.helpers.pod_worker', json.dumps(
      dict(runs=[words], faults=[], pace=pace))]
  return local.supervise(command, {'PYTHONPATH': str(train_test.ROOT)},
                         PROCESSES, 2, 'cpu', str(folder / 'logs'), 1_000_000)


def all_losses(workdir) -> dict[int, set[float]]:
  """Every loss that was written of each step: those after the last checkpoint
  are computed again."""
  found = {}
  for row in train_test.rows(workdir):
    if row['split'] == 'train':
      found.setdefault(row['step'], set()).add(row['loss'])
  return found


def bugs(said: str) -> list[str]:
  """Returns the tracebacks, less those of who was in the middle of an exchange
  with a process that was killed."""
  found = said.split('Traceback (most recent call last):')[1:]
  ends = (re.search(r'^[\w.]*(Error|Exception|Interrupt|Exit)\b.*', trace,
                    re.MULTILINE) for trace in found)
  return [trace[:5000] for trace, end in zip(found, ends)
          if end is None or 'Gloo' not in end[0]]


def test_a_run_that_loses_processes_reaches_the_same_losses(
    tmp_path, texts, monkeypatch, capfd):
  calm, soaked = tmp_path / 'calm', tmp_path / 'soaked'
  assert train(tmp_path / 'a', calm, texts) == 0
  slow = tmp_path / 'slow'
  slow.touch()
  begun = time.monotonic()
  losing = Losing(soaked, begun + SECONDS)

  class Watched(local.Forwarding):

    def start(self, processes):
      losing.running = processes
      super().start(processes)

  monkeypatch.setattr(local, 'Forwarding', Watched)
  threading.Timer(SECONDS, slow.unlink).start()
  losing.start()
  code = train(tmp_path / 'b', soaked, texts,
               dict(file=str(slow), seconds=PACE), 10)
  took, said = time.monotonic() - begun, ''.join(capfd.readouterr())
  assert code == 0, said
  for log in (tmp_path / 'b').glob('logs/*'):
    said += log.read_text()
  assert not (found := bugs(said)), found
  assert losing.lost and took > SECONDS
  expected, got = all_losses(calm), all_losses(soaked)
  assert sorted(got) == sorted(expected) == list(range(1, STEPS + 1))
  again = sum(len(values) > 1 for values in got.values())
  worst = max(abs(loss / min(expected[step]) - 1)
              for step, values in got.items() for loss in values)
  kinds = [kind for _, kind, _ in losing.lost]
  tell(f'{kinds.count("SIGKILL")} killed and {kinds.count("SIGTERM")} stopped '
       f'in {took:,.0f} s; {STEPS} steps, {again} of them with other bits than '
       f'before; largest relative difference of a loss {worst:.1e}')
  np.testing.assert_allclose(
      [max(got[step]) for step in sorted(got)],
      [max(expected[step]) for step in sorted(got)], rtol=1e-5)
  np.testing.assert_allclose(
      [min(got[step]) for step in sorted(got)],
      [min(expected[step]) for step in sorted(got)], rtol=1e-5)
