"""The study of hybrids: its ratios, and that all of them cost alike."""

import pytest

from tools.compare import costs, freeze
from tools.compare import study_spec as spec

FILE = 'configs/studies/hybrids.py'


def test_its_ratios_divide_the_layers():
  sweep = spec.Spec(FILE).sweep
  found = {}
  for point in sweep.points:
    model = sweep.config(point).model
    names = model.pattern.split(',') if model.pattern else [None]
    mixers = [model.kinds[name].mixer if name else model.mixer
              for name in names]
    assert model.num_layers % len(mixers) == 0
    found[point.name] = (mixers.count('attention')
                         * model.num_layers // len(mixers))
  assert found == {'attention': 8, '1-to-1': 4, '3-to-1': 2, '7-to-1': 1,
                   'recurrence': 0}


@pytest.mark.slow
@pytest.mark.long
def test_its_variants_cost_as_many_flops_as_the_base():
  frozen = freeze.freeze(FILE)
  assert frozen.plan.seeds.confirm >= 5 and len(frozen.plan.sizes) == 3
  for size in frozen.plan.sizes:
    base = frozen.point('attention', size, 'text')
    for variant in frozen.plan.variants:
      own = frozen.point(variant, size, 'text')
      assert own['flops_per_token'] == pytest.approx(
          base['flops_per_token'], rel=0.01)
      assert own['params'] == pytest.approx(base['params'], rel=0.35)
  # Two cores take 2.5 hours at 60 seconds of one core a run.
  assert sum(cost.runs for cost in costs.of(frozen, 8, None)) <= 300
