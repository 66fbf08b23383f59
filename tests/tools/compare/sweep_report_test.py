"""The report: what it says of known runs."""

import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest

from tests.helpers import sweep_folder
from tests.helpers.sweep_folder import HEALTH, LOST, POINTS, SHIFT, point
from tools import sweep as command
from tools.compare import layout
from tools.compare import spec
from tools.compare.sweep_report import curves
from tools.compare.sweep_report import extras
from tools.compare.sweep_report import measures
from tools.compare.sweep_report import tables
from tools.compare.sweep_report import write
from training.workdir import run_config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sweep')
  sweep_folder.write(folder, POINTS, states=LOST)
  return folder


@pytest.fixture(scope='module')
def sweep(folder):
  return curves.load_sweep(folder)


@pytest.fixture(scope='module')
def outcomes(sweep):
  return {o.point.name: o for o in tables.outcomes(sweep)}


@pytest.fixture(scope='module')
def written(sweep, tmp_path_factory):
  folder = tmp_path_factory.mktemp('report')
  return write.write(sweep, folder)


def test_differences_are_those_of_the_runs(outcomes):
  step, shifts = sweep_folder.STEPS, (0.002, -0.001, -0.001)
  gap = float(sweep_folder.loss(step, 0.8) - sweep_folder.loss(step))
  found = outcomes['better'].difference
  assert found.mean == pytest.approx(gap + np.mean(shifts))
  # t(0.975, 2) = 4.3027
  assert found.high - found.mean == pytest.approx(
      4.3027 * np.std(shifts, ddof=1) / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize('name, verdict', [
    ('better', 'better'), ('same', 'noise'), ('low', 'worse'),
    ('worse', 'unknown'), ('</script><b>', 'unknown'), ('base', 'n/a')])
def test_verdicts(outcomes, name, verdict):
  assert outcomes[name].verdict == verdict


def test_p_values_are_corrected_over_the_points(sweep, outcomes, written):
  from scipy import stats
  from statsmodels.stats.multitest import multipletests
  base, ps = sweep.base.finals, {}
  for name, row in outcomes.items():
    finals = row.point.finals
    both = sorted(finals.keys() & base.keys())
    if name != 'base' and len(both) > 2:
      d = [finals[s] - base[s] for s in both]
      # The runs of some are the base's own; others differ alike at each seed,
      # which has the sign test's p.
      ps[name] = (stats.ttest_1samp(d, 0).pvalue if np.ptp(d) > 1e-9
                  else 0.25 if any(d) else 1.0)
  holm = dict(zip(ps, multipletests(list(ps.values()), method='holm')[1]))
  with written[1].open() as file:
    sheet = {row['variant']: row for row in csv.DictReader(file)}
  for name, row in outcomes.items():
    assert (row.p, row.p_holm) == pytest.approx(
        (ps.get(name), holm.get(name)))
    assert sheet[name]['p_holm'] == str('' if name not in ps else row.p_holm)
  assert len(ps) > 2 and holm['better'] > ps['better']
  table = tables.outcome_table(sweep, list(outcomes.values())).plain()
  assert table[0]['corrected p'] == 'base'
  assert table[1]['corrected p'] == f'{holm["better"]:.2g}'
  assert any('Corrected for this (Holm)' in note
             for note in tables.outcome_table(sweep, tables.outcomes(sweep)
                                              ).notes)


@pytest.mark.parametrize('name, factor', [
    ('better', 0.8), ('low', 1.3), ('same', 1.0)])
def test_speed_up_is_the_share_of_compute(outcomes, name, factor):
  found = outcomes[name].speed_up
  assert found.mean == pytest.approx(1 / factor, rel=0.03)
  assert found.low < 1 / factor < found.high


def test_curves_stand_at_what_was_spent(sweep):
  curve = sweep.base.curve(0, 'eval')
  assert curve.tokens[-1] == sweep_folder.TOKENS
  assert curve.flops[-1] == sweep_folder.TOKENS * sweep_folder.FLOPS
  assert curve.seconds[-1] == pytest.approx(0.5 * sweep_folder.STEPS)
  assert curve.seconds[0] == pytest.approx(0.5 * sweep_folder.EVERY)


def test_what_a_point_leaves_as_it_is_is_no_change(tmp_path):
  sweep_folder.write(tmp_path, [point('base'), point(
      'other', {'model.norm': 'layernorm', 'model.block': 'parallel'})])
  other = curves.load_sweep(tmp_path).points[1]
  assert tables.changes(other) == 'model.block=parallel'


def test_a_kind_of_layer_that_the_base_has_not_is_a_change(tmp_path):
  changes = {'model.pattern': 'own', 'model.kinds.own.mixer': 'deltanet'}
  sweep_folder.write(tmp_path, [point('base'), point('other', changes)])
  assert curves.load_sweep(tmp_path).points[1].changes == changes


def test_runs_that_train_together_share_the_seconds(tmp_path):
  sweep_folder.write(tmp_path, [point('base', together=2), point('alone')])
  seconds = [p.mean_curve('eval').seconds[-1]
             for p in curves.load_sweep(tmp_path).points]
  assert seconds == pytest.approx([0.25 * sweep_folder.STEPS,
                                   0.5 * sweep_folder.STEPS])


def test_text_says_what_is_not_known(sweep):
  said = write.text(sweep)
  assert 'fewer than 3 seeds no noise can be stated' in said
  assert re.search(r'worse +1 +failed +none +the loss was not finite', said)
  assert re.search(r'high +2 +pending +none', said)
  assert 'differ moe' in said  # its parameters


def test_two_seeds_show_their_spread_and_no_interval(tmp_path):
  points = [point('base', seeds=(0, 1), shift={0: 0.1, 1: -0.1}),
            point('other', {'optim.lr': 3e-3}, seeds=(0, 1),
                  shift={0: 0.14, 1: -0.12})]
  sweep_folder.write(tmp_path, points)
  sweep = curves.load_sweep(tmp_path)
  low, high = sorted(sweep.points[1].finals.values())
  said = write.text(sweep)
  assert f'({low:.4f} to {high:.4f})' in said
  assert '+0.0100 (-0.0200 to +0.0400)' in said
  html = write.write(sweep, tmp_path)[0].read_text()
  # The forest and the learning rates: bars, and captions that say what of.
  assert html.count('Bars: from one seed to the other') == 2
  assert 'Bars: 95 %' not in html
  bars, = re.findall(r'<svg class="forest".*?</svg>', html)
  assert bars.count('stroke-width="1"') == 1 and 'stroke-width="2"' not in bars
  sweep_folder.write(tmp_path / 'one', [dict(p, seeds=(0,)) for p in points])
  html = write.write(curves.load_sweep(tmp_path / 'one'), tmp_path)[0]
  assert html.read_text().count('One seed: no bars.') == 2


def test_a_base_without_runs_compares_nothing(tmp_path):
  states = {('base', s): ('failed', 'no memory') for s in range(3)}
  sweep_folder.write(tmp_path, POINTS[:2], states=states)
  sweep = curves.load_sweep(tmp_path)
  assert 'The base base has no finished run' in write.text(sweep)
  html, *_ = write.write(sweep, tmp_path)
  assert 'no memory' in html.read_text()


def _notes(folder):
  sweep = curves.load_sweep(folder)
  return '\n'.join(tables.outcome_table(
      sweep, tables.outcomes(sweep)).notes)


def test_a_verdict_over_survivors_is_told(tmp_path):
  norm = {'model.norm': 'rmsnorm'}
  points = [point('base', seeds=range(4)), point('norm', norm, seeds=range(4))]
  sweep_folder.write(tmp_path / 'all', points)
  assert 'ended alone' not in _notes(tmp_path / 'all')
  sweep_folder.write(tmp_path / 'some', points, states={
      ('norm', 2): ('failed', 'the loss was not finite')})
  assert 'over the seeds that ended alone: norm 3 of 4' in _notes(
      tmp_path / 'some')


def test_figures_that_were_not_matched_are_told(tmp_path):
  position = {'model.position': 'rope'}
  sweep_folder.write(tmp_path, [
      point('base'), point('near', {'model.norm': 'rmsnorm'}),
      point('far', position, flops=1.05 * sweep_folder.FLOPS)], match='params')
  note, = [line for line in _notes(tmp_path).splitlines() if 'matched' in line]
  assert note == ('Only params was matched: by more than 1 %, in FLOPs a token '
                  'differ far.')


def test_a_speed_up_of_noise_is_bracketed(sweep, outcomes):
  rows = {row[0].text: row for row in tables.outcome_table(
      sweep, list(outcomes.values())).rows}
  assert re.fullmatch(r'\(.*\d\.\d\d \[.*\]\)', rows['same'][5].text)
  assert rows['same'][5].mark == 'noise'
  assert re.fullmatch(r'1\.2\d \[.*\]', rows['better'][5].text)


def test_a_run_of_another_config_is_told(tmp_path, capsys):
  sweep_folder.write(tmp_path, [
      point('base'), point('norm', {'model.norm': 'rmsnorm'})])
  assert 'config' not in _notes(tmp_path) + capsys.readouterr().err
  folder = layout.run_folder(tmp_path, 'norm', 1)
  run_config.save(folder, spec.changed(
      run_config.load_config(folder), {'optim.b1': 0.5}, 'a test'))
  assert 'figures: norm, seed 1 (optim.b1).' in _notes(tmp_path)
  assert 'warning: not of the config that sweep.json says: norm, seed 1' in (
      capsys.readouterr().err)


def test_each_change_over_all_settings_of_the_others(tmp_path):
  norm, block = {'model.norm': 'rmsnorm'}, {'model.block': 'parallel'}
  wide = {'model.d_ff': 99}  # solved for, so no change of its own
  flat = {s: 0.5 for s in range(3)}
  sweep_folder.write(tmp_path, [
      point('base', shift=flat),
      point('norm', norm, shift={0: .6, 1: .7, 2: .8}),
      point('block', {**block, **wide}, matched=['model.d_ff'], shift=flat),
      point('both', norm | block, shift={0: .2, 1: .3, 2: .4})])
  rows = {row[0].text: row for row in extras.effects_table(
      curves.load_sweep(tmp_path)).rows}
  assert list(rows) == ['model.norm=rmsnorm', 'model.block=parallel']
  # norm: +0.1, +0.2, +0.3 alone and -0.3, -0.2, -0.1 with block.
  norm = rows['model.norm=rmsnorm']
  assert norm[1].value == pytest.approx(0, abs=1e-9)
  assert norm[2].value == 'noise' and norm[4].value == 2
  assert norm[3].text == '-0.2000 to +0.2000'
  # block: 0, 0, 0 alone and -0.4 each with norm: -0.2 each seed.
  assert rows['model.block=parallel'][1].text == (
      '-0.2000 [-0.2000, -0.2000]')


@pytest.mark.parametrize('change', [
    {'optim.decay_mask': [['.*', 0]]},  # a tuple of the config
    {'model.kinds': {'near': {'window': 8}}}])
def test_a_change_to_a_value_of_several_parts_has_its_effect(change, tmp_path):
  block = {'model.block': 'parallel'}
  sweep_folder.write(tmp_path, [
      point('base'), point('other', change, shift={0: .1, 1: .1, 2: .1}),
      point('block', block),
      point('both', change | block, shift={0: .3, 1: .3, 2: .3})])
  rows = {row[0].text: row[1].text for row in extras.effects_table(
      curves.load_sweep(tmp_path)).rows}
  (field, value), = change.items()
  assert rows[f'{field}={json.dumps(value)}'] == '+0.2000 [+0.2000, +0.2000]'
  assert 'model.block=parallel' in rows


def test_sensitivity_to_the_learning_rate(sweep):
  group, = extras.rates(sweep)
  assert list(group.points) == [1e-4, 1e-3, 3e-3]
  done = group.done
  row, = extras.rate_table([group]).rows
  assert row[1].value == 1e-3 and row[2].value == done[1e-3]
  assert row[4].value == pytest.approx(
      np.mean(list(done.values())) - done[1e-3])


def test_the_edge_of_the_learning_rates_is_told(tmp_path):
  sweep_folder.write(tmp_path, [
      point('base', factor=1.2), point('up', {'optim.lr': 2e-3})])
  table = extras.rate_table(
      extras.rates(curves.load_sweep(tmp_path)))
  assert 'at the edge' in table.rows[0][1].text
  assert 'may lie outside' in table.notes[0]


def test_the_best_learning_rate_is_told_from_its_neighbours(tmp_path):
  sweep_folder.write(tmp_path, [
      point('base', shift=SHIFT),
      point('half', {'optim.lr': 5e-4}, shift={s: x + 0.1 + s / 1e3
                                               for s, x in SHIFT.items()}),
      point('twice', {'optim.lr': 2e-3}, factor=1.4, shift=SHIFT),
      point('less', {'optim.lr': 1e-4}, shift={s: x + 0.01
                                               for s, x in SHIFT.items()})])
  group, = extras.rates(curves.load_sweep(tmp_path))
  row, = extras.rate_table([group]).rows
  assert [lr for lr in group.points] == [1e-4, 5e-4, 1e-3, 2e-3]
  twice = float(sweep_folder.loss(200, 1.4) - sweep_folder.loss(200))
  assert 0.05 < twice < 0.1  # less than the half's; `less` is no neighbour
  assert row[1].value == 1e-3 and row[3].text.startswith(
      f'0.002: {twice:+.4f} [{twice:+.4f}') and row[3].mark == ''
  few = extras.Rates('few', {lr: dataclasses.replace(
      p, runs={0: p.runs[0]}) for lr, p in group.points.items()})
  row, = extras.rate_table([few]).rows
  assert row[3].text == f'0.002: {twice:+.4f}' and row[3].mark == 'unknown'


def test_health_and_extrapolation(sweep):
  table = extras.health_table(sweep)
  row, = table.rows
  assert row[0].text == 'moe'
  assert [c.value for c in row[1:]] == pytest.approx(list(HEALTH.values()))
  rows = extras.extrapolation_table(
      extras.extrapolation(sweep)).rows
  assert [c.text for c in rows[1]][3:] == ['refused'] * 3
  assert rows[0][5].value == pytest.approx(2 + 0.1 * 255 / (2 * 256 + 255))


def test_what_tasks_found_has_columns(tmp_path):
  """Of the fractions: mean, spread, and difference over paired seeds; of a
  seed that has none nothing."""
  labels = lambda *f1: {'labels': {seed: {
      'f1': x, 'texts': 7, 'by_label': {'a': 0.1}}
                                    for seed, x in enumerate(f1)}}
  sweep_folder.write(tmp_path, [
      point('base', tasks=labels(0.5, 0.6, 0.7)),
      point('norm', {'model.norm': 'rmsnorm'}, tasks=labels(0.6, 0.8, 0.7)),
      point('rope', {'model.position': 'rope'})])
  sweep = curves.load_sweep(tmp_path)
  table = measures.table(sweep)
  assert [heading for heading, _ in table.columns] == [
      'variant', 'labels/f1', 'labels/f1, minus base']
  base, norm, rope = [[cell.text for cell in row] for row in table.rows]
  assert base == ['base', '0.6000 ± 0.1000', 'base']
  # 0.1, 0.2, 0: t(0.975, 2) = 4.3027, times 0.1 over the root of 3.
  assert norm == ['norm', '0.7000 ± 0.1000', '+0.1000 [-0.1484, +0.3484]']
  assert rope == ['rope', 'n/a', 'n/a']
  html, sheet, _ = write.write(sweep, tmp_path)
  assert 'What the tasks found' in html.read_text()
  rows = {r['variant']: r for r in csv.DictReader(sheet.open())}
  assert float(rows['norm']['labels/f1_high']) == pytest.approx(
      0.3484, abs=1e-4)
  assert rows['rope']['labels/f1'] == ''
  assert re.search(r'^labels/f1 +norm +0.7000 ± 0.1000 +\+0.1000 \[',
                   write.text(sweep), re.M)


def test_what_tasks_of_training_found_counts_at_the_last_step():
  row = lambda step, **figures: dict(step=step, split='eval', **figures)
  run = curves.Run(0, 'done', '', {
      'train.steps': 8, 'eval.tasks': 'labels,loss'}, (
          row(4, **{'labels/f1': 0.1}), row(8, **{
              'loss': 2.0, 'labels/f1': 0.5, 'labels/n': 3, 'labels/a/f1': 0.2,
              'other/f1': 0.7, 'loss/perplexity': None})), {})
  assert measures.of_run(run) == {'labels/f1': 0.5}


def test_csv_holds_every_point(written, outcomes):
  rows = {r['variant']: r for r in csv.DictReader(written[1].open())}
  assert list(rows) == [p['name'] for p in POINTS]
  assert float(rows['better']['low']) == outcomes['better'].difference.low
  assert rows['worse']['loss_seed_1'] == '' and rows['worse']['low'] == ''
  assert float(rows['same']['loss_seed_2']) == pytest.approx(
      float(sweep_folder.loss(sweep_folder.STEPS)) + 0.03)


def test_csv_holds_every_curve(written, sweep):
  rows = list(csv.DictReader(written[2].open()))
  each = sweep_folder.STEPS // sweep_folder.EVERY
  runs = sum(len(p['seeds']) for p in POINTS)
  # Of each split; the failed run went half-way, the pending one nowhere.
  assert len(rows) == 2 * each * (runs - 1) - each
  curve = sweep.points[1].curve(2, 'eval')
  for name in (*curves.AXES, 'step', 'loss'):
    assert [float(r[name]) for r in rows
            if (r['variant'], r['seed'], r['split']) == ('better', '2', 'eval')
            ] == pytest.approx(list(getattr(curve, name)))


def _main(monkeypatch, *words):
  monkeypatch.setattr('sys.argv', ['sweep', 'report', *map(str, words)])
  return command.main()


def test_command_writes_beside_the_runs(folder, monkeypatch, capsys):
  assert _main(monkeypatch, '--workdir', folder) == 0
  said = capsys.readouterr().out
  for name in ('report.html', 'report.csv', 'curves.csv'):
    assert (folder / name).exists() and str(folder / name) in said
  assert _main(monkeypatch, '--workdir', folder, '--json') == 0
  said = json.loads(capsys.readouterr().out)
  assert [p['variant'] for p in said['points']] == [p['name'] for p in POINTS]
  assert said['points'][1]['verdict'] == 'better' and said['notes']
  assert {row['why'] for row in said['missing']} == {
      'the loss was not finite', ''}


def test_command_draws_a_picture(folder, monkeypatch, capsys, tmp_path):
  pytest.importorskip('matplotlib', reason='no matplotlib')
  file = tmp_path / 'small.png'
  assert _main(monkeypatch, '--workdir', folder,
               '--plot', file) == 0
  assert file.read_bytes().startswith(b'\x89PNG')


def test_command_refuses_the_folder_of_another_sweep(folder, monkeypatch):
  with pytest.raises(ValueError, match='holds the sweep .*synthetic.py, not'):
    _main(monkeypatch, 'configs/sweeps/parts.py', '--workdir', folder)
  with pytest.raises(ValueError, match='sweep.json is missing'):
    _main(monkeypatch, '--workdir', folder / 'none')
  assert not (folder / 'none').exists()
