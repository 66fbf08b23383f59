"""The notebooks of docs/ run, and print what they print in the file."""

import copy
import json
import pathlib
import re

import pytest

from tools.docs import notebooks

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob('docs/**/*.ipynb'))


def _said(notebook):
  """What the cells print and return as text; decimals differ by machine."""
  return [re.sub(r'\d+\.\d+', '#', ''.join(
      output.get('text') or output['data']['text/plain']))
          for cell in notebook['cells'] if cell['cell_type'] == 'code'
          for output in cell['outputs']]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_says_what_its_file_says(path):
  pytest.importorskip('treescope', reason='no treescope')
  theirs = json.loads(path.read_text())
  ours = copy.deepcopy(theirs)
  notebooks.run(ours)
  assert _said(ours) == _said(theirs)
  assert len(_said(ours)) > 5
