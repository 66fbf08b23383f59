"""The score card: what the runs of a suite found, in a file and a picture."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from etils import epath
import numpy as np

from configs.errors import require
from tools.compare import statistics
from tools.probes import suites
from training.workdir import storage

JSON, PICTURE = 'card.json', 'card.png'


def of(suite: suites.Suite, workdir: epath.Path) -> dict[str, Any]:
  """Returns the card: for each task the figures of its best learning rate.

  It is chosen by the same held-out rows that the figures are of, as in the
  papers that give the best of several learning rates. A rate at which a run
  diverged is none to choose.
  """
  from training.data import probes
  from training.evals.tasks import probe as probe_task
  tasks = {}
  for task, config in suite.configs.items():
    by_lr: dict[float, list] = {}
    diverged: dict[float, list[int]] = {}
    for run in suite.runs(task):
      if suites.diverged(run, workdir):
        diverged.setdefault(run.lr, []).append(run.seed)
      else:
        by_lr.setdefault(run.lr, []).append(_figures(run.folder(workdir)))
    by_lr = {lr: each for lr, each in by_lr.items() if lr not in diverged}
    tasks[task] = dict(
        steps=config.train.steps, diverged=diverged,
        what=probes.of(config).level, commonest=probe_task.constant(config),
        **_of_best(by_lr))
  return dict(suite=suite.file, seeds=list(suite.seeds), tasks=tasks)


def _of_best(by_lr: Mapping[float, Sequence[Mapping]]) -> dict[str, Any]:
  """Returns the figures of the best of the learning rates at which no run
  diverged; lr is None where there is none."""
  if not by_lr:
    return dict(lr=None, accuracy_by_lr={}, accuracy=None, rows_right=None,
                level={}, beyond={}, rows=0)
  mean = {lr: float(np.mean([own['probe/accuracy'] for own in each]))
          for lr, each in by_lr.items()}
  best = max(mean, key=mean.get)
  figures = {name.removeprefix('probe/'): _over_seeds(
      [own[name] for own in by_lr[best]]) for name in by_lr[best][0]
             if name.startswith('probe/')}
  group = lambda prefix: {name.removeprefix(prefix): figure
                          for name, figure in figures.items()
                          if name.startswith(prefix)}
  return dict(lr=best, accuracy_by_lr=mean, accuracy=figures['accuracy'],
              rows_right=figures['rows_right'], level=group('level/'),
              beyond=group('beyond/'), rows=int(figures['rows']['mean']))


def _figures(folder: epath.Path) -> dict[str, float]:
  """Returns the last figures of the task in a run's metrics."""
  rows = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  found = [row for row in rows if 'probe/accuracy' in row]
  require(bool(found), f'{folder} holds no figures of the task probe')
  return found[-1]


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
  """Returns the mean over the seeds, half of its 95 % interval by Student's t
  (None of one seed), and the figure of each seed."""
  return dict(mean=float(np.mean(values)), seeds=list(values),
              half_95=statistics.half_width(values) if values[1:] else None)


def text(card: Mapping[str, Any]) -> str:
  """Renders a card for a terminal."""
  seeds = len(card['seeds'])
  lines = [f'accuracy over {seeds} seeds, at the best learning rate: mean ± '
           'half of the 95 % interval']
  for task, own in card['tasks'].items():
    failed = ', '.join(f'{lr:g} ({len(each)} of {seeds} runs)'
                       for lr, each in own['diverged'].items())
    if own['lr'] is None:
      lines.append(f'{task}: no figures, since runs diverged at every lr: '
                   f'{failed}')
      continue
    lines.append(f'{task}, lr {own["lr"]:g}: {_shown(own["accuracy"])} '
                 f'(the commonest answer: {own["commonest"]:.4f}); by '
                 f'{own["what"]}:')
    if failed:
      lines.append(f'  left out, since runs diverged: lr {failed}')
    figures = own['level'] | {f'beyond training {name}': figure
                              for name, figure in own['beyond'].items()}
    lines += [f'  {name:<22} {_shown(figure)}'
              for name, figure in figures.items()]
  return '\n'.join(lines)


def _shown(figure: Mapping[str, Any], digits: int = 4) -> str:
  half = figure['half_95']
  more = '' if half is None else f' ± {half:.{digits}f}'
  return f'{figure["mean"]:.{digits}f}{more}'


def write(card: Mapping[str, Any], workdir: epath.Path) -> None:
  """Writes card.json and card.png."""
  storage.write(workdir / JSON, json.dumps(card, indent=1) + '\n')
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure = _draw(card, pyplot)
  with (workdir / PICTURE).open('wb') as file:
    figure.savefig(file, dpi=150, format='png')
  pyplot.close(figure)


def _draw(card: Mapping[str, Any], pyplot: Any) -> Any:
  """Draws a row of cells for each task: its levels, then longer rows."""
  tasks = card['tasks']
  width = max(1, *(len(own['level']) for own in tasks.values()))
  columns = width + max(len(own['beyond']) for own in tasks.values())
  figure, axes = pyplot.subplots(
      figsize=(3.7 + 1.05 * columns, 1.2 + 0.6 * len(tasks)),
      layout='constrained')
  values = np.full((len(tasks), columns), np.nan)
  for y, own in enumerate(tasks.values()):
    if own['lr'] is None:
      axes.text(0, y, 'diverged', ha='center', va='center', fontsize=8)
    longer = [(f'{name} length', cell) for name, cell in own['beyond'].items()]
    for x, (name, cell) in [*enumerate(own['level'].items()),
                            *enumerate(longer, width)]:
      values[y, x] = cell['mean']
      axes.text(x, y, f'{name}\n{_shown(cell, 2)}', ha='center', va='center',
                fontsize=8, color='white' if cell['mean'] < 0.6 else 'black')
  image = axes.imshow(values, vmin=0, vmax=1, cmap='viridis', aspect='auto')
  axes.set_yticks(range(len(tasks)), [
      f'{task}\n{own["what"]}; commonest answer {own["commonest"]:.2f}'
      for task, own in tasks.items()], fontsize=8)
  groups = [((width - 1) / 2, 'difficulty, from easy to hard')]
  if columns > width:
    groups.append(((width + columns - 1) / 2, 'rows longer than in training'))
  axes.set_xticks(*zip(*groups))
  axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
  axes.set_yticks(np.arange(len(tasks) - 1) + 0.5, minor=True)
  axes.xaxis.remove_overlapping_locs = False  # a group's name is at an edge
  axes.grid(which='minor', color='white', linewidth=1.5)
  axes.tick_params(which='both', length=0)
  axes.axvline(width - 0.5, color='black')
  axes.set_title(f'{len(card["seeds"])} seeds: mean ± half of the 95 % '
                 'interval', fontsize=9)
  figure.colorbar(image, label='accuracy')
  return figure
