"""The benchmark of sweeps: what it compares, and how it reads the losses."""

import json

import pytest

from benchmarks import sweep
from training import vectorised
from training.workdir import run_config


def test_its_runs_are_one_group_of_rates_and_seeds():
  configs = sweep.configs(8, 40)
  assert vectorised.groups(configs) == [list(range(8))]
  assert {(c.optim.lr, c.seed) for c in configs} == {
      (lr, seed) for lr in sweep.RATES for seed in (0, 1)}


def test_a_single_run_has_the_config_of_its_place_in_the_group(tmp_path):
  args = sweep._parser().parse_args(['--steps=40'])
  words = sweep._command(args, tmp_path, 5)
  config = run_config.flatten(sweep.configs(8, 40)[5])
  given = dict(word.removeprefix('--config.').split('=') for word in words
               if word.startswith('--config.'))
  assert given == {name: str(config[name]) for name in given}
  assert given['seed'] == '1' and given['optim.lr'] == '0.002'


def test_losses_are_compared_step_by_step(tmp_path):
  for side, losses in (('alone', (4.0, 2.0, 1.0)),
                       ('together', (4.0 + 4e-6, 2.0 - 4e-6, 1.1))):
    (tmp_path / side / '0').mkdir(parents=True)
    (tmp_path / side / '0/metrics.jsonl').write_text('\n'.join(
        json.dumps({'step': step, 'split': 'train', 'loss': loss})
        for step, loss in zip((4, 20, 24), losses)))
  assert sweep.differences(tmp_path, 0) == pytest.approx((2e-6, 0.1), rel=1e-6)
