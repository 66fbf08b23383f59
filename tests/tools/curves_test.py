"""The curves of plain runs: their table, pictures and page."""

import pathlib
import sys

import numpy as np
import pytest

from common.errors import RequestError
from tests.helpers import sweep_folder
from tools import curves
from training.workdir import metrics

STARTS = {'png': b'\x89PNG', 'svg': b'<?xml', 'pdf': b'%PDF',
          'html': b'<!doctype html>'}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('sweep')
  sweep_folder.write(root, sweep_folder.POINTS[:2])
  return [str(root), *(str(root / f'points/{name}/seed-0')
                       for name in ('base', 'better'))]


def _run(monkeypatch, *words):
  monkeypatch.setattr(sys, 'argv', ['curves', *words])
  return curves.main()


@pytest.mark.parametrize('kind', STARTS)
def test_the_ending_of_the_name_says_what_is_drawn(folders, tmp_path, kind,
                                                   monkeypatch, capsys):
  file = tmp_path / f'curves.{kind}'
  assert _run(monkeypatch, *folders[1:], f'--plot={file}', '--by=flops') == 0
  assert file.read_bytes().startswith(STARTS[kind])
  if kind == 'html':
    assert all(f'"{folder}"' in file.read_text() for folder in folders[1:])
    assert all(words in file.read_text() for words in (
        'What the configs have different', 'model.norm', 'rmsnorm'))
  # The two differ in one field.
  heading, row, *_ = capsys.readouterr().out.splitlines()
  assert heading.split() == ['field', *folders[1:]]
  assert row.split() == ['model.norm', 'layernorm', 'rmsnorm']


@pytest.mark.parametrize('words, sentence', [
    ((1, '--plot=a.jpg'), 'must end in one of .html, .svg, .png, .pdf'),
    ((1, '--plot=a'), 'must end in one of'),
    ((1, '--plot=/proc/a.png'), 'nothing can be written'),
    ((1, '--smooth=1', '--plot=a.png'), '--smooth is 1.0'),
    ((0, '--plot=a.png'), 'no run was started in this workdir'),
])
def test_what_cannot_be_drawn_is_refused(folders, words, sentence,
                                         monkeypatch):
  with pytest.raises(RequestError, match=sentence):
    _run(monkeypatch, *(folders[x] if isinstance(x, int) else x
                        for x in words))


def test_what_was_evaluated_is_drawn_as_it_is(folders):
  plain, smooth = (curves._curves_of_run(folders[1], w) for w in (0.0, 0.9))
  same = {figure for figure, line in plain.items()
          if line['loss'] == smooth[figure]['loss']}
  assert 'eval/loss' in same and 'train/loss' not in same


def test_a_moving_average_passes_over_what_is_not_finite():
  np.testing.assert_allclose(curves.smooth_curve([4, 2, np.nan, 8], 0.5), [
      4, (2 + 4 / 2) / 1.5, np.nan, (8 + 2 / 2 + 4 / 4) / 1.75])


def test_the_first_row_of_a_log_is_drawn_too(folders):
  rows = metrics.read_metrics(pathlib.Path(folders[1]) / metrics.METRICS_FILE)
  curve_of_figure = curves._curves_of_run(folders[1], 0.0)
  for split in ('train', 'eval'):
    steps = [row['step'] for row in rows if row['split'] == split]
    assert curve_of_figure[f'{split}/loss']['step'] == steps
