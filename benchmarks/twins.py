"""Mixtures of experts against their dense twins, and what balances experts.

  python -m benchmarks.twins --workdir runs/twins

Every run is train.py on the default text, by a command that is printed; run
again, what is complete is only read. A twin differs in nothing but its
feed-forward network, which is as wide as the experts that a token sees. What a
step takes is measured afterwards, the twins taking turns, so that a busy
machine slows them alike. The remedies are tried on the mixture of 8 experts,
without a balancing loss but where it says so. Expert choice is no remedy here:
in a model that predicts the next token its choice would depend on that token.
"""

import argparse
import importlib
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import numpy as np

from configs.errors import EnvironmentFailure, RequestError
from training import cli
from training.workdir import storage

_SHORT = {'data.length': 128}
# name: (config, what is changed in it)
TWINS = {
    'mixtral, dense': ('mixtral', _SHORT | {
        'model.ffn': 'swiglu', 'model.d_ff': 344}),
    'mixtral, 4 experts': ('mixtral', _SHORT),
    'mixtral, 8 experts': ('mixtral', _SHORT | {'model.moe.num_experts': 8}),
    'switch, dense': ('switch', {'model.ffn': 'relu'}),
    'switch, 4 experts': ('switch', {}),
}
_ALONE = {'model.moe.num_experts': 8, 'model.moe.balance_loss': 'none',
          'data.length': 128, 'data.batch_size': 8}
REMEDIES = {name: ('mixtral', _ALONE | changes) for name, changes in {
    'none': {},
    'balance loss': {'model.moe.balance_loss': 'switch'},
    'importance loss': {'model.moe.balance_loss': 'importance'},
    'jitter 0.01': {'model.moe.jitter': 0.01},
    'noise 1': {'model.moe.logit_noise': 1.0},
    'bias 0.01': {'model.moe.router': 'sigmoid', 'model.moe.bias_rate': 0.01},
    'z-loss 0.001': {'model.moe.z_loss_weight': 0.001},
    'sinkhorn': {'model.moe.router': 'sinkhorn'},
    'random second': {'model.moe.router': 'gshard'},
    'expert dropout 0.1': {'model.moe.expert_dropout': 0.1},
    'capacity 1.25': {'model.moe.capacity_factor': 1.25,
                      'model.moe.eval_capacity_factor': 1.25},
}.items()}
GROUPS = {'twins': TWINS, 'remedies': REMEDIES}
TURNS = 15  # of each twin, to measure its step
PARTS = 5  # of a run, at whose ends it is evaluated
PANEL = {'load_max': 'max/mean', 'window_unused': 'unused',
         'load_entropy': 'load entropy', 'dropped': 'dropped',
         'confidence': 'confidence'}


def command(workdir: pathlib.Path, name: str, row, steps: int) -> list[str]:
  """Returns the command of one run."""
  system, changes = row
  flags = changes | {
      'train.steps': steps, 'eval.every_steps': steps // PARTS,
      'eval.batches': 8, 'log.every_steps': 5, 'checkpoint.every_steps': 0}
  folder = workdir / name.replace(', ', '-').replace(' ', '_')
  return [sys.executable, 'train.py', '--config', f'configs/{system}.py',
          f'--workdir={folder}',
          *(f'--config.{field}={value}' for field, value in flags.items())]


def run(words: list[str]) -> list[dict]:
  """Trains, unless it is done already; returns the lines of metrics.jsonl."""
  print(shlex.join(['python', *words[1:]]), flush=True)
  result = subprocess.run(words, capture_output=True, text=True)
  if result.returncode:
    raise EnvironmentFailure(result.stdout + result.stderr)
  workdir = next(w.partition('=')[2] for w in words if 'workdir=' in w)
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def config_of(row):
  """Returns the config of a row, as its command has it."""
  system, changes = row
  config = importlib.import_module(f'configs.{system}').get_config()
  config.update_from_flattened_dict(changes)
  return config


def curve(rows: list[dict], row) -> dict:
  """Returns of a run: parameters, FLOPs, and its held-out loss by step."""
  from training import objectives
  from training.costs import totals, flops
  config = config_of(row)
  figures = totals.count(config)
  evals = [r for r in rows if r['split'] == 'eval']
  objective = objectives.of(config)
  sides = objective.row_lengths(config)
  per_step = config.data.batch_size * sum(sides) * (
      flops.training_flops_per_token(
          totals.resolved(config), *sides,
          unread=objective.unread(config, sides[0]),
          freeze=config.optim.freeze, prefix=objective.prefix))
  return dict(
      parameters=figures['parameters'], active=figures['active_parameters'],
      flops_per_step=per_step, steps=[r['step'] for r in evals],
      loss=[r['loss'] for r in evals])


