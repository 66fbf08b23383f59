"""The commands of a run, as a person would type them."""

from collections.abc import Mapping
import shlex
from typing import Any

from tools.compare import layout, spec


def flags(changes: Mapping[str, Any]) -> list[str]:
  """Returns the changes of a point as train.py's flags."""
  return [f'--config.{key}={spec.tuples(value)}'
          for key, value in changes.items()]


def train(description: dict, workdir, point: str, seed: int) -> list[str]:
  """Returns the words that train one run, from `train.py` on."""
  row = layout.row_of(description, point)
  return ['train.py', '--config', description['file'], '--workdir',
          str(layout.run_folder(workdir, point, seed)),
          *flags(row['changes']), f'--config.seed={seed}']


def train_together(workdir, runs: list[tuple[str, int]]) -> list[str]:
  """Returns the words that train several runs as one program."""
  names = ','.join(f'{point}/{seed}' for point, seed in runs)
  return ['-m', 'tools.compare.worker', '--workdir', str(workdir),
          f'--runs={names}']


def evaluate(workdir, point: str, seed: int, tasks: list[str]) -> list[str]:
  """Returns the words that do the evaluations which a run owes."""
  folder = layout.run_folder(workdir, point, seed)
  return ['eval.py', '--workdir', str(folder), f'--tasks={",".join(tasks)}',
          '--json', str(folder / 'eval.json')]


def evaluate_together(workdir, runs: list[tuple[str, int]], tasks: list[str]
                      ) -> list[str]:
  """Returns the words that do in one process what several runs owe."""
  return [*train_together(workdir, runs), f'--evaluate={",".join(tasks)}']


def line(description: dict, workdir, run) -> str:
  """Returns one line for a shell: all that a run still needs."""
  words = [train(description, workdir, run.point, run.seed)]
  if run.tasks:
    words.append(evaluate(workdir, run.point, run.seed, run.tasks.split(',')))
  return ' && '.join(shlex.join(['python', *word]) for word in words)
