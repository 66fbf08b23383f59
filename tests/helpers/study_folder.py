"""Writes the folder of a study whose figures are known, without training."""

import dataclasses
import pathlib

import numpy as np

from configs.sweeps import helpers
from tools.compare import decide, layout, noise, phases
from tools.compare import plan as plans

BASE = 'learned'
VARIANTS = ('rope', 'alibi', 'none', 'post_norm', 'wild')
# What a reader of names must survive, in HTML, Markdown, LaTeX and SVG.
ODD = 'a_b<b>&"50%"|#{x}$\\'
SIZES = ('small', 'medium', 'large')
PARAMS = (41_234, 163_456, 652_345, 2_605_678)
MEASURES = (plans.Measure('loss', plans.TEXT, 'loss', plans.LOWER, 5.545),
            plans.Measure('mqar', 'mqar', 'probe/accuracy', plans.HIGHER, 0.1))
# What each variant adds to the loss and to an accuracy; None: it diverges.
EFFECTS = {BASE: 0.0, 'rope': -0.21, 'alibi': -0.08, 'none': 0.004,
           'post_norm': 0.3, 'wild': None, ODD: -0.15}
STEPS = 300
EVERY = 30  # steps between two evaluations


def plan(variants=VARIANTS, **changes):
  """Returns the plan of a study of position encodings.

  Args:
    variants: its variants, beside the base.
    **changes: other values of fields of the plan.
  """
  fields = dict(
      name='positions', question='Which position encoding should a small GPT '
      'have?', file='configs/studies/positions.py', base=BASE,
      variants=tuple(variants), sizes=SIZES, workloads=(plans.TEXT, 'mqar'),
      measures=MEASURES,
      seeds=dict(noise=6, tune=1, screen=4, confirm=5),
      tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3, 4e-3)}), effect=0.05,
      match='params', match_field='model.d_ff', tuned_sizes=SIZES[:1])
  return plans.Plan(**fields | changes)


def frozen(of):
  """Returns a plan as it is frozen, with a point for each variant, size and
  workload."""
  points = []
  for variant in (of.base, *of.variants):
    for i, (size, params) in enumerate(zip(of.all_sizes, PARAMS)):
      for workload in of.workloads:
        changes = {'model.d_model': 32 << i}
        matched = []
        if variant != of.base:
          changes['model.position'] = 'rope'
          matched = ['model.d_ff']
        points.append(dict(
            variant=variant, size=size, workload=workload, changes=changes,
            matched=matched, params=params, active_params=params,
            multiplied_params=params, looked_up_params=0,
            flops_per_token=6.0 * params, tokens=1_228_800, vocab=256))
  return plans.FrozenPlan(
      of, helpers.small_gpt_config(STEPS).to_dict(), points,
      {'file': '0123456789abcdef', 'text': 'fedcba98765432'},
      {'commit': 'f5ac5de0123456789', 'diff': ''})


def outcomes(of, phase, names, effects=None):
  """Returns the outcome of every run of a phase.

  Args:
    of: the plan.
    phase: the name of the phase.
    names: the variants that it runs.
    effects: as EFFECTS.
  """
  random = np.random.default_rng(len(phase))
  effects = effects or EFFECTS
  num_sizes = 1 if phase == 'screen' else len(SIZES)
  outcomes_of_runs = []
  for i in range(num_sizes):
    for workload in of.workloads:
      for seed in phases.PHASES[phase].seeds_of_phase(of):
        # What all variants have in common by their seed.
        shared = random.normal(0, 0.03)
        for name in names:
          outcomes_of_runs.append(_outcome(
              of, phase=phase, name=name, i=i, workload=workload, seed=seed,
              effect=effects.get(name, 0.0), shared=shared, random=random))
  return outcomes_of_runs


