"""The report of sweeps and studies whose runs are known: its numbers, names,
what is not over or damaged, and its page in a browser."""

import csv
import dataclasses
import html
import io
import json
import math
import re
import shutil
import types

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from common.errors import RequestError
from tests.helpers import chromium, study_folder, sweep_folder
from tests.helpers.study_folder import BASE, ODD, VARIANTS
from tests.helpers.sweep_folder import HEALTH, LOST, POINTS, SHIFT, point
from tools.compare import __main__ as command
from tools.compare import comparison, curves, decide, efficiency, figures
from tools.compare import layout, measures, phases
from tools.compare import page as page_lib
from tools.compare import plan as plans
from tools.compare import plots, report, spec, tables
from tools.compare import results as results_lib
from training import cli
from training.evals import in_training
from training.workdir import run_config

ALL = (*VARIANTS, ODD)


@pytest.mark.parametrize('changes, is_cool', [
    (dict(), True), (dict(schedule='linear'), True),
    (dict(schedule='wsd'), True),
    (dict(schedule='constant'), False), (dict(schedule='rsqrt'), False),
    (dict(decay_steps=100), True), (dict(decay_steps=101), False),
    (dict(final_fraction=0.5), True), (dict(final_fraction=0.51), False)])
def test_a_run_has_cooled_down_if_its_rate_fell_to_a_half(changes, is_cool):
  fields = dict(schedule='cosine', decay_steps=80, final_fraction=0.1) | changes
  assert curves.ends_cooled_down({'train.steps': 100} | {
      f'optim.{name}': value for name, value in fields.items()}) is is_cool


GOOD = [dict(step=4, split='train'), dict(step=4, split='eval', loss=2.0)]


@pytest.mark.parametrize('state, rows, every, has_all, diverged', [
    ('done', GOOD, 2, True, False), ('running', GOOD, 2, False, False),
    ('done', GOOD[:1], 2, False, False), ('done', GOOD[:1], 0, True, False),
    ('done', [dict(step=2, split='eval', loss=2.0)], 2, False, False),
    ('done', [*GOOD, dict(step=4, split='eval', loss=None)], 2, False, True),
    ('done', [*GOOD, dict(step=4, split='train', param_norm=None)], 2, True,
     True),
    ('done', [dict(step=3, split='train', bad_in_row=3), *GOOD], 2, True, True),
    ('done', [dict(step=3, split='train', bad_in_row=2), *GOOD], 2, True,
     False)])
def test_how_a_run_ended_is_read_from_its_rows(state, rows, every, has_all,
                                               diverged):
  run = curves.Run(
      seed=0, state=state, error='', rows=tuple(rows), evaluations={}, config={
          'train.steps': 4, 'train.max_bad_steps': 3,
          'eval.every_steps': every})
  assert (run.has_all_results, run.diverged) == (has_all, diverged)


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sweep')
  sweep_folder.write(folder, POINTS, states=LOST)
  return comparison.load_comparison(folder)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  folder = tmp_path_factory.mktemp('study')
  c = _study(folder, plan=study_folder.plan(ALL))
  return c, c.results


@pytest.fixture(scope='module')
def written(sweep):
  return {path.name: path for path in report.write_report(sweep)}


def _study(folder, results=None, plan=None, **changes):
  """Returns the comparison of a study whose results are known."""
  results = study_folder.write(folder, plan, results, **changes)
  return comparison.compare_study(folder, plans.load_frozen_plan(folder),
                                  results_lib.NOTHING | results)


def _rows(table):
  """{name of the first column: {heading: cell}}."""
  return {next(iter(row.values())).text: row for row in table.rows}


def test_a_sweeps_differences_and_speed_ups_are_those_of_its_runs(sweep):
  rows = {row['variant']: row for row in sweep.verdicts()}
  gap = float(sweep_folder.loss(sweep_folder.STEPS, 0.8)
              - sweep_folder.loss(sweep_folder.STEPS))
  shifts = (0.002, -0.001, -0.001)
  assert rows['better']['effect'] == pytest.approx(gap + np.mean(shifts))
  # t(0.975, 2) = 4.3027
  assert rows['better']['high'] - rows['better']['effect'] == pytest.approx(
      4.3027 * np.std(shifts, ddof=1) / math.sqrt(3), rel=1e-4)
  none, unknown = decide.NONE_SHOWN, decide.NO_NOISE
  assert [row['verdict'] for row in rows.values()] == [
      'base', 'better', unknown, none, none, unknown, none, unknown]
  for name, factor in (('better', 0.8), ('low', 1.3), ('same', 1.0)):
    fast = [rows[name][f'speed_up_flops{end}'] for end in ('_low', '', '_high')]
    assert fast[1] == pytest.approx(1 / factor, rel=0.03)
    assert fast[0] < 1 / factor < fast[2]
  table = _rows(tables.verdict_table(sweep))
  for name, words in (('better', r'1\.2\d \[.*\]'),
                      ('same', r'\(.*\d\.\d\d \[.*\]\)')):
    assert re.fullmatch(words, table[name]['speed-up in FLOPs'].text)


