"""A study's report: its numbers, names, studies that are not over, and files
that are damaged."""

import csv
import dataclasses
import html.parser
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from configs.errors import RequestError
from tests.helpers import chromium, study_folder
from tests.helpers.study_folder import BASE, ODD, VARIANTS
from tools.compare import decide, figures, measures, page, study_report
from training import cli

ALL = (*VARIANTS, ODD)


class _Page(html.parser.HTMLParser):
  """The tables of a page: by id, rows of (text, data-value)."""

  def __init__(self, study):
    super().__init__()
    self.tables, self.tags, self._table, self._cell = {}, set(), None, None
    self.text = ''
    self.feed(page.html(study_report.document(study, [])))

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
  return study_report.load(folder), found


def _answer(folder, found):
  return study_report.answer(_load(folder, found=found)[0])


def _markdown(study):
  return page.markdown(study_report.document(study, [])).replace('\\', '')


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  return _load(tmp_path_factory.mktemp('study'), study_folder.plan(ALL))


@pytest.fixture(scope='module')
def shown(study):
  return _Page(study[0])


def _check(cell, value, low=None, high=None, digits=4):
  """The cell's figure is `value` in full, and its text what it rounds to."""
  text, full = cell
  if value is None:
    assert text == 'n/a' and full is None
    return
  assert float(full) == value
  if not text.startswith('<'):
    wanted = [value] if low is None else [value, low, high]
    numbers = [float(x.replace(',', '')) for x in re.findall(
        r'[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?', text)]
    assert numbers[:len(wanted)] == pytest.approx(
        wanted, abs=0.5001 * 10 ** -digits)


def test_each_variant_has_one_row_with_the_verdicts_numbers(study, shown):
  own, found = study
  rows = {row['variant'][1]: row for row in shown.rows('verdicts')}
  assert [*rows] == [BASE, *ALL]
  confirmed = {(row['variant'], row['measure']): row
               for row in found['confirm']}
  assert len(confirmed) == len(found['confirm']) == 2 * 4
  for variant in ALL:
    row, primary = rows[variant], confirmed.get((variant, 'loss'))
    if primary is None:
      assert row['verdict'][0].startswith('stopped at the screen')
      continue
    assert row['verdict'][0] == primary['verdict']
    _check(row['loss minus base'], primary['effect'], primary['low'],
           primary['high'])
    _check(row['p (Holm)'], primary['p_holm'])
    _check(row['trend over size'], *(
        primary['trend'][key] for key in ('slope', 'low', 'high')))
    for kind, heading in (('flops', 'speed-up in FLOPs'),
                          ('seconds', 'speed-up in time')):
      largest, = (x for x in primary['speed_ups'] if (
          x['by'], x['size']) == (kind, 'large'))
      _check(row[heading], *(largest[key] for key in (
          'factor', 'low', 'high')), digits=2)
    other = confirmed[variant, 'mqar']
    _check(row['mqar minus base'], other['effect'], other['low'],
           other['high'])
    assert row['diverged'][0] == f'{primary["diverged"]} of {primary["runs"]}'
    assert float(row['power'][1]) == 0.84
  assert rows['wild']['verdict'][0] == 'stopped at the screen: unstable'


