"""Times runs as one program against the same runs in a process each.

  python -m benchmarks.sweep
  python -m benchmarks.sweep --runs=4 --at_once=2 --json=FILE

The runs are of 4 learning rates and as many seeds as it takes: a GPT of 2
layers of width 64, 200 steps of 8 x 64 bytes of text, with an evaluation and a
checkpoint at the end. Each side counts from the start of its first process to
the end of its last; nothing compiled is kept. Then the losses are compared, of
the first 20 steps and of all: rounding grows in the course of training.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from configs.errors import EnvironmentFailure, require
from training import cli
from training.workdir import storage

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
FIRST = 20  # steps after which losses have hardly drifted apart


def fields(run: int, steps: int) -> dict:
  """Returns what run `run` changes of configs/gpt.py:tiny."""
  return {
      'model.d_model': 64, 'model.num_layers': 2, 'model.max_len': 64,
      'data.length': 64, 'data.batch_size': 8, 'train.steps': steps,
      'optim.warmup_steps': 20, 'eval.every_steps': steps, 'eval.batches': 16,
      'checkpoint.every_steps': steps, 'log.every_steps': 4,
      'seed': run // len(RATES), 'optim.lr': RATES[run % len(RATES)]}


def configs(runs: int, steps: int) -> list:
  """Returns the configs of all runs: one group of training/vectorised.py."""
  from configs import gpt
  made = []
  for run in range(runs):
    config = gpt.get_config('tiny')
    config.update_from_flattened_dict(fields(run, steps))
    made.append(config.lock())
  return made


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.sweep', description=__doc__,
      allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  parser.add_argument('--runs', type=int, default=8, help='how many')
  parser.add_argument('--steps', type=int, default=200, help='of each run')
  parser.add_argument('--at_once', type=int, default=1,
                      help='single runs at a time')
  parser.add_argument('--json', default='', help='a file for the figures')
  parser.add_argument('--joint', default='', help='train them as one program '
                      'into this folder, and time nothing')
  return parser


def main():
  args = _parser().parse_args()
  if args.joint:
    return _joint(args)
  for name, most in (('runs', 1000), ('steps', 10**6), ('at_once', 512)):
    require(1 <= getattr(args, name) <= most, f'--{name} is '
            f'{getattr(args, name)}: choose 1 to {most:,}')
  json_file = storage.output(args.json, '--json')
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    together = _timed([_joint_command(args, folder)], 1)
    alone = _timed([_command(args, folder, run) for run in range(args.runs)],
                   args.at_once)
    first, differ = (max(apart) for apart in zip(
        *[differences(folder, run) for run in range(args.runs)]))
  figures = dict(runs=args.runs, steps=args.steps, at_once=args.at_once,
                 together_s=together, alone_s=alone, ratio=together / alone,
                 largest_relative_difference_of_a_loss=differ,
                 of_the_first_steps=first)
  print(f'{args.runs} runs of {args.steps} steps: together {together:.1f} s, '
        f'alone, {args.at_once} at a time, {alone:.1f} s: '
        f'{together / alone:.2f} x. Their losses differ by {first:.1e} at '
        f'most in the first {FIRST} steps, by {differ:.1e} in all.')
  if json_file:
    storage.write(json_file, json.dumps(figures, indent=1) + '\n')
  return 0


def _joint(args) -> int:
  from training import vectorised
  from training.distributed import cpu
  cpu.prepare()
  vectorised.train(configs(args.runs, args.steps), [
      pathlib.Path(args.joint) / str(run) for run in range(args.runs)])
  return 0


def _joint_command(args, folder) -> list[str]:
  return [sys.executable, '-m', 'benchmarks.sweep', f'--runs={args.runs}',
          f'--steps={args.steps}', f'--joint={folder / "together"}']


def _command(args, folder, run: int) -> list[str]:
  return [sys.executable, 'train.py', '--config', 'configs/gpt.py',
          f'--workdir={folder / "alone" / str(run)}'] + [
              f'--config.{name}={value}'
              for name, value in fields(run, args.steps).items()]


def _timed(commands: list[list[str]], at_once: int) -> float:
  """Returns the seconds that all commands take, `at_once` at a time."""
  environment = {name: value for name, value in os.environ.items()
                 if not name.startswith('JAX_COMPILATION_CACHE')}
  start, waiting, going = time.perf_counter(), list(commands), []
  while waiting or going:
    while waiting and len(going) < at_once:
      going.append(subprocess.Popen(
          waiting.pop(0), env=environment, stdout=subprocess.DEVNULL,
          stderr=subprocess.PIPE, text=True))
    done = [process for process in going if process.poll() is not None]
    for process in done:
      going.remove(process)
      if process.returncode:
        raise EnvironmentFailure(
            f'{" ".join(process.args)} ended with exit code '
            f'{process.returncode}: {process.stderr.read()}')
    time.sleep(0.02)
  return time.perf_counter() - start


def differences(folder, run: int) -> tuple[float, float]:
  """Returns the largest relative difference of a loss of the two sides, in the
  first steps and in all."""
  def rows(side):
    lines = (folder / side / str(run) / 'metrics.jsonl').read_text()
    return [json.loads(line) for line in lines.splitlines()]
  apart = [(a['step'], abs(a['loss'] / b['loss'] - 1)) for a, b in zip(
      rows('together'), rows('alone'), strict=True)]
  return (max(x for step, x in apart if step <= FIRST),
          max(x for _, x in apart))


if __name__ == '__main__':
  cli.run(main)
