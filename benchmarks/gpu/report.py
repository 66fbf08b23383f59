"""The results as verdicts, as tables, and as one HTML page."""

import collections
from collections.abc import Callable, Mapping, Sequence
from html import escape
import json
from typing import Any

from benchmarks.gpu import cases
from tools.compare import pages as report
from tools.compare.pages.tables import Cell, Table

Row = dict[str, Any]
# Nothing is fetched, and the browser is told so.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SIDES = {'ours': 'Archetype', 'theirs': 'PyTorch'}


def steps(results: Mapping[str, Any], case: str = '', side: str = ''
          ) -> list[Row]:
  """Returns the rows of training steps, in the order of the sections."""
  return [row | dict(again=name == 'again')
          for name, section in results['sections'].items()
          for row in section['rows'] if row.get('side') and 'case' in row
          and case in ('', row['case']) and side in ('', row['side'])]


def verdicts(results: Mapping[str, Any]) -> list[Row]:
  """Returns each goal with what was found: `reached` is None where there is
  no figure, and `why` says why."""
  found = []
  for name, case in cases.CASES.items():
    own = steps(results, name, 'ours')
    found.append(_share(results, name, case.title, case.goal,
                        [row for row in own if dropless(row)]))
    ratio, why = against_rival(results, name)
    found.append(_verdict(
        f'{case.title}: tokens a second, over those of torch.compile',
        cases.RIVAL_GOAL, ratio, why))
    if name == 'mixtral':
      found.append(_share(
          results, 'mixtral_padded', f'{case.title}, a capacity that drops '
          'tokens', case.goal, [row for row in own if not dropless(row)]))
  return found


def _share(results: Mapping[str, Any], section: str, title: str, goal: float,
           rows: Sequence[Row]) -> Row:
  figures = [row['mfu'] for row in rows if row.get('mfu')]
  timed = any('tokens_per_s' in row for row in rows)
  why = '' if figures else ('no peak of this card is known' if timed else
                            _why(results, section))
  return _verdict(f'{title}: share of the peak FLOP/s', goal,
                  max(figures, default=None), why)


def _verdict(goal: str, wanted: float, found: float | None, why: str) -> Row:
  return dict(goal=goal, wanted=wanted, found=found, why=why,
              reached=None if found is None else found >= wanted)


def dropless(row: Row) -> bool:
  """Whether a step's experts compute every token, as transformers' do."""
  return not cases.EXPERTS.get(row.get('experts', ''), {}).get('drops')


def against_rival(results: Mapping[str, Any], case: str
                  ) -> tuple[float | None, str]:
  """Returns our tokens a second over theirs at the same batch; or why not."""
  rival = next((row for row in steps(results, case, 'theirs')
                if 'tokens_per_s' in row), None)
  if rival is None:
    return None, _why(results, f'{case}_torch')
  if not rival['compiled']:
    return None, 'torch.compile failed, and the step ran without it'
  same = [row for row in steps(results, case, 'ours') if dropless(row)
          and 'tokens_per_s' in row and row['batch'] == rival['batch']]
  if not same:
    return None, (f'no step of ours has the batch of theirs, {rival["batch"]}')
  return same[0]['tokens_per_s'] / rival['tokens_per_s'], ''


def _why(results: Mapping[str, Any], name: str) -> str:
  section = results['sections'].get(name)
  if section is None:
    return 'it was not asked for'
  errors = [row['error'] for row in section['rows'] if 'error' in row]
  why = section['why'] or (errors or [''])[-1]
  return f'{section["status"]}: {why}' if why else section['status']


def figure(value: float | None, form: str, factor: float = 1,
           mark: str = '') -> Cell:
  """Returns a figure's cell; None: there is none."""
  if value is None:
    return Cell('n/a', None, 'unknown')
  return Cell(form.format(value * factor), value, mark)


def verdict_table(results: Mapping[str, Any]) -> Table:
  rows = []
  for row in verdicts(results):
    share = row['wanted'] < 1
    form, by = ('{:.1f} %', 100) if share else ('{:.2f}', 1)
    said = {True: 'reached', False: 'missed', None: row['why']}[row['reached']]
    mark = {True: 'better', False: 'worse', None: 'unknown'}[row['reached']]
    rows.append([Cell(row['goal']), figure(row['wanted'], form, by),
                 figure(row['found'], form, by, mark), Cell(said, mark=mark)])
  return Table([('what', ''), ('goal, at least', ''), ('found', ''),
                ('verdict', '')], rows)


