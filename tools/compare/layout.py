"""What lies where in a sweep's folder, and what can be read of a run there."""

from collections.abc import Iterable, Mapping
import contextlib
import json
import os
import pathlib
import tempfile

from configs.errors import RequestError, require
from tools.compare import spec
from training import schema
from training.workdir import storage


# What is read of a point, of sweep.json, and of the evaluations.
CHANGES = schema.Each((int, float, str, bool, list, dict))  # dict: model.kinds
POINT = {
    'name': str, 'changes': CHANGES,
    'matched': [str], 'params': schema.Positive(int),
    'active_params': schema.Positive(int),
    'flops_per_token': schema.Positive(schema.NUMBER),
    'tokens': schema.Positive(schema.NUMBER),
    'seeds': [int]}
DESCRIPTION = {
    'name': str, 'file': str, 'match': str, 'match_field': str, 'base': str,
    'base_config': {}, 'paired': bool, 'points': [POINT]}
# Fields that say how much of what is held out a run is evaluated on.
EVALUATED = ('eval.part', 'eval.batches')
EXTRAPOLATION = {
    'length': int, 'curves': schema.Each(schema.Each((list, type(None)),
                                                     '[0-9]{1,9}'))}


def try_folder(workdir, own: str = 'sweep.json') -> None:
  """Raises RequestError where no sweep, nor what `own` tells of, can be kept:
  before anything is run."""
  require('://' not in str(workdir), f'--workdir is {str(workdir)!r}: the '
          'ledger of a sweep needs a folder of this machine, or one that is '
          'mounted')
  storage.try_folder(workdir)
  storage.refuse_run(workdir, '--workdir', own)
  for name in ('sweep.json', 'ledger.sqlite'):
    storage.try_file(pathlib.Path(workdir) / name, '--workdir')


def run_folder(workdir, point: str, seed: int) -> pathlib.Path:
  return pathlib.Path(workdir) / 'points' / point / f'seed-{seed}'


def save_description(workdir, description: dict) -> None:
  """Writes sweep.json, whole or not at all."""
  path = pathlib.Path(workdir) / 'sweep.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  # A name of its own: several runners may start at once.
  with tempfile.NamedTemporaryFile(
      'w', dir=path.parent, prefix='sweep.json.', delete=False) as partial:
    partial.write(json.dumps(description, indent=2) + '\n')
  os.chmod(partial.name, 0o644)
  os.replace(partial.name, path)


def load_description(workdir, file: str = '') -> dict:
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
  description = schema.parse(path.read_bytes(), str(path))
  _check(description, str(path))
  if file and file != description['file']:
    raise RequestError(f'{workdir} holds the sweep {description["file"]}, not '
                       f'{file}: leave the file out or name another --workdir')
  return description


def _check(description: dict, who: str) -> None:
  """Raises RequestError for what is no description of a sweep; fills in config
  fields that are newer than it."""
  schema.check_shape(description, DESCRIPTION, who)
  schema.check_shape(description.get('sources', {}), schema.Each(str),
                     f'{who}.sources')
  points = {row['name'] for row in description['points']}
  require(len(points) == len(description['points']),
          f'{who} is damaged: two points have one name')
  require(description['base'] in points, f'{who} is damaged: its base '
          f'{description["base"]!r} is none of its points')
  from training import limits
  from training.workdir import run_config
  tree = run_config.tuples(description['base_config'])
  run_config.check_fields(tree, f'{who} is damaged: base_config: ')
  base = run_config.from_json(tree)
  limits.ranges(base)
  description['base_config'] = json.loads(json.dumps(
      run_config.to_json(base)))  # with lists, as it is on disk
  for row in description['points']:
    parts = pathlib.PurePath(row['name']).parts
    require(parts and '..' not in parts and parts[0] != '/',
            f'{who} is damaged: a point is called {row["name"]!r}')
    spec.changed(base, row['changes'], f'{who}, point {row["name"]!r},')


def row_of(description: dict, point: str) -> dict:
  """Returns what sweep.json says of a point; RequestError where it has none,
  which a ledger of another sweep may name."""
  rows = [row for row in description['points'] if row['name'] == point]
  require(rows, f'sweep.json has no point {point!r}, which the ledger has: '
          'they are of different sweeps')
  return rows[0]


