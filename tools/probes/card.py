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
  papers that give the best of several learning rates.
  """
  import numpy as np

  from training.data import probes
  tasks = {}
  for task, config in suite.configs.items():
    by_lr: dict[float, list] = {}
    for run in suite.runs(task):
      by_lr.setdefault(run.lr, []).append(_figures(run.folder(workdir)))
    mean = {lr: float(np.mean([own['probe/accuracy'] for own in each]))
            for lr, each in by_lr.items()}
    best = max(mean, key=lambda lr: mean[lr])
    tasks[task] = dict(
        lr=best, steps=config.train.steps, accuracy_by_lr=mean,
        what=probes.of(config).level,
        accuracy=_over_seeds(by_lr[best], 'probe/accuracy'),
        rows_right=_over_seeds(by_lr[best], 'probe/rows_right'),
        level=_group(by_lr[best], 'probe/level/'),
        beyond=_group(by_lr[best], 'probe/beyond/'),
        rows=int(by_lr[best][0]['probe/rows']))
  return dict(suite=suite.file, seeds=list(suite.seeds), tasks=tasks)


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
    lines.append(f'{task}, lr {own["lr"]:g}: {_shown(own["accuracy"])}; '
                 f'by {own["what"]}:')
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
  rows = [[(name, figure['mean']) for name, figure in own['level'].items()]
          for own in card['tasks'].values()]
  more = [[(f'{name} length', figure['mean'])
           for name, figure in own['beyond'].items()]
          for own in card['tasks'].values()]
  width = max(map(len, rows))
  columns = width + max(map(len, more), default=0)
  values = np.full((len(rows), columns), np.nan)
  figure, axes = pyplot.subplots(
      figsize=(2.5 + 0.95 * columns, 1.2 + 0.55 * len(rows)),
      layout='constrained')
  for y, (levels, longer) in enumerate(zip(rows, more)):
    for x, (name, value) in [*enumerate(levels), *enumerate(longer, width)]:
      values[y, x] = value
      axes.text(x, y, f'{name}\n{value:.2f}', ha='center', va='center',
                fontsize=8, color='white' if value < 0.6 else 'black')
  image = axes.imshow(values, vmin=0, vmax=1, cmap='viridis', aspect='auto')
  axes.set_yticks(range(len(rows)), [
      f'{task}\n({own["what"]})' for task, own in card['tasks'].items()])
  axes.set_xticks([])
  axes.axvline(width - 0.5, color='black')
  axes.set_xlabel('difficulty, from easy to hard | rows longer than in '
                  'training')
  figure.colorbar(image, label='accuracy')
  with path.open('wb') as file:
    figure.savefig(file, dpi=150, format='png')
  pyplot.close(figure)