def _outcome(of, *, phase, name, i, workload, seed, effect, shared, random):
  """Returns the outcome of one run.

  Args:
    of: the plan.
    phase, name, workload, seed: its phase, variant, workload and seed.
    i: the number of its size.
    effect: what the variant adds to the loss; None: the run diverges.
    shared: what the runs of the seed have in common.
    random: the generator of its noise.
  """
  measure = of.measures_of_workload(workload)[0]
  loss = 2.6 - 0.25 * i + shared + (effect or 0.0) + random.normal(0, 0.02)
  accuracy = 0.5 + 0.12 * i + shared - (effect or 0.0)
  accuracy = np.clip(accuracy + random.normal(0, 0.02), 0, 1)
  value = float(loss if workload == plans.TEXT else accuracy)

  # The curve of the loss, which the last phase keeps.
  curve = {}
  if effect is None:
    value = measure.chance
    loss = np.inf
  elif phase == 'confirm':
    step = np.arange(EVERY, STEPS + 1, EVERY)
    loss_at_step = loss + 4 * (step ** -0.5 - STEPS ** -0.5)
    curve = dict(step=step.tolist(), tokens=(2048 * step).tolist(),
                 flops=(6.0 * PARAMS[i] * 2048 * step).tolist(),
                 seconds=(0.01 * step).tolist(), loss=loss_at_step.tolist())
  return plans.Outcome(
      phase, name, SIZES[i], workload, seed, {measure.name: value},
      effect is None, 6.0 * PARAMS[i] * STEPS * 2048, 3.0 + i, PARAMS[i],
      {'optim.lr': 2e-3}, float(loss), curve)


def results(of, upto='confirm', effects=None):
  """Returns what results.json holds once some phases are over.

  Args:
    of: the plan.
    upto: the last phase that is over; '': none is.
    effects: as EFFECTS.
  """
  names = []
  if upto:
    all_phases = [*of.seeds]
    names = all_phases[:all_phases.index(upto) + 1]

  # The runs of each phase, and what was decided by them.
  runs = []
  records = {}
  if 'noise' in names:
    runs += outcomes(of, 'noise', (of.base, plans.SECOND_BASE))
    records['noise'] = noise.measure_noise(of, runs)
    records['announced'] = noise.AnnouncedPower(
        0.84, True,
        'An effect of 0.05 in loss is found with a probability of 84%.')
  if 'tune' in names:
    tuned = []
    for variant in (of.base, *of.variants):
      tuned += [_tuned(variant, workload) for workload in of.workloads]
    records['tuned'] = tuned
  if 'screen' in names:
    runs += outcomes(of, 'screen', (of.base, *of.variants), effects)
    records['screen'] = decide.screen_variants(of, runs)
  passed = [row.variant for row in records.get('screen', ())
            if row.verdict == decide.PASSED]
  if 'confirm' in names:
    runs += outcomes(of, 'confirm', (of.base, *passed), effects)
    records['confirm'] = decide.confirm_variants(of, runs)

  # The cost of each phase, and what the results were made with.
  costs = {}
  for name in names:
    costs[name] = dict(planned=10, done=10, failed=1, tokens=1.23e7,
                       flops=4.56e13, seconds=321.0, finished=True)
  return plans.to_json(dict(
      study=dict(name=of.name, hash=frozen(of).hash), outcomes=runs, **records,
      phases=costs, as_planned=dict(same=True, differences=[]),
      provenance=dict(codes=['commit f5ac5de01234'], devices=['cpu x 2'],
                      versions={'jax': '0.10.2', 'python': '3.11.9'})))


def _tuned(variant, workload):
  """Returns how a variant was tuned; the best rate of `rope` is at the edge of
  the rates that were tried."""
  lr = 0.002
  at_edge = []
  if variant == 'rope':
    lr = 0.004
    at_edge = ['optim.lr']
  tried = []
  for tried_lr in (1e-3, 2e-3, 4e-3):
    tried.append(dict(rung=0, steps=150, changes={'optim.lr': tried_lr},
                      value=2.5, loss=2.5, diverged=False))
  return dict(
      variant=variant, size=SIZES[0], workload=workload,
      changes={'optim.lr': lr}, at_edge=at_edge, runs=5, flops=1.5e12,
      seconds=77.0, tried=tried)


def write(root, of=None, tree=None, **changes):
  """Writes study.json and results.json; returns what the latter holds.

  Args:
    root: the folder of the study.
    of: the plan; None: that of `plan`.
    tree: the results; None: those of the whole study.
    **changes: other values of fields of the frozen plan.
  """
  root = pathlib.Path(root)
  of = of or plan()
  root.mkdir(parents=True, exist_ok=True)
  if tree is None:
    tree = results(of)
  plans.save_frozen_plan(root, dataclasses.replace(frozen(of), **changes))
  layout.save_with_checksum(root / 'results.json', tree)
  return tree
