"""What lies where in a sweep's folder, and what can be read of a run there."""

import json
import os
import pathlib
import tempfile

from configs.errors import RequestError, require
from tools.sweep import spec
from training import storage


def try_folder(workdir) -> None:
  """Raises RequestError where no sweep can be kept: before anything is run."""
  require('://' not in str(workdir), f'--workdir is {str(workdir)!r}: the '
          'ledger of a sweep needs a folder of this machine, or one that is '
          'mounted')
  storage.try_folder(workdir)
  for name in ('sweep.json', 'ledger.sqlite'):
    storage.try_file(pathlib.Path(workdir) / name, '--workdir')


def run_folder(workdir, point: str, seed: int) -> pathlib.Path:
  return pathlib.Path(workdir) / 'points' / point / f'seed-{seed}'


def save(workdir, description: dict) -> None:
  """Writes sweep.json, whole or not at all."""
  path = pathlib.Path(workdir) / 'sweep.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  # A name of its own: several runners may start at once.
  with tempfile.NamedTemporaryFile(
      'w', dir=path.parent, prefix='sweep.json.', delete=False) as partial:
    partial.write(json.dumps(description, indent=2) + '\n')
  os.chmod(partial.name, 0o644)
  os.replace(partial.name, path)


def load(workdir, file: str = '') -> dict:
  """Returns what `save` wrote.

  Args:
    workdir: W.
    file: that the sweep must be of, where it is given.

  Raises:
    ValueError: where no sweep was started, or another one.
  """
  path = pathlib.Path(workdir) / 'sweep.json'
  if not path.is_file():
    raise RequestError(f'{path} is missing: no sweep was checked or run in '
                       'this workdir')
  description = json.loads(path.read_text())
  if file and file != description['file']:
    raise RequestError(f'{workdir} holds the sweep {description["file"]}, not '
                       f'{file}: leave the file out or name another --workdir')
  return description


def config(description: dict, point: str, seed: int):
  """Returns the config of a run as sweep.json has it, whatever the sweep's
  file says by now."""
  from training import run_config
  base = run_config.from_json(description['base_config'])
  row = next(p for p in description['points'] if p['name'] == point)
  return spec.changed(base, {**row['changes'], 'seed': seed},
                      f'point {point!r}')


def differing(description: dict, workdir, point: str, seed: int
              ) -> list[str]:
  """Returns the fields in which the run on disk is not the sweep's.

  Raises:
    ValueError: where its config.json is missing or damaged.
  """
  from training import run_config
  got = run_config.flatten(run_config.load(run_folder(workdir, point, seed)))
  expected = run_config.flatten(config(description, point, seed))
  return [name for name in {**expected, **got}
          if got.get(name, run_config.MISSING)
          != expected.get(name, run_config.MISSING)]


def metrics(folder: pathlib.Path, split: str) -> list[dict]:
  """Returns the lines of a run's metrics.jsonl of one split, as far as they
  are whole."""
  path = folder / 'metrics.jsonl'
  if not path.is_file():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
    except ValueError:  # it is being written
      continue
    if row['split'] == split:
      rows.append(row)
  return rows


def is_trained(folder: pathlib.Path, steps: int) -> bool:
  """Whether the run took its last step and saved it."""
  return (folder / 'checkpoints' / str(steps)).is_dir() and any(
      row['step'] == steps for row in metrics(folder, 'train'))


def is_evaluated(folder: pathlib.Path, tasks: list[str]) -> bool:
  """Whether eval.json holds every task."""
  path = folder / 'eval.json'
  if not path.is_file():
    return not tasks
  try:
    figures = json.loads(path.read_text())
  except ValueError:  # a kill in the middle of writing
    return False
  return set(tasks) <= set(figures)


def log(folder: pathlib.Path, line: str) -> None:
  """Adds a line to what a run printed."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / 'log.txt').open('a') as file:
    print(line, file=file)


def error(folder: pathlib.Path) -> str:
  """Returns the sentence that a failed run's log gives, or ends with."""
  path = folder / 'log.txt'
  lines = [line.strip() for line in path.read_text(
      errors='replace').splitlines() if line.strip()]
  start = max((i for i, line in enumerate(lines) if line.startswith('$ ')),
              default=0)  # of the last attempt
  told = [line for line in lines[start:] if line.startswith('error: ')]
  return (told or lines or ['it printed nothing'])[-1].removeprefix('error: ')