def test_p_values_are_corrected_over_the_points(sweep):
  base, ps = sweep.values('confirm', 'base', '', sweep.plan.primary), {}
  for name in sweep.plan.variants:
    values = sweep.values('confirm', name, '', sweep.plan.primary)
    d = [values[seed] - base[seed] for seed in values]
    # The runs of some are the base's own; others differ alike at each seed,
    # which has the sign test's p. One of too few seeds is of the family.
    ps[name] = (None if len(d) < 3 else stats.ttest_1samp(d, 0).pvalue
                if np.ptp(d) > 1e-9 else 0.25 if any(d) else 1.0)
  holm = dict(zip(ps, multipletests(
      [1.0 if p is None else p for p in ps.values()], method='holm')[1]))
  for row in sweep.verdicts()[1:]:
    p = ps[row['variant']]
    assert (row['p'], row['p_corrected']) == pytest.approx(
        (p, None if p is None else holm[row['variant']]))


def test_curves_stand_at_what_was_spent(sweep, tmp_path, written):
  curve = sweep.curves['base', '', 0]['eval']
  assert curve['tokens'][-1] == sweep_folder.TOKENS
  assert curve['flops'][-1] == sweep_folder.TOKENS * sweep_folder.FLOPS
  assert (curve['seconds'][0], curve['seconds'][-1]) == pytest.approx(
      (0.5 * sweep_folder.EVERY, 0.5 * sweep_folder.STEPS))
  # Runs that train together share the seconds.
  sweep_folder.write(tmp_path, [point('base', together=2)])
  together = curves.mean_curve(
      [lines['eval'] for lines in comparison.load_comparison(
      tmp_path).curves.values()])
  assert together['seconds'][-1] == pytest.approx(0.25 * sweep_folder.STEPS)
  rows = list(csv.DictReader(written['curves.csv'].open()))
  curve = sweep.curves['better', '', 2]['eval']
  for name in (*curves.AXES, 'step', 'loss'):
    assert [float(r[name]) for r in rows
            if (r['variant'], r['seed'], r['figure']) == ('better', '2', 'eval')
            ] == pytest.approx(curve[name])


@pytest.mark.parametrize('kind', ['sweep', 'study'])
def test_a_row_of_runs_has_the_fields_of_its_run(kind, request):
  read = request.getfixturevalue(kind)
  if kind == 'study':
    read, _ = read
  rows = iter(report._rows_of_runs(read))
  for run in read.outcomes:
    for measure, value in run.values.items():
      row = next(rows)
      assert row.pop('measure') == measure and row.pop('value') == value
      assert json.loads(row.pop('changes')) == run.changes
      assert row == {name: getattr(run, name) for name in row}
  assert next(rows, None) is None
  assert list(row) == ['phase', 'variant', 'size', 'workload', 'seed',
                       'diverged', 'loss', 'flops', 'seconds', 'params']


@pytest.mark.parametrize('columns, shown, left_out', [
    (80, 'abc', ''), (19, 'abc', ''), (18, 'ab', 'c'), (12, 'ab', 'c'),
    (11, 'a', 'b, c'), (1, 'a', 'b, c')])
def test_a_terminal_gets_the_first_columns_that_fit(columns, shown, left_out,
                                                    monkeypatch):
  cells = {name: page_lib.Cell(name * 5, None, '') for name in 'abc'}
  table = page_lib.Table('name', 'title', [cells])
  monkeypatch.setattr('sys.stdout', types.SimpleNamespace(isatty=lambda: True))
  monkeypatch.setattr(page_lib.os, 'get_terminal_size',
                      lambda: types.SimpleNamespace(columns=columns))
  lines = table.text().splitlines()
  assert lines[0].split() == list(shown)
  assert lines[1].split() == [name * 5 for name in shown]
  told = [f'(too narrow for {left_out})'] if left_out else []
  assert lines[2:] == told


@pytest.mark.parametrize('begin', '=+-@\t')
def test_no_text_of_a_sheet_is_a_formula(begin):
  text = page_lib.sheet([{'name': f'{begin}1+1', 'x': -1.0, 'rest': 'a=b'}])
  row, = csv.DictReader(io.StringIO(text, newline=''))
  assert row == {'name': f"'{begin}1+1", 'x': '-1.0', 'rest': 'a=b'}


def test_what_a_point_leaves_as_it_is_is_no_change(tmp_path):
  kind = {'model.pattern': 'own', 'model.kinds.own.mixer': 'deltanet'}
  sweep_folder.write(tmp_path, [point('base'), point(
      'other', {'model.norm': 'layernorm', 'model.block': 'parallel'}),
                                point('kind', kind)])
  _, other, patterned = curves.load_sweep(tmp_path).points
  assert other.changes == {'model.block': 'parallel'}
  assert patterned.changes == kind  # which the base has not


