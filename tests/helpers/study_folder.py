"""Writes the folder of a study whose figures are known, without training."""

import json
import pathlib

import numpy as np
from scipy import stats

from configs.sweeps import helpers
from tools.compare import findings
from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans
from training.workdir import run_config

BASE, VARIANTS = 'learned', ('rope', 'alibi', 'none', 'post_norm', 'wild')
# What a reader of names must survive, in HTML, Markdown, LaTeX and SVG.
ODD = 'a_b<b>&"50%"|#{x}$\\'
SIZES, PARAMS = ('small', 'medium', 'large'), (41_234, 163_456, 652_345)
MEASURES = (plans.Measure('loss', plans.TEXT, 'loss', plans.LOWER, 5.545),
            plans.Measure('mqar', 'mqar', 'probe/accuracy', plans.HIGHER, 0.1),
            plans.Measure('parity', 'parity', 'probe/accuracy', plans.HIGHER,
                          0.5))
# What each variant adds to the loss and to an accuracy; None: it diverges.
EFFECTS = {BASE: 0.0, 'rope': -0.21, 'alibi': -0.08, 'none': 0.004,
           'post_norm': 0.3, 'wild': None, ODD: -0.15}
STEPS, EVERY = 300, 30


def plan(variants=VARIANTS, confirm=5):
  return plans.Plan(
      name='positions', question='Which position encoding should a small GPT '
      'have?', file='configs/studies/positions.py', base=BASE,
      variants=tuple(variants), sizes=SIZES,
      workloads=(plans.TEXT, 'mqar', 'parity'), measures=MEASURES,
      seeds=plans.Seeds(noise=6, tune=1, screen=4, confirm=confirm),
      tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3, 4e-3)}), effect=0.05,
      match='params', match_field='model.d_ff', tuned_sizes=SIZES[:1])


def frozen(of):
  base = run_config.to_json(helpers.small_gpt(STEPS))
  points = []
  for variant in (of.base, *of.variants):
    for i, (size, params) in enumerate(zip(SIZES, PARAMS)):
      for workload in of.workloads:
        changes = {'model.d_model': 32 << i}
        if variant != of.base:
          changes['model.position'] = 'rope'
        points.append(dict(
            variant=variant, size=size, workload=workload, changes=changes,
            matched=['model.d_ff'] if variant != of.base else [],
            params=params, active_params=params, flops_per_token=6.0 * params,
            tokens=1_228_800, vocab=256))
  return frozen_lib.Frozen(
      of, base, points, {'file': '0123456789abcdef', 'text': 'fedcba98765432'},
      {'commit': 'f5ac5de0123456789', 'diff': ''})


def outcomes(of, phases=plans.PHASES, effects=None, rng=None):
  """Every run of these phases but those of `tune`."""
  rng, effects = rng or np.random.default_rng(0), effects or EFFECTS
  found = []
  for phase in phases:
    names = {'noise': (of.base, plans.AGAIN), 'tune': (),
             'screen': (of.base, *of.variants)}.get(phase)
    if names is None:
      passed = [row.variant for row in _screen(of, found) if row.passed]
      names = (of.base, *passed) if passed else ()
    sizes = SIZES[:1] if phase == 'screen' else SIZES
    for i in range(len(sizes)):
      for workload in of.workloads:
        for seed in of.seeds.of(phase):
          shared = rng.normal(0, 0.03)
          for name in names:
            found.append(_outcome(of, phase, name, i, workload, seed,
                                  effects.get(name, 0.0), shared, rng))
  return found


