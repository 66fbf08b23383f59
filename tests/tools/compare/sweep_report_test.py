"""The report of a sweep: what it says of known runs, and its page in a browser.
"""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest

from tests.helpers import chromium, sweep_folder
from tests.helpers.sweep_folder import HEALTH, LOST, POINTS, SHIFT, point
from tools.compare import __main__ as command
from tools.compare import curves, figures, layout, spec, sweep_report
from training.evals import in_training
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
  return {o.point.name: o for o in sweep_report.outcomes(sweep)}


@pytest.fixture(scope='module')
def written(sweep, tmp_path_factory):
  return sweep_report.write(sweep, tmp_path_factory.mktemp('report'))


def test_differences_and_speed_ups_are_those_of_the_runs(sweep, outcomes):
  step, shifts = sweep_folder.STEPS, (0.002, -0.001, -0.001)
  gap = float(sweep_folder.loss(step, 0.8) - sweep_folder.loss(step))
  found = outcomes['better'].difference
  assert found.mean == pytest.approx(gap + np.mean(shifts))
  # t(0.975, 2) = 4.3027
  assert found.high - found.mean == pytest.approx(
      4.3027 * np.std(shifts, ddof=1) / math.sqrt(3), rel=1e-4)
  assert {name: row.verdict for name, row in outcomes.items()} == {
      'base': 'n/a', 'better': 'better', 'worse': 'unknown', 'same': 'noise',
      'moe': 'noise', '</script><b>': 'unknown', 'low': 'worse',
      'high': 'unknown'}
  for name, factor in (('better', 0.8), ('low', 1.3), ('same', 1.0)):
    fast = outcomes[name].speed_up
    assert fast.mean == pytest.approx(1 / factor, rel=0.03)
    assert fast.low < 1 / factor < fast.high
  rows = sweep_report.outcome_table(sweep, list(outcomes.values())).rows
  assert re.fullmatch(r'1\.2\d \[.*\]', rows[1]['speed-up'].text)
  assert re.fullmatch(r'\(.*\d\.\d\d \[.*\]\)', rows[3]['speed-up'].text)


def test_p_values_are_corrected_over_the_points(sweep, outcomes, written):
  from scipy import stats
  from statsmodels.stats.multitest import multipletests
  base, ps = sweep.base.finals, {}
  for name, row in outcomes.items():
    both = sorted(row.point.finals.keys() & base.keys())
    if name != 'base' and len(both) > 2:
      d = [row.point.finals[s] - base[s] for s in both]
      # The runs of some are the base's own; others differ alike at each seed,
      # which has the sign test's p.
      ps[name] = (stats.ttest_1samp(d, 0).pvalue if np.ptp(d) > 1e-9
                  else 0.25 if any(d) else 1.0)
  holm = dict(zip(ps, multipletests(list(ps.values()), method='holm')[1]))
  with written[1].open() as file:
    sheet = {row['variant']: row for row in csv.DictReader(file)}
  for name, row in outcomes.items():
    assert (row.p, row.p_holm) == pytest.approx((ps.get(name), holm.get(name)))
    assert sheet[name]['p_holm'] == str('' if name not in ps else row.p_holm)
  assert 'Corrected for this (Holm)' in sweep_report.text(sweep)


def test_curves_stand_at_what_was_spent(sweep, tmp_path, written):
  curve = sweep.base.curve(0, 'eval')
  assert curve.tokens[-1] == sweep_folder.TOKENS
  assert curve.flops[-1] == sweep_folder.TOKENS * sweep_folder.FLOPS
  assert curve.seconds[[0, -1]] == pytest.approx(
      [0.5 * sweep_folder.EVERY, 0.5 * sweep_folder.STEPS])
  # Runs that train together share the seconds.
  sweep_folder.write(tmp_path, [point('base', together=2)])
  own = curves.load_sweep(tmp_path).base.mean_curve('eval')
  assert own.seconds[-1] == pytest.approx(0.25 * sweep_folder.STEPS)
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


def test_what_a_point_leaves_as_it_is_is_no_change(tmp_path):
  kind = {'model.pattern': 'own', 'model.kinds.own.mixer': 'deltanet'}
  sweep_folder.write(tmp_path, [point('base'), point(
      'other', {'model.norm': 'layernorm', 'model.block': 'parallel'}),
                                point('kind', kind)])
  _, other, own = curves.load_sweep(tmp_path).points
  assert sweep_report.changes(other) == 'model.block=parallel'
  assert own.changes == kind  # which the base has not


