"""The model card of an export: README.md, with a licence to fill in."""

import csv
import pathlib
from typing import Any

from etils import epath

from training import hub
from training.workdir import metrics, run_config, storage

TEMPLATES = pathlib.Path(__file__).parent / 'templates'


def write(workdir: epath.Path, config: Any, folder: pathlib.Path, step: int,
          count: int) -> None:
  """Writes the card of a run's checkpoint, unless there is one in the folder,
  which may have been edited.

  Args:
    workdir: of the run.
    config: its config.
    folder: of the export.
    step: of the checkpoint.
    count: how many parameters it has.
  """
  import jinja2
  if (folder / hub.CARD).exists():
    return
  file = workdir / metrics.METRICS
  rows = [row for row in (metrics.read(file) if file.exists() else ())
          if row['split'] == 'eval' and row['step'] <= step]
  (folder / hub.CARD).write_text(jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True,
      undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
  ).get_template('card.md.jinja').render(
      config=config, step=step, count=count, verdicts=verdicts(workdir),
      at=rows[-1]['step'] if rows else None,
      losses=metrics.scalars(rows[-1]) if rows else {},
      command=run_config.to_train('RUN', config)))


def verdicts(workdir: epath.Path) -> list[dict[str, str]]:
  """Returns the rows with a verdict of the report on the comparison to which a
  run belongs; []: it belongs to none, or there is no report yet."""
  workdir = pathlib.Path(workdir).absolute()
  comparison, name = workdir.parents[2], workdir.parent.name
  if not (comparison / 'sweep.json').exists():
    return []
  points = storage.read_json(comparison / 'sweep.json')['points']
  variant = next((point.get('variant', name) for point in points
                  if point['name'] == name), name)
  for report in (comparison, comparison.parent):  # of a sweep, of a study
    file = report / 'report/results.csv'
    if file.exists():
      with file.open(newline='') as lines:
        return [row for row in csv.DictReader(lines)
                if row['variant'] == variant and row['verdict']]
  return []
