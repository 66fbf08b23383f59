"""A suite of probes as its file describes it, its training, and the score card:
what its runs found, in a file and a picture.

A file of configs/probes/ holds LRS, the learning rates; SEEDS, how many, 3 if
it says nothing; and suite(add), which calls add(NAME, **{'probe.levels': (1,
2), ...}) for each task: a probe by its name, with the fields in which a run
differs from the architecture's config. add(NAME, label=OTHER, ...) calls it by
another name, so that a suite may have a probe several times.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import json
import re
from typing import Any, NamedTuple

from etils import epath
import ml_collections
import numpy as np

from common.errors import Stopped, check_choice, require
from tools.compare import page, spec, statistics
from training import plugins
from training.data import probes
from training.workdir import storage

CARD_FILE, PICTURE_FILE = 'card.json', 'card.png'
# The fields by which the runs of a task differ.
_FIELDS_OF_RUNS = ('seed', 'optim.lr')


class Run(NamedTuple):
  """One training run of a suite.

  Attributes:
    task: the label of the task.
    lr: the learning rate.
    seed: the seed.
    config: the config of the run.
  """
  task: str
  lr: float
  seed: int
  config: ml_collections.ConfigDict

  def folder(self, workdir: epath.Path) -> epath.Path:
    """Returns the folder of the run, inside of the folder of the suite."""
    return workdir / self.task / f'lr_{self.lr:g}' / f'seed_{self.seed}'


class Suite(NamedTuple):
  """The runs by which a file of configs/probes/ tests an architecture.

  Attributes:
    file: the path of the file.
    digest: a hash of the file.
    lrs: the learning rates.
    seeds: the seeds.
    configs: the config of each task, by its label.
  """
  file: str
  digest: str
  lrs: tuple[float, ...]
  seeds: tuple[int, ...]
  configs: dict[str, ml_collections.ConfigDict]

  def runs(self, task: str) -> Iterator[Run]:
    """Yields the runs of a task, one for each learning rate and seed, each with
    a config of its own.

    Args:
      task: the label of the task, a key of `configs`.
    """
    for lr in self.lrs:
      for seed in self.seeds:
        config = self.configs[task].copy_and_resolve_references()
        config.seed, config.optim.lr = seed, lr
        yield Run(task=task, lr=lr, seed=seed, config=config.lock())


def load_suite(file: str, base: ml_collections.ConfigDict,
               only: Sequence[str] = (), seeds: int = 0,
               overrides: Collection[str] = ()) -> Suite:
  """Reads a file of configs/probes/, and makes the configs of its runs for an
  architecture.

  Args:
    file: a file of configs/probes/.
    base: the config of the architecture.
    only: the labels of the tasks to keep; (): all.
    seeds: the number of seeds; 0: as many as the file says.
    overrides: the fields that the command line sets, by dotted name.

  Raises:
    RequestError: for a file that is no suite, or a run that is not possible.
  """
  # Read the file as a module.
  from training import preflight
  file = plugins.find_config_file(file, asked_in='--suite', folders=('probes',),
                                  defines='suite')
  module = plugins.run_user_file(file)
  for name in ('LRS', 'suite'):
    require(hasattr(module, name), f'{file} has no {name}: a suite has LRS '
            'and suite(add)')
  configs: dict[str, ml_collections.ConfigDict] = {}

  def add(task: str, label: str = '', **fields: Any) -> None:
    """Adds a task to the suite. The file's function suite(add) is given this
    function, and calls it once for each task.

    Args:
      task: the name of a probe, which is a synthetic task such as recall.
      label: the name of the task in the suite; '' stands for the probe's name.
      **fields: the fields in which the runs of the task differ from the
        architecture's config, by dotted name.
    """
    # The label becomes the name of a folder.
    check_choice(f'{file}: task', task, probes.PROBES)
    label = label or task
    require(label not in configs, f'{file} adds {label!r} twice')
    require(re.fullmatch(r'\w+', label) is not None, f'{file}: {label!r} names '
            'a folder: choose letters, digits and underscores')

    # Fill the fields that all tasks set. A size of 0 is derived: the vocabulary
    # is the task's, and max_len is data.length. A run is evaluated and saved
    # only at its end.
    steps = fields.get('train.steps', base.train.steps)
    fields_of_tasks = {
        'objective': probes.PROBES[task].objective,
        'data.source': f'probe:{task}', 'model.vocab_size': 0,
        'model.max_len': 0, 'eval.tasks': 'probe', 'eval.every_steps': steps,
        'checkpoint.every_steps': steps, 'checkpoint.keep': 1,
        'log.every_steps': max(steps // 10, 1),
        'optim.warmup_steps': steps // 10}
    fields = fields_of_tasks | fields

    # A field that the suite sets must not be set on the command line too.
    if not only or label in only:
      for field in overrides:
        is_free = field not in (*_FIELDS_OF_RUNS, *fields)
        require(is_free, f'--config.{field} is set, which the suite {file} '
                f'sets itself in its task {label!r}: leave it out, or change '
                'the suite')
    configs[label] = spec.apply_changes(base, fields, f'{file}, task {task!r}')

  # Let the file add its tasks, and keep those that are asked for.
  plugins.call_user_function(file, module.suite, add)
  for task in only:
    check_choice('--only', task, configs)
  seeds = seeds or getattr(module, 'SEEDS', spec.DEFAULT_NUM_SEEDS)
  chosen = {task: config for task, config in configs.items()
            if not only or task in only}
  suite = Suite(
      file=file, digest=plugins.hash_text(plugins.read_python_file(file)),
      lrs=tuple(module.LRS), seeds=tuple(range(seeds)), configs=chosen)

  # Check all runs before the first one is trained.
  for task in suite.configs:
    for run in suite.runs(task):
      preflight.check_config(run.config)
  return suite


def train_suite(suite: Suite, workdir: epath.Path) -> None:
  """Trains the runs of a suite that are not trained yet, one task after the
  other. A task has a run for each learning rate and seed. If a run diverges,
  the others go on.

  Args:
    suite: the suite.
    workdir: the folder of the suite, which gets a folder for each run.

  Raises:
    Stopped: if a signal stops the training.
  """
  from training import loop, vectorised
  for task in suite.configs:
    runs = list(suite.runs(task))
    print(f'{task}: {len(suite.lrs)} learning rates x {len(suite.seeds)} seeds',
          flush=True)
    # Runs of equal shapes form a group, which trains as one program. A group is
    # the indices of its runs. Each run gets a writer of its files, which says
    # how the run ended.
    groups = vectorised.group_configs([run.config for run in runs])
    for group in groups:
      configs = [runs[i].config for i in group]
      folders = [runs[i].folder(workdir) for i in group]
      writers = vectorised.train_group(configs, folders)
      for writer in writers:
        if writer.stop_requested or writer.code == loop.STOPPED:
          raise Stopped


def make_card(suite: Suite, workdir: epath.Path) -> dict[str, Any]:
  """Returns the score card of a suite: for each task the figures of its best
  learning rate.

  The learning rate is chosen on the same held-out rows on which the figures are
  measured. That favours every architecture a little, and is how the papers do
  it that report the best of several learning rates. A rate at which a run
  diverged cannot be chosen.

  Args:
    suite: the suite, whose runs are trained.
    workdir: the folder of the suite.

  Returns:
    A dict for JSON. A figure in it has its mean over the seeds, its 95 %
    interval (None with fewer than three seeds, or if all figures are equal),
    and the figure of each seed.
  """
  tasks = {task: _row_of_task(suite, task, workdir) for task in suite.configs}
  return dict(suite=suite.file, suite_digest=suite.digest,
              seeds=list(suite.seeds), tasks=tasks)


def _row_of_task(suite: Suite, task: str, workdir: epath.Path
                 ) -> dict[str, Any]:
  """Returns the row of a task in the score card: the mean accuracy at each
  learning rate, and the figures of the best rate over the seeds.

  Args:
    suite: the suite, whose runs are trained.
    task: the label of the task.
    workdir: the folder of the suite.

  Returns:
    A dict for JSON. Its `lr` is the best rate, or None, without figures, if a
    run diverged at every rate; `diverged` has the seeds of these runs by rate.
  """
  from training.evals.tasks import probe as probe_task

  # Read the figures of the runs at each learning rate, and note the seeds whose
  # run diverged.
  figures_by_lr: dict[float, list[dict[str, float]]] = {}
  diverged: dict[float, list[int]] = {}
  for run in suite.runs(task):
    figures = _figures_of_run(run, workdir)
    if figures:
      figures_by_lr.setdefault(run.lr, []).append(figures)
    else:
      diverged.setdefault(run.lr, []).append(run.seed)

  # Average the accuracy at each learning rate at which no run diverged.
  mean_accuracy = {}
  for lr, figures_of_runs in figures_by_lr.items():
    if lr not in diverged:
      accuracies = [figures['accuracy'] for figures in figures_of_runs]
      mean_accuracy[lr] = float(np.mean(accuracies))

  # Take the figures of the best learning rate over the seeds.
  best_lr = None
  over_seeds = {}
  if mean_accuracy:
    best_lr = max(mean_accuracy, key=lambda lr: mean_accuracy[lr])
    figures_of_runs = figures_by_lr[best_lr]
    for name in figures_of_runs[0]:
      values = [figures[name] for figures in figures_of_runs]
      interval = statistics.logit_interval(values)._asdict()
      over_seeds[name] = interval | {'seeds': values}

  # Figures are named level/LEVEL, and beyond/LENGTH for rows that are longer
  # than in training.
  config = suite.configs[task]
  return dict(
      steps=config.train.steps, diverged=diverged, lr=best_lr,
      what=probes.find_probe(config).level,
      commonest=probe_task.score_constant_answer(config),
      accuracy_by_lr=mean_accuracy, level=_with_prefix('level/', over_seeds),
      beyond=_with_prefix('beyond/', over_seeds),
      accuracy=over_seeds.get('accuracy'),
      rows_right=over_seeds.get('rows_right'))


def _with_prefix(prefix: str, figures: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the figures whose names begin with a prefix, by their names without
  it."""
  return {name.removeprefix(prefix): figure for name, figure in figures.items()
          if name.startswith(prefix)}


