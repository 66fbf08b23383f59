"""A study that is small, and a trainer of it that computes what runs give."""

import dataclasses
import math

from tools.study import frozen as frozen_lib
from tools.study import plan as plans

BEST_LR = {'base': 2e-3, 'good': 4e-3, 'same': 2e-3, 'wild': 2e-3}


def plan(**changes) -> plans.Plan:
  return dataclasses.replace(plans.Plan(
      name='made', question='', file='made.py', base='base',
      variants=('good', 'same', 'wild'), sizes=('s', 'm', 'l'),
      workloads=('text', 'copy'),
      measures=(plans.Measure('loss', 'text', 'loss', plans.LOWER, 5.5),
                plans.Measure('copy', 'copy', 'accuracy', plans.HIGHER, 0.0)),
      seeds=plans.Seeds(noise=6, tune=2, screen=6, confirm=6),
      tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3, 4e-3)}), effect=0.1,
      tuned_sizes=('s', 'm', 'l')), **changes)


def frozen(of: plans.Plan, steps: int = 100) -> frozen_lib.Frozen:
  base = {'train': {'steps': steps}, 'optim': {
      'lr': 2e-3, 'warmup_steps': 10, 'decay_steps': 0},
          'checkpoint': {'every_steps': 50}, 'log': {'every_steps': 20}}
  points = [
      {'variant': variant, 'size': size, 'workload': workload,
       'changes': {'model.d_model': 8 << i}
       | ({} if variant == of.base else {'model.norm': variant}),
       'matched': [], 'params': 1000 << i, 'active_params': 1000 << i,
       'flops_per_token': 6000.0 * 2 ** i, 'tokens': 10_000, 'vocab': 256}
      for i, size in enumerate(of.sizes) for workload in of.workloads
      for variant in (of.base, *of.variants)]
  return frozen_lib.Frozen(of, base, points, {}, {'commit': None, 'diff': None})


def spread(seed: int, *names) -> float:
  """A number between -1 and 1 that follows from a seed and names."""
  return math.sin(sum(ord(c) for c in '.'.join(names)) * 12.9898
                  + seed * 78.233)


class Trainer:
  """Computes: `good` is better by 0.3, `wild` diverges. Counts its runs."""

  def __init__(self, of: frozen_lib.Frozen, noise: float = 0.02):
    self.frozen, self.noise = of, noise
    self.asked: dict[str, list] = {}

  def train(self, folder, runs):
    self.asked.setdefault(folder, []).extend(runs)
    return [self._outcome(run) for run in runs]

  def _outcome(self, run) -> plans.Outcome:
    point = self.frozen.point_of(run)
    best = BEST_LR.get(run.variant, BEST_LR['base'])
    lr = run.changes.get('optim.lr', best)
    loss = (2.0 - 0.3 * (run.variant == 'good')
            + 0.2 * math.log2(lr / best) ** 2 + 0.1 * spread(run.seed)
            + self.noise * spread(run.seed, run.variant, run.size, run.workload,
                                  str(run.changes.get('init_seed', 0))))
    bad = run.variant == 'wild' and run.phase == 'screen'
    measure = next(m for m in self.frozen.plan.measures
                   if m.workload == run.workload)
    value = loss if measure.better == plans.LOWER else 1 - loss / 5
    return plans.Outcome(
        run.phase, run.variant, run.size, run.workload, run.seed,
        {measure.name: measure.chance if bad else value}, bad,
        point['tokens'] * point['flops_per_token'] * run.share, 1.0,
        point['params'], dict(run.changes), math.inf if bad else loss)
