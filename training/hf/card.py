"""The model card of an export: README.md, with a licence to fill in."""

import csv
import pathlib
from typing import Any

from etils import epath

from training import hub
from training.workdir import metrics, run_config, storage

TEMPLATES = pathlib.Path(__file__).parent / 'templates'


def write_model_card(workdir: epath.Path, config: Any, folder: pathlib.Path,
                     step: int, num_parameters: int) -> None:
  """Writes the model card (README.md) of a run's checkpoint into a folder,
  unless there is one, which may have been edited.

  Args:
    workdir: the workdir of the run.
    config: the config of the run.
    folder: the folder of the export.
    step: the step of the checkpoint, whose last evaluation the card reports.
    num_parameters: the number of parameters of the model.
  """
  import jinja2
  if (folder / hub.MODEL_CARD_FILE).exists():
    return

  # The last evaluation up to the checkpoint.
  step_of_losses = None
  losses = {}
  file = workdir / metrics.METRICS_FILE
  if file.exists():
    for row in metrics.read_metrics(file):
      if row['split'] == 'eval' and row['step'] <= step:
        step_of_losses = row['step']
        losses = metrics.scalar_figures(row)

  # The card, made of a template.
  templates = jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True,
      undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
  text = templates.get_template('card.md.jinja').render(
      config=config, step=step, count=num_parameters,
      verdicts=read_verdicts(workdir), at=step_of_losses, losses=losses,
      command=run_config.training_command('RUN', config))
  (folder / hub.MODEL_CARD_FILE).write_text(text)


def read_verdicts(workdir: epath.Path) -> list[dict[str, str]]:
  """Returns the rows of results.csv, the report of a comparison, that give a
  verdict on the variant that a run trains; []: the run belongs to no
  comparison, or there is no report yet.

  Args:
    workdir: the folder of the run. A comparison keeps it three levels below its
      own folder, in one with the name of a point of the sweep.
  """
  workdir = pathlib.Path(workdir).absolute()
  comparison = workdir.parents[2]
  name = workdir.parent.name
  if not (comparison / 'sweep.json').exists():
    return []
  # The variant of the run: a point of a sweep is its own.
  variant = name
  for point in storage.read_json(comparison / 'sweep.json')['points']:
    if point['name'] == name:
      variant = point.get('variant', name)
      break

  # The report is that of the sweep, or of the study around it.
  for folder in (comparison, comparison.parent):
    file = folder / 'report/results.csv'
    if file.exists():
      with file.open(newline='') as lines:
        rows = []
        for row in csv.DictReader(lines):
          if row['variant'] == variant and row['verdict']:
            rows.append(row)
        return rows
  return []