def step_table(results: Mapping[str, Any]) -> Table:
  """Training steps of both sides."""
  titles = {name: case.title for name, case in cases.CASES.items()}
  rows, notes = [], []
  for row in steps(results):
    names = [Cell(titles.get(row['case'], row['case'])),
             Cell(SIDES[row['side']] + (
                 ', not compiled' if row.get('compiled') is False else '')
                  + ', again' * row['again'])]
    notes += [f'{names[0].text}, {names[1].text}: {note}'
              for note in row.get('notes', [])]
    if 'tokens_per_s' not in row:
      rows.append([*names, Cell(row.get('error', ''), mark='worse'),
                   *[Cell('')] * 9])
      continue
    how = [f'{key} {row[key]}' for key in (
        'attention', 'experts', 'precision', 'remat') if row.get(key)]
    rows.append([
        *names, Cell('; '.join(how)), figure(row['layers'], '{:,}'),
        figure(row['parameters'], '{:.2f}', 1e-9),
        Cell(f'{row["batch"]} x {row["length"]:,}'),
        figure(row['step_s'], '{:.1f}', 1e3),
        figure(row['tokens_per_s'], '{:,.0f}'),
        figure(row['flops_per_s'], '{:.1f}', 1e-12),
        figure(row['mfu'], '{:.1f} %', 100),
        figure(row['peak_bytes'], '{:.1f}', 2 ** -30),
        figure(row['compile_s'], '{:.0f}')])
  return Table([(head, '') for head in (
      'model', 'side', 'how', 'layers', 'parameters, 10⁹', 'batch', 'step, ms',
      'tokens/s', 'TFLOP/s', 'of the peak', 'peak memory, GiB',
      'to the first step, s')], rows, notes)


def kernel_table(results: Mapping[str, Any]) -> Table:
  """Attention and experts alone."""
  chosen, rows = results['chosen'], []
  peak = results['machine'].get('peak')
  for row in _rows(results, 'kernels'):
    names = [Cell(row.get('part', '')), Cell(row.get('case', '')),
             Cell(row.get('way', ''))]
    if 'step_s' not in row:
      rows.append([*names, Cell(''), Cell(''), Cell(''),
                   Cell(row['error'], mark=_mark(row['error']))])
      continue
    is_chosen = chosen.get(row['part'], {}).get(row['case']) == row['way']
    rows.append([
        *names, figure(row['step_s'], '{:.2f}', 1e3),
        figure(row['flops_per_s'], '{:.1f}', 1e-12),
        figure(row['flops_per_s'] / peak if peak else None, '{:.1f} %', 100),
        Cell('chosen' if is_chosen else 'drops tokens' if row.get('drops')
             else '', mark='better' if is_chosen else '')])
  return Table([(head, '') for head in (
      'part', 'at the shapes of', 'way', 'forward and back, ms', 'TFLOP/s',
      'of the peak', '')], rows)


def _mark(error: str) -> str:
  """What is not for this platform is no failure."""
  refused = ' is refused' in error or error.startswith(
      ('RequestError', 'LookupError'))
  return 'noise' if refused else 'worse'


def writing_table(results: Mapping[str, Any]) -> Table:
  """Generation of both sides, at the limit that memory sets."""
  rows = []
  every = [row for name in ('write', 'write_torch')
           for row in _rows(results, name)]
  limits = {row['batch']: row['limit_per_s'] for row in every
            if row.get('limit_per_s')}
  for row in every:
    names = [Cell(SIDES[row['side']]), Cell(
        f'{row["cache"]} cache' if 'cache' in row else '')]
    if 'tokens_per_s' not in row:
      rows.append([*names, Cell(row['error'], mark='worse'), *[Cell('')] * 4])
      continue
    limit = limits.get(row['batch'])
    rows.append([
        *names, figure(row['batch'], '{}'),
        Cell(f'{row["prompt"]} + {row["new"]}'),
        figure(row['tokens_per_s'], '{:,.0f}'), figure(limit, '{:,.0f}'),
        figure(row['tokens_per_s'] / limit if limit else None, '{:.1f} %',
               100)])
  return Table([(head, '') for head in (
      'side', 'how', 'batch', 'prompt + new', 'new tokens/s',
      'limit of the memory', 'of the limit')], rows, [
          'A call is timed whole, with its prompt. The limit is what the '
          "card's memory could read: for each new token all weights but the "
          'table of the embedding, and the keys and values that are there.'])


def test_table(results: Mapping[str, Any]) -> Table:
  """The tests' outcomes: how many passed, and each that failed."""
  rows, cells = _rows(results, 'tests'), []
  together = collections.Counter(
      (row['outcome'], row['why']) for row in rows
      if row.get('outcome') in ('passed', 'skipped'))
  for (outcome, why), count in together.items():
    cells.append([Cell(f'{count} tests'), Cell(outcome, mark=dict(
        passed='better', skipped='noise')[outcome]), Cell(why)])
  for row in rows:
    if row.get('outcome') not in ('passed', 'skipped'):
      cells.append([Cell(row.get('test', '')),
                    Cell(row.get('outcome', 'failed'), mark='worse'),
                    Cell(row.get('why') or row.get('error', ''))])
  return Table([('test', ''), ('outcome', ''), ('why', '')], cells)


