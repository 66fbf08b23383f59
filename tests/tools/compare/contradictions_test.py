"""The preregistered study configs/studies/contradictions.py is what its text
says, and each of its models can be built."""

import itertools
import json

import pytest

from tools.compare import cost, freeze, spec
from tools.compare import plan as plans
from training.costs import totals

FILE = 'configs/studies/contradictions.py'
FACTORS = 'exclusive', 'gate', 'gated_norm', 'sinks'


@pytest.fixture(scope='module')
def study():
  """The base with its variants, and the constants of the file."""
  return freeze.read_study_file(FILE)


def _config(study, variant: str, size: str):
  """Returns the config of a variant at a size on the text, unmatched."""
  sweep, constants = study
  point, = [point for point in sweep.points if point.name == variant]
  changes = {**constants['SIZES'][size], **point.changes}
  return spec.apply_changes(sweep.base, changes, 'it')


def _names(study) -> list[str]:
  return [point.name for point in study[0].points]


def test_the_factorial_design_is_complete(study):
  """Each of the 16 combinations is there once, with the changes of its factors
  and no others."""
  points = {point.name: dict(point.changes) for point in study[0].points}
  assert points[study[0].base_name] == {}
  for count in range(1, len(FACTORS) + 1):
    for names in itertools.combinations(FACTORS, count):
      expected = {}
      for name in names:
        expected |= points[name]
      assert points['-'.join(names)] == expected
  in_design = [name for name in points if set(name.split('-')) <= {*FACTORS}]
  assert len(in_design) == 15  # and the base
  assert len(points) - 1 >= 20


def test_sizes_and_tokens_are_what_a_referee_asks_for(study):
  base = study[0].base_name
  costs = [cost.cost_of_run(_config(study, base, size))
           for size in study[1]['SIZES']]
  assert len(costs) == 4
  flops = [row.flops_per_token * row.tokens for row in costs]
  assert flops[-1] / flops[0] >= 30
  assert costs[-1].params >= 500_000
  for row in costs[-2:]:
    assert row.tokens >= 10 * row.params


def test_each_model_can_be_built_at_each_size(study):
  for size, name in itertools.product(study[1]['SIZES'], _names(study)):
    config = _config(study, name, size)
    params, _ = totals.count_parameters(cost.resolve_model(config))
    assert params > 0
    # Heads have one size, so that more of them make a model wider.
    assert config.model.head_dim == 16


def test_rates_are_transferred_but_of_what_mup_has_no_rule_for(study):
  without = [name for name in _names(study) if _config(
      study, name, 'd64').model.parametrization != 'mup']
  assert without == ['ngrams']
  smallest, *_ = study[1]['SIZES'].values()
  assert study[0].base.model.mup_base_width == smallest['model.d_model']
  assert study[1]['SEEDS']['tune'] >= 3
  assert study[1]['TUNING'].extend > 0


@pytest.mark.long
def test_each_run_is_matched_and_can_be_trained(tmp_path, monkeypatch):
  for name in 'prose', 'code':
    rows = [json.dumps({'text': f'{name} {i} ' * 60}) for i in range(4000)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(rows))
  file = spec.path_of_sweep_file(FILE)
  file = str(spec.pathlib.Path(file).resolve())
  monkeypatch.chdir(tmp_path)
  frozen = freeze.freeze_plan(file)
  plan = frozen.plan
  assert plan.tuned_sizes == ('d32',)
  assert plan.tuned_at_each_size == ('ngrams',)
  for size, variant in itertools.product(plan.all_sizes, plan.variants):
    base = frozen.point(plan.base, size, plans.TEXT)
    point = frozen.point(variant, size, plans.TEXT)
    assert point['tokens'] == base['tokens']
    assert point['flops_per_token'] == pytest.approx(
        base['flops_per_token'], rel=cost.LARGEST_SHARE_OFF)
