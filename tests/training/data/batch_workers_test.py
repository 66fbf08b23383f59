"""Grain's workers in real processes: signals, and the death of their parent."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).parents[3]
_PROGRAM = '''
    import multiprocessing
    import signal
    import sys
    import time
    sys.path.insert(0, {root!r})

    def main():
      from configs import base
      from training.data import tokenizers
      from training.objectives import pipeline
      got = []
      for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: got.append(number))
      config = base.base()
      config.data.update(
          source='text:{folder}/*.txt', cache_dir='{folder}/cache', length=16,
          batch_size=8, holdout_every=4, workers=2)
      batches = pipeline.training_loader(
          config, tokenizers.load("bytes")).iterate(0, 10_000)
      print('starting', flush=True)
      for _ in range(8):
        next(batches)
      print(*(p.pid for p in multiprocessing.active_children()), flush=True)
      while set(got) != {{signal.SIGINT, signal.SIGTERM}}:
        next(batches)  # while a signal comes
      for _ in range(500):
        next(batches)
      print('still going', flush=True)
      time.sleep(600)

    if __name__ == '__main__':
      main()
    '''


@pytest.mark.slow
def test_a_signal_to_all_is_the_parents_and_its_death_is_the_workers(tmp_path):
  for i in range(8):
    (tmp_path / f'{i}.txt').write_text(f'Document {i}. ' * 20)
  program = tmp_path / 'program.py'
  program.write_text(textwrap.dedent(_PROGRAM).format(
      root=str(ROOT), folder=tmp_path))
  parent = subprocess.Popen([sys.executable, program], text=True,
                            start_new_session=True, stdout=subprocess.PIPE)
  try:
    assert parent.stdout.readline() == 'starting\n'
    for _ in range(20):  # while the workers start
      os.killpg(parent.pid, signal.SIGINT)
      time.sleep(0.1)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    os.killpg(parent.pid, signal.SIGINT)
    os.killpg(parent.pid, signal.SIGTERM)
    assert parent.stdout.readline() == 'still going\n'
    parent.kill()
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in workers):
      assert time.monotonic() < until, 'a worker outlives its parent'
      time.sleep(0.1)
  finally:
    os.killpg(parent.pid, signal.SIGKILL)
    parent.communicate()


def _alive(pid):
  try:
    return 'State:\tZ' not in pathlib.Path(f'/proc/{pid}/status').read_text()
  except FileNotFoundError:
    return False
