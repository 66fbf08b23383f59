"""Plans and outcomes of studies that nobody ran."""

import dataclasses

import numpy as np

from tools.compare import plan as plans

SIZES = ('s', 'm', 'l')
PARAMS = dict(zip(SIZES, (10_000, 100_000, 1_000_000)))


def plan(**changes) -> plans.Plan:
  return dataclasses.replace(plans.Plan(
      name='norms', question='which norm?', file='configs/studies/norms.py',
      base='base', variants=('a', 'b'), sizes=SIZES,
      workloads=('text', 'mqar'),
      measures=(plans.Measure('loss', 'text', 'loss', plans.LOWER, 5.5),
                plans.Measure('mqar', 'mqar', 'probe/accuracy', plans.HIGHER,
                              0.0)),
      seeds=plans.Seeds(noise=6, tune=2, screen=5, confirm=5),
      tuning=plans.Tuning({'optim.lr': (1e-3, 2e-3)}), effect=0.03,
      tuned_sizes=SIZES), **changes)


def outcome(phase: str, variant: str, size: str, seed: int, value: float,
            workload: str = 'text', diverged: bool = False, **changes
            ) -> plans.Outcome:
  name = 'loss' if workload == 'text' else workload
  return plans.Outcome(
      phase, variant, size, workload, seed, {name: value}, diverged, 1e9, 1.0,
      PARAMS[size], {})._replace(**changes)


def phase(name: str, values: dict, workload: str = 'text', lost=()
          ) -> list[plans.Outcome]:
  """Returns outcomes of {variant: array [seed, size]}; `lost` holds (variant,
  seed, size) of those that diverged, by index, which have the value 5.5."""
  first = plans.PHASES.index(name) * plans.Seeds.APART
  return [outcome(name, variant, SIZES[k], first + s,
                  5.5 if (variant, s, k) in lost else float(array[s, k]),
                  workload, (variant, s, k) in lost)
          for variant, array in values.items()
          for s, k in np.ndindex(array.shape)]
