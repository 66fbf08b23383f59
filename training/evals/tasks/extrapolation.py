"""Loss by position at 1, 2, 4 and 8 times the training length.

Each position encoding goes past its training length in its own way:
sinusoidal, ALiBi, T5's relative bias and none as they are; RoPE as it is and
with each scaling, its factor the multiple of the length; learned positions
end at max_len, and are stretched only on request (--interpolate).

Every figure is a mean over tokens, the same ones at each length, and says over
how many: where the text is shorter than a row, no token reaches the row's end,
and there is no loss. With several sources each token counts by its source's
weight.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import positions
from architectures.parts.config import ModelConfig
from training import objectives, progress
from training.data.tokenizers import Tokenizer
from training.distributed import devices
from training.evals import Evaluation, Flag, Task
from training.objectives import pipeline
from training.workdir import storage

PICTURE_FILE = 'extrapolation.png'
# The lengths that are read, as multiples of the training length.
LENGTH_MULTIPLES = (1, 2, 4, 8)
LEAST_TOKENS = 2 ** 17  # that each length is measured on, where there are such

# The loss by position of each variant of the model (its position encoding as it
# is, or scaled for longer texts), by multiple of the training length:
# {variant: {multiple: [L]}}; None: the model refuses the length.
Curves = Mapping[str, Mapping[int, np.ndarray | None]]


class TokensByPosition(NamedTuple):
  """The tokens that a length is measured on.

  Attributes:
    num_tokens: int [L], how many tokens are predicted at each position.
    weights: [L], the sum of their weights, which depend on their source.
  """
  num_tokens: np.ndarray
  weights: np.ndarray


class SourceBatches(NamedTuple):
  """A source of held-out text as rows of one length.

  Attributes:
    token_weight: the weight of each of its tokens in a mean over all sources.
    batches: its batches, on the devices.
  """
  token_weight: float
  batches: list


class Extrapolation(Task):
  """Prints the losses as a table; writes extrapolation.png into the run's
  folder."""

  help = 'loss by position at 1, 2, 4 and 8 times the training length'
  why_not_allowed = ('does not predict every token, so it has no loss by '
                     'position')
  file = PICTURE_FILE
  figure_names = ('length', 'loss at *')
  flags = (
      Flag(name='interpolate', default=False,
           help='Stretch learned positions past max_len.'),
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.predicts_every_token

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Measures the loss on texts of the training length and of multiples of
    it, and prints and draws it.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      The mean loss at each length, and the loss at each position.
    """
    model = evaluation.run.model
    length = evaluation.run.config.data.length

    # Each variant of the model reads each length. A variant may be for longer
    # texts alone, so the table of curves has gaps.
    curves: dict[str, dict[int, np.ndarray | None]] = {}
    tokens_by_multiple: dict[int, TokensByPosition] = {}
    for multiple in LENGTH_MULTIPLES:
      sources = list(_load_sources(evaluation, multiple))
      tokens = _count_tokens(sources)
      tokens_by_multiple[multiple] = tokens
      variants = positions.position_of(model).variants_for_longer_rows(
          model, length, multiple, evaluation.options.interpolate)
      for name, variant in variants.items():
        curve = None
        if variant is not None:  # else the model refuses the length
          curve = _loss_by_position(evaluation, model=variant, sources=sources,
                                    tokens=tokens)
        curves.setdefault(name, {})[multiple] = curve

    # Print the table, and draw the picture.
    print(format_table(curves, tokens_by_multiple=tokens_by_multiple,
                       length=length))
    path = evaluation.workdir / PICTURE_FILE
    draw_losses(curves, tokens_by_multiple=tokens_by_multiple, length=length,
                path=path)
    print(f'loss by position: {path}')
    return _figures_for_json(curves, tokens_by_multiple=tokens_by_multiple,
                             length=length, position=model.position)


