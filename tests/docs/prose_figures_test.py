"""Figures in prose are those of the tables that they are read from.

A page says where a figure comes from in a comment right after it, which no
reader sees:

  the loss falls by 0.020<!-- = [dense][150] - [8 experts][150] -->.

[ROW][COLUMN] is the first number of a cell, ROW the row's first cell (or, where
several rows begin alike, its first two, 'A | B'); [PAGE][ROW][COLUMN] is one of
another page. A table that repeats rows of another page says so above it:

  <!-- rows of docs/experts.md -->
"""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / 'README.md', *ROOT.glob('docs/**/*.md')])
FIGURE = re.compile(r'([-+]?\d[\d,]*(?:\.\d+)?) ?%?<!-- = (.*?) -->', re.S)
CELL = re.compile(r'\[([^\[\]]+)\]\[([^\[\]]+)\](?:\[([^\[\]]+)\])?')
NUMBER = re.compile(r'[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?')
COPY = re.compile(r'<!-- rows of (\S+) -->')
FUNCTIONS = {'abs': abs, 'max': max, 'min': min, 'round': round}


def _plain(cell):
  return re.sub(r'<!--.*?-->|\*\*|`', '', cell, flags=re.S).strip()


def _tables(text):
  """Yields (the header's cells, the rows' cells) of each table."""
  for block in re.findall(r'(?:^ *\|.*\n)+', text + '\n', re.M):
    rows = [[_plain(cell) for cell in line.strip().strip('|').split('|')]
            for line in block.splitlines()]
    if len(rows) > 2 and all(set(cell) <= set('-: ') for cell in rows[1]):
      yield rows[0], rows[2:]


@functools.cache
def _page(path):
  return list(_tables(path.read_text()))


def _value(tables, row, column):
  """The one number of all tables under these labels."""
  found = [cells[header.index(column)] for header, rows in tables
           if column in header for cells in rows
           if row in (cells[0], ' | '.join(cells[:2]))]
  assert len(found) == 1, f'[{row}][{column}] names {len(found)} cells'
  number = NUMBER.search(found[0])
  assert number, f'[{row}][{column}] holds {found[0]!r}, no number'
  return float(number[0].replace(',', ''))


def _evaluate(path, expression):
  def cell(match):
    if match[3] is None:
      return repr(_value(_page(path), match[1], match[2]))
    return repr(_value(_page(ROOT / match[1]), match[2], match[3]))
  text = CELL.sub(cell, ' '.join(expression.split()))
  return eval(text, {'__builtins__': {}}, FUNCTIONS)


def _agrees(printed, value):
  """Whether a figure is the value, rounded as it is printed."""
  printed = printed.replace(',', '')
  decimals = len(printed.partition('.')[2])
  return abs(abs(float(printed)) - abs(value)) <= 0.5001 * 10 ** -decimals


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.name)
def test_figures_in_prose_are_those_of_the_tables(path):
  for printed, expression in FIGURE.findall(path.read_text()):
    value = _evaluate(path, expression)
    assert _agrees(printed, value), (
        f'{path.name} says {printed}, and {expression} is {value:.6g}')


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.name)
def test_rows_that_stand_on_two_pages_are_the_same(path):
  text = path.read_text()
  for mark in COPY.finditer(text):
    (_, rows), *_ = _tables(text[mark.end():])
    theirs = {}
    for _, others in _page(ROOT / mark[1]):
      for cells in others:
        theirs.setdefault(cells[0], set()).update(cells[1:])
    for label, *cells in rows:
      assert label in theirs, f'{mark[1]} has no row {label!r}'
      for cell in filter(NUMBER.search, cells):
        same = {cell, cell + ' %', cell.removesuffix(' %')} & theirs[label]
        assert same, f'{path.name}, {label}: {cell} is not in {mark[1]}'


def _number(cell, unit):
  if unit not in cell:
    return None
  return float(NUMBER.search(cell)[0].replace(',', ''))


def test_ratios_of_times_are_those_of_their_row():
  seen = 0
  for header, rows in _page(ROOT / 'docs/performance.md'):
    column = next((name for name in header if name.startswith('ratio')), None)
    if column is None or 'ours' not in header or 'PyTorch' not in header:
      continue
    for cells in map(lambda row: dict(zip(header, row)), rows):
      others = [cells[name] for name in ('PyTorch', 'compiled')
                if cells.get(name)]
      for ratio, other in zip(NUMBER.findall(cells[column]), others):
        for unit, power in (('ms', 1), ('tokens/s', -1)):
          ours, theirs = _number(cells['ours'], unit), _number(other, unit)
          if ours and theirs:
            assert _agrees(ratio, (theirs / ours) ** power), cells
            seen += 1
  assert seen > 6


@pytest.mark.parametrize('text, wrong', [
    ('falls by 0.020<!-- = [a][y] - [b][y] -->', False),
    ('falls by 0.021<!-- = [a][y] - [b][y] -->', True),
    ('is 2 %<!-- = 100 * ([a][y] / [b][y] - 1) -->', False),
    ('is 3 %<!-- = 100 * ([a][y] / [b][y] - 1) -->', True),
])
def test_a_wrong_figure_is_noticed(tmp_path, text, wrong):
  page = tmp_path / 'page.md'
  page.write_text(f'{text}.\n\n| x | y |\n|---|---|\n| a | 1.040 |\n'
                  '| b | **1.020** ± 1 |\n')
  [(printed, expression)] = FIGURE.findall(page.read_text())
  assert _agrees(printed, _evaluate(page, expression)) is not wrong
  with pytest.raises(AssertionError, match='names 0 cells'):
    _evaluate(page, '[c][y]')
