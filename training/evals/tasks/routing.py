"""How a mixture of experts routes held-out text: the health panel by layer.

Each figure is a mean over batches, by their tokens, and over sources, by
their weights."""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from architectures.parts.moe import routing
from training import objectives
from training.evals import Evaluation, Task
from training.workdir import storage

FILE = 'routing.png'
ROWS = 512  # of each source, at most
# What the table shows, and its heading: see parts/moe/routing.py.
COLUMNS = {
    'dropped': 'dropped', 'unserved': 'unserved', 'load_max': 'max/mean',
    'load_entropy': 'load entropy', 'unused': 'unused',
    'confidence': 'confidence', 'router_entropy': 'router entropy',
    'shard_imbalance': 'shards max/mean', 'balance_loss': 'balance',
    'importance_loss': 'importance', 'z_loss': 'z',
}


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints the table; writes routing.png into the workdir."""
  run_, objective = evaluation.run, objectives.of(evaluation.run.config)

  def panel(params: Any, batch: Any):
    output = objective.apply(run_.module, params, batch)
    return output.aux['health'], objective.tokens(batch)

  step = evaluation.program(panel, 'routing')
  panels, weights_W = [], []
  for loader in evaluation.held_out():
    batch_panels, tokens_W = zip(*evaluation.results(
        step, loader.cut(ROWS), 'evaluating'))
    panels += batch_panels
    weights_W += [loader.share * n / sum(tokens_W) for n in tokens_W]
  weights_W = np.array(weights_W, np.float32)
  panels = jax.tree.map(lambda *xs: np.stack(xs), *panels)
  figures = {name: np.average(x, 0, weights_W) for name, x in panels.items()}
  # An expert is unused if no batch of them all used it.
  figures |= {name: np.asarray(x) for name, x in routing.window(
      panels['load_E'], weights_W).items()}
  print(table(figures))
  path = evaluation.workdir / FILE
  plot(figures['load_E'], path)
  print(f'load by layer and expert: {path}')
  return {name: x.tolist() for name, x in figures.items()}


def table(figures: Mapping[str, np.ndarray]) -> str:
  """One row a layer of experts."""
  rows = [['layer', *COLUMNS.values()], *(
      [str(n), *(f'{figures[name][n]:.4f}' for name in COLUMNS)]
      for n in range(len(figures['load_E'])))]
  return '\n'.join(f'{layer:<6}' + ''.join(f'{cell:>17}' for cell in cells)
                   for layer, *cells in rows)


def plot(load_NE: np.ndarray, path: Any) -> None:
  """Draws the load of each expert, 1 where it is even."""
  from matplotlib import figure as figures, ticker
  layers, experts = load_NE.shape
  figure = figures.Figure(
      figsize=(max(4, min(12, experts / 2)), max(2, min(10, 1 + layers / 3))),
      layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(load_NE * experts, aspect='auto', vmin=0, vmax=2,
                      cmap='RdBu_r')
  axes.set(xlabel='expert', ylabel='layer of experts',
           title='load of an expert over the mean')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(12, integer=True))
  figure.colorbar(image, ax=axes, extend='max')
  storage.write_picture(path, figure)


def _unfit(config: ml_collections.ConfigDict) -> str:
  kinds = [kind.get('ffn', '') for kind in config.model.kinds.values()]
  return '' if 'moe' in (config.model.ffn, *kinds) else (
      f'model.ffn is {config.model.ffn!r}, which has no experts to route to')


TASKS = {'routing': Task(
    'how a mixture of experts routes held-out text', run, _unfit, file=FILE,
    figures=())}
