"""publish: bundles studies, each in one file, and writes the page of verdicts.

A bundle is docs/assets/studies/NAME-HASH.tar.gz: the plan and the ledger of the
study, its results with the curves, code, devices and versions, and the metrics
and evaluations of each run, without checkpoints. Unpacked it is a workdir of
which `report` tells. The results are not those that `run` saved, but what
follows from the runs by the code that publishes, which they name.

The page is made of the bundles alone, a row for each variant, whatever its
verdict is; so it cannot say what no bundle holds, and is the same however often
it is written. A bundle of whose runs this code does not give the verdicts that
it holds is refused.
"""

import argparse
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import gzip
import io
import pathlib
import tarfile
import tempfile
from typing import Any

from common.errors import RequestError, require
from tools.compare import comparison as comparison_lib
from tools.compare import decide, layout, page
from tools.compare import plan as plans
from tools.compare import results as results_lib
from tools.compare.comparison import Comparison
from training.workdir import storage

DEFAULT_FOLDER_OF_BUNDLES = 'docs/assets/studies'
DEFAULT_PAGE = 'docs/verdicts.md'
# The files of a workdir that a bundle holds beside its results: none names a
# machine or a folder.
PATTERNS_OF_BUNDLED_FILES = (
    'study.json', 'study.sqlite', '*/sweep.json',
    *(f'*/points/*/*/{name}' for name in layout.FILES_OF_FIGURES))


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of `python -m tools.compare publish` to a parser."""
  parser.add_argument('workdirs', nargs='*', metavar='WORKDIR',
                      help='of studies that are over, or their bundles, whose '
                      'results are then computed anew; none: the page is '
                      'written again')
  parser.add_argument('--bundles', default=DEFAULT_FOLDER_OF_BUNDLES,
                      help='their folder '
                      '(%(default)s)')
  parser.add_argument('--page', default=DEFAULT_PAGE, help='(%(default)s)')


def main(args) -> int:
  """Publishes the verdicts of studies: writes a bundle (a tar.gz of the plan,
  results and metrics) for each, and a page about all bundles in the folder.

  Args:
    args: the arguments of the command: the folders of the studies, the folder
      of the bundles, and the file of the page.

  Returns:
    The exit code, 0.
  """
  bundle_folder = pathlib.Path(args.bundles)
  page_file = pathlib.Path(args.page)
  # Refuse anything but a finished study before anything is written.
  content_of_bundle = {}
  for source in args.workdirs:
    with _folder_of_study(pathlib.Path(source)) as workdir:
      comparison = comparison_lib.load_comparison(workdir)
      missing = comparison.results['missing'] or 'it is none'
      require(comparison.is_study and 'confirm' in comparison.results,
              f'{source} is no study whose confirmation is over ({missing}): '
              'there is no verdict to publish')
      name = f'{comparison.plan.name}-{comparison.frozen.hash}.tar.gz'
      content_of_bundle[name] = bundle_study(workdir, comparison.results)

  # Write the bundles, and then the page about all bundles in the folder, the
  # newest study first.
  for name, content in content_of_bundle.items():
    bundle_folder.mkdir(parents=True, exist_ok=True)
    storage.write_file(bundle_folder / name, content)
    print(bundle_folder / name)
  published = [_load_bundle(path) for path in bundle_folder.glob('*.tar.gz')]
  published.sort(key=lambda comparison: (comparison.frozen.time,
                                         comparison.plan.name), reverse=True)
  text = page.render(
      'verdicts.md', date=plans.format_date, rows=rows_of_verdicts,
      is_any_at_edge=is_any_at_edge, studies=published)
  storage.write_file(page_file, text)
  print(page_file)
  return 0


def bundle_study(workdir, results: Mapping[str, Any]) -> bytes:
  """Packs the plan, results and metrics of a study into a tar.gz, without its
  checkpoints. Equal files and results give equal bytes, so no time of packing
  is in it.

  Args:
    workdir: the folder of the study.
    results: its results, computed from the runs (recompute.recompute_results).

  Returns:
    The bytes of the tar.gz.
  """
  # Read the files of the study.
  workdir = pathlib.Path(workdir)
  content_of_file = {}
  for pattern in PATTERNS_OF_BUNDLED_FILES:
    for path in workdir.glob(pattern):
      name = path.relative_to(workdir).as_posix()
      content_of_file[name] = path.read_bytes()

  # Replace results.json by the results that follow from the runs, without the
  # warnings about the saved ones.
  results = {**results, 'unlike_saved': []}
  content_of_file[results_lib.FILE] = layout.format_with_checksum(results)

  # Pack them. A time of 0 and sorted names make the bytes reproducible.
  bundle = io.BytesIO()
  with (gzip.GzipFile(fileobj=bundle, mode='wb', mtime=0) as packed,
        tarfile.open(fileobj=packed, mode='w') as tar):
    for name, content in sorted(content_of_file.items()):
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return bundle.getvalue()


def _load_bundle(path: pathlib.Path) -> Comparison:
  """Reads a published study from its bundle (a tar.gz), and checks that its
  verdicts follow from its runs.

  Args:
    path: the path of the bundle.

  Raises:
    RequestError: if the file is no bundle, or if this version of the code
      computes other verdicts from the runs.
  """
  with _folder_of_study(path) as folder:
    comparison = comparison_lib.load_comparison(folder)
    published = results_lib.load(folder)

  # Refuse a bundle whose verdicts this code does not find.
  statistics = published['statistics']
  codes = ', '.join(statistics['codes']) or 'code of no known commit'
  unlike_saved = '; '.join(comparison.results['unlike_saved'])
  require(not unlike_saved,
          f'{path} has verdicts, computed by {codes}, that do not follow from '
          f'its runs by this code ({unlike_saved}): publish {path} again, or '
          'write the page by that code')

  # The verdicts are equal, so the code that the bundle names as their author
  # is kept.
  results = {**comparison.results, 'statistics': statistics}
  return dataclasses.replace(comparison, results=results)


@contextlib.contextmanager
def _folder_of_study(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives the folder of a study, into which its bundle is unpacked for as long
  as it is used.

  Args:
    path: the folder itself, or the bundle.

  Yields:
    The folder. That of a bundle is deleted when the caller is done with it.

  Raises:
    RequestError: where a file is no bundle.
  """
  if not path.is_file():
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    try:
      with tarfile.open(path) as tar:
        # The filter refuses names and links that lead out of the folder.
        tar.extractall(folder, filter='data')
    except (tarfile.TarError, OSError, EOFError) as error:
      raise RequestError(f'{path} is no bundle ({error}): remove it, and '
                         'publish its study again') from error
    yield pathlib.Path(folder)


