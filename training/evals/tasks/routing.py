"""How a mixture of experts routes held-out text: the health panel by layer.

Each figure is a mean over batches, by their tokens, and over sources, by
their weights."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from architectures.parts.moe import routing
from training import objectives
from training.evals import Evaluation, Task
from training.objectives import Config
from training.workdir import storage

PICTURE_FILE = 'routing.png'
MOST_ROWS = 512  # of each source, at most
# The figures of the table, and their headings: see parts/moe/routing.py.
HEADING_OF_FIGURE = {
    'dropped': 'dropped', 'unserved': 'unserved', 'load_max': 'max/mean',
    'load_entropy': 'load entropy', 'unused': 'unused',
    'confidence': 'confidence', 'router_entropy': 'router entropy',
    'shard_imbalance': 'shards max/mean', 'balance_loss': 'balance',
    'importance_loss': 'importance', 'z_loss': 'z',
}


class Routing(Task):
  """Prints the figures as a table; writes routing.png into the workdir."""

  help = 'how a mixture of experts routes held-out text'
  file = PICTURE_FILE
  figure_names = ()

  def why_unfit(self, config: Config) -> str:
    model = config.model
    networks = [model.ffn]
    for kind in model.kinds.values():
      networks.append(kind.get('ffn', ''))
    if 'moe' in networks:
      return ''
    return f'model.ffn is {model.ffn!r}, which has no experts to route to'

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints, draws and returns how tokens are spread over the experts."""
    module = evaluation.run.module
    objective = objectives.find_objective(evaluation.run.config)

    def panel(params: Any, batch: Any):
      """Returns the figures of a batch, and how many tokens it has."""
      output = objective.apply(module, params, batch)
      return output.aux['health'], objective.tokens(batch)

    # The figures of each batch, and the weight of each.
    step = evaluation.jit_once(panel, 'routing')
    panels = []
    weights = []
    for loader in evaluation.held_out_loaders():
      counts = []
      for batch_panel, tokens in evaluation.run_on_batches(
          step, loader.cut(MOST_ROWS), 'evaluating'):
        panels.append(batch_panel)
        counts.append(tokens)
      weights += [loader.share * tokens / sum(counts) for tokens in counts]
    weights_W = np.array(weights, np.float32)

    # Their means. An expert is unused if no batch of them all used it.
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *panels)
    figures = {}
    for name, values in stacked.items():
      figures[name] = np.average(values, 0, weights_W)
    window = routing.window(stacked['load_E'], weights_W)
    for name, values in window.items():
      figures[name] = np.asarray(values)

    # The table, and a picture of it.
    print(format_table(figures))
    path = evaluation.workdir / PICTURE_FILE
    draw_load(figures['load_E'], path)
    print(f'load by layer and expert: {path}')
    return {name: values.tolist() for name, values in figures.items()}


def format_table(figures: Mapping[str, np.ndarray]) -> str:
  """Returns the table of the figures, a row for each layer of experts."""
  headings = [f'{heading:>17}' for heading in HEADING_OF_FIGURE.values()]
  lines = [f'{"layer":<6}' + ''.join(headings)]
  for layer in range(len(figures['load_E'])):
    cells = []
    for name in HEADING_OF_FIGURE:
      text = f'{figures[name][layer]:.4f}'
      cells.append(f'{text:>17}')
    lines.append(f'{layer:<6}' + ''.join(cells))
  return '\n'.join(lines)


def draw_load(load_NE: np.ndarray, path: Any) -> None:
  """Draws the load of each expert, 1 where it is even."""
  from matplotlib import figure as figures, ticker
  layers, experts = load_NE.shape
  # A picture that grows with the model, up to a page.
  width = max(4, min(12, experts / 2))
  height = max(2, min(10, 1 + layers / 3))
  figure = figures.Figure(figsize=(width, height), layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(load_NE * experts, aspect='auto', vmin=0, vmax=2,
                      cmap='RdBu_r')
  axes.set(xlabel='expert', ylabel='layer of experts',
           title='load of an expert over the mean')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(12, integer=True))
  figure.colorbar(image, ax=axes, extend='max')
  storage.write_picture(path, figure)


TASKS = {'routing': Routing()}