def test_what_is_not_known_is_said(sweep, tmp_path):
  text = report.format_report(sweep)
  assert re.search(r'worse +failed +the loss was not finite +1', text)
  assert re.search(r'high +pending +2', text)
  assert '2 of 23 runs failed or are not done' in text
  # A base without runs compares nothing.
  sweep_folder.write(tmp_path / 'a', POINTS[:2], states={
      ('base', s): ('failed', 'no memory') for s in range(3)})
  assert 'The base base has no finished run' in report.format_report(
      comparison.load_comparison(tmp_path / 'a'))
  # Figures that were not matched, and a run of another config.
  sweep_folder.write(tmp_path / 'b', [
      point('base'), point('norm', {'model.norm': 'rmsnorm'}),
      point('far', {'model.position': 'rope'}, flops=1.05 * sweep_folder.FLOPS)
  ], match='params')
  assert comparison.load_comparison(tmp_path / 'b').warnings == [
      'Beyond the question, not alike in FLOPs of a token: far (4e+05 -> '
      '4.2e+05, +5.0%).', 'Beyond the question, not alike in FLOPs of the run: '
      'far (4e+11 -> 4.2e+11, +5.0%).']
  folder = layout.run_folder(tmp_path / 'b', 'norm', 1)
  run_config.save_config(folder, spec.apply_changes(
      run_config.load_config(folder), {'optim.b1': 0.5}, 'a test'))
  assert 'figures: norm, seed 1 (optim.b1).' in report.format_report(
      comparison.load_comparison(tmp_path / 'b'))


def test_a_point_of_which_runs_diverged_is_unstable_as_in_a_study(tmp_path):
  """Whatever the runs say that did not: without them, `fast` is better."""
  seeds = range(5)
  shift = {seed: 0.001 * seed ** 2 for seed in seeds}
  points = [
      point('base', seeds=seeds, shift=shift),
      point('fast', {'optim.lr': 2e-3}, factor=0.5, seeds=seeds,
            diverged=(1, 3)),
      point('sound', {'optim.lr': 1.5e-3}, factor=0.7, seeds=seeds),
      point('gone', {'optim.lr': 1e-2}, seeds=seeds, diverged=seeds)]
  sweep_folder.write(tmp_path, points, states={
      (p['name'], seed): ('failed', 'error: diverged') for p in points
      for seed in p.get('diverged', ())})
  c = comparison.load_comparison(tmp_path)
  words = {row['variant']: row['verdict'] for row in c.verdicts()}
  assert words == {'base': 'base', 'fast': decide.UNSTABLE,
                   'sound': decide.BETTER, 'gone': decide.UNSTABLE}
  fast = c.effect('confirm', 'fast', 'loss')
  assert (fast['n'], fast['diverged'], fast['runs']) == (3, 2, 5)
  excluded = [(row['variant'], row['seed']) for row in c.excluded
              if row['state'] == 'diverged']
  assert excluded == [('fast', 1), ('fast', 3), *[('gone', n) for n in seeds]]
  tuned, = c.results['tuned']
  assert tuned['changes'] == {'optim.lr': 1.5e-3}
  assert not any('in no verdict' in line for line in c.warnings)
  report.write_report(c)
  text = report.format_report(c)
  assert re.search('fast .*unstable', text) and 'diverged' in text


@pytest.mark.parametrize('change', [
    {'model.norm': 'rmsnorm'}, {'optim.decay_mask': [['.*', 0]]}])
def test_each_change_over_all_settings_of_the_others(tmp_path, change):
  block = {'model.block': 'parallel'}
  wide = {'model.d_ff': 99}  # solved for, so no change of its own
  flat = {s: 0.5 for s in range(3)}
  sweep_folder.write(tmp_path, [
      point('base', shift=flat),
      point('norm', change, shift={0: .6, 1: .7, 2: .8}),
      point('block', {**block, **wide}, matched=['model.d_ff'], shift=flat),
      point('both', change | block, shift={0: .2, 1: .3, 2: .4})])
  norm, parallel = tables.change_table(
      comparison.load_comparison(tmp_path)).rows
  # norm: +0.1, +0.2, +0.3 alone and -0.3, -0.2, -0.1 with block.
  assert norm['minus base'].value == pytest.approx(0, abs=1e-9)
  assert norm['pairs'].value == 2
  assert norm['from pair to pair'].text == '-0.2000 to +0.2000'
  # block: 0, 0, 0 alone and -0.4 each with norm: -0.2 each seed.
  assert parallel['change'].text == 'model.block=parallel'
  assert parallel['minus base'].text == '-0.2000'  # all alike


def test_a_cost_is_beside_that_of_the_base_at_the_same_size():
  """The sizes have other costs, and so has another workload."""
  frozen = study_folder.frozen(study_folder.plan(('rope',)))
  factors = {'small': 1.5, 'medium': 0.75, 'large': 1.0}
  for frozen_point in frozen.points:
    for cost in ('params', 'flops_per_token'):
      if frozen_point['workload'] != plans.TEXT:
        frozen_point[cost] *= 7
      if frozen_point['variant'] == 'rope':
        frozen_point[cost] *= factors[frozen_point['size']]
  compared = comparison.Comparison(
      workdir='', frozen=frozen, results=results_lib.NOTHING, outcomes=[],
      curves={}, excluded=[], about=[], warnings=[], certificates={},
      differences={})
  rows = {(row['variant'].text, row['size'].text): row
          for row in tables.cost_table(compared).rows}
  assert {key: row['parameters'].text for key, row in rows.items()} == {
      (BASE, 'small'): '41.23k', (BASE, 'medium'): '163.5k',
      (BASE, 'large'): '652.3k', ('rope', 'small'): '61.85k (+50.0%)',
      ('rope', 'medium'): '122.6k (-25.0%)', ('rope', 'large'): '652.3k'}
  assert rows['rope', 'medium']['FLOPs a token'].text.endswith(' (-25.0%)')
  other = frozen.point('rope', 'small', 'mqar')
  assert tables._beside_base(compared, other, 'params').text == (
      '433k (+50.0%)')


