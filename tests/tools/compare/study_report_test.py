"""A study's report: its numbers, names, and studies that are not over."""

import csv
import html.parser
import json
import math
import re
import shutil
import subprocess

import pytest

from tests.helpers import study_folder
from tests.helpers.study_folder import BASE, ODD, VARIANTS
from tools.compare import findings
from tools.compare import plan as plans
from tools.compare.study_report import figures
from tools.compare.study_report import record as records
from tools.compare.study_report import render
from tools.compare.study_report import sheets
from tools.compare.study_report import writing

ALL = (*VARIANTS, ODD)


class _Page(html.parser.HTMLParser):
  """The tables of a page: by id, rows of (text, data-value)."""

  def __init__(self, text):
    super().__init__()
    self.tables, self.tags, self._table, self._cell = {}, set(), None, None
    self.text = ''
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.add(tag)
    if tag == 'table':
      self._table = self.tables.setdefault(attrs['id'], [])
    elif tag == 'tr':
      self._table.append([])
    elif tag in ('td', 'th'):
      self._cell = ['', attrs.get('data-value')]
      self._table[-1].append(self._cell)

  def handle_endtag(self, tag):
    if tag in ('td', 'th'):
      self._cell = None

  def handle_data(self, data):
    self.text += data
    if self._cell is not None:
      self._cell[0] += data

  def rows(self, name):
    """Returns its rows as {heading: (text, value)}."""
    head, *body = self.tables[name]
    return [dict(zip([text for text, _ in head], map(tuple, row), strict=True))
            for row in body]


def _load(folder, plan=None, found=None, **changes):
  found = study_folder.write(folder, plan, found, **changes)
  return records.load(folder), found


def _page(record):
  return _Page(render.html_page(writing.assemble(record, [])))


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  return _load(tmp_path_factory.mktemp('study'), study_folder.plan(ALL))


@pytest.fixture(scope='module')
def page(study):
  return _page(study[0])


def _numbers(text):
  return [float(x.replace(',', '')) for x in re.findall(
      r'[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?', text)]


def _check(cell, value, low=None, high=None, digits=4):
  """The cell's figure is `value` in full, and its text what it rounds to."""
  text, full = cell
  if value is None:
    assert text == 'n/a' and full is None
    return
  assert float(full) == value
  wanted = [value] if low is None else [value, low, high]
  if not text.startswith('<'):
    assert _numbers(text)[:len(wanted)] == pytest.approx(
        wanted, abs=0.5001 * 10 ** -digits)


def test_each_variant_has_one_row_with_the_verdicts_numbers(study, page):
  record, found = study
  rows = page.rows('verdicts')
  assert [row['variant'][1] for row in rows] == [BASE, *ALL]
  by_name = {row['variant'][1]: row for row in rows}
  confirmed = {(row['variant'], row['measure']): row
               for row in found['confirm']}
  assert len(confirmed) == len(found['confirm']) > 6
  for variant in ALL:
    row, own = by_name[variant], confirmed.get((variant, 'loss'))
    if own is None:
      assert row['verdict'][0].startswith('stopped at the screen')
      continue
    assert row['verdict'][0] == own['verdict']
    _check(row['loss minus base'], own['effect'], own['low'], own['high'])
    _check(row['p (Holm)'], own['p_holm'])
    _check(row['trend over size'], *(
        own['trend'][key] for key in ('slope', 'low', 'high')))
    for kind, heading in (('flops', 'speed-up in FLOPs'),
                          ('seconds', 'speed-up in time')):
      largest = [x for x in own['speed_ups'] if (
          x['by'], x['size']) == (kind, record.plan.sizes[-1])]
      _check(row[heading], *(largest[0][key] for key in (
          'factor', 'low', 'high')), digits=2)
    for name in ('mqar', 'parity'):
      other = confirmed[variant, name]
      _check(row[f'{name} minus base'], other['effect'], other['low'],
             other['high'])
    assert _numbers(row['diverged'][0]) == [own['diverged'], own['runs']]
    assert float(row['power'][1]) == 0.84