def _figures_for_json(curves: Curves,
                      tokens_by_multiple: Mapping[int, TokensByPosition],
                      length: int, position: str) -> dict[str, Any]:
  """Collects the losses by position, and the mean loss at each length, as
  values for JSON (--json).

  Args:
    curves: {variant of the model: {multiple of the training length: the loss at
      each position; None if the model refuses the length}}.
    tokens_by_multiple: {multiple: the tokens on which the losses were
      measured}.
    length: the number of tokens of a row in training.
    position: the position encoding with which the model was trained. The
      figures of this variant have no variant in their names.

  Returns:
    A dict with the mean losses by name; `length`; `texts`, the numbers of
    tokens at each position; and `curves`, the losses at each position.
  """
  # Keys of JSON are texts, so multiples are written as such.
  figures: dict[str, Any] = {'length': length, 'texts': {}, 'curves': {}}
  for multiple, tokens in tokens_by_multiple.items():
    figures['texts'][str(multiple)] = {
        'tokens': tokens.num_tokens.tolist(),
        'weights': tokens.weights.tolist()}

  for name, curve_by_multiple in curves.items():
    losses_by_multiple: dict[str, list | None] = {}
    for multiple, curve in curve_by_multiple.items():
      # The model refuses texts of this length.
      if curve is None:
        losses_by_multiple[str(multiple)] = None
        continue
      losses_by_multiple[str(multiple)] = curve.tolist()
      figure_name = f'loss at {multiple} × length'
      if name != position:
        figure_name += f' ({name})'
      figures[figure_name] = mean_loss(curve, tokens_by_multiple[multiple])
    figures['curves'][name] = losses_by_multiple
  return figures


def mean_loss(curve: Any, tokens: TokensByPosition,
              positions_averaged: slice = slice(None)) -> float:
  """Averages a loss over the tokens at some positions of a text.

  Args:
    curve: the loss at each position, [L].
    tokens: the numbers and the weights of the tokens at each position.
    positions_averaged: the positions; by default all.

  Returns:
    The mean, weighted by the tokens; nan where there are none.
  """
  # The loss at a position without tokens is nan, and must be left out.
  losses = curve[positions_averaged]
  weights = tokens.weights[positions_averaged]
  has_tokens = tokens.num_tokens[positions_averaged] > 0
  if not has_tokens.any():
    return math.nan
  return float(np.average(losses[has_tokens], weights=weights[has_tokens]))


