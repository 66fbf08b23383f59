"""A study that is small, and a trainer of it that computes what runs give."""

import argparse
import dataclasses
import json
import math
import os
from unittest import mock

from common.errors import Stopped
from tools.compare import layout, study
from tools.compare import plan as plans
from training.workdir import provenance, run_config

BEST_LR = {'base': 2e-3, 'good': 4e-3, 'same': 2e-3, 'wild': 2e-3}


def plan(**changes) -> plans.Plan:
  """Returns a plan of three variants, three sizes and two workloads; `changes`
  are other values of its fields."""
  small_plan = plans.Plan(
      name='made', question='', file='made.py', base='base',
      variants=('good', 'same', 'wild'), sizes=('s', 'm', 'l'),
      workloads=('text', 'copy'),
      measures=(plans.Measure('loss', 'text', 'loss', plans.LOWER, 5.5),
                plans.Measure('copy', 'copy', 'accuracy', plans.HIGHER, 0.0)),
      seeds=dict(noise=6, tune=3, screen=6, confirm=6),
      tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3, 4e-3)}), effect=0.1,
      tuned_sizes=('s', 'm', 'l'))
  return dataclasses.replace(small_plan, **changes)


def frozen(of: plans.Plan, steps: int = 100) -> plans.FrozenPlan:
  """Returns a plan as it is frozen, with a point for each size, workload and
  variant, of runs of so many steps."""
  base_config = {
      'train': {'steps': steps},
      'optim': {'lr': 2e-3, 'warmup_steps': 10, 'decay_steps': 0},
      'checkpoint': {'every_steps': 50, 'average': 0},
      'log': {'every_steps': 20}, 'data': {'batch_ramp': '40:8'}}
  points = []
  for i, size in enumerate(of.all_sizes):
    for workload in of.workloads:
      for variant in (of.base, *of.variants):
        changes = {'model.d_model': 8 << i}
        if variant != of.base:
          changes['model.norm'] = variant
        points.append({
            'variant': variant, 'size': size, 'workload': workload,
            'changes': changes, 'matched': [], 'params': 1000 << i,
            'active_params': 1000 << i, 'flops_per_token': 6000.0 * 2 ** i,
            'tokens': 10_000, 'vocab': 256, 'guess': 5.5})
  return plans.FrozenPlan(of, base_config, points, {},
                          {'commit': None, 'diff': None})


def spread(seed: int, *names) -> float:
  """Returns a number between -1 and 1 that follows from a seed and names.

  The offset that a plan draws for its seeds follows from the commit of the code
  and is left out, so that the noise is the same at each commit.
  """
  seed_of_study = seed % plans.SEEDS_BETWEEN_STUDIES
  sum_of_letters = sum(ord(letter) for letter in '.'.join(names))
  return math.sin(sum_of_letters * 12.9898 + seed_of_study * 78.233)


class Trainer:
  """Computes: `good` is better by 0.3, `wild` diverges. Counts its runs.

  Attributes:
    effects: by variant, how much better it is: a number, or by size, 0.3 at
      those that are not there.
    moved: by variant and size, another best rate than BEST_LR has.
    asked: the runs, by folder.
    foretold: the predictions, with what had been asked for before.
  """

  def __init__(self, of: plans.FrozenPlan, noise: float = 0.02, effects=None,
               moved=None):
    self.frozen, self.noise = of, noise
    self.effects = effects or {'good': 0.3}
    self.moved = moved or {}
    self.asked: dict[str, list] = {}
    self.foretold: list[tuple] = []

  def predicted(self, phase, rows):
    self.foretold.append((phase, rows, [*self.asked]))
    return {'rows': rows}

  def train(self, folder, runs):
    self.asked.setdefault(folder, []).extend(runs)
    return [self._outcome(run) for run in runs]

  def _outcome(self, run) -> plans.Outcome:
    """Returns the outcome of a run: a loss that is lower by the effect of its
    variant, and higher the further the rate is from the best one."""
    point = self.frozen.point_of_run(run)
    effect = self.effects.get(run.variant, 0.0)
    if isinstance(effect, dict):
      effect = effect.get(run.size, 0.3)
    best_lr = BEST_LR.get(run.variant, BEST_LR['base'])
    best_lr = self.moved.get((run.variant, run.size), best_lr)
    lr = run.changes.get('optim.lr', best_lr)
    loss_of_lr = 0.2 * math.log2(lr / best_lr) ** 2

    # What the runs of a seed have in common, and what each has for itself.
    shared = 0.1 * spread(run.seed)
    init_seed = str(run.changes.get('init_seed', 0))
    own_noise = self.noise * spread(run.seed, run.variant, run.size,
                                    run.workload, init_seed)
    loss = 2.0 - effect + loss_of_lr + shared + own_noise

    # The value of the measure of its workload.
    is_diverged = run.variant == 'wild' and run.phase == 'screen'
    measure = next(measure for measure in self.frozen.plan.measures
                   if measure.workload == run.workload)
    value = loss if measure.better == plans.LOWER else 1 - loss / 5
    if is_diverged:
      value = measure.chance
      loss = math.inf
    flops = point['tokens'] * point['flops_per_token'] * run.share
    return plans.Outcome(
        run.phase, run.variant, run.size, run.workload, run.seed,
        {measure.name: value}, is_diverged, flops, 1.0, point['params'],
        dict(run.changes), loss, cooled=True)


