"""The score card: what the runs of a suite found, in a file and a picture."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from etils import epath

from configs.errors import RequestError, require
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
  import numpy as np
  if not by_lr:
    return dict(lr=None, accuracy_by_lr={}, accuracy=None, rows_right=None,
                level={}, beyond={}, rows=0)
  mean = {lr: float(np.mean([own['probe/accuracy'] for own in each]))
          for lr, each in by_lr.items()}
  best = max(mean, key=lambda lr: mean[lr])
  return dict(
      lr=best, accuracy_by_lr=mean,
      accuracy=_over_seeds(by_lr[best], 'probe/accuracy'),
      rows_right=_over_seeds(by_lr[best], 'probe/rows_right'),
      level=_group(by_lr[best], 'probe/level/'),
      beyond=_group(by_lr[best], 'probe/beyond/'),
      rows=int(by_lr[best][0]['probe/rows']))


def _figures(folder: epath.Path) -> dict[str, float]:
  """Returns the last figures of the task in a run's metrics."""
  found = None
  for line in (folder / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    if 'probe/accuracy' in row:
      found = row
  require(found is not None, f'{folder} holds no figures of the task probe')
  return found


def _group(each: Sequence[Mapping], prefix: str) -> dict[str, Any]:
  return {name.removeprefix(prefix): _over_seeds(each, name)
          for name in each[0] if name.startswith(prefix)}


def _over_seeds(each: Sequence[Mapping], name: str) -> dict[str, Any]:
  """Returns the mean over the seeds, half of its 95 % interval by Student's t
  (None of one seed), and the figure of each seed."""
  import numpy as np
  from scipy import stats
  values = [own[name] for own in each]
  n = len(values)
  half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n ** 0.5
               ) if n > 1 else None
  return dict(mean=float(np.mean(values)), half_95=half, seeds=values)


def text(card: Mapping[str, Any]) -> str:
  """Renders a card for a terminal."""
  lines = [f'accuracy over {len(card["seeds"])} seeds, at the best learning '
           'rate: mean ± half of the 95 % interval']
  for task, own in card['tasks'].items():
    failed = ', '.join(
        f'{lr:g} ({len(seeds)} of {len(card["seeds"])} runs)'
        for lr, seeds in own['diverged'].items())
    if own['lr'] is None:
      lines.append(f'{task}: no figures, since runs diverged at every lr: '
                   f'{failed}')
      continue
    lines.append(f'{task}, lr {own["lr"]:g}: {_shown(own["accuracy"])} '
                 f'(the commonest answer: {own["commonest"]:.4f}); by '
                 f'{own["what"]}:')
    if failed:
      lines.append(f'  left out, since runs diverged: lr {failed}')
    for kind, word in (('level', ''), ('beyond', 'beyond training ')):
      for name, figure in own[kind].items():
        lines.append(f'  {word + name:<22} {_shown(figure)}')
  return '\n'.join(lines)


def _shown(figure: Mapping[str, Any]) -> str:
  half = figure['half_95']
  more = '' if half is None else f' ± {half:.4f}'
  return f'{figure["mean"]:.4f}{more}'


def write(card: Mapping[str, Any], workdir: epath.Path) -> None:
  """Writes card.json and card.png."""
  storage.write(workdir / JSON, json.dumps(card, indent=1) + '\n')
  _draw(card, workdir / PICTURE)


def check_picture() -> None:
  """Raises RequestError where the picture could not be drawn."""
  try:
    import matplotlib
  except ImportError as error:
    raise RequestError('the picture needs the package matplotlib: pip install '
                       "'archetype[plot]'.") from error
  matplotlib.use('Agg')


def _draw(card: Mapping[str, Any], path: epath.Path) -> None:
  """Draws a row of cells for each task: its levels, then longer rows."""
  import numpy as np
  from matplotlib import pyplot
  tasks = card['tasks'].values()
  width = max(1, *(len(own['level']) for own in tasks))
  columns = width + max(len(own['beyond']) for own in tasks)
  figure, axes = pyplot.subplots(
      figsize=(3.7 + 1.05 * columns, 1.2 + 0.6 * len(tasks)),
      layout='constrained')
  values = np.full((len(tasks), columns), np.nan)
  for y, own in enumerate(tasks):
    if own['lr'] is None:
      axes.text(0, y, 'diverged', ha='center', va='center', fontsize=8)
    longer = [(f'{name} length', cell) for name, cell in own['beyond'].items()]
    for x, (name, cell) in [*enumerate(own['level'].items()),
                            *enumerate(longer, width)]:
      values[y, x] = cell['mean']
      axes.text(x, y, f'{name}\n{_short(cell)}', ha='center', va='center',
                fontsize=8, color='white' if cell['mean'] < 0.6 else 'black')
  image = axes.imshow(values, vmin=0, vmax=1, cmap='viridis', aspect='auto')
  axes.set_yticks(range(len(tasks)), [
      f'{task}\n{own["what"]}; commonest answer {own["commonest"]:.2f}'
      for task, own in card['tasks'].items()], fontsize=8)
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
  with path.open('wb') as file:
    figure.savefig(file, dpi=150, format='png')
  pyplot.close(figure)


def _short(cell: Mapping[str, Any]) -> str:
  half = cell['half_95']
  return f'{cell["mean"]:.2f}' + ('' if half is None else f' ± {half:.2f}')
