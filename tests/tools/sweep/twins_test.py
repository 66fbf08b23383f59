"""The comparison of mixtures with their dense twins: fair, and readable."""

import pathlib

import pytest

from benchmarks import twins
from configs import base
from training.workdir import run_config


def _rows(loss):
  return [dict(step=step, split='eval', loss=loss + 10 / step)
          for step in (10, 20)]


@pytest.fixture(scope='module')
def curves():
  return {name: twins.curve(_rows(3.0), row) | dict(
      step_seconds=0.1 + 0.1 * i)
          for i, (name, row) in enumerate(twins.TWINS.items())}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize('system', ['mixtral', 'switch'])
def test_twins_cost_the_same(curves, system):
  dense = curves[f'{system}, dense']
  for name, figures in curves.items():
    if name.startswith(system) and 'dense' not in name:
      more = figures['flops_per_step'] / dense['flops_per_step'] - 1
      assert 0 < more < 0.01, name  # the router
      assert figures['active'] == pytest.approx(dense['active'], rel=0.01)
      assert figures['parameters'] > 1.2 * dense['parameters']


@pytest.mark.slow
def test_losses_are_read_at_the_same_time(curves):
  lines = twins.twins_table(curves).splitlines()
  assert len(lines) == 1 + len(curves)
  # 4 experts take twice the dense twin's time: half of their steps are in it.
  end, _, same_time = lines[2].split()[-3:]
  assert (float(end), float(same_time)) == (3.5, 4.0)


def test_the_panel_is_of_the_end():
  def row(step, load):
    return dict(step=step, split='train') | {
        f'health/{name}': [load, load + 1] for name in twins.PANEL}
  rows = [row(step, step) for step in range(1, 11)] + [
      dict(step=10, split='eval', loss=2.0)]
  figures = twins.panel(rows)
  assert figures['load_max'] == 10 and figures['worst'] == 11
  assert twins.remedies_table({'none': figures}).split()[-1] == '2.0000'


def test_commands_name_fields_that_there_are():
  known = run_config.flatten(base.base())
  for group in twins.GROUPS.values():
    for name, row in group.items():
      words = twins.command(pathlib.Path('runs'), name, row, 50)
      fields = [w[len('--config.'):].partition('=')[0] for w in words
                if w.startswith('--config.')]
      assert set(fields) <= set(known) and len(set(fields)) == len(fields)