def _load_sources(evaluation: Evaluation, multiple: int
                  ) -> Iterator[SourceBatches]:
  """Loads the held-out text in rows that are a multiple of the training length.

  At each multiple, the rows are pieces of the same long rows, so that the same
  tokens are predicted. A batch has as many tokens as the mesh allows; the rows
  do not depend on it.

  Args:
    evaluation: the evaluation of the run.
    multiple: how many times as long as in training the rows are, one of
      LENGTH_MULTIPLES.

  Yields:
    For each data source its batches, on the devices, and the weight of a token.
  """
  config = evaluation.run.config.copy_and_resolve_references()
  device_placement = evaluation.run.batch_sharding
  longest_multiple = max(LENGTH_MULTIPLES)
  longest_length = config.data.length * longest_multiple
  num_pieces = longest_multiple // multiple

  # Choose how many of the longest rows make a batch: about as many tokens as in
  # a batch of training, and a multiple of the number of devices.
  num_devices = math.prod(evaluation.run.mesh.shape.values())
  rows_of_device = config.data.batch_size // longest_multiple // num_devices
  num_rows = max(rows_of_device, 1) * num_devices
  config.data.update(length=longest_length, batch_size=num_rows)

  # Each process reads its slice of the rows, and cuts them into pieces. A
  # source counts by its share in the mixture, however many tokens are read of
  # it.
  index, count = devices.batch_slice_of_process(device_placement, num_rows)
  loaders = pipeline.make_evaluation_loaders(
      config, tokenizer=evaluation.tokenizer, process_index=index,
      process_count=count)
  for loader in loaders:
    batches = []
    num_tokens = 0.0
    least_rows = -(-LEAST_TOKENS // longest_length)
    for long_batch in loader.limit_rows(least_rows).iterate():
      cut_batch = _cut_rows(long_batch, num_pieces, evaluation.tokenizer)
      batch = devices.put_on_devices(cut_batch, device_placement)
      batches.append(batch)
      num_tokens += float(batch['weights'].sum())
    yield SourceBatches(token_weight=loader.share / num_tokens, batches=batches)


def _cut_rows(batch: Mapping[str, np.ndarray], num_pieces: int,
              tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  """Cuts each row of a batch into pieces of equal length, which become rows.

  Args:
    batch: {name: array [B, L]} of B rows of L tokens.
    num_pieces: the number of pieces of a row; it must divide L.
    tokenizer: the tokenizer, whose separator stands between packed documents.

  Returns:
    Arrays [B num_pieces, L / num_pieces]. The numbers and positions of packed
    documents begin anew in each new row.
  """
  # Reshaping cuts the rows, as an array lies in memory row by row.
  cut_batch = {}
  for name, x_BL in batch.items():
    cut_batch[name] = x_BL.reshape(len(x_BL) * num_pieces, -1)
  if 'positions' not in cut_batch:
    return cut_batch

  # If documents are packed into rows, compute their numbers and positions
  # again: a piece may begin in the middle of a document.
  segments = []
  positions_of_rows = []
  for tokens_L in cut_batch['tokens']:
    documents = objectives.number_documents(tokens_L == tokenizer.separator_id)
    segments.append(documents['segment_ids'])
    positions_of_rows.append(documents['positions'])
  cut_batch['segment_ids'] = np.stack(segments)
  cut_batch['positions'] = np.stack(positions_of_rows)
  return cut_batch


def _sum_over_batches(function: Callable, batches: Sequence) -> np.ndarray:
  """Returns the sum over batches of function(batch), an array of [L], in
  float64."""
  length = batches[0]['tokens'].shape[1]
  sum_L = np.zeros(length)
  for batch in progress.show_items(
      batches, f'evaluating rows of {length:,} tokens'):
    sum_L += np.asarray(jax.device_get(function(batch)), np.float64)
  return sum_L


def _count_tokens(sources: Sequence[SourceBatches]) -> TokensByPosition:
  """Returns how many tokens the sources predict at each position, and the sum
  of their weights."""
  count_by_position = jax.jit(lambda batch: batch['weights'].sum(0))
  counts = []
  for source in sources:
    counts.append(_sum_over_batches(count_by_position, source.batches))
  token_weights = [source.token_weight for source in sources]
  return TokensByPosition(num_tokens=np.sum(counts, axis=0).astype(int),
                          weights=np.dot(token_weights, counts))


def _loss_by_position(evaluation: Evaluation, model: ModelConfig,
                      sources: Sequence[SourceBatches],
                      tokens: TokensByPosition) -> np.ndarray:
  """Measures the mean loss at each position of a text.

  Args:
    evaluation: the evaluation of the run.
    model: the config of the variant of the model that reads the text, such as
      one with scaled positions. It has the same parameters.
    sources: the batches of each source.
    tokens: the numbers and the weights of the tokens at each position.

  Returns:
    float [L], the loss in nats; nan where there is no token.
  """
  module = architectures.build(model)
  objective = objectives.find_objective(evaluation.run.config)

  def sum_losses(params: Any, batch: Any) -> jax.Array:
    """Returns the sum of a batch's losses at each position, [L]."""
    loss_BL = objective.token_losses(module, params, batch).loss
    return jnp.sum(loss_BL * batch['weights'], 0)

  step = evaluation.jit_once(sum_losses, 'extrapolation', model)

  # Add up the losses, weighted so that a source counts by its share in the
  # mixture. Positions without tokens keep the nan of `out`.
  total_L = np.zeros(len(tokens.num_tokens))
  for source in sources:
    sum_L = _sum_over_batches(lambda batch: step(evaluation.params, batch),
                              source.batches)
    total_L += source.token_weight * sum_L
  loss_L = np.full(total_L.shape, np.nan)
  return np.divide(total_L, tokens.weights, out=loss_L,
                   where=tokens.num_tokens > 0)


def format_table(curves: Curves,
                 tokens_by_multiple: Mapping[int, TokensByPosition],
                 length: int) -> str:
  """Formats a table of the mean loss of each variant of the model at each
  length, and of how many tokens it is over.

  In a cell, 'refused' says that the model does not take the length, and '—'
  that the variant, which is scaled for longer texts, is not tried at it.

  Args:
    curves: {variant: {multiple of the training length: the loss at each
      position, or None}}.
    tokens_by_multiple: {multiple: the tokens that the losses were measured on}.
    length: the number of tokens of a row in training.
  """
  # Collect the cells of each row by its heading. A multiple with None is one
  # that the model refuses; one that is missing was not tried.
  rows = {'': [f'{multiple}x' for multiple in LENGTH_MULTIPLES]}
  for name, curve_by_multiple in curves.items():
    cells = []
    for multiple in LENGTH_MULTIPLES:
      curve = curve_by_multiple.get(multiple)
      cell = '—'
      if curve is not None:
        cell = f'{mean_loss(curve, tokens_by_multiple[multiple]):.3f}'
      elif multiple in curve_by_multiple:
        cell = 'refused'
      cells.append(cell)
    rows[name] = cells
  rows['tokens'] = []
  for multiple in LENGTH_MULTIPLES:
    num_tokens = tokens_by_multiple[multiple].num_tokens.sum()
    rows['tokens'].append(f'{num_tokens:,}')

  # Pad the cells, so that all columns have one width.
  lines = [f'loss in nats per token at multiples of the training length '
           f'{length}']
  for name, cells in rows.items():
    padded_cells = [f'{cell:>9}' for cell in cells]
    lines.append(f'{name:<24}' + ''.join(padded_cells))
  return '\n'.join(lines)


def draw_losses(curves: Curves,
                tokens_by_multiple: Mapping[int, TokensByPosition],
                length: int, path: Any) -> None:
  """Draws the loss by position of each variant of the model, at the longest
  length that it takes.

  Args:
    curves: the losses by position.
    tokens_by_multiple: the tokens that they were measured on.
    length: the training length.
    path: the file of the picture.
  """
  from matplotlib.figure import Figure
  figure = Figure(figsize=(8, 4.5), layout='constrained')
  axes = figure.subplots()
  for name, curve_by_multiple in curves.items():
    curves_taken = {}
    for multiple, curve in curve_by_multiple.items():
      if curve is not None:
        curves_taken[multiple] = curve
    if not curves_taken:
      continue
    longest = max(curves_taken)
    curve = curves_taken[longest]

    # Bins of equal width on the logarithmic axis; a loss of nan is a gap.
    edges = np.geomspace(1, len(curve), 25)
    edges = np.unique(edges.astype(int))
    losses = []
    for start, end in zip(edges, edges[1:]):
      losses.append(mean_loss(curve, tokens=tokens_by_multiple[longest],
                              positions_averaged=slice(start, end)))
    middles = np.sqrt(edges[:-1] * edges[1:])
    axes.plot(middles, losses, label=name)

  # The length that the model was trained with, and how to read the axes.
  axes.axvline(length, color='grey', linestyle='--', linewidth=1,
               label='training length')
  axes.set(xlabel='position in tokens', ylabel='loss in nats per token',
           title='held-out loss by position, of the longest text that each '
           'encoding takes')
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.grid(alpha=0.3)
  figure.legend(loc='outside right upper')
  storage.write_picture(path, figure)


TASKS = {'extrapolation': Extrapolation()}
