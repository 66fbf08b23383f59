"""A small sweep for tests, and a train.py that takes no time."""

import argparse
import pathlib
import sys

from tools.compare import layout, run
from training import cli
from training.workdir import run_config

FILE = '''
from configs import gpt

def get_config():
  c = gpt.get_config('tiny')
  c.model.update(d_model=32, num_layers=2, num_heads=2, max_len=16)
  c.data.update(length=16, batch_size=8, source='text:{texts}/*.txt')
  c.data.holdout_every = 4
  c.train.steps = 12
  c.optim.warmup_steps = 2
  c.eval.update(every_steps=6, batches=1)
  c.log.every_steps = 1
  c.checkpoint.update(every_steps=4, keep=1)
  return c
SEEDS = {seeds}
TASKS = {tasks}

def sweep(add):
{points}
'''
POINTS = """
  add('rms', **{'model.norm': 'rmsnorm'})
  add('swiglu', **{'model.ffn': 'swiglu'})
"""


def write(folder: pathlib.Path, points: str = POINTS, seeds: int = 2,
          tasks=()) -> str:
  """Writes a sweep's file and the text that it trains on; returns its path."""
  for i in range(8):
    (folder / f'{i}.txt').write_text(f'Document {i}. ' + 'As is said. ' * 40)
  path = folder / 'mini.py'
  path.write_text(FILE.format(texts=folder, points=points, seeds=seeds,
                              tasks=tasks))
  return str(path)


def arguments(*words: str) -> argparse.Namespace:
  """Returns the arguments of the runner of sweeps, for runs one by one."""
  parser = argparse.ArgumentParser()
  run.add_arguments(parser)
  return parser.parse_args(['--group=1', *words])


# A program that writes what a finished run leaves. A seed of the point `bad`
# fails; with a file `hold-seed-1` in the sweep's folder, that seed hangs
# half-way.
SCRIPT = '''
import json, pathlib, sys, time
folder, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
with (folder / 'metrics.jsonl').open('w') as file:
  print(json.dumps(dict(step=1, split='train', loss=2.0)), file=file)
if folder.parent.name == 'bad':
  sys.exit('error: this point is bad')
while (folder.parents[2] / f'hold-{folder.name}').exists():
  time.sleep(0.05)
with (folder / 'metrics.jsonl').open('a') as file:
  for split in 'train', 'eval':
    print(json.dumps(dict(step=steps, split=split, loss=1.0, bad_in_row=0)),
          file=file)
(folder / 'checkpoints' / str(steps)).mkdir(parents=True)
'''
# A program that does so for several runs, but for a point `bad`, or evaluates
# them, but for a point `odd`; and ends with a code.
TOGETHER = '''
import json, pathlib, sys
code, tasks, *folders = sys.argv[1:]
for folder in map(pathlib.Path, folders):
  if folder.parent.name == ('odd' if tasks else 'bad'):
    with (folder / 'log.txt').open('a') as log:
      print('error: not as the others', file=log)
  elif tasks:
    (folder / 'eval.json').write_text(
        json.dumps(dict.fromkeys(tasks.split(','), 1)))
  else:
    (folder / 'checkpoints/12').mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text(
        '{"step": 12, "split": "train", "loss": 1.0, "bad_in_row": 0}\\n')
sys.exit(int(code))
'''


def fake(monkeypatch, code: int = 0) -> None:
  """Replaces training by programs that take no time: SCRIPT for one run, and
  TOGETHER for several at once.

  Args:
    monkeypatch: which undoes that.
    code: the exit code of TOGETHER.
  """

  def train(description, workdir, point, seed):
    folder = layout.run_folder(workdir, point, seed)
    config = layout.config_of_run(description, point, seed)
    run_config.save_config(folder, config)
    return ['-c', SCRIPT, str(folder), str(config.train.steps)]

  monkeypatch.setattr(layout, 'train_command', train)
  monkeypatch.setattr(
      layout, 'group_command', lambda workdir, runs, tasks: [
          '-c', TOGETHER, str(code), tasks,
          *(str(layout.run_folder(workdir, *name)) for name in runs)])


def states(workdir) -> dict:
  """Returns {(point, seed): state} of the runs of a sweep."""
  with layout.Ledger(workdir) as ledger:
    return {(run.point, run.seed): run.state for run in ledger.runs()}


def main() -> None:
  """A runner of the fake, for tests that kill it: its words are run's."""
  import pytest
  with pytest.MonkeyPatch.context() as monkeypatch:
    fake(monkeypatch)
    cli.run(lambda: run.main(arguments(*sys.argv[1:])))


if __name__ == '__main__':
  main()
