"""publish: bundles studies, each in one file, and writes the page of verdicts.

A bundle is BUNDLES/NAME-HASH.tar.gz: the plan and the ledger of the study, its
results with the curves, code, devices and versions, and the metrics and
evaluations of each run, without checkpoints. Unpacked it is a workdir of which
`report` tells. The page is made of the bundles alone, a row for each variant,
whatever its verdict is; so it cannot say what no bundle holds, and is the same
however often it is written.
"""

import argparse
from collections.abc import Iterator, Mapping
import gzip
import io
import pathlib
import tarfile
import tempfile
from typing import Any

from common.errors import RequestError, require
from tools.compare import decide, page, report
from tools.compare import plan as plans
from training.workdir import storage

BUNDLES = 'docs/assets/studies'
PAGE = 'docs/verdicts.md'
# What a bundle holds of a workdir: nothing that names a machine or its folders.
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
  over = [(workdir, report.load(workdir)) for workdir in args.workdirs]
  for workdir, c in over:
    require(c.is_study and 'confirm' in c.results, f'{workdir} is no study '
            'whose confirmation is over: there is no verdict to publish')
  for workdir, c in over:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{c.plan.name}-{c.frozen.hash}.tar.gz'
    storage.write(path, bundle(workdir))
    print(path)
  studies = sorted(map(_opened, folder.glob('*.tar.gz')),
                   key=lambda c: (c.frozen.time, c.plan.name), reverse=True)
  storage.write(target, page.render('verdicts.md', date=plans.date, rows=rows,
                                    studies=studies))
  print(target)
  return 0


def bundle(workdir) -> bytes:
  """Returns the files of a study as a tar.gz, the same bytes for the same
  files."""
  workdir, file = pathlib.Path(workdir), io.BytesIO()
  with gzip.GzipFile(fileobj=file, mode='wb', mtime=0) as packed, tarfile.open(
      fileobj=packed, mode='w') as tar:
    for path in sorted(path for pattern in FILES
                       for path in workdir.glob(pattern)):
      member = tarfile.TarInfo(path.relative_to(workdir).as_posix())
      content = path.read_bytes()
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return file.getvalue()


def _opened(path: pathlib.Path) -> report.Comparison:
  """Returns what a bundle holds; RequestError where it is none."""
  with tempfile.TemporaryDirectory() as folder:
    try:
      with tarfile.open(path) as tar:
        tar.extractall(folder, filter='data')
    except (tarfile.TarError, OSError, EOFError) as error:
      raise RequestError(f'{path} is no bundle ({error}): remove it, and '
                         'publish its study again') from error
    return report.load(folder)


def rows(c: report.Comparison) -> Iterator[dict[str, str]]:
  """Yields the cells of each variant's row, by the words of the template. One
  that was stopped has its figures from the screening."""
  plan = c.plan
  for row in c.verdicts()[1:]:
    name, confirmed = row['variant'], row['n'] is not None
    points = [c.frozen.point(plan.base, size, plans.TEXT)
              for size in plan.sizes[:None if confirmed else 1]]
    shown = row if confirmed else _of(c, 'screen', name, plan.primary)
    factor = next((x for x in c.effect('confirm', name, plan.primary.name).get(
        'multipliers', ()) if (x['size'], x['by']) == (
            decide.ALL, 'multiplier')), {})
    changes = report.alone(
        c.frozen, c.frozen.point(name, plan.sizes[0], plans.TEXT))
    others = [(m.name, _of(c, 'confirm', name, m)) for m in plan.measures[1:]]
    yield {
        'part': f'{name} ({report.changed(changes)})',
        'verdict': row['verdict'],
        'parameters': ', '.join(f'{x["params"]:,}' for x in points),
        'tokens': ', '.join(f'{x["tokens"]:,}' for x in points),
        'seeds': str(shown.get('n')), 'effect': _effect(shown),
        'p': page.p_value(shown.get('p_corrected')).text,
        'multiplier': page.estimate(*map(
            factor.get, ('factor', 'low', 'high')), '.2f').text,
        'others': '; '.join(f'{measure} {_effect(x)}'
                            for measure, x in others if x.get('n')) or 'n/a'}


def _effect(row: Mapping[str, Any]) -> str:
  return page.estimate(*map(row.get, ('effect', 'low', 'high'))).text


def _of(c: report.Comparison, phase: str, variant: str, measure: plans.Measure
        ) -> Mapping[str, Any]:
  """Returns the estimate of a measure over all sizes of a phase; {} where there
  is none."""
  return next((x for x in c.estimates if (
      x['phase'], x['variant'], x['measure']) == (
          phase, variant, measure.name)), {})