def test_sensitivity_to_the_learning_rate(tmp_path):
  sweep_folder.write(tmp_path, [
      point('base', shift=SHIFT), point('half', {'optim.lr': 5e-4}, factor=2.0),
      point('twice', {'optim.lr': 2e-3}, factor=1.4, shift=SHIFT)])
  c = comparison.load_comparison(tmp_path)
  group, = c.results['tuned']
  assert [trial['changes']['optim.lr'] for trial in group['tried']] == [
      5e-4, 1e-3, 2e-3]
  row, = tables.tuning_table(c).rows
  means = [trial['value'] for trial in group['tried']]
  assert row['chosen'].text == 'optim.lr=0.001'
  assert row['at the edge'].text == 'no'
  assert row['sensitivity'].value == pytest.approx(np.mean(means) - means[1])
  series, = plots.tuning_plot(c)['series']
  assert series['mean']['loss']['y'] == pytest.approx(means, rel=1e-5)


def test_what_tasks_found_are_measures(sweep, tmp_path):
  """Of the fractions: mean, spread, and difference over paired seeds. Runs that
  were to have no losses are not called failed."""
  values = {row['measure']: row['mean'] for row in sweep.estimates
            if row['variant'] == 'moe' and row['runs']}
  assert [x for name, x in values.items() if name.startswith('experts')] == (
      pytest.approx([*HEALTH.values()]))
  found = {row['variant']: row['mean'] for row in sweep.estimates
           if row['measure'] == 'labels/f1'}
  assert found['base'] == 0.5 and found['better'] is None  # it has none
  labels = lambda *f1: {'labels': {seed: {
      'f1': x, 'texts': 7, 'by_label': {'a': 0.1}}
                                   for seed, x in enumerate(f1)}}
  sweep_folder.write(tmp_path, [
      point('base', tasks=labels(0.5, 0.6, 0.7)),
      point('norm', {'model.norm': 'rmsnorm'}, tasks=labels(0.6, 0.8, 0.7)),
      point('rope', {'model.position': 'rope'})],
                     states={('rope', 2): ('failed', 'no luck')})
  for file in tmp_path.rglob('config.json'):
    tree = json.loads(file.read_text())
    tree['eval']['every_steps'] = 0
    file.write_text(json.dumps(tree))
  for file in tmp_path.rglob('metrics.jsonl'):
    file.write_text(''.join(line for line in file.open()
                            if '"split": "eval"' not in line))
  c = comparison.load_comparison(tmp_path)
  base, norm = tables.other_table(c).rows
  assert base['mean'].text == '0.6000 ± 0.1000'
  # 0.1, 0.2, 0: t(0.975, 2) = 4.3027, times 0.1 over the root of 3.
  assert norm['mean'].text == '0.7000 ± 0.1000'
  assert norm['minus base'].text == '+0.1000 [-0.1484, +0.3484]'
  lost, = tables.excluded_table(c).rows
  assert lost['why'].text == 'no luck'


def test_figures_of_tasks_are_the_same_whenever_they_were_done():
  """Also of parts of a task, as lm_eval's groups have them; not its standard
  errors and counts."""
  tasks = {'lm_eval:mmlu': {
      'acc': 0.5, 'mmlu_law/acc': 0.25, 'mmlu_law/acc (strict)': 0.125,
      'stderr': {'acc': 0.1, 'mmlu_law/acc': 0.2}, 'examples': {'mmlu_law': 4}},
           'labels': {'f1': 0.5, 'by_label': {'a': 0.25}}}
  row = dict(step=8, split='eval', **{'other/f1': 0.7})
  for task, values in tasks.items():
    row |= in_training.flatten_numbers(values, task)
  during = curves.Run(0, 'done', '', {
      'train.steps': 8, 'eval.tasks': 'lm_eval:mmlu,labels,gone'},
                      (row | {'step': 4, 'labels/f1': 0.1}, row), {})
  after = curves.Run(0, 'done', '', {}, (), tasks)
  values = comparison._final_values(during)
  assert values == comparison._final_values(after) == {
      'lm_eval:mmlu/acc': 0.5, 'lm_eval:mmlu/mmlu_law/acc': 0.25,
      'lm_eval:mmlu/mmlu_law/acc (strict)': 0.125, 'labels/f1': 0.5}