def _notes(folder):
  sweep = curves.load_sweep(folder)
  return '\n'.join(sweep_report.outcome_table(
      sweep, sweep_report.outcomes(sweep)).notes)


def test_what_is_not_known_is_said(sweep, tmp_path, capsys):
  said = sweep_report.text(sweep)
  assert 'fewer than 3 seeds no noise can be stated' in said
  assert re.search(r'worse +1 +failed +none +the loss was not finite', said)
  assert re.search(r'high +2 +pending +none', said)
  # A base without runs compares nothing.
  sweep_folder.write(tmp_path / 'a', POINTS[:2], states={
      ('base', s): ('failed', 'no memory') for s in range(3)})
  assert 'The base base has no finished run' in _notes(tmp_path / 'a')
  # A verdict over survivors, and figures that were not matched.
  sweep_folder.write(tmp_path / 'b', [
      point('base'), point('norm', {'model.norm': 'rmsnorm'}),
      point('far', {'model.position': 'rope'}, flops=1.05 * sweep_folder.FLOPS)
  ], match='params', states={('norm', 2): ('failed', 'not finite')})
  notes = _notes(tmp_path / 'b')
  assert 'over the seeds that ended alone: norm 2 of 3' in notes
  assert ('Only params was matched. By more than 1 % from the base differ the '
          'FLOPs a token of far.') in notes
  # A run of another config.
  assert 'config' not in notes + capsys.readouterr().err
  folder = layout.run_folder(tmp_path / 'b', 'norm', 1)
  run_config.save(folder, spec.changed(
      run_config.load_config(folder), {'optim.b1': 0.5}, 'a test'))
  assert 'figures: norm, seed 1 (optim.b1).' in _notes(tmp_path / 'b')
  assert 'warning: not of the config that sweep.json says: norm, seed 1' in (
      capsys.readouterr().err)


def test_two_seeds_show_their_spread_and_no_interval(tmp_path):
  sweep_folder.write(tmp_path, [
      point('base', seeds=(0, 1), shift={0: 0.1, 1: -0.1}),
      point('other', {'optim.lr': 3e-3}, seeds=(0, 1),
            shift={0: 0.14, 1: -0.12})])
  sweep = curves.load_sweep(tmp_path)
  assert '+0.0100 (-0.0200 to +0.0400)' in sweep_report.text(sweep)
  html = sweep_report.write(sweep, tmp_path)[0].read_text()
  # The forest and the learning rates.
  assert html.count('Bars: from one seed to the other') == 3  # with its words
  assert 'Bars: 95 %' not in html


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
  norm, parallel = sweep_report.effects_table(
      curves.load_sweep(tmp_path)).rows
  # norm: +0.1, +0.2, +0.3 alone and -0.3, -0.2, -0.1 with block.
  assert norm['loss'].value == pytest.approx(0, abs=1e-9)
  assert norm['verdict'].value == 'noise' and norm['pairs'].value == 2
  assert norm['from pair to pair'].text == '-0.2000 to +0.2000'
  # block: 0, 0, 0 alone and -0.4 each with norm: -0.2 each seed.
  assert parallel['change'].text == 'model.block=parallel'
  assert parallel['loss'].text == '-0.2000 [-0.2000, -0.2000]'


def test_sensitivity_to_the_learning_rate(tmp_path):
  sweep_folder.write(tmp_path, [
      point('base', shift=SHIFT),
      point('half', {'optim.lr': 5e-4}, shift={s: x + 0.1 + s / 1e3
                                               for s, x in SHIFT.items()}),
      point('twice', {'optim.lr': 2e-3}, factor=1.4, shift=SHIFT)])
  group, = sweep_report.rates(curves.load_sweep(tmp_path))
  assert list(group.points) == [5e-4, 1e-3, 2e-3]
  row, = sweep_report.rate_table([group]).rows
  twice = float(sweep_folder.loss(200, 1.4) - sweep_folder.loss(200))
  assert row['best'].value == 1e-3
  assert row['next to it'].text.startswith(
      f'0.002: {twice:+.4f} [{twice:+.4f}') and row['next to it'].mark == ''
  done = group.done
  assert row['sensitivity'].value == pytest.approx(
      np.mean(list(done.values())) - done[1e-3])
  del group.points[5e-4]
  table = sweep_report.rate_table([group])
  assert 'at the edge' in table.rows[0]['best'].text
  assert 'may lie outside' in table.notes[0]