def test_every_row_of_the_results_is_shown_once(study, shown):
  _, found = study
  for row, own in zip(shown.rows('noise-table'), found['noise'], strict=True):
    assert [row[key][0] for key in ('size', 'measure', 'phase')] == [
        own[key] for key in ('size', 'measure', 'phase')]
    _check(row['standard deviation'], own['sd'], own['sd_low'], own['sd_high'])
    _check(row['smallest effect'], own['smallest_effect'])
    _check(row['seeds needed'], own['seeds_needed'])
  for row, own in zip(shown.rows('screened'), found['screen'], strict=True):
    assert row['variant'][0] == own['variant']
    _check(row['minus base'], own['effect'], own['low'], own['high'])
    _check(row['q'], own['q'])
    assert row['passed'][0].startswith('yes' if own['passed'] else 'no')
  sizes = [own for row in found['confirm'] if row['primary']
           for own in row['sizes']]
  for row, own in zip(shown.rows('by-size'), sizes, strict=True):
    _check(row['loss minus base'], own['mean'], own['low'], own['high'])
    _check(row['p'], own['p'])
  for row, own in zip(shown.rows('tuned'), found['tuned'], strict=True):
    assert row['chosen'][0] == f'optim.lr={own["changes"]["optim.lr"]}'
    assert row['tried'][0] == 'optim.lr: 0.001, 0.002, 0.004'
  assert [float(row['FLOPs'][1]) for row in shown.rows('spent')] == [
      4.56e13] * 4 + [4 * 4.56e13]
  means = {(row['variant'][1], row['size'][0]): row
           for row in shown.rows('means')}
  assert len(means) == 3 * 5 + 2  # none and wild stopped at the small size
  assert means['wild', 'small']['phase'][0] == 'screen'
  values = [run['values']['mqar'] for run in found['outcomes'] if (
      run['phase'], run['variant'], run['size'], run['workload']) == (
          'confirm', 'alibi', 'large', 'mqar')]
  assert float(means['alibi', 'large']['mqar'][1]) == pytest.approx(
      np.mean(values))


def test_the_sheets_hold_every_estimate_and_run_in_full(study):
  own, found = study
  rows = {(row['phase'], row['variant'], row['measure'], row['size']): row
          for row in csv.DictReader(study_report.estimates(own).splitlines())}
  for verdict in found['confirm']:
    key = 'confirm', verdict['variant'], verdict['measure']
    row = rows[(*key, decide.ALL)]
    assert [float(row[name]) for name in ('effect', 'low', 'high', 'p')] == [
        verdict[name] for name in ('effect', 'low', 'high', 'p')]
    assert float(row['p_corrected']) == verdict['p_holm']
    for size in verdict['sizes']:
      assert float(rows[(*key, size['size'])]['effect']) == size['mean']
  runs = csv.DictReader(study_report.sheet_of_runs(own).splitlines())
  assert [float(row['value']) for row in runs] == [
      value for run in found['outcomes'] for value in run['values'].values()]


def test_names_are_text_and_columns_explained_in_every_format(study, shown):
  own, _ = study
  document = study_report.document(own, [])
  assert not {'b', 'x'} & shown.tags
  assert ODD in [row['variant'][0] for row in shown.rows('verdicts')]
  assert ODD in re.sub(r'\\(.)', r'\1', page.markdown(document))
  tex = page.latex(document)
  tables = re.findall(r'\\begin\{tabular\}\{(l+)\}\n\\toprule\n(.*?)'
                      r'\\bottomrule', tex, re.DOTALL)
  assert len(tables) > 12
  for columns, body in tables:
    rows = [row for row in body.replace('\\midrule\n', '').split(' \\\\\n')
            if row]
    for row in rows:
      assert len(re.findall(r'(?<!\\)&', row)) == len(columns) - 1, row
      assert not re.search(r'(?<!\\)[#%_]', row), row
    assert len(rows) <= page.HIGH + 1
  labels = re.findall(r'\\label\{(.*?)\}', tex)
  assert len(set(labels)) == len(labels)
  for text in (shown.text, _markdown(own), tex):
    assert 'of finding an effect of 0.05 nats a token by the screen' in text


@pytest.mark.parametrize('upto, told, tables', [
    ('', 'no phase is over', {'points'}),
    ('tune', 'noise and tune are over; screen and confirm are not',
     {'noise-table', 'tuned'}),
    ('screen', 'the confirmation of rope, alibi and post_norm is not over',
     {'screened', 'tuned'})])
def test_a_study_that_is_not_over_says_how_far_it_is(
    tmp_path, upto, told, tables):
  own, _ = _load(tmp_path, found=study_folder.results(
      study_folder.plan(), upto))
  answer = study_report.answer(own)
  assert 'no answer yet' in answer and told in answer
  assert any('not over' in line for line in study_report.warnings(own))
  shown = _Page(own)
  assert tables <= shown.tables.keys() and 'by-size' not in shown.tables
  # Every variant has its row all the same.
  assert len(shown.rows('verdicts')) == 1 + len(VARIANTS)
  if not upto:
    (tmp_path / 'results.json').unlink()
    own = study_report.load(tmp_path)
    assert 'the plan is frozen' in study_report.answer(own)
    assert not list(figures.of_study(own))


