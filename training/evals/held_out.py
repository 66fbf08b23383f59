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
                 loaders: Sequence[pipeline.Loader], batches: int,
                 put: Callable, stop: Callable[[], bool]
                 ) -> list[dict[str, Mean]] | None:
  """Runs the evaluation step on the held-out batches of each source.

  Args:
    step: the compiled evaluation step.
    params: the parameters of the model, a tree of arrays.
    loaders: the loaders of held-out data, one for each source.
    batches: the number of batches of each source; 0: all, each token exactly
      once.
    put: a function that puts a batch on the devices.
    stop: a function that is called before each batch: whether to stop there.

  Returns:
    For each source the sums of its figures, {name: Mean}, for
    `average_figures`; None if stopped.
  """
  def run_batches(loader: pipeline.Loader) -> Iterator[Any]:
    """Yields what the step returns of each batch of a loader."""
    for batch in loader.iterate(0, loader.first(batches)):
      if stop():
        raise progress.WorkStopped
      yield step(params, put(batch))

  # The generator raises in the middle of a source, and a part of one is no
  # figure, so all is given up.
  try:
    return [sum_figures(run_batches(loader)) for loader in loaders]
  except progress.WorkStopped:
    return None


def sum_figures(results: Iterable[dict[str, Mean]]) -> dict[str, Mean]:
  """Returns the sums over some batches of what the evaluation step returned of
  each: {figure: Mean}, on the host and in float64."""
  sums: Any = None
  for result in results:
    sums_of_batch = jax.tree.map(np.float64, jax.device_get(result))
    if sums is None:
      sums = sums_of_batch
    else:
      sums = jax.tree.map(np.add, sums, sums_of_batch)
  return sums


def average_figures(sums_by_source: Sequence[dict[str, Mean]],
                    loaders: Sequence[pipeline.Loader]) -> dict[str, float]:
  """Computes the figures of an evaluation: means over the sources by share.

  Args:
    sums_by_source: the `sum_figures` of each source.
    loaders: the loaders of held-out data, one for each source.

  Returns:
    The objective's figures, nan where there is nothing to average; of tokens
    their perplexity; where the loss is one of the text, bits per byte; and
    of several sources each one's own loss, as loss/NAME.
  """
  # Average the objective's figures, the loss first, as it is printed first. A
  # sum with weight 0 gives nan, of which numpy need not warn.
  objective = loaders[0].objective
  with np.errstate(divide='ignore', invalid='ignore'):
    means_by_source = [objective.means(sums) for sums in sums_by_source]
  other_names = sorted({*means_by_source[0]} - {'loss'})
  figures = {}
  for name in ['loss', *other_names]:
    if name in means_by_source[0]:
      values = [means[name] for means in means_by_source]
      figures[name] = mean_of_sources(values, loaders)

  # Add the figures that follow from them. The exponential of a very high loss
  # is inf.
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
  """Finds the names of the figures of an evaluation without doing it.

  Args:
    step: the evaluation step, jitted or not.
    params: the parameters of the model, a tree of arrays.
    loaders: the loaders of held-out data, one for each source.
    put: a function that puts a batch on the devices.
    sums_of_run: the function of the program that takes one run's sums from
      those of all runs that train together: sums_of_run(sums, number of the
      run).
  """
  # Average sums that are ones, of the shapes that the step would return.
  # jax.eval_shape finds these without computing or compiling anything; only the
  # names of the result are of use.
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
