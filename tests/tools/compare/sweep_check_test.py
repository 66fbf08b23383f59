"""Whether the points of a sweep can be compared, as check sees it."""

import pytest

from configs.errors import RequestError
from tests.helpers import sweep_folder, sweeps
from tools.compare import check
from tools.compare import curves, sweep_report


def described(folder, points, tasks=()):
  return check.describe(sweeps.arguments(
      sweeps.write(folder, points, tasks=tasks), '--workdir=unused'))


@pytest.mark.slow
def test_other_data_are_no_pairs(tmp_path):
  assert described(tmp_path, sweeps.POINTS)['paired']
  long = described(tmp_path, "  add('long', **{'data.length': 8})\n")
  assert not long['paired'] and 'same batches' in check.table(long)
  assert long['points'][1]['tokens'] == 12 * 8 * 8
  assert not described(
      tmp_path, "  add('prefix', **{'objective': 'prefix'})\n")['paired']


@pytest.mark.slow
def test_other_rows_of_a_probe_are_no_pairs(tmp_path):
  probe = ("'objective': 'probe', 'data.source': 'probe:copy', "
           "'data.holdout_every': 20, 'probe.levels': (1, 2, 3), "
           "'model.max_len': 0")
  file = sweeps.write(tmp_path, "  add('levels', **{'probe.levels': (1, 2)})\n")
  text = open(file).read().replace(
      '  return c', f'  c.update_from_flattened_dict({{{probe}}})\n  return c')
  open(file, 'w').write(text)
  told = check.describe(sweeps.arguments(file, '--workdir=unused'))
  assert not told['paired'] and 'probe.*, so a seed' in check.table(told)


@pytest.mark.parametrize('field, value', [
    ('eval.part', "'first'"), ('eval.batches', '2')])
def test_points_that_are_evaluated_on_other_text_are_told(
    field, value, tmp_path):
  told = described(tmp_path, f"  add('x', **{{{field!r}: {value}}})\n")
  assert told['paired']
  assert (f'warning: Points differ in {field}, so their held-out losses are '
          'not of the same text.') in check.table(told)
  told = described(tmp_path, "  add('x', **{'model.norm': 'rmsnorm'})\n")
  assert 'warning' not in check.table(told)


def test_the_report_says_so_too(tmp_path):
  sweep_folder.write(tmp_path, [sweep_folder.point('base'), sweep_folder.point(
      'x', {'eval.part': 'first', 'eval.batches': 2})])
  assert 'differ in eval.part and eval.batches' in sweep_report.text(
      curves.load_sweep(tmp_path))
  # As a study has them: alike in all points.
  other = {'eval.part': 'second'}
  sweep_folder.write(tmp_path / 'study', [
      sweep_folder.point('base', other),
      sweep_folder.point('x', other | {'model.norm': 'rmsnorm'})])
  assert 'eval.part' not in '\n'.join(sweep_report.as_json(
      curves.load_sweep(tmp_path / 'study'))['notes'])


NEVER = "  add('x', **{'eval.every_steps': 0, 'eval.tasks': %r})\n"


def test_a_point_that_leaves_nothing_to_compare_is_refused(tmp_path):
  with pytest.raises(RequestError, match="'x': eval.every_steps is 0 and no "
                     'task is done'):
    described(tmp_path, NEVER % '')
  # The report compares what tasks found without held-out losses, too.
  described(tmp_path, NEVER % 'loss')
  described(tmp_path, NEVER % '', tasks=('loss',))
