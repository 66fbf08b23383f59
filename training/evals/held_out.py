"""The figures of what is held out, from sums over its batches.

A figure of several sources is the mean of their own by `Loader.share`: that of
text drawn as training draws it, whatever length of each is held out. Bits per
byte are the mean loss over the mean bytes of a token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import math
from typing import Any

import jax
import numpy as np

from training import progress
from training.objectives import pipeline
from training.objectives import Mean


def sum_held_out(step: Callable, params: Any,
                 loaders: Sequence[pipeline.Loader],
             batches: int, put: Callable, stop: Callable[[], bool]
             ) -> list[dict[str, Mean]] | None:
  """Returns the `sums` of what is held out, for `means`; None if stopped.

  Args:
    step: the compiled evaluation step.
    params: the parameters.
    loaders: those of pipeline.make_evaluation_loaders.
    batches: how many of each source; 0: all, each token exactly once.
    put: puts a batch on the devices.
    stop: asked before each batch, whether to leave it at that.
  """
  def results(loader: pipeline.Loader) -> Iterator[Any]:
    """Yields what the step returns of each batch of a loader."""
    for batch in loader.iterate(0, loader.first(batches)):
      if stop():
        raise progress.WorkStopped
      yield step(params, put(batch))

  try:
    # A signal may come in the middle of a source.
    return [sum_figures(results(loader)) for loader in loaders]
  except progress.WorkStopped:
    return None


def sum_figures(results: Iterable[dict[str, Mean]]) -> dict[str, Mean]:
  """Returns {figure: Mean} of what a step returned of some batches, on the
  host."""
  total: Any = None
  for one in results:
    more = jax.tree.map(np.float64, jax.device_get(one))
    if total is None:
      total = more
    else:
      total = jax.tree.map(np.add, total, more)
  return total


def average_figures(totals: Sequence[dict[str, Mean]],
          loaders: Sequence[pipeline.Loader]) -> dict[str, float]:
  """Returns the figures of an evaluation: means over the sources by share.

  Args:
    totals: `sums` of each loader.
    loaders: those of pipeline.make_evaluation_loaders.

  Returns:
    The objective's figures, nan where there is nothing to average; of tokens
    their perplexity; where the loss is one of the text, bits per byte; and
    of several sources each one's own loss, as loss/NAME.
  """
  # The objective's figures, the loss first.
  objective = loaders[0].objective
  with np.errstate(divide='ignore', invalid='ignore'):
    each = [objective.means(total) for total in totals]
  others = sorted({*each[0]} - {'loss'})
  figures = {}
  for name in ['loss', *others]:
    if name in each[0]:
      figures[name] = mean_of_sources([one[name] for one in each], loaders)

  # The figures that follow from them.
  if objective.perplexity:
    with np.errstate(over='ignore'):
      figures['perplexity'] = float(np.exp(figures[objective.main]))
  if objective.every_token or objective.bound:
    size = mean_of_sources([loader.bytes_per_token for loader in loaders],
                           loaders)
    figures['bits_per_byte'] = figures['loss'] / (math.log(2) * size)
  if len(loaders) > 1:
    for loader, one in zip(loaders, each):
      figures[f'loss/{loader.name}'] = float(one['loss'])
  return figures


def list_figure_names(step: Callable, params: Any,
                      loaders: Sequence[pipeline.Loader],
          put: Callable, part: Callable) -> list[str]:
  """Returns the names of the figures of an evaluation; none is done.

  Args:
    step: the evaluation step, jitted or not.
    params, loaders, put: as for `evaluate`.
    part: the function of the program that gives a member's part of sums.
  """
  # The sums of one run, of which only the shapes are known: ones in them.
  batch = put(loaders[0].batch(0))
  shapes = jax.eval_shape(step, params, batch)
  ones = jax.tree.map(lambda x: np.ones(x.shape), shapes)
  ones_of_run = part(ones, 0)
  of_sources = [ones_of_run] * len(loaders)
  return list(average_figures(of_sources, loaders))


def format_figure(value: float) -> str:
  """Returns a figure as it is printed; n/a: there was nothing to average."""
  return 'n/a' if math.isnan(value) else f'{value:.4f}'


def mean_of_sources(values: Sequence[float],
                    loaders: Sequence[pipeline.Loader]) -> float:
  """Returns the mean of the sources' values, by their share."""
  shares = [loader.share for loader in loaders]
  return float(np.dot(shares, values) / sum(shares))
