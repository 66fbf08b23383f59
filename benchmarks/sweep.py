"""Times runs as one program against the same runs in a process each.

  python -m benchmarks.sweep
  python -m benchmarks.sweep --runs=4 --at_once=2 --json=FILE

The runs are of 4 learning rates and as many seeds as it takes: a GPT of 2
layers of width 64, 200 steps of 8 x 64 bytes of text, with an evaluation and a
checkpoint at the end. Each side counts from the start of its first process to
the end of its last; nothing compiled is kept. Then the losses are compared.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags

from training import cli

flags.DEFINE_integer('runs', 8, 'How many.')
flags.DEFINE_integer('steps', 200, 'Of each run.')
flags.DEFINE_integer('at_once', 1, 'Single runs at a time.')
flags.DEFINE_string('json', '', 'Write the figures to this file.')
flags.DEFINE_string('joint', '', 'Train them as one program into this folder, '
                    'and time nothing.')

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def fields(run: int, steps: int) -> dict:
  """Returns what run `run` changes of configs/gpt.py:tiny."""
  return {
      'model.d_model': 64, 'model.num_layers': 2, 'model.max_len': 64,
      'data.length': 64, 'data.batch_size': 8, 'train.steps': steps,
      'optim.warmup_steps': 20, 'eval.every_steps': steps, 'eval.batches': 16,
      'checkpoint.every_steps': steps, 'seed': run // len(RATES),
      'optim.lr': RATES[run % len(RATES)]}


def main():
  cli.parse(__doc__)
  args = flags.FLAGS
  if args.joint:
    return _joint(args)
  if min(args.runs, args.steps, args.at_once) < 1:
    raise ValueError('--runs, --steps and --at_once must be at least 1')
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    together = _timed([_joint_command(args, folder)], 1)
    alone = _timed([_command(args, folder, run) for run in range(args.runs)],
                   args.at_once)
    differ = max(_difference(folder, run) for run in range(args.runs))
  figures = dict(runs=args.runs, steps=args.steps, at_once=args.at_once,
                 together_s=together, alone_s=alone, ratio=together / alone,
                 largest_relative_difference_of_a_loss=differ)
  print(f'{args.runs} runs of {args.steps} steps: together {together:.1f} s, '
        f'alone, {args.at_once} at a time, {alone:.1f} s: '
        f'{together / alone:.2f} x. Their losses differ by {differ:.1e} at '
        'most.')
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(figures, indent=1) + '\n')
  return 0


def _joint(args) -> int:
  from configs import gpt
  from training import host, vectorised
  host.settle()
  configs = []
  for run in range(args.runs):
    config = gpt.get_config('tiny')
    config.update_from_flattened_dict(fields(run, args.steps))
    configs.append(config.lock())
  vectorised.train(configs, [pathlib.Path(args.joint) / str(run)
                             for run in range(args.runs)])
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
        raise RuntimeError(f'{" ".join(process.args)} ended with exit code '
                           f'{process.returncode}: {process.stderr.read()}')
    time.sleep(0.02)
  return time.perf_counter() - start


def _difference(folder, run: int) -> float:
  """The largest relative difference of a loss of the two sides."""
  def losses(side):
    lines = (folder / side / str(run) / 'metrics.jsonl').read_text()
    return [json.loads(line)['loss'] for line in lines.splitlines()]
  return max(abs(a / b - 1) for a, b in zip(
      losses('together'), losses('alone'), strict=True))


if __name__ == '__main__':
  cli.run(main)