def test_health_and_extrapolation(sweep):
  row, = sweep_report.health_table(sweep).rows
  assert row.pop('variant').text == 'moe'
  assert [c.value for c in row.values()] == pytest.approx([*HEALTH.values()])
  base, better = sweep_report.extrapolation_table(
      sweep_report.extrapolation(sweep)).rows
  assert [c.text for c in better.values()][3:] == ['refused'] * 3
  assert base['8 × length'].value == pytest.approx(
      2 + 0.1 * 255 / (2 * 256 + 255))


def test_what_tasks_found_has_columns(tmp_path):
  """Of the fractions: mean, spread, and difference over paired seeds. Runs that
  were to have no losses are not called failed."""
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
  sweep = curves.load_sweep(tmp_path)
  base, norm, rope = [[cell.text for cell in row.values()]
                      for row in sweep_report.measures_table(sweep).rows]
  assert base == ['base', '0.6000 ± 0.1000', 'base']
  # 0.1, 0.2, 0: t(0.975, 2) = 4.3027, times 0.1 over the root of 3.
  assert norm == ['norm', '0.7000 ± 0.1000', '+0.1000 [-0.1484, +0.3484]']
  assert rope == ['rope', 'n/a', 'n/a']
  sheet = sweep_report.write(sweep, tmp_path)[1]
  rows = {r['variant']: r for r in csv.DictReader(sheet.open())}
  assert float(rows['norm']['labels/f1_high']) == pytest.approx(
      0.3484, abs=1e-4)
  text = sweep_report.text(sweep)
  assert re.search(r'^labels/f1 +norm +0.7000 ± 0.1000 +\+0.1000 \[', text,
                   re.M)
  assert 'No held-out losses were asked for' in text
  lost, = sweep_report.missing(sweep).rows
  assert lost['why'].text == 'no luck'


def test_figures_of_tasks_are_the_same_whenever_they_were_done():
  """Also of parts of a task, as lm_eval's groups have them; not its standard
  errors and counts."""
  tasks = {'lm_eval:mmlu': {
      'acc': 0.5, 'mmlu_law/acc': 0.25, 'mmlu_law/acc (strict)': 0.125,
      'stderr': {'acc': 0.1, 'mmlu_law/acc': 0.2}, 'examples': {'mmlu_law': 4}},
           'labels': {'f1': 0.5, 'by_label': {'a': 0.25}}}
  row = dict(step=8, split='eval', loss=2.0, **{'other/f1': 0.7})
  for task, own in tasks.items():
    row |= in_training.numbers_of(own, task)
  during = curves.Run(0, 'done', '', {
      'train.steps': 8, 'eval.tasks': 'lm_eval:mmlu,labels,gone'},
                      (row | {'step': 4, 'labels/f1': 0.1}, row), {})
  after = curves.Run(0, 'done', '', {}, (), tasks)
  assert sweep_report.figures_of_tasks(during) == (
      sweep_report.figures_of_tasks(after)) == {
          'lm_eval:mmlu/acc': 0.5, 'lm_eval:mmlu/mmlu_law/acc': 0.25,
          'lm_eval:mmlu/mmlu_law/acc (strict)': 0.125, 'labels/f1': 0.5}


def _main(monkeypatch, *words):
  monkeypatch.setattr('sys.argv', ['sweep', 'report', *map(str, words)])
  return command.main()


def test_the_command_writes_beside_the_runs(folder, monkeypatch, capsys,
                                            tmp_path):
  plot = tmp_path / 'small.png'
  assert _main(monkeypatch, '--workdir', folder, '--json', '--plot', plot) == 0
  assert plot.read_bytes().startswith(b'\x89PNG')
  said, err = capsys.readouterr()
  for name in ('report.html', 'report.csv', 'curves.csv'):
    assert (folder / name).exists() and str(folder / name) in err
  said = json.loads(said)
  assert [p['variant'] for p in said['points']] == [p['name'] for p in POINTS]
  assert said['points'][1]['verdict'] == 'better' and said['notes']
  for words, match in (([folder, '--plot', 'a.gif'], 'gif'), (
      [tmp_path / 'none'], 'sweep.json is missing')):
    with pytest.raises(ValueError, match=match):
      _main(monkeypatch, *words)
  assert not (tmp_path / 'none').exists()


