"""Measures how far averaging lowers the noise of a held-out loss.

  python -m benchmarks.averaging --workdir runs/averaging
  python -m benchmarks.averaging --workdir runs/averaging --seeds=8 --json=FILE

Trains one small GPT with several seeds as one program, once with a learning
rate that stays constant and once with cosine, with optim.ema, and evaluates
neighbouring checkpoints of the last part of each run in four ways:

  live       the parameters
  ema        their moving average (optim.ema)
  mean       the mean of the parameters of this and the 3 checkpoints before it
  scores     the mean of the losses of these 4 checkpoints, which is what
             Heineman et al. 2025 (Signal and Noise, arXiv 2508.13144) average

The noise of a seed is the standard deviation of its losses around a straight
line through the steps, because the loss falls as well; that of several seeds is
the root of the mean of the squares. The loss itself is given too: an average
has to be as good as what it takes the place of.
"""

import argparse
import json
import math

from configs.errors import require
from training import cli
from training.workdir import storage

SCHEDULES = ('constant', 'cosine')
EVERY, POINTS, OF = 10, 16, 4  # steps apart, checkpoints, and in a mean
STEPS = 300
EMA = 0.95


def config(schedule: str, seed: int):
  """Returns the config of one run."""
  from configs import gpt
  made = gpt.get_config('tiny')
  made.update_from_flattened_dict({
      'seed': seed, 'model.d_model': 64, 'model.num_layers': 2,
      'model.max_len': 64, 'data.length': 64, 'data.batch_size': 8,
      'train.steps': STEPS, 'optim.schedule': schedule, 'optim.lr': 3e-3,
      'optim.warmup_steps': 50, 'optim.ema': EMA, 'eval.live': True,
      'eval.every_steps': EVERY, 'eval.batches': 8,
      'checkpoint.every_steps': EVERY, 'checkpoint.keep': POINTS + OF,
      'log.every_steps': 50})
  return made.lock()


def losses(workdir) -> dict[str, list[float]]:
  """Returns the loss of each of the last checkpoints of a run, by the way in
  which it is evaluated."""
  from training import evaluating, progress, runs
  from training.data import pipeline, tokenizers
  from training.step import make_eval_step
  from training.workdir import parameters, restoring
  import jax
  import numpy as np
  rows = [json.loads(line) for line in
          (workdir / 'metrics.jsonl').read_text().splitlines()]
  rows = {row['step']: row for row in rows if row['split'] == 'eval'}
  steps = sorted(rows)[-POINTS:]
  live = lambda n: rows[n]['live/loss']
  own = lambda n: [n - EVERY * i for i in range(OF)][::-1]
  found = {'live': [live(n) for n in steps],
           'ema': [rows[n]['loss'] for n in steps],
           'scores': [float(np.mean([live(m) for m in own(n)]))
                      for n in steps]}
  c = runs.for_this_machine(runs.config_of(workdir))
  tokenizer = tokenizers.load(c.data.tokenizer)
  run = runs.build(c, runs.resolve(c, tokenizer)[0])
  loaders = pipeline.held_out(c, tokenizer)
  step = jax.jit(make_eval_step(run.module, c))
  there = restoring.directory(workdir)
  with run.context():
    read = {n: parameters.restore(there, run.abstract.params, n, live=True
                                  ).state for n in sorted(
                                      {m for n in steps for m in own(n)})}
    found['mean'] = [evaluating.means(evaluating.evaluate(
        step, parameters.mean([read[m] for m in own(n)]), loaders,
        c.eval.batches, run.put, lambda: False), loaders)['loss']
                     for n in progress.each(steps, f'means of {workdir.name}')]
  return found


def noise(values: list[float]) -> float:
  """Returns the standard deviation around the line through the values, of
  which two degrees of freedom are the line's."""
  import numpy as np
  x = np.arange(len(values))
  rest = values - np.polyval(np.polyfit(x, values, 1), x)
  return float(np.sqrt(np.sum(rest ** 2) / (len(values) - 2)))


def figures(of_seeds: list[dict[str, list[float]]]) -> dict[str, dict]:
  """Returns the noise and the mean loss of each way, over the seeds."""
  import numpy as np
  ways = ('live', 'ema', 'mean', 'scores')
  found = {way: dict(
      noise=math.sqrt(np.mean([noise(own[way]) ** 2 for own in of_seeds])),
      loss=float(np.mean([own[way] for own in of_seeds]))) for way in ways}
  for way in ways:
    own = found[way]
    own['of_live'] = own['noise'] / found['live']['noise']
    own['lower'] = sum(noise(seed[way]) < noise(seed['live'])
                       for seed in of_seeds)
  return found


def main():
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.averaging', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--workdir', required=True, help='a folder for the runs')
  parser.add_argument('--seeds', type=int, default=6,
                      help='how many, from 2 on')
  parser.add_argument('--json', default='', help='a file for the figures')
  args = parser.parse_args()
  require(args.seeds > 1, f'--seeds is {args.seeds}: choose 2 or more')
  out = storage.output(args.json, '--json')
  folder = storage.path(args.workdir)
  storage.try_folder(folder)
  from training import vectorised
  found = {}
  for schedule in SCHEDULES:
    configs = [config(schedule, seed) for seed in range(args.seeds)]
    workdirs = [folder / schedule / str(seed) for seed in range(args.seeds)]
    vectorised.train(configs, workdirs)
    found[schedule] = figures([losses(workdir) for workdir in workdirs])
  print(f'{POINTS} checkpoints {EVERY} steps apart, {args.seeds} seeds')
  print('| schedule | evaluated | loss | noise | of live | seeds with less |')
  print('|---|---|---|---|---|---|')
  for schedule, ways in found.items():
    for way, own in ways.items():
      print(f'| {schedule} | {way} | {own["loss"]:.4f} | {own["noise"]:.5f} | '
            f'{own["of_live"]:.2f} | {own["lower"]} of {args.seeds} |')
  if out:
    storage.write(out, json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  cli.run(main)