def test_the_command_writes_beside_the_runs(sweep, monkeypatch, capsys,
                                            tmp_path):
  def main(*words):
    monkeypatch.setattr('sys.argv', ['sweep', 'report', *map(str, words)])
    return command.main()

  assert main('--workdir', sweep.workdir, '--json') == 0
  printed, err = capsys.readouterr()
  assert str(sweep.workdir / 'report/index.html') in err
  printed = json.loads(printed)
  assert [p['variant'] for p in printed['points']] == [
      p['name'] for p in POINTS]
  assert printed['estimates'][1]['verdict'] == 'better' and printed['warnings']
  with pytest.raises(ValueError, match='sweep.json is missing'):
    main(tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_a_studys_tables_and_sheet_have_the_results_numbers(study):
  c, results = study
  rows = _rows(tables.verdict_table(c))
  assert [*rows] == [BASE, *ALL]
  sheet = {(row['phase'], row['measure'], row['variant'], row['size']): row
           for row in c.estimates}
  confirmed = {(row['variant'], row['measure']): row
               for row in results['confirm']}
  assert len(confirmed) == len(results['confirm']) == 2 * 4
  for (variant, measure), result in confirmed.items():
    row = sheet['confirm', measure, variant, decide.ALL_SIZES]
    for name in ('effect', 'low', 'high', 'p', 'p_corrected'):
      assert row[name] == result[name]
    for size in result['sizes']:
      assert sheet['confirm', measure, variant, size['size']]['effect'] == (
          size['effect'])
    for fast in result['speed_ups']:
      assert sheet['confirm', measure, variant, fast['size']][
          f'speed_up_{fast["by"]}'] == fast['factor']
  for variant in ALL:
    result = confirmed.get((variant, 'loss'))
    if result is None:
      assert rows[variant]['verdict'].text.startswith('stopped at the screen')
      continue
    assert rows[variant]['verdict'].text == result['verdict']
    assert rows[variant]['minus base'] == (
        '{effect:+.4f} [{low:+.4f}, {high:+.4f}]'.format(**result),
        result['effect'], '')
    assert rows[variant]['trend over size'].value == result['trend']['effect']
  for row, result in zip(tables.noise_table(c).rows, results['noise'],
                         strict=True):
    assert row['standard deviation'].value == result['sd']
    assert row['smallest effect'].value == result['smallest_effect']
  for result in results['screen']:
    assert sheet['screen', 'loss', result['variant'], 'small']['verdict'] == (
        result['verdict'])
  values = [run['values']['mqar'] for run in results['outcomes'] if (
      run['phase'], run['variant'], run['size'], run['workload']) == (
          'confirm', 'alibi', 'large', 'mqar')]
  assert sheet['confirm', 'mqar', 'alibi', 'large']['mean'] == pytest.approx(
      np.mean(values))
  # Runs that diverged are told, and names are text.
  assert {row['state'].text
          for row in tables.excluded_table(c).rows} == {'diverged'}
  page = report.render_page(c, [])
  assert html.escape(ODD).replace('&quot;', '&#34;') in page
  assert ODD not in page


def test_multipliers_predictions_and_what_a_screening_lost_are_told(tmp_path):
  plan = study_folder.plan(
      ('rope', 'alibi', 'none'), largest='huge', seeds=dict(
          noise=6, tune=1, screen=4, confirm=5, largest=3))
  results = study_folder.results(plan, 'confirm')
  for row in results['outcomes']:
    row |= {'cooled': True, 'body': 0.5}
  runs = [plans.outcome_from_json(row) for row in results['outcomes']]
  ahead = [x._replace(phase='largest', size='huge') for x in runs
           if (x.phase, x.size, x.workload) == ('confirm', 'large', 'text')]
  rows = efficiency.predict_largest_size(plan, runs, dict.fromkeys(
      ('learned', 'rope', 'alibi'), 1e15))
  narrowed = phases.PHASES['largest'].narrow_plan(plan)
  results |= plans.to_json({
      'confirm': decide.confirm_variants(
          plan, runs), 'outcomes': [*runs, *ahead],
      'largest': decide.confirm_variants(
          narrowed, ahead, 'largest'), 'predicted': {
          'hash': 'abcd', 'time': 1e9, 'blind': True, 'rows': rows}})
  results['phases']['largest'] = results['phases']['confirm']
  c = _study(tmp_path, results, plan)
  table = tables.multiplier_table(c).rows
  assert len(table) == 2 * 4  # of rope and alibi, which passed
  rope = results['confirm'][0]['multipliers'][0]
  assert table[0]['multiplier'].value == rope['factor'] > 1
  assert [*table[0]][2:] == [
      'floor', 'multiplier', 'multiplier, pinned', 'multiplier, no embeddings',
      'multiplier, no embeddings, pinned']
  assert [row['size'].text for row in tables.rank_table(c).rows] == [
      'small', 'medium', 'large']
  # the same runs
  assert tables.rank_table(c).rows[2]["Kendall's tau"].value == 1
  section = report.section_of_prediction(c)
  seen = _rows(section.tables[0])
  for prediction in rows:
    row = seen[prediction['variant']]
    assert row['off by'].value == pytest.approx(
        row['observed'].value - prediction['value'])
    assert row['inside'].text == ('yes' if prediction['low'] <= row[
        'observed'].value <= prediction['high'] else 'no')
  assert seen['rope']['observed'].value == next(
      x['effect'] for x in results['largest'] if x['variant'] == 'rope')
  sentence, = report.say_what_screening_may_lose(c)
  assert sentence.startswith('1 of 3 variants were stopped')
  page = report.render_page(c, [])
  for words in ('before any run of this size', 'id="multipliers"', 'At huge',
                'id="ranks"', sentence[:40],
                'The outcome at huge was predicted'):
    assert words in page
  assert report.NOT_COOLED not in page
  results['predicted']['blind'] = False
  for row in results['outcomes']:
    row['cooled'] = False
  page = report.render_page(_study(tmp_path, results, plan), [])
  assert report.NOT_COOLED in page and 'it is none' in page


@pytest.mark.parametrize('upto', ['', 'tune', 'screen'])
def test_a_study_that_is_not_over_says_how_far_it_is(tmp_path, upto):
  c = _study(tmp_path, study_folder.results(study_folder.plan(), upto))
  assert any('is not over' in line and 'confirm' in line
             for line in c.warnings)
  assert not tables.other_table(c).rows and report.render_page(c, [])
  # Every variant has its row all the same.
  assert len(tables.verdict_table(c).rows) == 1 + len(VARIANTS)
  if not upto:
    (tmp_path / 'results.json').unlink()
    assert not figures.draw_figures(comparison.load_comparison(tmp_path))


def test_every_run_is_a_dot_of_the_figures(study):
  c, results = study
  left, right = figures.draw_outcome(c).axes
  dots = lambda axes: [line for line in axes.lines if line.get_marker() == '.']
  rope = next(row for row in results['confirm'] if row['variant'] == 'rope')
  assert len(rope['differences']) == 5
  assert any(line.get_xdata().tolist() == rope['differences']
             for line in dots(right))
  curve = next(lines['eval'] for (*at, _), lines in c.curves.items()
               if at == ['rope', 'large'])
  assert any(curve['loss'][-1] in line.get_ydata() for line in dots(left))
  assert sum(
      len(line.get_xdata()) for axes in figures.draw_measures_by_size(c).axes
      for line in dots(axes)) == sum(
          x.phase == 'confirm' and x.workload == 'mqar'
          for x in c.outcomes)
  # What guessing gives does not set the scale of runs that are alike.
  alike = dataclasses.replace(c, outcomes=[x._replace(values={
      name: 0.8 + 1e-3 * y for name, y in x.values.items()}) for x in (
          c.outcomes)])
  axes, = figures.draw_measures_by_size(alike).axes
  assert axes.get_ylim()[0] > 0.7 and 'guessing: 0.1' in axes.get_title()
  # An accuracy's interval ends below 1.
  uneven = dataclasses.replace(c, outcomes=[x._replace(values=dict.fromkeys(
      x.values, (0.5, 0.99)[x.seed % 3 > 0])) for x in c.outcomes])
  axes, = figures.draw_measures_by_size(uneven).axes
  bars = [bar.get_segments() for line in axes.containers for bar in line[2]]
  assert 0.9 < np.nanmax(np.concatenate(bars)[..., 1]) < 1


def test_what_students_test_may_not_be_asked_is_said():
  row = dict(measure='loss', variant='a', n=6, p=0.03, p_robust=0.2,
             p_shape=0.9)
  plan = study_folder.plan()
  assert comparison.doubt_normal_noise(plan, [row | dict(p=0.2)]) == []
  doubt, = comparison.doubt_normal_noise(plan, [row])
  assert 'disagree, before correction, on a (p = 0.03 and 0.2)' in doubt
  doubt, = comparison.doubt_normal_noise(
      plan, [row | dict(p=None, p_shape=0.01)])
  assert 'outliers (p = 0.01' in doubt


def test_what_was_tuned_is_compared_seed_by_seed_and_on_fresh_seeds(tmp_path):
  results = study_folder.results(study_folder.plan())
  row = next(row for row in results['tuned'] if row['workload'] == 'text')
  tried = {1e-3: [2.6, 2.7, 2.8], 2e-3: [2.5, 2.61, 2.69],
           4e-3: [2.52, 2.6, 2.72]}  # 2e-3 was chosen
  for trial in row['tried']:
    trial |= {'rung': 1, 'values': tried[trial['changes']['optim.lr']]}
    trial['value'] = float(np.mean(trial['values']))
  c = _study(tmp_path, results)
  cells = tables.tuning_table(c).rows[results['tuned'].index(row)]
  apart = np.subtract(tried[4e-3], tried[2e-3])
  low, high = stats.t.interval(0.95, 2, apart.mean(), stats.sem(apart))
  assert cells['next best'].text == (
      f'{apart.mean():+.4f} [{low:+.4f}, {high:+.4f}]')
  fresh = [x.values['loss'] for x in c.outcomes if (
      x.phase, x.variant, x.workload) == ('screen', BASE, 'text')]
  assert cells['on fresh seeds'].text == (
      f'{np.mean(fresh):.4f} ± {np.std(fresh, ddof=1):.4f}')


def test_a_target_is_reached_from_where_on_the_one_sided_test_says_so(
    study, sweep, tmp_path):
  losses = np.array([[3.4, 3.29, 3.2776, 3.276, 3.27],
                     [3.5, 3.28, 3.2778, 3.275, 3.28],
                     [3.3, 3.27, 3.2777, 3.277, 3.27],
                     [3.6, 3.27, 3.2779, 3.276, 3.27]])
  each = [dict(step=[10, 20, 30, 40, 50], tokens=[1, 2, 3, 4, 5],
               flops=[0] * 5, seconds=[.1, .2, .3, .4, .5], loss=row)
          for row in losses.tolist()]
  p = stats.ttest_1samp(losses, 3.28, alternative='less').pvalue
  assert list(p < 0.01) == [False, False, True, True, False]
  # The last is not below: then no earlier one is asked.
  assert tables.find_first_evaluation_below(each,
                                            3.28) == {'p': pytest.approx(p[4])}
  shorter = [{name: x[:4] for name, x in curve.items()} for curve in each]
  assert tables.find_first_evaluation_below(shorter, 3.28) == {
      'step': 30, 'tokens': 3, 'seconds': pytest.approx(0.3),
      'p': pytest.approx(p[2])}
  # Of 2,000 curves that never are below, it is said of 1 % that they are.
  rng = np.random.default_rng(0)
  wrong = np.mean(['step' in tables.find_first_evaluation_below([
      {name: [1, 2, 3] for name in ('step', 'tokens', 'flops', 'seconds')}
      | {'loss': row} for row in rng.normal(3.28, 0.01, (4, 3)).tolist()], 3.28)
                   for _ in range(2000)])
  assert 0.005 < wrong < 0.016
  table = tables.target_table(dataclasses.replace(study[0], target=2.4))
  steps = {(row['variant'].text, row['size'].text): row['steps to target'].text
           for row in table.rows}
  assert steps['rope', 'large'].isdecimal() and steps['wild', 'large'] == 'n/a'
  sizes = dict.fromkeys(row['size'].text for row in table.rows)
  assert [*sizes] == [*reversed(study[0].plan.sizes)]
  assert not tables.target_table(study[0]).rows
  assert 'To a held-out loss of 2.5' in report.format_report(
      dataclasses.replace(sweep, target=2.5))


def _none_shown(**row):
  """Results in which no difference is shown of rope."""
  results = study_folder.results(study_folder.plan())
  primary = [result for result in results['confirm']
             if result['measure'] == 'loss']
  assert primary[0]['variant'] == 'rope' and len(primary) == 3
  primary[0].update(verdict=decide.NONE_SHOWN, n=5, **row)
  return results


def test_the_answer_names_effects_and_what_is_excluded(tmp_path):
  """An effect is excluded by an interval that holds for all variants."""
  answer = lambda results=None: report.answer_in_a_sentence(
      _study(tmp_path, results))
  plain = answer()
  assert plain.startswith('By loss (nats a token): better: rope (-0.2')
  assert 'stopped at the screen: unstable: wild' in plain
  assert ('rope (+0.0050 [-0.0020, +0.0120]: an effect of 0.05 is excluded)'
          in answer(_none_shown(effect=0.005, low=-0.002, high=0.012)))
  # By itself this interval lies within 0.05; not so beside two others.
  results = _none_shown(effect=0.0, low=-0.045, high=0.045)
  assert 'excluded' not in answer(results)
  results['confirm'] = [row for row in results['confirm']
                        if row['variant'] == 'rope']
  assert 'an effect of 0.05 is excluded' in answer(results)


def test_what_was_planned_and_done_is_told(study, tmp_path):
  methods = ' '.join(report.describe_methods(study[0].frozen, study[0].results))
  assert 'What ran is what was planned' in report.render_page(study[0], [])
  for words in (
      'optim.lr in {0.001, 0.002, 0.004}', 'rope (model.position=rope)',
      '5 fresh seeds', '6 pairs', 'by successive halving over 2 rungs',
      '(loss on text, in nats a token, lower is better)', 'McNemar',
      'an effect of 0.05 nats a token on loss', study[0].frozen.hash):
    assert words in methods, words
  results = study_folder.results(study_folder.plan())
  results['as_planned'] = dict(differences=['2 runs are missing'])
  page = report.render_page(_study(tmp_path, results), [])
  assert '2 runs are missing' in page
  assert 'What ran is what was planned' not in page


def test_the_unit_is_the_objectives():
  plan = study_folder.plan()
  frozen = study_folder.frozen(plan)
  loss, accuracy = plan.measures
  bits = dataclasses.replace(loss, figure='bits_per_byte')
  assert [measures.format_unit(frozen, m) for m in (loss, accuracy, bits)] == [
      'nats a token', '', 'bits a byte']
  for objective, unit in (('mlm_nsp', 'nats'), ('regression', '')):
    frozen.base_config['objective'] = objective
    assert measures.format_unit(frozen, loss) == unit


def test_results_that_were_changed_or_are_of_another_plan_are_refused(
    tmp_path, capsys):
  study_folder.write(tmp_path, study_folder.plan(VARIANTS[1:]),
                     study_folder.results(study_folder.plan()))
  with pytest.raises(RequestError, match='is of another plan than study.json'):
    comparison.load_comparison(tmp_path)
  study_folder.write(tmp_path)
  path = tmp_path / 'results.json'
  path.write_text(path.read_text().replace('"better"', '"worse"', 1))
  with pytest.raises(SystemExit) as end:
    cli.run(lambda: report.write_report(comparison.load_comparison(tmp_path))
            and 0)
  assert end.value.code == 2
  assert 'results.json is damaged' in capsys.readouterr().err
  assert not (tmp_path / 'report').exists()


@pytest.mark.slow
def test_figures_and_page_of_a_study_stand_alone(study, tmp_path):
  """Figures of a journal's width, one colour a variant; a page without ids that
  are there twice, or missing."""
  paths = {path.name: path for path in report.write_report(study[0])}
  for name, inches in (('outcome', 6.75), ('measures', 3.25)):
    png = paths[f'{name}.png'].read_bytes()
    assert int.from_bytes(png[16:20], 'big') == round(300 * inches)
    assert paths[f'{name}.pdf'].read_bytes().startswith(b'%PDF')
    svg = paths[f'{name}.svg'].read_text()
    for variant, colour in zip(ALL, figures.COLOURS, strict=True):
      assert (colour in svg) == (variant not in ('none', 'wild'))
  text = paths['index.html'].read_text()
  ids = re.findall(r'\bid="([^"]*)"', text)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)
  if chromium.PROGRAM is None:
    pytest.skip('no chromium on the path (Debian package chromium)')
  uri = paths['index.html'].as_uri()
  with chromium.Page(uri, tmp_path / 'profile', size=(500, 900)) as shown:
    assert shown.requests == [uri] and not shown.errors
    assert shown.evaluate('document.documentElement.scrollWidth '
                          '<= window.innerWidth')