def config(description: dict, point: str, seed: int):
  """Returns the config of a run as sweep.json has it, whatever the sweep's
  file says by now."""
  from training.workdir import run_config
  base = run_config.from_json(description['base_config'])
  row = row_of(description, point)
  return spec.changed(base, {**row['changes'], 'seed': seed},
                      f'point {point!r}')


def differing(description: dict, workdir, point: str, seed: int
              ) -> list[str]:
  """Returns the fields in which the run on disk is not the sweep's.

  Raises:
    ValueError: where its config.json is missing or damaged.
  """
  from training.workdir import run_config
  got = run_config.flatten(run_config.load_config(
      run_folder(workdir, point, seed)))
  expected = run_config.flatten(config(description, point, seed))
  return [name for name in {**expected, **got}
          if got.get(name, run_config.MISSING)
          != expected.get(name, run_config.MISSING)]


def codes(workdir, runs) -> list[str]:
  """Returns the different codes that trained the (point, seed) of a sweep, as
  far as they are known."""
  from training.workdir import provenance, run_config
  starts = []
  for point, seed in runs:
    # A config that is damaged is reported where the run is looked at.
    with contextlib.suppress(RequestError):
      starts += run_config.starts(run_folder(workdir, point, seed))
  return provenance.codes(starts)


def changed_data(workdir, runs) -> list[str]:
  """Returns the sources that did not hold the same at every start of the
  (point, seed) of a sweep, as far as that is known."""
  from training.workdir import run_config
  held: dict[tuple, set[str]] = {}
  for point, seed in runs:
    with contextlib.suppress(RequestError):
      folder = run_folder(workdir, point, seed)
      data = run_config.load_config(folder).data
      for start in run_config.starts(folder):
        for name, content in start.get('data', {}).items():
          # Of what these cut out of it, and how they lay it out.
          held.setdefault((name, data.holdout_every, data.chat_template),
                          set()).add(content)
  return sorted({name for (name, *_), found in held.items() if len(found) > 1})


def data_note(found: list[str]) -> str:
  """Says that the data of a sweep changed in the middle of it."""
  return ('The data changed in the middle of this sweep, so that its runs may '
          f'not be compared: {", ".join(found)} did not hold the same for all.')


def held_out_note(changes: Iterable[Mapping]) -> str:
  """Says that points, of which these are the changes, were evaluated on
  different text or rows; '' where they were not."""
  changes = list(changes)
  found = [name for name in EVALUATED
           if len({own.get(name) for own in changes}) > 1]
  return (f'Points differ in {" and ".join(found)}, so their held-out losses '
          'are not of the same text.') if found else ''


def codes_note(found: list[str]) -> str:
  """Says that the code of a sweep changed in the middle of it."""
  return ('The code changed in the middle of this sweep, so that its runs may '
          f'not be compared: {"; ".join(found)}.')


def metrics(folder: pathlib.Path, split: str) -> list[dict]:
  """Returns the lines of a run's metrics.jsonl of one split, as far as they
  are whole."""
  path = folder / 'metrics.jsonl'
  if not path.is_file():
    return []
  from training.workdir import metrics as metrics_lib
  return [row for row in metrics_lib.read(path) if row['split'] == split]


def is_trained(folder: pathlib.Path, train) -> bool:
  """Whether the run took its last step and saved it, and did not end there
  after too many bad ones; `train` is config.train of the run."""
  steps = train.steps
  last = [row for row in metrics(folder, 'train') if row['step'] == steps]
  return (folder / 'checkpoints' / str(steps)).is_dir() and bool(last) and not (
      'bad_in_row' in last[-1]
      and last[-1]['bad_in_row'] >= train.max_bad_steps)


def evaluation(folder: pathlib.Path) -> dict:
  """Returns what a run's eval.json holds, which was written in one piece.

  Raises:
    RequestError: where it is damaged.
  """
  path = folder / 'eval.json'
  who = f'{path} (which can be removed: the evaluation is then done again)'
  figures = schema.parse(path.read_bytes(), who)
  schema.check_shape(figures, {}, who)
  return figures


def is_evaluated(folder: pathlib.Path, tasks: list[str]) -> bool:
  """Whether eval.json holds every task."""
  path = folder / 'eval.json'
  if not path.is_file():
    return not tasks
  return set(tasks) <= set(evaluation(folder))


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