def test_every_row_of_the_results_is_shown_once(study, page):
  record, found = study
  noise = page.rows('noise-table')
  assert len(noise) == len(found['noise'])
  for row, own in zip(noise, found['noise']):
    assert [row[key][0] for key in ('size', 'measure', 'phase')] == [
        own[key] for key in ('size', 'measure', 'phase')]
    _check(row['standard deviation'], own['sd'], own['sd_low'], own['sd_high'])
    _check(row['smallest effect'], own['smallest_effect'])
    _check(row['seeds needed'], own['seeds_needed'])
    assert (row['power'][1] and float(row['power'][1])) == own['power']
  screened = page.rows('screened')
  assert len(screened) == len(found['screen']) == len(ALL)
  for row, own in zip(screened, found['screen']):
    assert row['variant'][0] == own['variant']
    _check(row['minus base'], own['effect'], own['low'], own['high'])
    _check(row['p'], own['p'])
    _check(row['q'], own['q'])
    assert row['passed'][0].startswith('yes' if own['passed'] else 'no')
  sizes = [(row['variant'], own) for row in found['confirm']
           if row['primary'] for own in row['sizes']]
  shown = page.rows('by-size')
  assert [(row['variant'][0], row['size'][0]) for row in shown] == [
      (name, own['size']) for name, own in sizes]
  for row, (_, own) in zip(shown, sizes):
    _check(row['loss minus base'], own['mean'], own['low'], own['high'])
    _check(row['p'], own['p'])
  tuned = page.rows('tuned')
  assert len(tuned) == len(found['tuned'])
  for row, own in zip(tuned, found['tuned']):
    assert row['chosen'][0] == f'optim.lr={own["changes"]["optim.lr"]}'
    assert row['tried'][0] == 'optim.lr: 0.001, 0.002, 0.004'
    assert row['at the edge'][0] == (', '.join(own['at_edge']) or 'no')
  spent = page.rows('spent')
  assert [row['phase'][0] for row in spent] == [*plans.PHASES, 'all']
  assert [float(row['FLOPs'][1]) for row in spent] == [4.56e13] * 4 + [
      4 * 4.56e13]


def test_means_are_of_the_runs(study, page):
  _, found = study
  rows = {(row['variant'][1], row['size'][0]): row
          for row in page.rows('means')}
  assert len(rows) == 3 * 5 + 2  # none and wild stopped at the small size
  assert rows['wild', 'small']['phase'][0] == 'screen'
  values = [run['values']['mqar'] for run in found['outcomes'] if (
      run['phase'], run['variant'], run['size'], run['workload']) == (
          'confirm', 'alibi', 'large', 'mqar')]
  assert len(values) == 5
  mean = math.fsum(values) / 5
  assert float(rows['alibi', 'large']['mqar'][1]) == pytest.approx(mean)
  spread = (sum((x - mean) ** 2 for x in values) / 4) ** 0.5
  assert _numbers(rows['alibi', 'large']['mqar'][0])[1] == pytest.approx(
      spread, abs=6e-5)


def test_the_sheets_hold_every_estimate_and_run_in_full(study):
  record, found = study
  rows = list(csv.DictReader(sheets.estimates(record).splitlines()))
  key = lambda row: (row['phase'], row['variant'], row['measure'], row['size'])
  by_key = {key(row): row for row in rows}
  assert len(by_key) == len(rows)
  for own in found['confirm']:
    row = by_key['confirm', own['variant'], own['measure'], findings.ALL]
    assert [float(row[name]) for name in ('effect', 'low', 'high', 'p')] == [
        own[name] for name in ('effect', 'low', 'high', 'p')]
    assert float(row['p_corrected']) == own['p_holm']
    for size in own['sizes']:
      row = by_key['confirm', own['variant'], own['measure'], size['size']]
      assert float(row['effect']) == size['mean']
  for own in found['screen']:
    row = by_key['screen', own['variant'], 'loss', 'small']
    for name, wanted in (('effect', own['effect']), ('p', own['p']),
                         ('p_corrected', own['q'])):
      assert row[name] == ('' if wanted is None else repr(wanted))
  runs = list(csv.DictReader(sheets.runs(record).splitlines()))
  assert [float(row['value']) for row in runs] == [
      value for own in found['outcomes'] for value in own['values'].values()]