@pytest.fixture(scope='module')
def page(written, tmp_path_factory):
  if chromium.PROGRAM is None:
    pytest.skip('no chromium on the path (Debian package chromium)')
  profile = tmp_path_factory.mktemp('profile')
  with chromium.Page(written['index.html'].as_uri(), profile,
                     size=(1100, 900)) as page:
    yield page
  shutil.rmtree(profile, ignore_errors=True)


@pytest.mark.slow
def test_the_page_of_a_sweep_sorts_and_fetches_nothing(page, written, sweep):
  assert page.evaluate(
      '[...document.querySelectorAll("h2")].map(h => h.textContent)') == [
          'Verdict', 'Loss curves', 'Sizes and measures', 'Tuning', 'Left out',
          'Methods', 'Provenance and cost']
  assert page.requests == [written['index.html'].as_uri()]
  means = {row['variant']: row['mean'] for row in sweep.verdicts()}
  rising = sorted(means.values())
  for wanted in (rising, rising[::-1]):
    page.click('#verdicts th:nth-child(2) button')
    assert [means[name] for name in page.evaluate(
        '[...document.querySelectorAll("#verdicts tbody tr")]'
        '.map(r => r.cells[0].textContent)')] == wanted
  # A page of 1,100 pixels shows all columns.
  assert page.evaluate(
      '[...document.querySelectorAll(".scroll")].filter('
      's => s.scrollWidth > s.clientWidth).length') == 0
  assert not page.errors