def _figures_of_run(run: Run, workdir: epath.Path) -> dict[str, float]:
  """Reads the figures, such as the accuracy, that a run was evaluated to after
  its last step.

  Args:
    run: the run.
    workdir: the folder of the suite.

  Returns:
    The figures by name, or {} if the run diverged before its last step.
  """
  # Each line of the file is a JSON object with the figures of a step, and the
  # last evaluation is near the end.
  metrics_file = run.folder(workdir) / 'metrics.jsonl'
  lines = metrics_file.read_text().splitlines()
  for line in reversed(lines):
    figures = json.loads(line)
    if 'probe/accuracy' not in figures:
      continue
    if figures['step'] == run.config.train.steps:
      return _with_prefix('probe/', figures)
  return {}


def card_as_text(card: Mapping[str, Any]) -> str:
  """Returns a score card as text for a terminal.

  Args:
    card: the card, as `make_card` returns it.
  """
  num_seeds = len(card['seeds'])
  lines = [f'accuracy over {num_seeds} seeds, at the best learning rate: mean '
           'and 95 % interval']
  for task, row in card['tasks'].items():
    # The accuracy over all rows. There is none if runs diverged at all rates.
    if row['lr'] is None:
      lines.append(f'{task}: no figures')
    else:
      accuracy = _figure_with_interval(row['accuracy'])
      lines.append(
          f'{task}, lr {row["lr"]:g}: {accuracy} (the commonest answer: '
          f'{row["commonest"]:.4f}); by {row["what"]}:')
    for lr, seeds in row['diverged'].items():
      lines.append(f'  left out, since runs diverged: lr {lr:g} '
                   f'({len(seeds)} of {num_seeds} runs)')

    # The accuracy at each level, and on rows longer than in training.
    for name, figure in row['level'].items():
      lines.append(f'  {name:<22} {_figure_with_interval(figure)}')
    for name, figure in row['beyond'].items():
      label = f'beyond training {name}'
      lines.append(f'  {label:<22} {_figure_with_interval(figure)}')
  return '\n'.join(lines)