def test_names_are_text_in_every_format(study, page):
  record, _ = study
  document = writing.assemble(record, [])
  assert 'b' not in page.tags and 'script' not in page.tags
  assert ODD in [row['variant'][0] for row in page.rows('verdicts')]
  markdown = render.markdown_page(document)
  shown = re.sub(r'\\(.)', r'\1', markdown)
  assert f'| {ODD} | better |' in shown
  rows = [line for line in markdown.splitlines() if line.startswith('| a\\_b')]
  cells = {len(re.findall(r'(?<!\\)\|', re.sub(r'\\\\', '', row)))
           for row in rows[:1]}
  assert cells == {12}  # a bar within the name ends no cell
  _check_latex(render.latex_tables(document))


def _check_latex(text):
  """Braces and environments close, rows have their columns, and no character
  of a name is a command."""
  plain = re.sub(r'\\[\\{}$&#%_]', '', text)
  depth = 0
  for c in plain:
    depth += (c == '{') - (c == '}')
    assert depth >= 0
  assert not depth
  stack = []
  for kind, name in re.findall(r'\\(begin|end)\{([\w*]+)\}', text):
    if kind == 'begin':
      stack.append(name)
    else:
      assert stack.pop() == name
  assert not stack
  tables = re.findall(r'\\begin\{tabular\}\{(l+)\}\n\\toprule\n(.*?)'
                      r'\\bottomrule', text, re.DOTALL)
  assert len(tables) > 8
  for columns, body in tables:
    rows = [row for row in body.replace('\\midrule\n', '').split(' \\\\\n')
            if row]
    for row in rows:
      assert len(re.findall(r'(?<!\\)&', row)) == len(columns) - 1, row
      assert not re.search(r'(?<!\\)[#%_]', row), row
    assert len(rows) <= render.HIGH + 1
  labels = re.findall(r'\\label\{(.*?)\}', text)
  assert len(set(labels)) == len(labels)
  assert set(re.findall(r'\\([a-zA-Z]+)', text)) <= {
      'usepackage', 'input', 'begin', 'end', 'centering', 'footnotesize',
      'caption', 'label', 'toprule', 'midrule', 'bottomrule', 'textless',
      'textgreater', 'textbar', 'textbackslash', 'textasciitilde',
      'textasciicircum', 'pm', 'times', 'dots'}


