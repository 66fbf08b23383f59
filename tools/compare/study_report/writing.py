"""Writes W/report/: a page, Markdown, LaTeX tables, CSV and the figures."""

from collections.abc import Sequence
import pathlib

from tools.compare.study_report import costs
from tools.compare.study_report import drawing
from tools.compare.study_report import figures
from tools.compare.study_report import record as records
from tools.compare.study_report import render
from tools.compare.study_report import sheets
from tools.compare.study_report import tables
from tools.compare.study_report import words
from tools.compare.study_report.document import Document, Figure, Named, Section
from tools.compare.study_report.record import Record
from training.workdir import storage


def write(workdir) -> list[pathlib.Path]:
  """Writes the report of a study, as far as it is; returns the files' paths.

  Args:
    workdir: W, with study.json and, once a phase has begun, results.json.

  Raises:
    RequestError: where there is no study, a file is damaged, or a library is
      not installed.
    EnvironmentFailure: where a file cannot be written.
  """
  drawing.require_libraries()
  record = records.load(workdir)
  folder = pathlib.Path(workdir) / 'report'
  storage.try_folder(folder)
  drawn = list(figures.draw(record))
  document = assemble(record, [figure for figure, _ in drawn])
  files: dict[str, str | bytes] = {
      'index.html': render.html_page(document),
      'report.md': render.markdown_page(document),
      'tables.tex': render.latex_tables(document),
      'results.csv': sheets.estimates(record),
      'runs.csv': sheets.runs(record)}
  for figure, drawing_ in drawn:
    files |= {f'{figure.name}.svg': drawing_.svg,
              f'{figure.name}.png': drawing_.png}
  folder.mkdir(parents=True, exist_ok=True)
  for name in _FIGURES:  # of an earlier report, which has them no more
    for path in (folder / f'{name}.svg', folder / f'{name}.png'):
      if path.name not in files:
        path.unlink(missing_ok=True)
  for name, content in files.items():
    _write(folder / name, content)
  return [folder / name for name in files]


_FIGURES = ('effects', 'curves', 'noise', 'measures')


def _write(path: pathlib.Path, content: str | bytes) -> None:
  if isinstance(content, str):
    storage.write(path, content)
  else:
    path.write_bytes(content)


def assemble(record: Record, drawn: Sequence[Figure]) -> Document:
  """Returns the document, with the sections that there is something for."""
  by_name = {figure.name: figure for figure in drawn}
  pick = lambda *names: [by_name[n] for n in names if n in by_name]
  results = record.results
  named = lambda name, title, table: [Named(name, title, table)] * bool(
      table.rows)
  sections = [
      Section('verdict', 'Verdict', (), pick('effects'), [
          Named('verdicts', 'Each variant beside the base',
                tables.verdicts(record)),
          *named('by-size', 'At each size', tables.by_size(record)),
          *named('means', 'Means', tables.means(record))]),
      Section('curves', 'Loss curves', (), pick('curves')),
      Section('measures', 'Probes and other measures', (), pick('measures')),
      Section('stability', 'Stability', (), (), [
          *named('diverging', 'How often variants diverge',
                 tables.stability(record)),
          *named('diverged', 'Runs that diverged', tables.diverged(record))]),
      Section('noise', 'Noise', (), pick('noise'), named(
          'noise-table', 'Base against base', tables.noise(record))),
      Section('screen', 'Screen', (), (), named(
          'screened', 'Every variant at the smallest size',
          tables.screen(record)) if results['screen'] else ()),
      Section('tuning', 'Tuning', (), (), named(
          'tuned', 'What each variant was tuned to', costs.tuning(record))),
      Section('planned', 'Planned and run', words.as_planned(record), (), [
          *named('hashes', 'Hashes', costs.hashes(record)),
          *named('amendments', 'Changes after the plan was frozen',
                 costs.amendments(record))]),
      Section('methods', 'Methods', words.methods(record), (), [
          *named('points', 'Variants and sizes', costs.points(record)),
          *named('config', 'The config that all runs change',
                 costs.config(record))]),
      Section('provenance', 'Provenance and cost', (), (), [
          *named('spent', 'Spent, by phase', costs.spent(record)),
          *named('code', 'Code, machines and data',
                 costs.provenance(record))])]
  return Document(
      record.plan.name, record.plan.question, words.answer(record),
      words.warnings(record), [s for s in sections if (
          s.paragraphs or s.figures or s.tables)])
