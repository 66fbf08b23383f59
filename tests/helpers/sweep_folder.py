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
  """A power law of the steps; `factor` times the compute for as much."""
  return floor + 4 * (np.asarray(step, float) / factor) ** -0.5


def point(name, changes=None, factor=1.0, seeds=(0, 1, 2), shift=None,
          params=PARAMS, **more):
  """Describes a point: `shift` is what each seed adds to its losses; `diverged`
  are seeds that end half-way, after too many bad steps."""
  return dict(name=name, changes=changes or {}, factor=factor, seeds=seeds,
              shift=shift or {}, params=params, **more)


def write(root, points, match='', states=None):
  """Writes sweep.json, the ledger and the workdirs.

  Args:
    root: W.
    points: of point(); the first is the base.
    match: what sizes were matched by.
    states: (state, error) by (point, seed), where it is not done.
  """
  root, states = pathlib.Path(root), dict(states or {})
  rows = [dict(name=p['name'], changes=p['changes'],
               matched=p.get('matched', []), params=p['params'],
               active_params=p['params'],
               flops_per_token=p.get('flops', FLOPS),
               tokens=p.get('tokens', TOKENS), seeds=list(p['seeds']),
               tasks=[])
          for p in points]
  config = base.base()
  config.train.steps, config.optim.warmup_steps = STEPS, 20
  description = dict(
      name='synthetic', file='configs/sweeps/synthetic.py', match=match,
      match_field='', paired=True, base=points[0]['name'],
      base_config=config.to_dict(), points=rows)
  layout.save_sweep_description(root, description)
  with layout.Ledger(root) as ledger:
    ledger.add_runs(
        (p['name'], seed, ()) for p in points for seed in p['seeds'])
    runner = ledger.register_runner()
    for run in ledger.runs():
      state, error = states.get((run.point, run.seed), (layout.DONE, ''))
      if state != layout.PENDING:
        ledger.claim_runs([run.id], runner)
        ledger.settle_run(run.id, runner, state, error)
        p = next(p for p in points if p['name'] == run.point)
        folder = layout.run_folder(root, run.point, run.seed)
        run_config.save_config(
            folder, layout.config_of_run(description, run.point, run.seed))
        bad = config.train.max_bad_steps * (run.seed in p.get('diverged', ()))
        _write_run(folder, p, run.seed, state == layout.DONE and not bad, bad)


def _write_run(folder, p, seed, done, bad):
  with (folder / 'metrics.jsonl').open('w') as file:
    for step in range(EVERY, (STEPS if done else STEPS // 2) + 1, EVERY):
      # The same at the end, less known before it.
      wave = 0.01 * np.sin(step + seed) * (step < STEPS)
      at = float(loss(step, p['factor']) + wave + p['shift'].get(seed, 0.0))
      train = dict(step=step, split='train', loss=at + 0.1, step_seconds=0.5,
                   **{f'health/{name}': [value, value]
                      for name, value in p.get('health', {}).items()})
      if step == STEPS // 2:
        train['bad_in_row'] = bad
      if 'together' in p:
        train['runs_at_once'] = p['together']
      for row in (train, dict(step=step, split='eval', loss=at)):
        file.write(json.dumps(row) + '\n')
  tasks = {task: by_seed[seed] for task, by_seed in p.get('tasks', {}).items()}
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
