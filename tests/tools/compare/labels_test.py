"""What tells variants apart in figures: their names and their lines."""

from tools.compare.pages import colours
from tools.compare.pages import labels
from tools.compare.sweep_report import plots
from tools.compare.sweep_report import tables
from tools.compare.statistics import Interval

LONG = 'attention-in-every-fourth-layer-'


def test_a_long_name_loses_its_middle_and_no_two_look_alike():
  found = labels.shortened(['rope', LONG + 'a', LONG + 'b'])
  assert found == {'rope': 'rope', LONG + 'a': 'attention-i…th-layer-a',
                   LONG + 'b': 'attention-i…th-layer-b'}
  assert all(len(label) <= 22 for label in found.values())
  alike = [f'{LONG}{x}{LONG}' for x in 'ab']
  assert labels.shortened(alike) == dict(zip(alike, alike))


def test_the_lines_of_24_variants_differ_and_have_few_colours():
  looks = colours.looks('base', [str(i) for i in range(24)])
  assert len({repr(look) for look in looks.values()}) == 25
  assert len({look['color'] for look in looks.values()}) == 7


def test_the_label_of_a_long_name_is_not_cut_by_the_forest():
  point = tables.Point(9 * LONG, {}, (), 1, 1, 1.0, 1, {})
  svg = plots.forest([tables.Outcome(
      point, Interval(0.1, None, None, 1, 0.1, 0.1), None, None)],
      {point.name: 'c0 d0'})
  place, label = svg.rpartition('text-anchor="end">')[::2]
  label = label.partition('</text>')[0]
  assert len(label) == plots.NAME
  # A bold letter of the page is less than 8 wide.
  assert float(place.rpartition('<text x="')[2].partition('"')[0]) >= 6.5 * 40