def section_table(results: Mapping[str, Any]) -> Table:
  """What ran, for how long, and what did not and why."""
  marks = {'done': 'better', 'failed': 'worse', 'running': 'worse'}
  return Table([('section', ''), ('', ''), ('seconds', ''), ('guess', ''),
                ('why', '')], [[
                    Cell(section['title']),
                    Cell('done by an earlier call' if section.get('earlier')
                         else section['status'],
                         mark=marks.get(section['status'], 'noise')),
                    figure(section['seconds'], '{:.0f}'),
                    figure(section['guess_s'], '{:.0f}'),
                    Cell(section['why'])]
                    for section in results['sections'].values()])


def machine_table(results: Mapping[str, Any]) -> Table:
  """What is installed, as the first section found it."""
  machine = dict(results['machine'])
  torch = machine.pop('torch', {})
  named = machine | {f'PyTorch: {key}': value for key, value in torch.items()}
  return Table([('', ''), ('', '')], [
      [Cell(name.replace('_', ' ')), Cell(_plain(value))]
      for name, value in named.items()])


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else (
      f'{value:,}' if isinstance(value, int | float)
      and not isinstance(value, bool) else json.dumps(value))


def _rows(results: Mapping[str, Any], section: str) -> list[Row]:
  return results['sections'].get(section, {}).get('rows', [])


TABLES: dict[str, Callable[[Mapping[str, Any]], Table]] = {
    'Goals': verdict_table, 'Training steps': step_table,
    'Generation': writing_table, 'Attention and experts alone': kernel_table,
    'Tests on the card': test_table, 'What ran': section_table,
    'What is installed': machine_table}


def text(results: Mapping[str, Any]) -> str:
  """Returns the tables that have a row, for a terminal."""
  parts = warnings(results)
  for title, make in TABLES.items():
    table = make(results)
    if table.rows:
      parts.append('\n'.join([title, table.text(), *table.notes]))
  return '\n\n'.join(parts)


def page(results: Mapping[str, Any]) -> str:
  """Returns the page, one file that fetches nothing."""
  card = results['machine'].get('card', 'an unknown card')
  warned = ''.join(f'<p class="warn">{escape(line)}</p>\n'
                   for line in warnings(results))
  body = ''.join(
      f'<section><h2>{escape(title)}</h2>\n{_html(make(results))}</section>\n'
      for title, make in TABLES.items() if make(results).rows)
  return f'''<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>Archetype on {escape(card)}</title>
<style>
{report.CSS.read_text()}</style>
<h1>Archetype on {escape(card)}</h1>
<p class="about">Begun {escape(results['started'])}, with a budget of
{results['minutes']:g} minutes. FLOPs are model FLOPs, which leave out what is
computed again, masked or padded.</p>
{warned}{body}</html>
'''


def warnings(results: Mapping[str, Any]) -> list[str]:
  """Returns what a reader should know before the figures."""
  lines = []
  if results['toy']:
    lines.append('These are toy sizes: they say that the benchmark runs, and '
                 'nothing of speed.')
  failed = sum(row.get('outcome') in ('failed', 'error')
               for row in _rows(results, 'tests'))
  if failed:
    lines.append(f'{failed} of the tests failed on this card: what they test '
                 'may be wrong there, and its speed means nothing.')
  for section in results['sections'].values():
    if section['status'] in ('failed', 'running'):
      lines.append(': '.join(filter(None, (
          section['title'], section['status'], section['why']))))
  return lines


def _html(table: Table) -> str:
  head = ''.join(f'<th scope="col">{escape(name)}</th>'
                 for name, _ in table.columns)
  head = f'<thead><tr>{head}</tr></thead>\n' if any(
      name for name, _ in table.columns) else ''
  rows = '\n'.join(f'<tr>{_cells(row)}</tr>' for row in table.rows)
  notes = ''.join(f'<li>{escape(note)}</li>' for note in table.notes)
  return (f'<div class="scroll"><table>{head}<tbody>\n{rows}\n</tbody></table>'
          '</div>\n' + (f'<ul class="notes">{notes}</ul>\n' if notes else ''))


def _cells(row: Sequence[Cell]) -> str:
  classes = (' '.join(filter(None, (
      cell.mark, 'long' if len(cell.text) > 34 else ''))) for cell in row)
  return ''.join(f'<td class="{name}">{escape(cell.text)}</td>'
                 for name, cell in zip(classes, row))
