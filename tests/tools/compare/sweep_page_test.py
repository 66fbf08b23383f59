"""The page of a report, in a browser: it renders, sorts, draws."""

import re
import shutil

import numpy as np
import pytest

from tests.helpers import chromium
from tests.helpers import sweep_folder
from tests.helpers.sweep_folder import LOST, POINTS
from tools.compare.sweep_report import curves
from tools.compare.sweep_report import write

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sweep')
  sweep_folder.write(folder, POINTS, states=LOST)
  return folder


@pytest.fixture(scope='module')
def sweep(folder):
  return curves.load_sweep(folder)


@pytest.fixture(scope='module')
def written(sweep, tmp_path_factory):
  folder = tmp_path_factory.mktemp('report')
  return write.write(sweep, folder)


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


def _measured(page):
  """The first line of the curves, measured against the labels of the axes."""
  drawn = page.evaluate('''(() => {
      const labels = [...document.querySelectorAll("#curves svg text")].map(
        t => ["x", "y", "text-anchor"].map(a => t.getAttribute(a)).concat(
          t.textContent));
      const d = document.querySelector("#curves path.line").getAttribute("d");
      return [labels, d.split(/[ML]/).slice(1).map(p => p.split(" "))]; })()''')
  labels = [(float(x), float(y), anchor, number) for x, y, anchor, text
            in drawn[0] if (number := _number(text)) is not None]
  fits = []
  for i, wanted in ((0, 'middle'), (1, 'end')):
    at, value = np.array([(label[i], label[3]) for label in labels
                          if label[2] == wanted]).T
    at -= 4 * i  # a label stands below its line
    fits.append(np.polyfit(at, value, 1))
    np.testing.assert_allclose(np.polyval(fits[-1], at), value, atol=1e-6)
  pixels = np.array(drawn[1], float)
  return [np.polyval(fit, pixels[:, i]) for i, fit in enumerate(fits)]


def _number(text):
  """What report.js's format(x) is of; None for another text."""
  found = re.fullmatch(r'([\d.]+)([kMGT]?)', text)
  return found and float(found[1]) * {
      '': 1, 'k': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12}[found[2]]


def test_lines_are_where_the_axes_say(page, sweep):
  x, y = _measured(page)
  curve = sweep.base.mean_curve('eval')
  # To a tenth of a pixel, of some hundreds.
  np.testing.assert_allclose(x, curve.tokens, atol=2e-4 * np.ptp(x))
  np.testing.assert_allclose(y, curve.loss, atol=4e-4 * np.ptp(y))


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


def test_a_variant_keeps_its_colour_in_all_figures(page):
  found = {}
  for plot in ('curves', 'rates', 'health', 'extrapolation'):
    for name, colour in page.evaluate(
        f'[...document.querySelectorAll("#{plot} .legend button")].map('
        'b => [b.textContent, getComputedStyle(b.querySelector("line")).stroke]'
        ')'):
      found.setdefault(name.partition(':')[0], set()).add(colour)
  for name, colour in page.evaluate(
      '[...document.querySelectorAll("svg.forest g")].map(g => ['
      'g.querySelector("text").textContent, getComputedStyle('
      'g.querySelector("line.line")).stroke])'):
    found[name].add(colour)
  assert found.keys() == {p['name'] for p in POINTS}
  assert all(len(colours) == 1 for colours in found.values()), found
  few = [found[p['name']].copy().pop() for p in POINTS[:7]]
  assert len(set(few)) == 7  # the base is ink, and six have colours
  # A line is drawn as its legend says.
  assert page.evaluate(
      'getComputedStyle(document.querySelector("#health path.line")).stroke'
  ) in found['moe']


def test_a_page_of_1100_pixels_shows_all_columns(written, tmp_path):
  if chromium.PROGRAM is None:
    pytest.skip('no chromium on the path (Debian package chromium)')
  with chromium.Page(written[0].as_uri(), tmp_path, size=(1100, 900)) as page:
    assert page.evaluate('innerWidth') <= 1100
    assert page.evaluate(
        '[...document.querySelectorAll(".scroll")].filter('
        's => s.scrollWidth > s.clientWidth).length') == 0
  shutil.rmtree(tmp_path, ignore_errors=True)


def test_a_point_says_its_figures(page, sweep):
  x, y = page.evaluate('''(() => {
      const c = document.querySelector("#curves circle");
      c.scrollIntoView({block: "center"});
      const b = c.getBoundingClientRect();
      return [b.x + b.width / 2, b.y + b.height / 2]; })()''')
  page.move(x, y)
  said = page.evaluate('document.querySelector("#curves .tip").textContent')
  first = sweep.base.mean_curve('eval').loss[0]
  assert said == f'base: {first:.4f} at 50k tokens'