def _figure_with_interval(figure: Mapping[str, Any], digits: int = 4) -> str:
  """Returns a figure with its interval as text.

  Args:
    figure: its mean, and the low and high end of its interval.
    digits: the number of digits after the point.
  """
  return page.estimate(figure['mean'], low=figure['low'], high=figure['high'],
                       form=f'.{digits}f').text


def write_card(card: Mapping[str, Any], workdir: epath.Path) -> None:
  """Writes a score card as a file, card.json, and as a picture, card.png."""
  storage.write_file(workdir / CARD_FILE, json.dumps(card, indent=1) + '\n')
  storage.write_picture(workdir / PICTURE_FILE, _draw_card(card))


def _draw_card(card: Mapping[str, Any]) -> Any:
  """Draws a score card as a grid of cells, a row for each task.

  Args:
    card: the card, as `make_card` returns it.

  Returns:
    A matplotlib figure. A row has a cell for each level of the task, and then
    one for each length beyond that of training.
  """
  # Make room for the task with most levels, and for that with most lengths.
  from matplotlib.figure import Figure
  tasks = card['tasks']
  num_level_columns = max(1, *(len(row['level']) for row in tasks.values()))
  num_beyond_columns = max(len(row['beyond']) for row in tasks.values())
  columns = num_level_columns + num_beyond_columns
  figure = Figure(figsize=(3.7 + 1.05 * columns, 1.2 + 0.6 * len(tasks)),
                  layout='constrained')
  axes = figure.subplots()

  # Write the figures into the cells, and colour these by the mean. The text is
  # white on dark cells. Cells without a figure stay empty (NaN).
  values = np.full((len(tasks), columns), np.nan)
  for y, row in enumerate(tasks.values()):
    if row['lr'] is None:
      axes.text(0, y, 'diverged', ha='center', va='center', fontsize=8)
    # The cells of a row: (column, name, figure).
    cells = []
    for x, (name, figure_of_level) in enumerate(row['level'].items()):
      cells.append((x, name, figure_of_level))
    for x, (name, figure_of_length) in enumerate(row['beyond'].items(),
                                                 num_level_columns):
      cells.append((x, f'{name} length', figure_of_length))
    for x, name, cell in cells:
      values[y, x] = cell['mean']
      words = '\n'.join([name, *_figure_with_interval(cell, 2).split(' ', 1)])
      color = 'white' if cell['mean'] < 0.6 else 'black'
      axes.text(x, y, words, ha='center', va='center', fontsize=8, color=color)
  image = axes.imshow(values, vmin=0, vmax=1, cmap='viridis', aspect='auto')

  # Name the tasks and the columns.
  labels = []
  for task, row in tasks.items():
    labels.append(f'{task}\n{row["what"]}; commonest answer '
                  f'{row["commonest"]:.2f}')
  axes.set_yticks(range(len(tasks)), labels, fontsize=8)
  axes.set_xticks([])
  axes.set_xlabel('difficulty, from easy to hard; then rows longer than in '
                  'training')
  axes.axvline(num_level_columns - 0.5, color='black')
  axes.set_title(f'{len(card["seeds"])} seeds: mean and 95 % interval',
                 fontsize=9)
  figure.colorbar(image, label='accuracy')
  return figure
