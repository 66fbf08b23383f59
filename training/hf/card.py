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
  """Writes a model card, README.md, for a checkpoint of a run that is exported.
  An existing one is left as it is, as somebody may have edited it.

  Args:
    workdir: the folder of the run.
    config: the config of the run.
    folder: the folder of the export, to which the card is written.
    step: the step of the checkpoint. The card has the last evaluation up to it.
    num_parameters: the number of parameters of the model.
  """
  import jinja2
  if (folder / hub.MODEL_CARD_FILE).exists():
    return

  # Find the last evaluation up to the checkpoint.
  step_of_losses = None
  losses = {}
  file = workdir / metrics.METRICS_FILE
  if file.exists():
    for row in metrics.read_metrics(file):
      if row['split'] == 'eval' and row['step'] <= step:
        step_of_losses = row['step']
        losses = metrics.scalar_figures(row)

  # Fill in the template of the card.
  templates = jinja2.Environment(
      loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True,
      undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
  text = templates.get_template('card.md.jinja').render(
      config=config, step=step, count=num_parameters,
      verdicts=read_verdicts(workdir), at=step_of_losses, losses=losses,
      command=run_config.training_command('RUN', config))
  (folder / hub.MODEL_CARD_FILE).write_text(text)


def read_verdicts(workdir: epath.Path) -> list[dict[str, str]]:
  """Reads what a comparison of several runs has found about the variant that
  this run trains: the rows of its report, results.csv, with a verdict.

  Args:
    workdir: the folder of the run. If the run is part of a comparison, it is
      COMPARISON/.../POINT/..., three levels below the folder of the comparison,
      where POINT is a setting that the comparison trains.

  Returns:
    The rows, {column: text}; [] if the run belongs to no comparison, or there
    is no report yet.
  """
  workdir = pathlib.Path(workdir).absolute()
  comparison = workdir.parents[2]
  name = workdir.parent.name
  if not (comparison / 'sweep.json').exists():
    return []
  # Look up the variant that the point belongs to, which is the point itself
  # unless sweep.json says otherwise.
  variant = name
  for point in storage.read_json(comparison / 'sweep.json')['points']:
    if point['name'] == name:
      variant = point.get('variant', name)
      break

  # The comparison may be part of a study, one folder up, which has the report.
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
