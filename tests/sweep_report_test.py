"""The report: what it says of known runs, and that a browser can show it."""

import csv
import math
import re
import shutil

import numpy as np
import pytest

from tests import chromium
from tests import sweep_folder
from tests.sweep_folder import point
from tools.sweep import __main__ as command
from tools.sweep import curves
from tools.sweep import report_extras
from tools.sweep import report_tables
from tools.sweep import report_write

SHIFT = {0: 0.01, 1: -0.02, 2: 0.015}
HEALTH = {'dropped': 0.1, 'unserved': 0.02, 'window_load_max': 1.4,
          'window_load_entropy': 0.95, 'window_unused': 0.0,
          'confidence': 0.4, 'router_entropy': 0.8}


def _extrapolation(slope, refused=False):
  return {'length': 64, 'curves': {'alibi': {
      str(m): None if refused and m > 1 else
      [2 + slope * i / 512 for i in range(64 * m)] for m in (1, 2, 4, 8)}}}


POINTS = [
    point('base', shift=SHIFT, extrapolation=_extrapolation(0.1)),
    # 0.8 of the compute, then shifts of their own.
    point('better', {'model.norm': 'rmsnorm'}, factor=0.8,
          shift={0: 0.012, 1: -0.021, 2: 0.014},
          extrapolation=_extrapolation(1.0, refused=True)),
    point('worse', {'model.position': 'none'}, factor=1.2, shift=SHIFT),
    point('same', {'model.block': 'parallel'},
          shift={0: 0.02, 1: -0.04, 2: 0.03}),
    point('moe', {'model.ffn': 'moe'}, shift=SHIFT, params=80000,
          health=HEALTH),
    point('</script><b>', {'model.ffn': 'geglu'}, seeds=(0, 1), shift=SHIFT),
    point('low', {'optim.lr': 1e-4}, factor=1.3, shift=SHIFT),
    point('high', {'optim.lr': 3e-3}, factor=1.1, shift=SHIFT),
]
LOST = {('worse', 1): ('failed', 'the loss was not finite'),
        ('high', 2): ('pending', '')}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sweep')
  sweep_folder.write(folder, POINTS, states=LOST)
  return folder


@pytest.fixture(scope='module')
def sweep(folder):
  return curves.load(folder)


@pytest.fixture(scope='module')
def outcomes(sweep):
  return {o.point.name: o for o in report_tables.outcomes(sweep)}


@pytest.fixture(scope='module')
def written(sweep, tmp_path_factory):
  folder = tmp_path_factory.mktemp('report')
  return report_write.write(sweep, folder)


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
  other = curves.load(tmp_path).points[1]
  assert report_tables.changes(other) == 'model.block=parallel'


def test_runs_that_train_together_share_the_seconds(tmp_path):
  sweep_folder.write(tmp_path, [point('base', together=2), point('alone')])
  seconds = [p.mean_curve('eval').seconds[-1]
             for p in curves.load(tmp_path).points]
  assert seconds == pytest.approx([0.25 * sweep_folder.STEPS,
                                   0.5 * sweep_folder.STEPS])


def test_text_says_what_is_not_known(sweep):
  said = report_write.text(sweep)
  assert 'fewer than 3 seeds no noise can be stated' in said
  assert re.search(r'worse +1 +failed +none +the loss was not finite', said)
  assert re.search(r'high +2 +pending +none', said)
  assert 'differ moe' in said  # its parameters


def test_a_base_without_runs_compares_nothing(tmp_path):
  states = {('base', s): ('failed', 'no memory') for s in range(3)}
  sweep_folder.write(tmp_path, POINTS[:2], states=states)
  sweep = curves.load(tmp_path)
  assert 'The base base has no finished run' in report_write.text(sweep)
  html, _ = report_write.write(sweep, tmp_path)
  assert 'no memory' in html.read_text()


def test_each_change_over_all_settings_of_the_others(tmp_path):
  norm, block = {'model.norm': 'rmsnorm'}, {'model.block': 'parallel'}
  wide = {'model.d_ff': 99}  # solved for, so no change of its own
  flat = {s: 0.5 for s in range(3)}
  sweep_folder.write(tmp_path, [
      point('base', shift=flat),
      point('norm', norm, shift={0: .6, 1: .7, 2: .8}),
      point('block', {**block, **wide}, matched=['model.d_ff'], shift=flat),
      point('both', norm | block, shift={0: .2, 1: .3, 2: .4})])
  rows = {row[0].text: row for row in report_extras.effects_table(
      curves.load(tmp_path)).rows}
  assert list(rows) == ['model.norm=rmsnorm', 'model.block=parallel']
  # norm: +0.1, +0.2, +0.3 alone and -0.3, -0.2, -0.1 with block.
  norm = rows['model.norm=rmsnorm']
  assert norm[1].value == pytest.approx(0, abs=1e-9)
  assert norm[2].value == 'noise' and norm[4].value == 2
  assert norm[3].text == '-0.2000 to +0.2000'
  # block: 0, 0, 0 alone and -0.4 each with norm: -0.2 each seed.
  assert rows['model.block=parallel'][1].text == (
      '-0.2000 [-0.2000, -0.2000]')


def test_sensitivity_to_the_learning_rate(sweep):
  group, = report_extras.rates(sweep)
  assert list(group.points) == [1e-4, 1e-3, 3e-3]
  done = group.done
  row, = report_extras.rate_table([group]).rows
  assert row[1].value == 1e-3 and row[2].value == done[1e-3]
  assert row[3].value == pytest.approx(
      np.mean(list(done.values())) - done[1e-3])


