"""The tables of how a study went: tuning, phases, plan, sizes, config."""

from collections.abc import Mapping, Sequence
import datetime
import json
from typing import Any

from tools.compare.pages.tables import Cell, Table
from tools.compare import plan as plans
from tools.compare.study_report import numbers
from tools.compare.study_report import settings
from tools.compare.study_report.record import Record
from tools.compare.study_report.tables import name_of
from training.workdir import run_config

def value(x: Any) -> str:
  """Returns a config's value as a flag would have it."""
  return x if isinstance(x, str) and x else json.dumps(x)


def changed(changes: Mapping[str, Any]) -> str:
  return ', '.join(f'{name}={value(x)}' for name, x in changes.items())


def tuning(record: Record) -> Table:
  """What each variant was tuned to, and what that took."""
  rows = []
  for row in record.results['tuned']:
    tried = row['tried']
    bad = sum(bool(one['diverged']) for one in tried)
    rows.append([
        name_of(record, row['variant']), Cell(row['size']),
        Cell(row['workload']), Cell(changed(row['changes'])),
        Cell(_grid(row)), Cell(', '.join(row['at_edge']) or 'no'),
        Cell(f'{bad} of {len(tried)}', bad),
        Cell(str(row['runs']), row['runs']), numbers.flops(row['flops']),
        numbers.duration(row['seconds'])])
  return Table(
      [('variant', ''), ('size', ''), ('workload', ''), ('chosen', ''),
       ('tried', 'all values, those too by which the edge was moved'),
       ('at the edge', 'fields whose best value is the last of those tried, so '
        'that a better one may lie beyond'),
       ('diverged', 'candidates, of all rungs'), ('runs', ''), ('FLOPs', ''),
       ('time', 'of training steps')], rows)


def _grid(row: Mapping[str, Any]) -> str:
  """'optim.lr: 0.001, 0.002', of what was tried."""
  values: dict[str, list] = {}
  for one in row['tried']:
    for name, x in one['changes'].items():
      own = values.setdefault(name, [])
      own += [] if x in own else [x]
  return '; '.join(f'{name}: {", ".join(map(value, _sorted(own)))}'
                   for name, own in values.items())


def _sorted(values: list) -> list:
  numeric = all(isinstance(x, int | float) for x in values)
  return sorted(values) if numeric else values


def spent(record: Record) -> Table:
  """Runs, FLOPs and time of each phase, and of all."""
  phases, rows = record.results['phases'], []
  for phase in plans.PHASES:
    if phase not in phases:
      rows.append([Cell(phase), Cell('not begun'), *[Cell('-')] * 7])
      continue
    own = phases[phase]
    rows.append([Cell(phase), Cell('over' if own['finished'] else 'not over')]
                + _spent(own))
  if phases:
    keys = ('planned', 'done', 'failed', 'tokens', 'flops', 'seconds',
            'wall_seconds')
    rows.append([Cell('all'), Cell('')] + _spent({
        key: _sum([own[key] for own in phases.values()]) for key in keys}))
  return Table(
      [('phase', ''), ('state', ''),
       ('runs planned at most', 'if every variant is confirmed; each edge of '
        'what is tuned that is moved adds to them'), ('done', ''),
       ('diverged', 'of those done'),
       ('tokens', ''), ('FLOPs', ''), ('training time', 'of training steps, of '
        'all runs together'), ('time by the clock', '')], rows)


def _spent(own: Mapping[str, Any]) -> list[Cell]:
  return [numbers.count(own['planned']), numbers.count(own['done']),
          numbers.count(own['failed']), numbers.count(own['tokens']),
          numbers.flops(own['flops']), numbers.duration(own['seconds']),
          numbers.duration(own['wall_seconds'])]


def _sum(values: Sequence[float | None]) -> float | None:
  return sum(values) if all(map(numbers.known, values)) else None


def hashes(record: Record) -> Table:
  """The hashes that must be equal where what ran is what was planned."""
  computed = record.frozen.hash
  rows = [[Cell(told), Cell(code),
           Cell('yes' if code == computed else 'no',
                mark='' if code == computed else 'worse')]
          for told, code in (
              ('of what stands in study.json', computed),
              ('that study.json says', record.said),
              ('that results.json is of', record.results['study']['hash']))]
  return Table([('hash of the plan', ''), ('hash', ''), ('equal', '')], rows)


def amendments(record: Record) -> Table:
  """What was changed after the plan was frozen, and why."""
  rows = [[Cell(time(row['time']), row['time']), Cell(row['reason']),
           Cell(', '.join(row['changed'])),
           Cell(', '.join(row['seen']) or 'nothing'), Cell(row['before'])]
          for row in record.frozen.amendments]
  return Table([('when', 'UTC'), ('why', ''), ('what was changed', ''),
                ('after looking at', 'phases that had been seen'),
                ('hash before', '')], rows)


def time(seconds: float) -> str:
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime(
      '%Y-%m-%d %H:%M')


def points(record: Record) -> Table:
  """What each variant changes at each size, and what it costs."""
  grouped: dict[tuple, list[str]] = {}
  for row in record.frozen.points:
    told = (row['variant'], row['size'], row['params'], row['flops_per_token'],
            row['tokens'], changed(settings.alone(record, row)),
            ', '.join(row['matched']))
    grouped.setdefault(told, []).append(row['workload'])
  rows = [[name_of(record, variant), Cell(size, size),
           Cell(', '.join(workloads)), numbers.count(params),
           numbers.flops(flops), numbers.count(tokens),
           Cell('-' if variant == record.plan.base else what or 'nothing'),
           Cell(solved or '-')]
          for (variant, size, params, flops, tokens, what, solved), workloads
          in grouped.items()]
  return Table(
      [('variant', ''), ('size', ''), ('workloads', ''), ('parameters', ''),
       ('FLOPs a token', ''), ('tokens', 'of a run'),
       ('changes', 'from the base of its size and workload, before tuning; the '
        'paragraphs above say what these change'),
       ('solved', 'fields that were solved for, to match the base')], rows)


def config(record: Record) -> Table:
  """Every field of the config that all runs change."""
  rows = [[Cell(name), Cell(value(x))]
          for name, x in run_config.flatten_dict(
              record.frozen.base_config).items()
          if not name.startswith(settings.ASIDE)]
  return Table([('field', ''), ('value', '0 or "": what the model or the data '
                                'make it')], rows)


def provenance(record: Record) -> Table:
  """Code, machines, versions and data."""
  frozen, found = record.frozen, record.results['provenance']
  rows = [('plan frozen at commit', frozen.code.get('commit') or 'not known'),
          ('changes beside that commit', frozen.code.get('diff') or 'none')]
  rows += [('code that ran', code) for code in found['codes']]
  rows += [('device', device) for device in found['devices']]
  rows += [('version', f'{name} {version}')
           for name, version in found['versions'].items()]
  rows += [('hash', f'{name}: {code}')
           for name, code in frozen.sources.items()]
  return Table([('what', ''), ('which', '')],
               [[Cell(name), Cell(told)] for name, told in rows])