def _none_shown(**row):
  """Results in which no difference is shown of rope."""
  found = study_folder.results(study_folder.plan())
  primary = [own for own in found['confirm'] if own['primary']]
  assert primary[0]['variant'] == 'rope' and len(primary) == 3
  primary[0].update(verdict=decide.NONE_SHOWN, n=5, **row)
  return found


def test_the_answer_names_effects_and_what_is_excluded(tmp_path):
  """An effect is excluded by an interval that holds for all variants."""
  plain = _answer(tmp_path, None)
  assert plain.startswith('By loss (nats a token), rope (-0.2')
  assert 'the screen stopped the variant wild as unstable' in plain
  assert ('rope (+0.0050 [-0.0020, +0.0120]: an effect of 0.05 is excluded)'
          in _answer(tmp_path, _none_shown(effect=0.005, low=-0.002,
                                           high=0.012)))
  # By itself this interval lies within 0.05; not so beside two others.
  found = _none_shown(effect=0.0, low=-0.045, high=0.045)
  assert 'excluded' not in _answer(tmp_path, found)
  found['confirm'] = [row for row in found['confirm']
                      if row['variant'] == 'rope']
  assert 'an effect of 0.05 is excluded' in _answer(tmp_path, found)
  found = study_folder.results(study_folder.plan(), effects=dict.fromkeys(
      study_folder.EFFECTS, 0.0))
  assert 'showed no difference from learned' in _answer(tmp_path, found)


def test_a_variant_of_which_all_runs_diverged_is_a_row(tmp_path, shown):
  assert {row['small'][0] for row in shown.rows('diverged')} == {'8 of 8'}
  found = study_folder.results(study_folder.plan())
  none = dict.fromkeys(('effect', 'low', 'high', 'p', 'p_holm', 'trend'))
  for row in found['confirm']:
    if row['variant'] == 'rope':
      row |= none | dict(n=0, verdict=decide.UNSTABLE, speed_ups=[])
      row['sizes'] = [own | dict(mean=None, low=None, high=None, n=0, p=None)
                      for own in row['sizes']]
  own, _ = _load(tmp_path, found=found)
  assert 'rope is unstable' in study_report.answer(own)
  rope = next(row for row in _Page(own).rows('verdicts')
              if row['variant'][1] == 'rope')
  assert rope['loss minus base'] == ('n/a', None)
  assert 'A speed-up is n/a where' in _markdown(own)


def test_what_was_changed_after_looking_is_told(tmp_path, shown):
  assert 'What ran is what was planned' in shown.text
  amendment = dict(reason='four seeds <were> too few', time=1.7e9,
                   before='0123456789abcdef', changed=['seeds.confirm'],
                   seen=['noise', 'screen'])
  found = study_folder.results(study_folder.plan())
  found['as_planned'] = dict(same=False, differences=['2 runs are missing'])
  changed = _Page(_load(tmp_path, found=found, amendments=[amendment])[0])
  row, = changed.rows('amendments')
  assert [text for text, _ in row.values()] == [
      '2023-11-14 22:13', amendment['reason'], 'seeds.confirm',
      'noise, screen', amendment['before']]
  assert '2 runs are missing' in changed.text
  assert 'What ran is what was planned' not in changed.text


def test_the_methods_name_what_a_run_reads(study):
  text = ' '.join(study_report.methods(study[0]))
  for said in (
      'd_model 32', 'num_layers 4', 'name adamw', 'weight_decay 0.1',
      'steps 300', 'vocab_size 256', 'schedule cosine',
      'optim.lr in {0.001, 0.002, 0.004}', 'rope (model.position=rope)',
      '652,345 parameters', '1,228,800 tokens', '5 fresh seeds', '6 pairs',
      '(loss on text, in nats a token, lower is better)',
      'by successive halving over 2 rungs, each of which keeps 50 % with 1 '
      'seed, at small; edges extended at most once',
      'has the parameter count of the base', 'Benjamini-Hochberg', 'McNemar',
      'an effect of 0.05 nats a token on loss', study[0].frozen.hash):
    assert said in text, said
  for unread in ('rope.theta', 'moe.top_k'):
    assert unread not in text  # the base has learned positions, no experts