def test_the_edge_of_the_learning_rates_is_told(tmp_path):
  sweep_folder.write(tmp_path, [
      point('base', factor=1.2), point('up', {'optim.lr': 2e-3})])
  table = report_extras.rate_table(
      report_extras.rates(curves.load(tmp_path)))
  assert 'at the edge' in table.rows[0][1].text
  assert 'may lie outside' in table.notes[0]


def test_health_and_extrapolation(sweep):
  table = report_extras.health_table(sweep)
  row, = table.rows
  assert row[0].text == 'moe'
  assert [c.value for c in row[1:]] == pytest.approx(list(HEALTH.values()))
  rows = report_extras.extrapolation_table(
      report_extras.extrapolation(sweep)).rows
  assert [c.text for c in rows[1]][3:] == ['refused'] * 3
  assert rows[0][5].value == pytest.approx(2 + 0.1 * 511 / 2 / 512)


def test_csv_holds_every_point(written, outcomes):
  rows = {r['variant']: r for r in csv.DictReader(written[1].open())}
  assert list(rows) == [p['name'] for p in POINTS]
  assert float(rows['better']['low']) == outcomes['better'].difference.low
  assert rows['worse']['loss_seed_1'] == '' and rows['worse']['low'] == ''
  assert float(rows['same']['loss_seed_2']) == pytest.approx(
      float(sweep_folder.loss(sweep_folder.STEPS)) + 0.03)


def _main(monkeypatch, *words):
  monkeypatch.setattr('sys.argv', ['sweep', 'report', *map(str, words)])
  return command.main()


def test_command_writes_beside_the_runs(folder, monkeypatch, capsys):
  assert _main(monkeypatch, '--workdir', folder) == 0
  said = capsys.readouterr().out
  for name in ('report.html', 'report.csv'):
    assert (folder / name).exists() and str(folder / name) in said


def test_command_refuses_the_folder_of_another_sweep(folder, monkeypatch):
  with pytest.raises(ValueError, match='holds the sweep .*synthetic.py, not'):
    _main(monkeypatch, 'configs/sweeps/parts.py', '--workdir', folder)
  with pytest.raises(ValueError, match='sweep.json is missing'):
    _main(monkeypatch, '--workdir', folder / 'none')
  assert not (folder / 'none').exists()


@pytest.fixture(scope='module')
def page(written, tmp_path_factory):
  if chromium.PROGRAM is None:
    pytest.skip('no chromium on the path (Debian package chromium)')
  profile = tmp_path_factory.mktemp('profile')
  with chromium.Page(written[0].as_uri(), profile) as page:
    yield page
  shutil.rmtree(profile, ignore_errors=True)


def _column(page, n, table='outcome'):
  return page.evaluate(
      f'[...document.querySelectorAll("#{table} tbody tr")]'
      f'.map(r => r.cells[{n}].textContent)')


def test_page_shows_every_section_and_fetches_nothing(page, written):
  assert page.evaluate(
      '[...document.querySelectorAll("h2")].map(h => h.textContent)') == [
          'Beside the base', 'Loss curves', 'Sensitivity to the learning rate',
          'Health of the routers', 'Past the training length',
          'Failed or not done']
  assert page.requests == [written[0].as_uri()]
  assert '</script><b>' in _column(page, 0)
  assert not page.errors


def test_tables_sort(page, sweep):
  means = {p.name: np.mean(list(p.finals.values())) for p in sweep.points}
  rising = sorted(means, key=means.get)
  page.click('#outcome th:nth-child(2) button')
  assert [means[n] for n in _column(page, 0)] == [means[n] for n in rising]
  page.click('#outcome th:nth-child(2) button')
  assert [means[n] for n in _column(page, 0)] == [
      means[n] for n in reversed(rising)]
  page.click('#outcome th:nth-child(1) button')
  assert _column(page, 0) == sorted(means)
  assert not page.errors


def _points(page, plot):
  """Points drawn, of each line: by the commands of its path."""
  return page.evaluate(
      f'[...document.querySelectorAll("#{plot} path.line")]'
      '.map(p => p.getAttribute("d").split(/[ML]/).length - 1)')


def test_plots_have_the_points(page):
  rows = sweep_folder.STEPS // sweep_folder.EVERY
  assert _points(page, 'curves') == [rows] * len(POINTS)
  assert _points(page, 'rates') == [3]
  assert _points(page, 'health') == [rows]
  assert len(_points(page, 'extrapolation')) == 2
  assert page.evaluate(
      'document.querySelectorAll("svg.forest circle").length'
  ) == len(POINTS) - 1
  for axis in ('flops', 'seconds', 'tokens'):
    page.click(f'#curves input[value={axis}]')
    assert _points(page, 'curves') == [rows] * len(POINTS)
    assert page.evaluate(
        'document.querySelector("#curves svg").textContent'
        f'.includes({curves.AXES[axis]!r})')
  assert not page.errors


def test_plots_follow_their_controls(page):
  rows = sweep_folder.STEPS // sweep_folder.EVERY
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
  page.click('#curves input[name=curves-seeds]')
  page.click('#curves .legend button:nth-child(2)')
  assert len(_points(page, 'curves')) == len(POINTS) - 1
  page.click('#curves .legend button:nth-child(2)')
  page.click('#curves input[name=curves-log]')
  assert _points(page, 'curves') == [rows] * len(POINTS)
  page.click('#curves input[name=curves-log]')
  assert not page.errors


def test_a_point_says_its_figures(page):
  x, y = page.evaluate('''(() => {
      const c = document.querySelector("#curves circle");
      c.scrollIntoView({block: "center"});
      const b = c.getBoundingClientRect();
      return [b.x + b.width / 2, b.y + b.height / 2]; })()''')
  page.move(x, y)
  said = page.evaluate('document.querySelector("#curves .tip").textContent')
  assert re.fullmatch(r'.+: \d\.\d{4} at 50k tokens', said)