def _points(page, plot):
  """Points drawn, of each line: by the commands of its path."""
  return page.evaluate(
      f'[...document.querySelectorAll("#{plot} path.line")]'
      '.map(p => p.getAttribute("d").split(/[ML]/).length - 1)')


@pytest.mark.slow
def test_plots_have_the_points_and_follow_their_controls(page, sweep):
  rows = sweep_folder.STEPS // sweep_folder.EVERY
  assert _points(page, 'rates') == [3]
  for axis in ('flops', 'seconds', 'tokens'):
    page.click(f'#curves-0 input[value={axis}]')
    assert _points(page, 'curves-0') == [rows] * len(POINTS)
  page.click('#curves-0 input[name=curves-0-minus]')
  assert page.evaluate(  # the base less itself is a level line
      'new Set(document.querySelector("#curves-0 path.line").getAttribute("d")'
      '.split(/[ML]/).slice(1).map(p => p.split(" ")[1])).size') == 1
  page.click('#curves-0 input[name=curves-0-minus]')
  page.click('#curves-0 input[value="health/dropped"]')
  assert _points(page, 'curves-0') == [rows]  # the mixture's
  page.click('#curves-0 input[value=eval]')
  page.click('#curves-0 input[name=curves-0-seeds]')
  assert page.evaluate(
      'document.querySelectorAll("#curves-0 path.seed").length') == (
          3 * len(POINTS) - len(LOST) - 1)
  page.click('#curves-0 .legend button:nth-child(2)')
  assert len(_points(page, 'curves-0')) == len(POINTS) - 1
  page.click('#curves-0 .legend button:nth-child(2)')
  x, y = page.evaluate('''(() => {
      const c = document.querySelector("#curves-0 circle");
      c.scrollIntoView({block: "center"});
      const b = c.getBoundingClientRect();
      return [b.x + b.width / 2, b.y + b.height / 2]; })()''')
  page.move(x, y)
  first = curves.mean_curve([lines['eval']
                             for (name, *_), lines in sweep.curves.items()
                             if name == 'base'])['loss'][0]
  assert page.evaluate('document.querySelector("#curves-0 .tip").textContent'
                       ) == f'base: {first:.4f} at 50k tokens'
  assert not page.errors