def stepper(row):
  """Returns a function that takes one training step of a row's run."""
  import jax

  from training import runs
  from training.data import pipeline, tokenizers
  from training.distributed import devices
  config = config_of(row)
  tokenizer = tokenizers.load(config.data.tokenizer)
  job = runs.build(config, runs.resolve(config, tokenizer)[0])
  loader = pipeline.training_loader(config, tokenizer)
  batch = devices.put(loader.batch(0), job.place)
  with job.context():
    held = [job.new_state()]
    compiled = job.train_step().lower(held[0], batch).compile()

  def take():
    held[0], _ = compiled(held[0], batch)
    jax.block_until_ready(held[0])

  return take


def step_seconds(table: dict) -> dict[str, float]:
  """Returns the median time of a step of each row, taking turns."""
  takes = {name: stepper(row) for name, row in table.items()}
  times = {name: [] for name in takes}
  for turn in range(1 + TURNS):
    for name, take in takes.items():
      start = time.perf_counter()
      take()
      if turn:  # the first one warms up
        times[name].append(time.perf_counter() - start)
  return {name: statistics.median(t) for name, t in times.items()}


def twins_table(curves: dict[str, dict]) -> str:
  """Loss at the same FLOPs, and at the same time: of the cheapest and of the
  quickest of a system at the end of its run."""
  lines = [f'{"run":<20}{"parameters":>12}{"active":>10}{"s/step":>8}'
           f'{"GFLOP/step":>12}{"loss, end":>11}{"same FLOPs":>12}'
           f'{"same time":>11}']
  for system in dict.fromkeys(name.split(',')[0] for name in curves):
    group = {n: c for n, c in curves.items() if n.startswith(f'{system},')}
    ends = {unit: min(c['steps'][-1] * c[unit] for c in group.values())
            for unit in ('flops_per_step', 'step_seconds')}
    for name, c in group.items():
      at = [np.interp(end / c[unit], c['steps'], c['loss'])
            for unit, end in ends.items()]
      lines.append(
          f'{name:<20}{c["parameters"]:>12,}{c["active"]:>10,}'
          f'{c["step_seconds"]:>8.3f}{c["flops_per_step"] / 1e9:>12.2f}'
          f'{c["loss"][-1]:>11.4f}{at[0]:>12.4f}{at[1]:>11.4f}')
  return '\n'.join(lines)


def panel(rows: list[dict]) -> dict:
  """Returns the panel's means over layers, and the last fifth of the run."""
  train = [r for r in rows if r['split'] == 'train']
  late = train[-max(1, len(train) // PARTS):]
  figures = {name: float(np.mean([r[f'health/{name}'] for r in late]))
             for name in PANEL}
  figures['worst'] = float(np.max([r['health/load_max'] for r in late]))
  figures['loss'] = [r['loss'] for r in rows if r['split'] == 'eval'][-1]
  return figures


def remedies_table(panels: dict[str, dict]) -> str:
  heads = PANEL | {'worst': 'worst max/mean', 'loss': 'held-out loss'}
  lines = [f'{"remedy":<19}' + ''.join(f'{h:>16}' for h in heads.values())]
  for name, figures in panels.items():
    lines.append(f'{name:<19}' + ''.join(
        f'{figures[key]:>16.4f}' for key in heads))
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.twins', description=__doc__,
      allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--steps', type=int, default=150)
  parser.add_argument('--only', choices=GROUPS, help='one of the tables')
  parser.add_argument('--json', default='', help='a file of figures')
  args = parser.parse_args()
  if args.steps < PARTS:
    raise RequestError(f'--steps is {args.steps}: it must be {PARTS} or more')
  storage.try_folder(args.workdir)
  json_file = storage.output(args.json, '--json')
  found = {}
  for group in [args.only] if args.only else GROUPS:
    of = {}
    for name, row in GROUPS[group].items():
      rows = run(command(args.workdir / group, name, row, args.steps))
      of[name] = curve(rows, row) if group == 'twins' else (
          panel(rows))
    if group == 'twins':
      for name, seconds in step_seconds(GROUPS[group]).items():
        of[name]['step_seconds'] = seconds
    print(twins_table(of) if group == 'twins' else remedies_table(of))
    found[group] = of
  if json_file:
    storage.write(json_file, json.dumps(found, indent=2) + '\n')


if __name__ == '__main__':
  cli.run(main)
