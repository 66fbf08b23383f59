"""The figures of what is held out, from sums over its batches.

A figure of several sources is the mean of their own by `Loader.share`: that of
text drawn as training draws it, whatever length of each is held out. Bits per
byte are the mean loss over the mean bytes of a token.
"""

from collections.abc import Callable, Iterable, Sequence
import math
from typing import Any

import jax
import numpy as np

from training.objectives import pipeline
from training.objectives import Mean


def sum_held_out(step: Callable, params: Any,
                 loaders: Sequence[pipeline.Loader], batches: int,
                 put: Callable, stop: Callable[[], bool]
                 ) -> list[dict[str, Mean]] | None:
  """Evaluates a model on the held-out batches of each data source.

  Args:
    step: the compiled evaluation step, step(params, batch).
    params: the parameters of the model, a tree of arrays.
    loaders: the loaders of held-out data, one for each source.
    batches: the number of batches of each source; 0: all, with each token
      exactly once.
    put: a function that puts a batch on the devices.
    stop: called before each batch: returns whether to stop there.

  Returns:
    For each source {name: Mean}, each figure as a sum and the weight to divide
    it by (`average_figures` does that); None if the evaluation was stopped.
    Sums over a part of a source would be no fair figures, so there are none
    then.
  """
  sums_by_source = []
  for loader in loaders:
    sums = None
    for batch in loader.iterate(0, loader.first(batches)):
      if stop():
        return None
      sums = add_figures(sums, step(params, put(batch)))
    sums_by_source.append(sums)
  return sums_by_source


def sum_figures(results: Iterable[dict[str, Mean]]) -> dict[str, Mean]:
  """Returns the sums over some batches of what the evaluation step returned of
  each: {figure: Mean}, on the host and in float64."""
  sums: Any = None
  for result in results:
    sums = add_figures(sums, result)
  return sums


def add_figures(sums: dict[str, Mean] | None, result: dict[str, Mean]
                ) -> dict[str, Mean]:
  """Adds what the evaluation step returned of one batch to the sums of the
  batches before.

  Args:
    sums: the sums, on the host and in float64; None: it is the first batch.
    result: {figure: Mean} of the batch, on the devices.

  Returns:
    The sums with this batch.
  """
  sums_of_batch = jax.tree.map(np.float64, jax.device_get(result))
  if sums is None:
    return sums_of_batch
  return jax.tree.map(np.add, sums, sums_of_batch)


def average_figures(sums_by_source: Sequence[dict[str, Mean]],
                    loaders: Sequence[pipeline.Loader]) -> dict[str, float]:
  """Computes the figures of an evaluation from the sums over each data source.
  A figure is the mean over the sources, weighted by their share.

  Args:
    sums_by_source: {name: Mean} of each source, from `sum_figures`.
    loaders: the loaders of held-out data, one for each source.

  Returns:
    The figures of the objective, nan if there is nothing to average. If tokens
    are predicted, also their perplexity, and bits_per_byte if the loss is one
    of the whole text. If there are several sources, also the loss of each,
    loss/NAME.
  """
  # Average the figures of the objective, the loss first, as the order is that
  # of printing. A sum with weight 0 gives nan; numpy need not warn.
  objective = loaders[0].objective
  with np.errstate(divide='ignore', invalid='ignore'):
    means_by_source = [objective.means(sums) for sums in sums_by_source]
  other_names = sorted({*means_by_source[0]} - {'loss'})
  figures = {}
  for name in ['loss', *other_names]:
    if name in means_by_source[0]:
      values = [means[name] for means in means_by_source]
      figures[name] = mean_of_sources(values, loaders)

  # Add the figures that follow from the loss. Perplexity may overflow to inf.
  if objective.has_perplexity:
    with np.errstate(over='ignore'):
      figures['perplexity'] = float(np.exp(figures[objective.main]))
  if objective.predicts_every_token or objective.bound:
    sizes = [loader.bytes_per_token for loader in loaders]
    bytes_per_token = mean_of_sources(sizes, loaders)
    figures['bits_per_byte'] = figures['loss'] / (math.log(2) * bytes_per_token)
  if len(loaders) > 1:
    for loader, means in zip(loaders, means_by_source):
      figures[f'loss/{loader.name}'] = float(means['loss'])
  return figures


def list_figure_names(step: Callable, params: Any,
                      loaders: Sequence[pipeline.Loader], put: Callable,
                      sums_of_run: Callable) -> list[str]:
  """Finds the names of the figures of an evaluation without computing it.

  Args:
    step: the evaluation step, step(params, batch), jitted or not.
    params: the parameters of the model, a tree of arrays.
    loaders: the loaders of held-out data, one for each source.
    put: a function that puts a batch on the devices.
    sums_of_run: sums_of_run(sums, i) takes the sums of run i from those of all
      runs that train together.
  """
  # jax.eval_shape finds the shapes of the sums that the step would return,
  # without compiling it. Average arrays of ones in their place, and keep only
  # the names.
  batch = put(loaders[0].batch(0))
  shapes = jax.eval_shape(step, params, batch)
  ones = jax.tree.map(lambda x: np.ones(x.shape), shapes)
  ones_of_run = sums_of_run(ones, 0)
  ones_by_source = [ones_of_run] * len(loaders)
  return list(average_figures(ones_by_source, loaders))


def format_figure(value: float) -> str:
  """Returns a figure as it is printed; n/a: there was nothing to average."""
  return 'n/a' if math.isnan(value) else f'{value:.4f}'


def mean_of_sources(values: Sequence[float],
                    loaders: Sequence[pipeline.Loader]) -> float:
  """Returns the mean of the sources' values, weighted by their share of the
  text that training draws."""
  shares = [loader.share for loader in loaders]
  return float(np.dot(shares, values) / sum(shares))
