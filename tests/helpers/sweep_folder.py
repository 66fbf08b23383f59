"""Writes the folder of a sweep whose figures are known, without training."""

import json
import pathlib

import numpy as np

from configs import base
from tools.compare import layout
from training.workdir import run_config

STEPS, EVERY = 200, 10
TOKENS, PARAMS, FLOPS = 1_000_000, 50_000, 4e5


def loss(step, factor: float = 1.0, floor: float = 1.5):
  """Returns the loss at a step: a power law of the steps, in which `factor`
  times the compute reaches as much."""
  return floor + 4 * (np.asarray(step, float) / factor) ** -0.5


def point(name, changes=None, factor=1.0, seeds=(0, 1, 2), shift=None,
          params=PARAMS, **more):
  """Returns a point of a sweep, with the losses of its runs.

  Args:
    name: its name.
    changes: its changes of the base config.
    factor: how much compute it needs for as much as the base; see `loss`.
    seeds: its seeds.
    shift: {seed: what is added to the losses of its run}.
    params: the size of its model.
    **more: `diverged`, the seeds that end half-way, after too many bad steps;
      `health`, figures of a mixture of experts by name; `together`, how many
      runs train at once; `tasks`, {task: the figures of each seed}; `matched`,
      `flops` and `tokens` of the description.
  """
  return dict(name=name, changes=changes or {}, factor=factor, seeds=seeds,
              shift=shift or {}, params=params, **more)


def write(root, points, match='', states=None):
  """Writes sweep.json, the ledger and the folders of the runs.

  Args:
    root: the folder of the sweep.
    points: of point(); the first is the base.
    match: what sizes were matched by.
    states: (state, error) by (point, seed), where it is not done.
  """
  root = pathlib.Path(root)
  states = dict(states or {})

  # The description of the sweep.
  descriptions = []
  for p in points:
    descriptions.append(dict(
        name=p['name'], changes=p['changes'], matched=p.get('matched', []),
        params=p['params'], active_params=p['params'],
        multiplied_params=p['params'], looked_up_params=0,
        flops_per_token=p.get('flops', FLOPS),
        tokens=p.get('tokens', TOKENS), seeds=list(p['seeds']), tasks=[]))
  config = base.base()
  config.train.steps = STEPS
  config.optim.warmup_steps = 20
  description = dict(
      name='synthetic', file='configs/sweeps/synthetic.py', match=match,
      match_field='', paired=True, base=points[0]['name'],
      base_config=config.to_dict(), points=descriptions)
  layout.save_sweep_description(root, description)

  # The ledger, and the folder of each run that has begun.
  point_by_name = {p['name']: p for p in points}
  with layout.Ledger(root) as ledger:
    ledger.add_runs(
        (p['name'], seed, ()) for p in points for seed in p['seeds'])
    runner = ledger.register_runner()
    for run in ledger.runs():
      state, error = states.get((run.point, run.seed), (layout.DONE, ''))
      if state == layout.PENDING:
        continue
      ledger.claim_runs([run.id], runner)
      ledger.settle_run(run.id, runner, state, error)
      folder = layout.run_folder(root, run.point, run.seed)
      run_config.save_config(
          folder, layout.config_of_run(description, run.point, run.seed))
      point_of_run = point_by_name[run.point]
      num_bad_steps = 0
      if run.seed in point_of_run.get('diverged', ()):
        num_bad_steps = config.train.max_bad_steps
      is_whole = state == layout.DONE and not num_bad_steps
      _write_run(folder, point_of_run, run.seed, is_whole, num_bad_steps)


def _write_run(folder, point_of_run, seed, is_whole, num_bad_steps):
  """Writes the metrics of a run, and the figures of its tasks.

  Args:
    folder: the folder of the run.
    point_of_run: its point, of `point`.
    seed: its seed.
    is_whole: whether it trains to the end, and not half-way.
    num_bad_steps: how many bad steps there are in a row at half-way.
  """
  last_step = STEPS if is_whole else STEPS // 2
  health = {}
  for name, value in point_of_run.get('health', {}).items():
    health[f'health/{name}'] = [value, value]
  with (folder / 'metrics.jsonl').open('w') as file:
    for step in range(EVERY, last_step + 1, EVERY):
      # A wave makes the loss before the end less certain than that at it.
      wave = 0.0
      if step < STEPS:
        wave = 0.01 * np.sin(step + seed)
      shift = point_of_run['shift'].get(seed, 0.0)
      loss_at_step = float(loss(step, point_of_run['factor']) + wave + shift)
      train_row = dict(step=step, split='train', loss=loss_at_step + 0.1,
                       step_seconds=0.5, **health)
      if step == STEPS // 2:
        train_row['bad_in_row'] = num_bad_steps
      if 'together' in point_of_run:
        train_row['runs_at_once'] = point_of_run['together']
      eval_row = dict(step=step, split='eval', loss=loss_at_step)
      for row in (train_row, eval_row):
        file.write(json.dumps(row) + '\n')

  tasks = {}
  for task, figures_by_seed in point_of_run.get('tasks', {}).items():
    tasks[task] = figures_by_seed[seed]
  if tasks:
    (folder / 'eval.json').write_text(json.dumps({'step': STEPS, **tasks}))


# A sweep that has all that a report shows.
SHIFT = {0: 0.01, 1: -0.02, 2: 0.015}
HEALTH = {'dropped': 0.1, 'unserved': 0.02, 'window_load_max': 1.4,
          'window_load_entropy': 0.95, 'window_unused': 0.0,
          'confidence': 0.4, 'router_entropy': 0.8}


POINTS = [
    point('base', shift=SHIFT, tasks={'labels': [{'f1': 0.5}] * 3}),
    # 0.8 of the compute, then shifts of their own.
    point('better', {'model.norm': 'rmsnorm'}, factor=0.8,
          shift={0: 0.012, 1: -0.021, 2: 0.014}),
    point('worse', {'model.position': 'none'}, factor=1.2, shift=SHIFT),
    point('same', {'model.block': 'parallel'},
          shift={0: 0.012, 1: -0.022, 2: 0.018}),
    point('moe', {'model.ffn': 'moe'}, shift=SHIFT, params=80000,
          health=HEALTH),
    point('</script><b>', {'model.ffn': 'geglu'}, seeds=(0, 1), shift=SHIFT),
    point('low', {'optim.lr': 1e-4}, factor=1.3, shift=SHIFT),
    point('high', {'optim.lr': 3e-3}, factor=1.1, shift=SHIFT),
]
LOST = {('worse', 1): ('failed', 'the loss was not finite'),
        ('high', 2): ('pending', '')}