def _outcome(of, phase, name, i, workload, seed, effect, shared, rng):
  measure = of.of_workload(workload)[0]
  loss = 2.6 - 0.25 * i + shared + (effect or 0.0) + rng.normal(0, 0.02)
  accuracy = np.clip(0.5 + 0.12 * i + shared - (effect or 0.0)
                     + rng.normal(0, 0.02), 0, 1)
  value = float(loss if workload == plans.TEXT else accuracy)
  if effect is None:
    value, loss = measure.chance, np.inf
  step = np.arange(EVERY, STEPS + 1, EVERY)
  tokens = 16 * 128 * step
  curve = {}
  if phase == 'confirm' and effect is not None:
    lost = loss + 4 * (step ** -0.5 - STEPS ** -0.5)
    curve = dict(step=step.tolist(), tokens=tokens.tolist(),
                 flops=(6.0 * PARAMS[i] * tokens).tolist(),
                 seconds=(0.01 * step).tolist(), loss=lost.tolist())
  return plans.Outcome(
      phase, name, SIZES[i], workload, seed, {measure.name: value},
      effect is None, 6.0 * PARAMS[i] * STEPS * 2048, 3.0 + i, PARAMS[i],
      {'optim.lr': 2e-3}, float(loss), curve)


def estimate(values):
  """The mean, its 95 % interval and p by Student's t, n; from numpy alone."""
  values = np.asarray(values)[np.isfinite(values)]
  n = len(values)
  if n < 3:
    return dict(effect=None, low=None, high=None, n=n, p=None)
  mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / n ** .5)
  half = float(stats.t.ppf(0.975, n - 1)) * error
  return dict(effect=mean, low=mean - half, high=mean + half, n=n,
              p=float(2 * stats.t.sf(abs(mean / error), n - 1)))


def _differences(runs, of, phase, variant, measure, size):
  value = {(run.variant, run.seed):
           np.nan if run.diverged else run.values[measure.name] for run in runs
           if (run.phase, run.size, run.workload) == (
               phase, size, measure.workload)}
  return np.array([value[variant, seed] - value[of.base, seed]
                   for seed in of.seeds.of(phase)])


def results(of, upto='confirm', effects=None, tuned=True):
  """What results.json holds once the phases up to `upto` are over ('': none).
  """
  phases = plans.PHASES[:plans.PHASES.index(upto) + 1] if upto else ()
  runs = outcomes(of, phases, effects)
  return plans.to_json(dict(
      study=dict(name=of.name, hash=frozen(of).hash), outcomes=runs,
      noise=_noise(of, runs) if 'noise' in phases else [],
      announced=_announced(of) if 'noise' in phases else None,
      tuned=_tuned(of) if 'tune' in phases else [],
      screen=_screen(of, runs) if 'screen' in phases else [],
      confirm=_confirm(of, runs) if 'confirm' in phases else [],
      phases={name: dict(planned=10, done=10, failed=1, tokens=1.23e7,
                         flops=4.56e13, seconds=321.0, wall_seconds=400.0,
                         finished=True) for name in phases},
      as_planned=dict(same=True, differences=[]),
      provenance=dict(codes=['commit f5ac5de01234'], devices=['cpu x 2'],
                      versions={'jax': '0.10.2', 'python': '3.11.9'})))


def _noise(of, runs):
  rows = []
  for measure in of.measures:
    by = {size: _differences(runs, of, 'noise', plans.AGAIN, measure, size)
          for size in SIZES}
    by[findings.ALL] = np.mean(list(by.values()), 0)
    primary = measure == of.primary
    for size, phase in [*((size, 'confirm') for size in by),
                        (SIZES[0], 'screen')]:
      n, sd = len(by[size]), float(np.std(by[size], ddof=1))
      low, high = (sd * float(np.sqrt((n - 1) / stats.chi2.ppf(q, n - 1)))
                   for q in (0.975, 0.025))
      rows.append(findings.Noise(
          size, measure.name, phase, n, sd, low, high, n - 1, 0, 2 * n,
          getattr(of.seeds, phase), 0.01, 2.2 * sd, 7 if primary else None,
          (0.93 if phase == 'screen' else 0.9) if primary else None))
  return rows


def _announced(of):
  return findings.Announced(
      of.effect, of.power, 0.93, 0.9, 0.84, True,
      'An effect of 0.05 in loss is found with a probability of 84%.')


