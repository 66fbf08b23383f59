"""publish: bundles studies, each in one file, and writes the page of verdicts.

A bundle is BUNDLES/NAME-HASH.tar.gz: the plan and the ledger of the study, its
results with the curves, code, devices and versions, and the metrics and
evaluations of each run, without checkpoints. Unpacked it is a workdir of which
`report` tells. The page is made of the bundles alone, a row for each variant,
whatever its verdict is; so it cannot say what no bundle holds, and is the same
however often it is written.
"""

import argparse
from collections.abc import Mapping
import gzip
import io
import pathlib
import tarfile
import tempfile
from typing import Any

from common.errors import RequestError, require
from tools.compare import comparison, decide, page
from tools.compare import plan as plans
from tools.compare.comparison import Comparison
from training.workdir import storage

BUNDLES = 'docs/assets/studies'
PAGE = 'docs/verdicts.md'
# The files of a workdir that a bundle holds: none names a machine or a folder.
FILES = ('study.json', 'study.sqlite', 'results.json', '*/sweep.json',
         '*/points/*/*/metrics.jsonl', '*/points/*/*/eval.json')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('workdirs', nargs='*', metavar='WORKDIR',
                      help='of studies that are over; none: the page is '
                      'written again')
  parser.add_argument('--bundles', default=BUNDLES, help='their folder '
                      '(%(default)s)')
  parser.add_argument('--page', default=PAGE, help='(%(default)s)')


def main(args) -> int:
  folder, target = pathlib.Path(args.bundles), pathlib.Path(args.page)
  studies = {}
  for workdir in args.workdirs:
    studies[workdir] = comparison.load_comparison(workdir)
  for workdir, c in studies.items():
    require(c.is_study and 'confirm' in c.results, f'{workdir} is no study '
            'whose confirmation is over: there is no verdict to publish')

  # The bundles, and then the page, of all that there are.
  for workdir, c in studies.items():
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{c.plan.name}-{c.frozen.hash}.tar.gz'
    storage.write_file(path, bundle(workdir))
    print(path)
  published = [_opened(path) for path in folder.glob('*.tar.gz')]
  published.sort(key=lambda c: (c.frozen.time, c.plan.name), reverse=True)
  storage.write_file(target, page.render(
      'verdicts.md', date=plans.format_date, rows=rows, studies=published))
  print(target)
  return 0


def bundle(workdir) -> bytes:
  """Returns the files of a study as a tar.gz, the same bytes for the same
  files."""
  workdir, file = pathlib.Path(workdir), io.BytesIO()
  paths: list[pathlib.Path] = []
  for pattern in FILES:
    paths += workdir.glob(pattern)
  with (gzip.GzipFile(fileobj=file, mode='wb', mtime=0) as packed,
        tarfile.open(fileobj=packed, mode='w') as tar):
    for path in sorted(paths):
      member = tarfile.TarInfo(path.relative_to(workdir).as_posix())
      content = path.read_bytes()
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return file.getvalue()


def _opened(path: pathlib.Path) -> Comparison:
  """Returns what a bundle holds; RequestError where it is none."""
  with tempfile.TemporaryDirectory() as folder:
    try:
      with tarfile.open(path) as tar:
        tar.extractall(folder, filter='data')
    except (tarfile.TarError, OSError, EOFError) as error:
      raise RequestError(f'{path} is no bundle ({error}): remove it, and '
                         'publish its study again') from error
    return comparison.load_comparison(folder)


def rows(c: Comparison) -> list[dict[str, str]]:
  """Returns the cells of each variant's row, by the words of the template."""
  return [_row(c, verdict) for verdict in c.verdicts()[1:]]


def _row(c: Comparison, verdict: Mapping[str, Any]) -> dict[str, str]:
  """Returns the cells of a variant's row. One that was stopped has its figures
  from the screening, which is at the smallest size."""
  plan, variant = c.plan, verdict['variant']
  shown, sizes = verdict, plan.sizes
  if verdict['n'] is None:
    shown = _estimate(c, 'screen', variant, plan.primary)
    sizes = plan.sizes[:1]

  # The change and its size.
  point = c.frozen.point(variant, plan.sizes[0], plans.TEXT)
  changes = comparison.format_changes(
      comparison.changes_from_base(c.frozen, point))
  params, tokens = [], []
  for size in sizes:
    base = c.frozen.point(plan.base, size, plans.TEXT)
    params.append(f'{base["params"]:,}')
    tokens.append(f'{base["tokens"]:,}')

  # The compute that it is worth, and what it does to other measures.
  confirmed = c.effect('confirm', variant, plan.primary.name)
  multiplier = comparison.first_row_with(
      confirmed.get('multipliers', ()), size=decide.ALL_SIZES, by='multiplier')
  worth = page.estimate(
      mean=multiplier.get('factor'), low=multiplier.get('low'),
      high=multiplier.get('high'), form='.2f')
  others = []
  for measure in plan.measures[1:]:
    other = _estimate(c, 'confirm', variant, measure)
    if other.get('n'):
      others.append(f'{measure.name} {_effect(other)}')
  return {
      'part': f'{variant} ({changes})',
      'verdict': verdict['verdict'],
      'parameters': ', '.join(params),
      'tokens': ', '.join(tokens),
      'seeds': str(shown.get('n')),
      'effect': _effect(shown),
      'p': page.p_value(shown.get('p_corrected')).text,
      'multiplier': worth.text,
      'others': '; '.join(others) or 'n/a'}


def _effect(row: Mapping[str, Any]) -> str:
  """Returns the effect of an estimate with its interval."""
  cell = page.estimate(mean=row.get('effect'), low=row.get('low'),
                       high=row.get('high'))
  return cell.text


def _estimate(c: Comparison, phase: str, variant: str, measure: plans.Measure
              ) -> Mapping[str, Any]:
  """Returns the estimate of a measure over all sizes of a phase; {} where there
  is none."""
  return comparison.first_row_with(
      c.estimates, phase=phase, variant=variant, measure=measure.name)
