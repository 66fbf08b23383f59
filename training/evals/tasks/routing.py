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
MOST_ROWS = 512  # of each source, enough for steady means
# The figures of the table in its order, with their headings; what each is, the
# router's report says (parts/moe/routing.py).
HEADING_OF_FIGURE = {
    'dropped': 'dropped', 'unserved': 'unserved', 'load_max': 'max/mean',
    'load_entropy': 'load entropy', 'unused': 'unused',
    'confidence': 'confidence', 'router_entropy': 'router entropy',
    'shard_imbalance': 'shards max/mean', 'balance_loss': 'balance',
    'importance_loss': 'importance', 'z_loss': 'z',
}


class Routing(Task):
  """Prints the figures of the routers as a table; writes routing.png into the
  run's folder."""

  help = 'how a mixture of experts routes held-out text'
  file = PICTURE_FILE
  figure_names = ()

  def why_unfit(self, config: Config) -> str:
    """Returns why a run with this config has no experts; '': it has some."""
    model = config.model
    networks = [model.ffn]
    # Kinds of layer may have a network of their own.
    for layer_kind in model.kinds.values():
      networks.append(layer_kind.get('ffn', ''))
    if 'moe' in networks:
      return ''
    return f'model.ffn is {model.ffn!r}, which has no experts to route to'

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Measures how tokens are spread over the experts (mixture of experts), and
    prints and draws it.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      {name: figures of the layers of experts}.
    """
    module = evaluation.run.module
    objective = objectives.find_objective(evaluation.run.config)

    def report_routing(params: Any, batch: Any) -> tuple[Any, Any]:
      """Returns the figures of a batch by name, each with an entry for each
      layer of experts, and how many tokens the batch has."""
      output = objective.apply(module, params, batch)
      return output.aux['health'], objective.tokens(batch)

    # Collect the figures of each batch, and the weight of each: its share of
    # the tokens of its source, times the source's share.
    step = evaluation.jit_once(report_routing, 'routing')
    reports = []
    weights = []
    for loader in evaluation.held_out_loaders():
      token_counts = []
      for report, num_tokens in evaluation.run_on_batches(
          step, loader.limit_rows(MOST_ROWS), 'evaluating'):
        reports.append(report)
        token_counts.append(num_tokens)
      tokens_of_source = sum(token_counts)
      for num_tokens in token_counts:
        weights.append(loader.share * num_tokens / tokens_of_source)
    weights_W = np.array(weights, np.float32)

    # Average over the W batches, for each of the N layers of experts. Some
    # figures of the load are no means: an expert is unused if no batch used it.
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *reports)
    figures = {}
    for name, values_WN in stacked.items():
      figures[name] = np.average(values_WN, 0, weights_W)
    load_figures = routing.summarize_window(stacked['load_E'], weights_W)
    for name, values_N in load_figures.items():
      figures[name] = np.asarray(values_N)

    # Print the table, and draw a picture of it.
    print(format_table(figures))
    path = evaluation.workdir / PICTURE_FILE
    draw_load(figures['load_E'], path)
    print(f'load by layer and expert: {path}')
    return {name: values.tolist() for name, values in figures.items()}


def format_table(figures: Mapping[str, np.ndarray]) -> str:
  """Formats a table of how tokens are spread over experts, a row a layer.

  Args:
    figures: {name: figures of the N layers of experts, [N]} of
      HEADING_OF_FIGURE, and load_E, the share of the assignments that each
      expert gets, [N, E].
  """
  headings = [f'{heading:>17}' for heading in HEADING_OF_FIGURE.values()]
  lines = [f'{"layer":<6}' + ''.join(headings)]
  for layer in range(len(figures['load_E'])):
    cells = []
    for name in HEADING_OF_FIGURE:
      value = f'{figures[name][layer]:.4f}'
      cells.append(f'{value:>17}')
    lines.append(f'{layer:<6}' + ''.join(cells))
  return '\n'.join(lines)


def draw_load(load_NE: np.ndarray, path: Any) -> None:
  """Draws the load of each expert over the mean of its layer, as a picture with
  a row for each layer of experts.

  The suffixes name axes: N layers, E experts.

  Args:
    load_NE: the share of the assignments that each expert gets, [layers,
      experts].
    path: the file of the picture.
  """
  from matplotlib import figure as matplotlib_figure, ticker
  num_layers, num_experts = load_NE.shape
  # Let the picture grow with the model, up to a page.
  width = max(4, min(12, num_experts / 2))
  height = max(2, min(10, 1 + num_layers / 3))
  figure = matplotlib_figure.Figure(figsize=(width, height),
                                    layout='constrained')

  # Colours show the load over the mean, 1 / experts: white at 1, and ever
  # darker to 0 and to 2, beyond which all look alike.
  axes = figure.subplots()
  image = axes.imshow(load_NE * num_experts, aspect='auto', vmin=0, vmax=2,
                      cmap='RdBu_r')
  axes.set(xlabel='expert', ylabel='layer of experts',
           title='load of an expert over the mean')
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(ticker.MaxNLocator(12, integer=True))
  figure.colorbar(image, ax=axes, extend='max')
  storage.write_picture(path, figure)


TASKS = {'routing': Routing()}