def _tuned(of):
  return [dict(
      variant=variant, size=SIZES[0], workload=workload,
      changes={'optim.lr': 0.004 if variant == 'rope' else 0.002},
      at_edge=['optim.lr'] if variant == 'rope' else [], runs=5, flops=1.5e12,
      seconds=77.0, tried=[
          dict(rung=rung, steps=150 << rung, changes={'optim.lr': lr},
               value=2.5 + 10 * lr, loss=2.5 + 10 * lr, diverged=False)
          for rung in (0, 1) for lr in (1e-3, 2e-3, 4e-3)[rung:]])
          for variant in (of.base, *of.variants) for workload in of.workloads]


def _screen(of, runs):
  rows = []
  for name in of.variants:
    apart = _differences(runs, of, 'screen', name, of.primary, SIZES[0])
    bad = int(np.sum(np.isnan(apart)))
    rows.append(dict(variant=name, measure=of.primary.name, **estimate(apart),
                     diverged=bad, base_diverged=0, runs=len(apart),
                     unstable=bad > of.unstable * len(apart)))
  tested = [row for row in rows if row['p'] is not None]
  qs = stats.false_discovery_control([row['p'] for row in tested])
  q = {row['variant']: float(x) for row, x in zip(tested, qs)}
  return [findings.Screened(
      **row, q=q.get(row['variant']), passed=bool(
          not row['unstable'] and q.get(row['variant'], 1.0) <= of.q))
          for row in rows]


def _confirm(of, runs):
  passed = [row.variant for row in _screen(of, runs) if row.passed]
  rows = [_verdict(of, runs, name, measure)
          for name in passed for measure in of.measures]
  for primary in (True, False):
    family = [row for row in rows if row['primary'] == primary]
    least = 0.0
    for k, row in enumerate(sorted(family, key=lambda row: row['p'])):
      least = max(least, min(1.0, row['p'] * (len(family) - k)))
      row['p_holm'] = least
      good = row['effect'] < 0 if primary else row['effect'] > 0
      row['verdict'] = (findings.NONE_SHOWN if least > of.alpha else
                        findings.BETTER if good else findings.WORSE)
  return [findings.Verdict(**row) for row in rows]


def _verdict(of, runs, variant, measure):
  by = {size: _differences(runs, of, 'confirm', variant, measure, size)
        for size in SIZES}
  sizes = []
  for size, apart in by.items():
    own = estimate(apart)
    sizes.append(findings.Effect(size, own.pop('effect'), **own))
  primary = measure == of.primary
  own = estimate(np.mean(list(by.values()), 0))
  factor = 1.61 if variant == 'rope' else 0.83
  return dict(
      variant=variant, measure=measure.name, primary=primary, **own,
      p_holm=None, sizes=sizes, same_direction=True, counted=own['effect'],
      diverged=1, base_diverged=0, runs=len(SIZES) * of.seeds.confirm,
      rate_low=0.0017, rate_high=0.3195, p_diverged=0.5, verdict='',
      trend=findings.Trend(-0.0123, -0.0321, 0.0075, of.seeds.confirm, 0.19)
      if primary else None,
      speed_ups=[findings.SpeedUp(
          size, kind, factor + 0.01 * i, factor - 0.2, factor + 0.3,
          of.seeds.confirm, 0.01) for i, size in enumerate(SIZES)
                 for kind in ('flops', 'seconds')] if primary else [])


def write(root, of=None, found=None, **changes):
  """Writes study.json and results.json; returns what the latter holds.

  Args:
    root: W.
    of: the plan.
    found: results; None: the whole study's.
    changes: of study.json.
  """
  root, of = pathlib.Path(root), of or plan()
  root.mkdir(parents=True, exist_ok=True)
  found = results(of) if found is None else found
  tree = frozen_lib.to_json(frozen(of)) | changes
  (root / 'study.json').write_text(json.dumps(tree, allow_nan=False))
  (root / 'results.json').write_text(json.dumps(found, allow_nan=False))
  return found
