"""Writes the folder of a study whose figures are known, without training."""

import dataclasses
import pathlib

import numpy as np

from configs.sweeps import helpers
from tools.compare import decide, layout, noise, phases
from tools.compare import plan as plans

BASE, VARIANTS = 'learned', ('rope', 'alibi', 'none', 'post_norm', 'wild')
# What a reader of names must survive, in HTML, Markdown, LaTeX and SVG.
ODD = 'a_b<b>&"50%"|#{x}$\\'
SIZES, PARAMS = ('small', 'medium', 'large'), (41_234, 163_456, 652_345)
MEASURES = (plans.Measure('loss', plans.TEXT, 'loss', plans.LOWER, 5.545),
            plans.Measure('mqar', 'mqar', 'probe/accuracy', plans.HIGHER, 0.1))
# What each variant adds to the loss and to an accuracy; None: it diverges.
EFFECTS = {BASE: 0.0, 'rope': -0.21, 'alibi': -0.08, 'none': 0.004,
           'post_norm': 0.3, 'wild': None, ODD: -0.15}
STEPS, EVERY = 300, 30


def plan(variants=VARIANTS, **changes):
  return plans.Plan(**dict(
      name='positions', question='Which position encoding should a small GPT '
      'have?', file='configs/studies/positions.py', base=BASE,
      variants=tuple(variants), sizes=SIZES, workloads=(plans.TEXT, 'mqar'),
      measures=MEASURES,
      seeds=dict(noise=6, tune=1, screen=4, confirm=5),
      tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3, 4e-3)}), effect=0.05,
      match='params', match_field='model.d_ff', tuned_sizes=SIZES[:1])
                    | changes)


def frozen(of):
  points = [dict(
      variant=variant, size=size, workload=workload,
      changes={'model.d_model': 32 << i} | (
          {} if variant == of.base else {'model.position': 'rope'}),
      matched=['model.d_ff'] if variant != of.base else [],
      params=params, active_params=params, flops_per_token=6.0 * params,
      tokens=1_228_800, vocab=256)
            for variant in (of.base, *of.variants)
            for i, (size, params) in enumerate(zip(SIZES, PARAMS))
            for workload in of.workloads]
  return plans.FrozenPlan(
      of, helpers.small_gpt_config(STEPS).to_dict(), points,
      {'file': '0123456789abcdef', 'text': 'fedcba98765432'},
      {'commit': 'f5ac5de0123456789', 'diff': ''})


def outcomes(of, phase, names, effects=None):
  """Every run of a phase, of these variants."""
  rng, effects = np.random.default_rng(len(phase)), effects or EFFECTS
  return [_outcome(of, phase, name, i, workload, seed, effects.get(name, 0.0),
                   shared, rng)
          for i in range(1 if phase == 'screen' else 3)
          for workload in of.workloads
          for seed in phases.PHASES[phase].seeds_of_phase(of)
          for shared in [rng.normal(0, 0.03)] for name in names]


def _outcome(of, phase, name, i, workload, seed, effect, shared, rng):
  measure = of.measures_of_workload(workload)[0]
  loss = 2.6 - 0.25 * i + shared + (effect or 0.0) + rng.normal(0, 0.02)
  accuracy = np.clip(0.5 + 0.12 * i + shared - (effect or 0.0)
                     + rng.normal(0, 0.02), 0, 1)
  value = float(loss if workload == plans.TEXT else accuracy)
  step = np.arange(EVERY, STEPS + 1, EVERY)
  curve = {}
  if effect is None:
    value, loss = measure.chance, np.inf
  elif phase == 'confirm':
    curve = dict(step=step.tolist(), tokens=(2048 * step).tolist(),
                 flops=(6.0 * PARAMS[i] * 2048 * step).tolist(),
                 seconds=(0.01 * step).tolist(),
                 loss=(loss + 4 * (step ** -0.5 - STEPS ** -0.5)).tolist())
  return plans.Outcome(
      phase, name, SIZES[i], workload, seed, {measure.name: value},
      effect is None, 6.0 * PARAMS[i] * STEPS * 2048, 3.0 + i, PARAMS[i],
      {'optim.lr': 2e-3}, float(loss), curve)


def results(of, upto='confirm', effects=None):
  """What results.json holds once the phases up to `upto` are over ('': none).
  """
  names = [*of.seeds][:[*of.seeds].index(upto) + 1] if upto else ()
  runs, records = [], {}
  if 'noise' in names:
    runs += outcomes(of, 'noise', (of.base, plans.SECOND_BASE))
    records['noise'] = noise.measure_noise(of, runs)
    records['announced'] = noise.AnnouncedPower(
        0.84, True,
        'An effect of 0.05 in loss is found with a probability of 84%.')
  if 'tune' in names:
    records['tuned'] = [_tuned(variant, workload)
                      for variant in (of.base, *of.variants)
                      for workload in of.workloads]
  if 'screen' in names:
    runs += outcomes(of, 'screen', (of.base, *of.variants), effects)
    records['screen'] = decide.screen_variants(of, runs)
  passed = [row.variant for row in records.get('screen', ())
            if row.verdict == decide.PASSED]
  if 'confirm' in names:
    runs += outcomes(of, 'confirm', (of.base, *passed), effects)
    records['confirm'] = decide.confirm_variants(of, runs)
  return plans.to_json(dict(
      study=dict(name=of.name, hash=frozen(of).hash), outcomes=runs, **records,
      phases={name: dict(planned=10, done=10, failed=1, tokens=1.23e7,
                         flops=4.56e13, seconds=321.0, finished=True)
              for name in names},
      as_planned=dict(same=True, differences=[]),
      provenance=dict(codes=['commit f5ac5de01234'], devices=['cpu x 2'],
                      versions={'jax': '0.10.2', 'python': '3.11.9'})))


def _tuned(variant, workload):
  is_edge = variant == 'rope'
  return dict(
      variant=variant, size=SIZES[0], workload=workload,
      changes={'optim.lr': 0.004 if is_edge else 0.002},
      at_edge=['optim.lr'] * is_edge, runs=5, flops=1.5e12, seconds=77.0,
      tried=[dict(rung=0, steps=150, changes={'optim.lr': lr}, value=2.5,
                  loss=2.5, diverged=False) for lr in (1e-3, 2e-3, 4e-3)])


def write(root, of=None, tree=None, **changes):
  """Writes study.json and results.json; returns what the latter holds.

  Args:
    root: W.
    of: the plan.
    found: results; None: the whole study's.
    changes: of study.json.
  """
  root, of = pathlib.Path(root), of or plan()
  root.mkdir(parents=True, exist_ok=True)
  tree = results(of) if tree is None else tree
  plans.save_frozen_plan(root, dataclasses.replace(frozen(of), **changes))
  layout.save_with_checksum(root / 'results.json', tree)
  return tree