def test_the_picture_shows_curves_and_verdicts(sweep, outcomes):
  picture = figures.sweep_picture(sweep, list(outcomes.values()))
  left, right = picture.axes
  names = [text.get_text() for text in right.get_yticklabels()]
  assert names[0] == 'better' and names[-1] == 'low'
  words = dict(zip(names, (t.get_text() for t in right.texts
                           if t.get_text())))
  assert words['same'] == 'inside the noise' and words['base'] == 'the base'
  colours = [line.get_color() for line in left.lines]
  assert colours[names.index('base')] == figures.INK
  # Twenty-five lines differ and have few colours.
  looks = figures.looks('base', [str(i) for i in range(24)])
  assert len({repr(look) for look in looks.values()}) == 25
  assert len({look['color'] for look in looks.values()}) == 7


@pytest.fixture(scope='module')
def page(written, tmp_path_factory):
  if chromium.PROGRAM is None:
    pytest.skip('no chromium on the path (Debian package chromium)')
  profile = tmp_path_factory.mktemp('profile')
  with chromium.Page(written[0].as_uri(), profile, size=(1100, 900)) as page:
    yield page
  shutil.rmtree(profile, ignore_errors=True)


def _column(page, n, table='outcome'):
  return page.evaluate(
      f'[...document.querySelectorAll("#{table} tbody tr")]'
      f'.map(r => r.cells[{n}].textContent)')


@pytest.mark.slow
def test_the_page_shows_every_section_sorts_and_fetches_nothing(
    page, written, sweep):
  assert page.evaluate(
      '[...document.querySelectorAll("h2")].map(h => h.textContent)') == [
          'Beside the base', 'Loss curves', 'Sensitivity to the learning rate',
          'Health of the routers', 'Past the training length',
          'Failed or not done']
  assert page.requests == [written[0].as_uri()]
  assert '</script><b>' in _column(page, 0)
  means = {p.name: np.mean(list(p.finals.values())) for p in sweep.points}
  rising = sorted(means.values())
  for wanted in (rising, rising[::-1]):
    page.click('#outcome th:nth-child(2) button')
    assert [means[name] for name in _column(page, 0)] == wanted
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
def test_plots_have_the_points_and_follow_their_controls(page):
  rows = sweep_folder.STEPS // sweep_folder.EVERY
  assert _points(page, 'rates') == [3] and _points(page, 'health') == [rows]
  assert len(_points(page, 'extrapolation')) == 2
  for axis in ('flops', 'seconds', 'tokens'):
    page.click(f'#curves input[value={axis}]')
    assert _points(page, 'curves') == [rows] * len(POINTS)
  page.click('#curves input[name=curves-minus]')
  assert page.evaluate(  # the base less itself is a level line
      'new Set(document.querySelector("#curves path.line").getAttribute("d")'
      '.split(/[ML]/).slice(1).map(p => p.split(" ")[1])).size') == 1
  page.click('#curves input[name=curves-minus]')
  page.click('#curves input[value=half]')
  assert _points(page, 'curves') == [rows // 2 + 1] * len(POINTS)
  page.click('#curves input[value=whole]')
  page.click('#curves input[name=curves-seeds]')
  assert page.evaluate('document.querySelectorAll("#curves path.seed").length'
                       ) == 3 * len(POINTS) - len(LOST) - 1
  page.click('#curves .legend button:nth-child(2)')
  assert len(_points(page, 'curves')) == len(POINTS) - 1
  page.click('#curves .legend button:nth-child(2)')
  assert not page.errors


@pytest.mark.slow
def test_a_point_says_its_figures_and_a_variant_keeps_its_colour(page, sweep):
  x, y = page.evaluate('''(() => {
      const c = document.querySelector("#curves circle");
      c.scrollIntoView({block: "center"});
      const b = c.getBoundingClientRect();
      return [b.x + b.width / 2, b.y + b.height / 2]; })()''')
  page.move(x, y)
  first = sweep.base.mean_curve('eval').loss[0]
  assert page.evaluate('document.querySelector("#curves .tip").textContent'
                       ) == f'base: {first:.4f} at 50k tokens'
  found = {}
  for plot in ('curves', 'rates', 'health', 'extrapolation'):
    for name, colour in page.evaluate(
        f'[...document.querySelectorAll("#{plot} .legend button")].map('
        'b => [b.textContent, getComputedStyle(b.querySelector("line")).stroke]'
        ')'):
      found.setdefault(name.partition(':')[0], set()).add(colour)
  assert found.keys() == {p['name'] for p in POINTS}
  assert all(len(colours) == 1 for colours in found.values()), found
