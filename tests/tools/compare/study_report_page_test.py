"""A study's report, in files and in a browser; and files that are damaged."""

import re
import shutil
import xml.etree.ElementTree as ET

import pytest

from configs.errors import RequestError
from tests.helpers import chromium
from tests.helpers import study_folder
from tests.helpers.study_folder import ODD, VARIANTS
from tools.compare.pages import colours
from tools.compare import decide
from tools.compare import study_report as report
from tools.compare import plan as plans
from tools.compare.study_report import record as records
from tools.compare.study_report import tables
from tools.compare.study_report import writing
from training import cli

ALL = (*VARIANTS, ODD)


@pytest.mark.parametrize('damage, said', [
    (lambda found: found.pop('noise'), "has no 'noise'"),
    (lambda found: found['confirm'][0].update(effect='much'),
     'confirm\\[0\\].effect'),
    (lambda found: found['confirm'][0].pop('p_holm'), "no 'p_holm'"),
    (lambda found: found['screen'][0].update(variant='x'), "variant 'x'"),
    (lambda found: found['confirm'][0].update(verdict='great'), "'great'"),
    (lambda found: found['confirm'][0]['sizes'][0].update(size='huge'),
     "size 'huge'"),
    (lambda found: found['phases'].update(guess=found['phases']['tune']),
     "phase 'guess'"),
    (lambda found: found['tuned'][0]['tried'][0].pop('rung'), "no 'rung'"),
    (lambda found: found['outcomes'][0].update(curve=[1]), 'curve'),
    (lambda found: found.update(study=None), 'study')])
def test_damaged_results_are_refused_in_a_sentence(tmp_path, damage, said):
  found = study_folder.results(study_folder.plan())
  damage(found)
  with pytest.raises(RequestError, match=said) as error:
    study_folder.write(tmp_path, found=found)
    records.load(tmp_path)
  assert 'results.json' in str(error.value) or 'phase' in str(error.value)


def test_results_of_an_earlier_plan_are_not_called_damaged(tmp_path):
  plan = study_folder.plan()
  found = study_folder.results(plan)
  study_folder.write(tmp_path, study_folder.plan(VARIANTS[1:]), found)
  with pytest.raises(RequestError, match="of another plan than study.json, "
                     ".*has the variant 'rope'"):
    records.load(tmp_path)


@pytest.mark.parametrize('file, text, said', [
    ('results.json', '{"study": ', 'is damaged, and is no JSON'),
    ('results.json', '[]', 'must be an object'),
    ('study.json', '{}', "has no 'plan'"),
    ('study.json', None, 'no study was planned')])
def test_a_wrong_folder_ends_with_code_2(tmp_path, capsys, file, text, said):
  study_folder.write(tmp_path)
  (tmp_path / file).unlink()
  if text is not None:
    (tmp_path / file).write_text(text)
  with pytest.raises(SystemExit) as end:
    cli.run(lambda: report.write(tmp_path) and 0)
  assert end.value.code == 2
  assert said in capsys.readouterr().err
  assert not (tmp_path / 'report').exists()


def test_a_plan_that_is_older_than_a_field_is_reported(tmp_path):
  plan = study_folder.plan()
  tree = study_folder.frozen(plan).base_config
  del tree['model']['pattern'], tree['eval']['part']
  study_folder.write(tmp_path, plan, base_config=tree)
  document = writing.assemble(records.load(tmp_path), [])
  assert any('num_layers 4' in line for section in document.sections
             for line in section.paragraphs)


@pytest.mark.slow
def test_what_is_decided_is_what_is_read(tmp_path):
  """Of outcomes, by the study's own statistics instead of made-up rows."""
  plan = study_folder.plan()
  outcomes = study_folder.outcomes(plan)
  noise = decide.noise(plan, outcomes)
  confirmed = decide.confirm(plan, outcomes)
  found = study_folder.results(plan) | plans.to_json(dict(
      noise=noise, announced=decide.announce(plan, noise),
      screen=decide.screen(plan, outcomes), confirm=confirmed))
  study_folder.write(tmp_path, plan, found)
  record = records.load(tmp_path)
  shown = tables.verdicts(record)
  for row in confirmed:
    if row.primary:
      cells, = (own for own in shown.rows if own[0].value == row.variant)
      assert [cell.value for cell in cells[1:4]] == [
          row.verdict, row.effect, row.p_holm]
      speed, = (x.factor for x in row.speed_ups
                if (x.size, x.by) == ('large', 'flops'))
      assert cells[5].value == speed
  assert writing.assemble(record, []).answer.startswith(
      'By loss (nats a token), rope (-0.2')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp('written')
  study_folder.write(folder, study_folder.plan(ALL))
  return report.write(folder)


@pytest.mark.slow
def test_the_figures_are_of_a_journals_width_and_one_colour_a_variant(written):
  names = {path.name for path in written}
  assert names == {'index.html', 'report.md', 'tables.tex', 'results.csv',
                   'runs.csv'} | {
      f'{name}.{kind}' for name in ('effects', 'curves', 'noise', 'measures')
      for kind in ('svg', 'png')}
  by_name = {path.name: path for path in written}
  for name, inches in (('effects', 3.25), ('curves', 6.75), ('noise', 6.75),
                       ('measures', 6.75)):
    png = by_name[f'{name}.png'].read_bytes()
    assert int.from_bytes(png[16:20], 'big') == round(300 * inches)
    root = ET.fromstring(by_name[f'{name}.svg'].read_text())
    assert root.get('width') == f'{72 * inches:g}pt'
  for variant, colour in zip(ALL, colours.COLOURS, strict=True):
    for name in ('effects', 'curves', 'measures'):
      assert (colour in by_name[f'{name}.svg'].read_text()) == (
          variant not in ('none', 'wild'))  # which were not confirmed


@pytest.mark.slow
def test_the_page_stands_alone(written, tmp_path_factory):
  text = written[0].read_text()
  ids = re.findall(r'\bid="([^"]*)"', text)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)
  assert len(re.findall(r'<svg[^>]*role="img" aria-labelledby', text)) == 4
  if chromium.PROGRAM is None:
    pytest.skip('no chromium on the path (Debian package chromium)')
  profile = tmp_path_factory.mktemp('profile')
  with chromium.Page(written[0].as_uri(), profile, size=(500, 900)) as page:
    assert page.requests == [written[0].as_uri()] and not page.errors
    assert page.evaluate('document.documentElement.scrollWidth '
                         '<= window.innerWidth')
    assert ODD in page.evaluate('document.querySelector("#verdicts")'
                                '.textContent')
    ids = page.evaluate('[...document.querySelectorAll("svg use")].filter(u => '
                        '!document.querySelector(u.getAttribute("xlink:href")'
                        ')).length')
    assert ids == 0
  shutil.rmtree(profile, ignore_errors=True)
