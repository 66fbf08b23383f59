"""The runs of a study as pairs, from which everything that it says follows.

Seed s of a variant and of the base have the same data in the same order, so
what the seed does to both cancels in their difference.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tools.compare.plan import Measure, Outcome

# In place of a size, in rows about the mean over sizes.
ALL_SIZES = 'all sizes'

Outcomes = Iterable[Outcome]
Runs = Mapping[tuple[str, str, str], Mapping[int, Outcome]]


class Pair(NamedTuple):
  """A run of a variant, and the run of the base with the same seed."""
  ours: Outcome
  base: Outcome


Pairs = Mapping[int, Pair]  # by seed, at one size


def outcomes_of_phase(outcomes: Outcomes, phase: str) -> Runs:
  """Returns the outcomes of the runs of a phase, by (variant, size, workload)
  and then by seed."""
  by_point: dict[tuple[str, str, str], dict[int, Outcome]] = {}
  for outcome in outcomes:
    if outcome.phase == phase:
      point = (outcome.variant, outcome.size, outcome.workload)
      by_point.setdefault(point, {})[outcome.seed] = outcome
  return by_point


def outcomes_with_measure(runs: Runs, variant: str, size: str, measure: Measure
                          ) -> dict[int, Outcome]:
  """Returns the outcomes of a variant at a size that have a measure, by seed.
  """
  by_seed = runs.get((variant, size, measure.workload), {})
  return {seed: outcome for seed, outcome in by_seed.items()
          if measure.name in outcome.values}


def pair_with_base(runs: Runs, variant: str, base: str, size: str,
                   measure: Measure
                   ) -> Pairs:
  """Returns, by seed, the run of a variant and that of the base, of the seeds
  of which both have a measure."""
  ours = outcomes_with_measure(runs, variant=variant, size=size,
                               measure=measure)
  theirs = outcomes_with_measure(runs, variant=base, size=size, measure=measure)
  seeds = sorted(ours.keys() & theirs.keys())
  return {seed: Pair(ours=ours[seed], base=theirs[seed]) for seed in seeds}


def ended_seeds(pairs_by_size: Sequence[Pairs]) -> list[int]:
  """Returns the seeds that have runs at all sizes of the model, none of which
  diverged. Other seeds cannot be averaged over the sizes.

  Args:
    pairs_by_size: for each size, the pairs of a run of the variant and one of
      the base, by seed.
  """
  shared = set.intersection(*map(set, pairs_by_size))
  ended = []
  for seed in sorted(shared):
    runs: list[Outcome] = []
    for pairs in pairs_by_size:
      runs += pairs[seed]
    if not any(run.diverged for run in runs):
      ended.append(seed)
  return ended


def differences_by_seed(pairs_by_size: Sequence[Pairs], measure: Measure
                        ) -> dict[int, list[float]]:
  """Returns by how much a variant differs from the base, for each seed at each
  size of the model.

  Args:
    pairs_by_size: for each size, the pairs of a run of the variant and one of
      the base, by seed.
    measure: the measure whose values are subtracted.

  Returns:
    The differences, variant minus base, at each size, {seed: [size]}. A seed of
    which a run is missing or diverged is left out.
  """
  differences = {}
  for seed in ended_seeds(pairs_by_size):
    row = []
    for pairs in pairs_by_size:
      ours, base = pairs[seed]
      row.append(ours.values[measure.name] - base.values[measure.name])
    differences[seed] = row
  return differences


def mean_differences(by_seed: Mapping[int, list[float]]) -> list[float]:
  """Returns the mean over the sizes of the differences of each seed."""
  return [sum(values) / len(values) for values in by_seed.values()]


def diverged_share(runs: Sequence[Outcome]) -> float:
  """Returns the share of runs that diverged; 0 where there is no run."""
  return sum(run.diverged for run in runs) / max(len(runs), 1)