FILE = """
from configs import gpt

SIZES = {{'s': {{'model.d_model': 8}}, 'm': {{'model.d_model': 12}},
         'l': {{'model.d_model': 16}}}}
SEEDS = {{'noise': 3, 'tune': 3, 'screen': 3, 'confirm': 3}}
TUNING = {{'fields': {{'optim.lr': (2e-3, 4e-3, 8e-3)}}, 'rungs': 2,
          'extend': 0}}
EFFECT = 0.5
{constants}

def get_config():
  c = gpt.get_config('tiny')
  c.model.update(d_model=8, num_layers=1, num_heads=2, max_len=8)
  c.data.update(length=8, batch_size=4, source={source!r}, holdout_every=4,
                cache_dir={cache!r})
  c.train.steps = 4
  c.optim.update(lr=4e-3, warmup_steps=1)
  c.eval.update(every_steps=2, batches=2)
  c.checkpoint.update(every_steps=4, keep=1)
  c.log.every_steps = 1
  {base}
  return c


def sweep(add):
  {sweep}
"""


def write(folder, constants: str = '', base: str = '',
          sweep: str = "add('none', **{'model.position': 'none'})",
          drop: str = '') -> str:
  """Writes a study's file, and the text that it reads; returns its path.

  Args:
    folder: to write in.
    constants: lines of the file, which come after its own.
    base: more of get_config().
    sweep: what is in sweep(add).
    drop: a text that is taken out of the file.
  """
  texts = folder / 'texts'
  texts.mkdir(exist_ok=True)
  for i in range(8):
    (texts / f'{i}.txt').write_text(
        f'Document {i}. What is sown is reaped, {i} times over. ' * 4)
  file = folder / 'made.py'
  text = FILE.format(constants=constants, base=base, sweep=sweep,
                     source=f'text:{texts}/*.txt', cache=str(folder / 'cache'))
  assert drop in text
  file.write_text(text.replace(drop, ''))
  return str(file)


class Written(study.Trainer):
  """Writes what runs leave on disk, through the ledger, without training.

  Attributes:
    loss: config -> the held-out loss that its run has.
    stop_after: how many runs it does before it is told to stop; None: all.
    did: (phase's folder, point, seed) of each run that it did.
  """

  def __init__(self, *args, loss=lambda config: 2.0, stop_after=None, **more):
    super().__init__(*args, **more)
    self.loss, self.stop_after, self.did = loss, stop_after, []

  def train_pending_runs(self, path, ledger):
    name = ledger.register_runner()
    description = layout.load_sweep_description(path)
    for row in ledger.runs(layout.PENDING):
      if self.stop_after is not None and len(self.did) >= self.stop_after:
        raise Stopped
      if ledger.claim_runs([row.id], name):
        config = layout.config_of_run(description, row.point, row.seed)
        folder = layout.run_folder(path, row.point, row.seed)
        if not folder.exists():
          self.begun(path, [row])
        with mock.patch.dict(os.environ, {
            provenance.PLAN_VARIABLE: description['plan']}):
          state, error = leave(folder, config, self.loss(config))
        ledger.settle_run(row.id, name, state, error)
        self.ended(path, row)
        self.did.append((path.name, row.point, row.seed))


def leave(folder, config, loss) -> tuple[str, str]:
  """Writes what a run leaves in its folder; returns its state and its error.

  Args:
    folder: the folder of the run.
    config: its config.
    loss: the held-out loss with which it ended; None: not finite in too many
      steps; or a text: the error that it failed by.
  """
  run_config.save_config(folder, config, {})
  if isinstance(loss, str):
    return layout.FAILED, loss

  # Its metrics.
  steps = config.train.steps
  num_bad_steps = 0
  if loss is None:
    num_bad_steps = config.train.max_bad_steps
  rows = [{'step': steps, 'split': 'train', 'loss': loss, 'step_seconds': 0.5,
           'bad_in_row': num_bad_steps, 'param_norm': 1.0}]
  if loss is not None:
    every = config.eval.every_steps
    for step in range(every, steps + 1, every):
      rows.append({'step': step, 'split': 'eval',
                   'loss': loss + (steps - step) / steps, 'accuracy': 0.5})
  lines = [json.dumps(row) + '\n' for row in rows]
  (folder / 'metrics.jsonl').write_text(''.join(lines))

  # Its last checkpoint.
  (folder / 'checkpoints' / str(steps)).mkdir(parents=True, exist_ok=True)
  if loss is None:
    return layout.FAILED, 'the loss was not finite'
  return layout.DONE, ''


def arguments(**changes) -> argparse.Namespace:
  """Returns what `run` is told, without what it freezes."""
  return argparse.Namespace(**{'until': 'confirm', 'anyway': False, 'group': 8,
                               'parallel': 1, **changes})
