"""Pictures have titles, and no label stands in another's way."""

import itertools
import warnings

import numpy as np
import pytest

from tests.helpers import sweep_folder
from tools import coord_check
from tools.compare.pages import fonts
from tools.compare.study_report import drawing
from tools.compare.sweep_report import curves
from tools.compare.sweep_report import picture
from training.evals.tasks import extrapolation, routing

figure = pytest.importorskip('matplotlib.figure', reason='no matplotlib')


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are saved, instead of their files."""
  found = []
  monkeypatch.setattr(figure.Figure, 'savefig',
                      lambda self, *args, **kwargs: found.append(self))
  return found


def _check(picture):
  picture.canvas.draw()
  panels = [axes for axes in picture.axes if axes.get_label() != '<colorbar>']
  for axes in panels:
    assert axes.get_title()
  for axes in picture.axes:
    for axis in (axes.xaxis, axes.yaxis):
      boxes = [label.get_window_extent() for label in axis.get_ticklabels(
          which='both') if label.get_visible() and label.get_text()]
      for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (axes.get_title(), axis)
  for axes in panels:
    low, high = sorted(axes.get_ylim())
    told = [t for t in axes.get_yticks() if low <= t <= high]
    assert len(told) >= min(2, len(axes.images[0].get_array())
                            if axes.images else 2), axes.get_title()
  titles = [axes.title.get_window_extent() for axes in panels]
  for a, b in itertools.combinations(titles, 2):
    assert not a.overlaps(b)
  whole = picture.bbox
  for box in titles:
    assert whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1


@pytest.mark.parametrize('layers, experts', [
    (1, 2), (12, 64), (96, 8), (40, 32)])
def test_routing(layers, experts, drawn, tmp_path):
  load = np.random.default_rng(0).dirichlet(np.ones(experts), size=layers)
  routing.plot(load, tmp_path / 'routing.png')
  _check(drawn[0])


@pytest.mark.parametrize('length', [16, 8192])
def test_extrapolation(length, drawn, tmp_path):
  by = {m: 2 + np.arange(length * m) / length for m in extrapolation.MULTIPLES}
  texts = {m: extrapolation.Text(np.ones(length * m, int), np.ones(length * m))
           for m in by}
  extrapolation.plot({'rope': by, 'rope, a long name': by, 'learned': {
      m: by[m] if m == 1 else None for m in by}}, texts, length,
                     tmp_path / 'e.png')
  _check(drawn[0])


@pytest.mark.parametrize('widths, count', [
    ((64, 128), 1), ((64, 128, 256, 512, 1024, 2048), 3), ((64, 80, 96), 2)])
def test_coord_check(widths, count, drawn):
  outputs = ['block 0', 'block 1', 'logits']
  spread = np.array([0.1, 0.5, 1.0])  # also less than a decade
  size = np.exp(spread * np.random.default_rng(0).normal(size=(7, 3)))
  rows = [dict(system='gpt_neox', parametrization='standard', outputs=outputs,
               steps=6, widths=list(widths),
               sizes=[size * (1 + 1e-3 * w) for w in widths])
          for _ in range(count)]
  coord_check.plot(rows, 'c.png')
  _check(drawn[0])


def test_outcome_of_a_sweep(drawn, tmp_path):
  points = [
      sweep_folder.point('base', shift={0: 0.01, 1: -0.02, 2: 0.015}),
      sweep_folder.point('worse', {'model.norm': 'rmsnorm'},
                         shift={0: 0.11, 1: 0.081, 2: 0.114}),
      sweep_folder.point('same', {'model.position': 'none'},
                         shift={0: 0.03, 1: -0.05, 2: 0.02}),
      sweep_folder.point('better', {'model.position': 'rope'},
                         shift={0: -0.09, 1: -0.121, 2: -0.086})]
  sweep_folder.write(tmp_path, points)
  picture.draw(curves.load_sweep(tmp_path), tmp_path / 'p.png')
  _check(drawn[0])
  left, right = drawn[0].axes
  names = [label.get_text() for label in right.get_yticklabels()]
  assert sorted(names[1:3]) == ['base', 'same']
  assert (names[0], names[3]) == ('better', 'worse')
  words = [text.get_text() for text in right.texts]
  assert words[0] == 'better' and words[3] == 'worse'
  assert sorted(words[1:3]) == ['inside the noise', 'the base']
  colours = {name: line.get_color() for name, line in zip(names, left.lines)}
  assert len(set(colours.values())) == 4 and colours['base'] == 'black'


def test_names_in_another_script_are_drawn(tmp_path, monkeypatch):
  """By a font that is installed; here one of matplotlib's own, which has a
  single letter of Japanese. A letter that no font has makes it warn."""
  monkeypatch.setattr(fonts, 'MORE', ('No Such Font', 'STIXGeneral'))
  assert fonts.families() == ['DejaVu Sans', 'STIXGeneral']
  sweep_folder.write(tmp_path, [
      sweep_folder.point('base'),
      sweep_folder.point('の', {'model.norm': 'rmsnorm'})])
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    picture.draw(curves.load_sweep(tmp_path), tmp_path / 'p.png')
    with drawing.style('a'):
      drawn = figure.Figure()
      drawn.suptitle('の')
      drawing.save(drawn)
