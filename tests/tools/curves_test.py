"""The curves of plain runs: their table, pictures and page."""

import json
import sys

import numpy as np
import pytest

from configs.errors import RequestError
from tests.helpers import sweep_folder
from tools import curves

STARTS = {'png': b'\x89PNG', 'svg': b'<?xml', 'pdf': b'%PDF',
          'html': b'<!doctype html>'}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('sweep')
  sweep_folder.write(root, sweep_folder.POINTS[:2])
  for file in root.glob('points/*/seed-0/config.json'):
    tree = json.loads(file.read_text())
    tree['derived']['model.vocab_size'] = 384  # as each run that has begun
    file.write_text(json.dumps(tree))
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
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[:2] for line in lines[1:3]] == [
      ['base/seed-0', '200'], ['better/seed-0', '200']]


@pytest.mark.parametrize('words, sentence', [
    ((1, '--plot=a.jpg'), 'must end in one of .html, .svg, .png, .pdf'),
    ((1, '--plot=a'), 'must end in one of'),
    ((1, '--plot=/proc/a.png'), 'nothing can be written'),
    ((1, '--smooth=1'), '--smooth is 1.0'),
    ((1, 1), 'a run is named twice'),
    ((0,), 'no run was started in this workdir'),
])
def test_what_cannot_be_drawn_is_refused(folders, words, sentence,
                                         monkeypatch):
  with pytest.raises(RequestError, match=sentence):
    _run(monkeypatch, *(folders[x] if isinstance(x, int) else x
                        for x in words))


def test_a_moving_average_passes_over_what_is_not_finite():
  np.testing.assert_allclose(curves.smoothed([4, 2, np.nan, 8], 0.5), [
      4, (2 + 4 / 2) / 1.5, np.nan, (8 + 2 / 2 + 4 / 4) / 1.75])