def test_the_unit_is_the_objectives():
  plan = study_folder.plan()
  frozen = study_folder.frozen(plan)
  loss, accuracy = plan.measures
  bits = dataclasses.replace(loss, figure='bits_per_byte')
  assert [measures.unit(frozen, m) for m in (loss, accuracy, bits)] == [
      'nats a token', '', 'bits a byte']
  for objective, unit in (('mlm_nsp', 'nats'), ('regression', '')):
    frozen.base_config['objective'] = objective
    assert measures.unit(frozen, loss) == unit


def test_results_that_were_changed_or_are_of_another_plan_are_refused(tmp_path):
  study_folder.write(tmp_path)
  path = tmp_path / 'results.json'
  path.write_text(path.read_text().replace('"better"', '"worse"', 1))
  with pytest.raises(RequestError, match='results.json is damaged'):
    study_report.load(tmp_path)
  study_folder.write(tmp_path, study_folder.plan(VARIANTS[1:]),
                     study_folder.results(study_folder.plan()))
  with pytest.raises(RequestError, match='is of another plan than study.json'):
    study_report.load(tmp_path)


@pytest.mark.parametrize('file, text, said', [
    ('results.json', '{"study": ', 'is damaged, and is no JSON'),
    ('study.json', None, 'no study was run')])
def test_a_wrong_folder_ends_with_code_2(tmp_path, capsys, file, text, said):
  study_folder.write(tmp_path)
  (tmp_path / file).unlink()
  if text is not None:
    (tmp_path / file).write_text(text)
  with pytest.raises(SystemExit) as end:
    cli.run(lambda: study_report.write(tmp_path) and 0)
  assert end.value.code == 2
  assert said in capsys.readouterr().err
  assert not (tmp_path / 'report').exists()


@pytest.mark.slow
def test_figures_and_page_stand_alone(tmp_path_factory):
  """Figures of a journal's width, one colour a variant; a page without ids that
  are there twice, or missing."""
  folder = tmp_path_factory.mktemp('written')
  study_folder.write(folder, study_folder.plan(ALL))
  written = {path.name: path for path in study_report.write(folder)}
  assert written.keys() == {
      'index.html', 'report.md', 'tables.tex', 'results.csv', 'runs.csv'} | {
          f'{name}.{kind}' for name in study_report.FIGURES
          for kind in figures.FORMATS}
  for name, inches in (('effects', 3.25), ('curves', 6.75), ('noise', 6.75),
                       ('measures', 3.25)):
    png = written[f'{name}.png'].read_bytes()
    assert int.from_bytes(png[16:20], 'big') == round(300 * inches)
    svg = written[f'{name}.svg'].read_text()
    assert ET.fromstring(svg).get('width') == f'{72 * inches:g}pt'
    assert written[f'{name}.pdf'].read_bytes().startswith(b'%PDF')
    for variant, colour in zip(ALL, figures.COLOURS, strict=True):
      assert name == 'noise' or (colour in svg) == (
          variant not in ('none', 'wild'))  # which were not confirmed
  text = written['index.html'].read_text()
  ids = re.findall(r'\bid="([^"]*)"', text)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)
  if chromium.PROGRAM is None:
    pytest.skip('no chromium on the path (Debian package chromium)')
  profile = tmp_path_factory.mktemp('profile')
  uri = written['index.html'].as_uri()
  with chromium.Page(uri, profile, size=(500, 900)) as shown:
    assert shown.requests == [uri] and not shown.errors
    assert shown.evaluate('document.documentElement.scrollWidth '
                          '<= window.innerWidth')
    assert ODD in shown.evaluate('document.querySelector("#verdicts")'
                                 '.textContent')
  shutil.rmtree(profile, ignore_errors=True)