@pytest.mark.skipif(shutil.which('pdflatex') is None, reason='no pdflatex')
@pytest.mark.slow
def test_the_tables_compile(study, tmp_path):
  tables = render.latex_tables(writing.assemble(study[0], []))
  (tmp_path / 'tables.tex').write_text(tables)
  (tmp_path / 'a.tex').write_text(
      '\\documentclass[twocolumn]{article}\\usepackage{booktabs}'
      '\\begin{document}\\input{tables}\\end{document}')
  subprocess.run(['pdflatex', '-interaction=nonstopmode', '-halt-on-error',
                  'a.tex'], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize('upto, told, tables', [
    ('', 'no phase is over', {'hashes'}),
    ('noise', 'noise is over; tune, screen and confirm are not',
     {'noise-table'}),
    ('tune', 'noise and tune are over', {'noise-table', 'tuned'}),
    ('screen', 'the confirmation of rope, alibi and post_norm is not over',
     {'screened', 'tuned'})])
def test_a_study_that_is_not_over_says_how_far_it_is(
    tmp_path, upto, told, tables):
  record, _ = _load(tmp_path, found=study_folder.results(
      study_folder.plan(), upto))
  document = writing.assemble(record, [])
  assert 'no answer yet' in document.answer and told in document.answer
  assert any('not over' in line for line in document.warnings)
  shown = _page(record)
  assert tables <= shown.tables.keys()
  assert 'by-size' not in shown.tables
  # Every variant has its row all the same.
  assert len(shown.rows('verdicts')) == 1 + len(VARIANTS)


def test_a_plan_without_results_has_a_page(tmp_path):
  study_folder.write(tmp_path)
  (tmp_path / 'results.json').unlink()
  record = records.load(tmp_path)
  assert 'the plan is frozen' in writing.assemble(record, []).answer
  assert not list(figures.draw(record))


def test_nothing_that_passed_the_screen_is_an_answer(tmp_path):
  plan = study_folder.plan()
  found = study_folder.results(plan, effects=dict.fromkeys(
      study_folder.EFFECTS, 0.0))
  assert not found['confirm']
  record, _ = _load(tmp_path, found=found)
  answer = writing.assemble(record, []).answer
  assert 'showed no difference from learned' in answer
  assert 'no answer' not in answer


def test_what_was_not_confirmed_is_nothing_that_failed(tmp_path):
  """More runs are planned than are done where the screen stops a variant."""
  found = study_folder.results(study_folder.plan())
  found['phases']['confirm'] |= dict(planned=90, done=45)
  record, _ = _load(tmp_path, found=found)
  assert not any('90' in line or 'failed' in line
                 for line in writing.assemble(record, []).warnings)


def test_a_variant_of_which_all_runs_diverged_is_a_row(tmp_path, page):
  wild = next(row for row in page.rows('verdicts')
              if row['variant'][1] == 'wild')
  assert wild['verdict'][0] == 'stopped at the screen: unstable'
  assert wild['diverged'][0] == '-'
  assert 'variants that it stopped (none, wild) is in' in page.text
  assert {row['small'][0] for row in page.rows('diverged')} == {'12 of 12'}
  # So is one that diverges in the confirmation alone.
  found = study_folder.results(study_folder.plan())
  for row in found['confirm']:
    if row['variant'] == 'rope':
      row |= dict(effect=None, low=None, high=None, n=0, p=None, p_holm=None,
                  verdict=findings.UNSTABLE, trend=None, speed_ups=[],
                  diverged=15)
      row['sizes'] = [own | dict(mean=None, low=None, high=None, n=0, p=None)
                      for own in row['sizes']]
  record, _ = _load(tmp_path, found=found)
  assert 'rope is unstable' in writing.assemble(record, []).answer
  rope = next(row for row in _page(record).rows('verdicts')
              if row['variant'][1] == 'rope')
  assert rope['loss minus base'] == ('n/a', None)


def test_what_was_changed_after_looking_is_told(tmp_path, study, page):
  assert 'What ran is what was planned' in page.text
  assert {row['equal'][0] for row in page.rows('hashes')} == {'yes'}
  amendment = dict(reason='four seeds <were> too few', time=1.7e9,
                   before='0123456789abcdef', changed=['seeds.confirm'],
                   seen=['noise', 'screen'])
  found = study_folder.results(study_folder.plan())
  found['as_planned'] = dict(same=False, differences=['2 runs of rope are '
                                                      'missing'])
  record, _ = _load(tmp_path, found=found, amendments=[amendment],
                    hash='another')
  shown = _page(record)
  row, = shown.rows('amendments')
  assert [text for text, _ in row.values()] == [
      '2023-11-14 22:13', amendment['reason'], 'seeds.confirm',
      'noise, screen', amendment['before']]
  assert '2 runs of rope are missing' in shown.text
  assert 'What ran is what was planned' not in shown.text
  assert [row['equal'][0] for row in shown.rows('hashes')].count('no') == 1


def test_the_methods_name_what_a_run_reads(study):
  record, _ = study
  text = ' '.join(next(s for s in writing.assemble(record, []).sections
                       if s.name == 'methods').paragraphs)
  for said in (
      'd_model 32', 'd_ff 128', 'num_layers 4', 'num_heads 4', 'name adamw',
      'b1 0.9', 'b2 0.95', 'weight_decay 0.1', 'warmup_steps 30', 'steps 300',
      'batch_size 16', 'vocab_size 256', 'length 128', 'schedule cosine',
      'clip_norm 1.0',
      'optim.lr in {0.001, 0.002, 0.004}', 'rope (model.position=rope)',
      '652,345 parameters', '5 fresh seeds', '4 seeds', '6 pairs',
      'Benjamini-Hochberg', 'Holm', 'McNemar', "Student's paired t-test",
      record.frozen.hash):
    assert said in text, said
  for unread in ('rope.theta', 'moe.top_k', 'relative.buckets'):
    assert unread not in text  # the base has learned positions, no experts


def test_results_are_read_as_they_were_written(study):
  record, found = study
  assert json.loads(json.dumps(plans.to_json(record.outcomes))) == [
      {**row, 'loss': row['loss']} for row in found['outcomes']]