def is_any_at_edge(comparison: Comparison) -> bool:
  """Returns whether tuning ended at an outermost value for any variant."""
  return any(row['at_edge'] for row in comparison.results['tuned'])


def rows_of_verdicts(comparison: Comparison) -> list[dict[str, str]]:
  """Returns the row of each variant of a study on the page of verdicts, as
  texts by the names that templates/verdicts.md.jinja gives to its columns."""
  return [_row_of_verdict(comparison, verdict)
          for verdict in comparison.verdicts()[1:]]


def _row_of_verdict(comparison: Comparison,
                    verdict: Mapping[str, Any]) -> dict[str, str]:
  """Returns the row of one variant, as `rows_of_verdicts` does. A variant that
  was stopped has its figures from the screening, at the smallest size.

  Args:
    comparison: the study.
    verdict: the estimate that the verdict is on, as Comparison.estimates has
      it.
  """
  plan, variant = comparison.plan, verdict['variant']
  shown, sizes = verdict, plan.sizes
  if verdict['n'] is None:
    shown = _estimate_over_sizes(comparison, phase='screen', variant=variant,
                                 measure=plan.primary)
    sizes = plan.sizes[:1]

  # The change and its size.
  point = comparison.frozen.point(variant, plan.sizes[0], plans.TEXT)
  changes = comparison_lib.format_changes(
      comparison_lib.changes_from_base(comparison.frozen, point))
  params, tokens = [], []
  for size in sizes:
    base = comparison.frozen.point(plan.base, size, plans.TEXT)
    params.append(f'{base["params"]:,}')
    tokens.append(f'{base["tokens"]:,}')

  # The compute that it is worth, and what it does to other measures.
  confirmed = comparison.effect('confirm', variant, plan.primary.name)
  multiplier = comparison_lib.first_row_with(
      confirmed.get('multipliers', ()), size=decide.ALL_SIZES, by='multiplier')
  worth = page.estimate(
      mean=multiplier.get('factor'), low=multiplier.get('low'),
      high=multiplier.get('high'), form='.2f')
  others = []
  for measure in plan.measures[1:]:
    other = _estimate_over_sizes(comparison, phase='confirm', variant=variant,
                                 measure=measure)
    if other.get('n'):
      others.append(f'{measure.name} {page.effect(other).text}')
  return {
      'part': f'{variant} ({changes})',
      'verdict': verdict['verdict'],
      'parameters': ', '.join(params),
      'tokens': ', '.join(tokens),
      'seeds': str(shown.get('n')),
      'effect': page.effect(shown).text,
      'p': page.p_value(shown.get('p_corrected')).text,
      'multiplier': worth.text,
      'others': '; '.join(others) or 'n/a'}


def _estimate_over_sizes(comparison: Comparison, phase: str, variant: str,
                         measure: plans.Measure
                         ) -> Mapping[str, Any]:
  """Returns the row of Comparison.estimates that has a measure of a variant in
  a phase, over all sizes; {} where there is none."""
  return comparison_lib.first_row_with(
      comparison.estimates, phase=phase, variant=variant, measure=measure.name)
