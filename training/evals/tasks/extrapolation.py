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
LENGTH_MULTIPLES = (1, 2, 4, 8)
LEAST_TOKENS = 2 ** 17  # at each length, at least

# The loss by position of each variant of the model, by multiple of the length:
# {variant: {multiple: [L]}}; None: the model refuses the length.
Curves = Mapping[str, Mapping[int, np.ndarray | None]]


class TokensByPosition(NamedTuple):
  """The tokens that a length is measured on, by position, [L].

  Attributes:
    tokens: how many tokens are predicted there.
    weights: what they count in all.
  """
  tokens: np.ndarray
  weights: np.ndarray


class SourceBatches(NamedTuple):
  """A source as rows of one length.

  Attributes:
    token_weight: what each of its tokens counts.
    batches: its batches, on the devices.
  """
  token_weight: float
  batches: list


class Extrapolation(Task):
  """Prints the losses as a table; writes extrapolation.png into the workdir."""

  help = 'loss by position at 1, 2, 4 and 8 times the training length'
  why_not_allowed = ('does not predict every token, so it has no loss '
                     'by position')
  file = PICTURE_FILE
  figure_names = ('length', 'loss at *')
  flags = (
      Flag(name='interpolate', default=False,
           help='Stretch learned positions past max_len.'),
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.every_token

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and draws the loss at each length, and returns it."""
    model = evaluation.run.model
    length = evaluation.run.config.data.length

    # Each variant of the model reads each length.
    curves: dict[str, dict[int, np.ndarray | None]] = {}
    texts: dict[int, TokensByPosition] = {}
    for multiple in LENGTH_MULTIPLES:
      sources = list(_load_sources(evaluation, multiple))
      texts[multiple] = _count_tokens(sources)
      variants = positions.position_of(model).variants_for_longer_rows(
          model, length, multiple, evaluation.options.interpolate)
      for name, variant in variants.items():
        curve = None
        if variant is not None:  # else the model refuses the length
          curve = _loss_by_position(evaluation, model=variant, sources=sources,
                               text=texts[multiple])
        curves.setdefault(name, {})[multiple] = curve

    # The table and the picture.
    print(format_table(curves, texts, length))
    path = evaluation.workdir / PICTURE_FILE
    draw_losses(curves, texts=texts, length=length, path=path)
    print(f'loss by position: {path}')
    return _figures_for_json(curves, texts=texts, length=length,
                             position=model.position)


def _figures_for_json(curves: Curves, texts: Mapping[int, TokensByPosition],
                      length: int,
             position: str) -> dict[str, Any]:
  """Returns what goes into --json: the curves, and the loss at each length.

  Args:
    curves: the losses by position.
    texts: the texts that they were measured on, by multiple.
    length: the training length.
    position: the position encoding of the model as it was trained.
  """
  figures: dict[str, Any] = {'length': length, 'texts': {}, 'curves': {}}
  for multiple, text in texts.items():
    figures['texts'][str(multiple)] = {
        'tokens': text.tokens.tolist(), 'weights': text.weights.tolist()}
  for name, by_multiple in curves.items():
    figures['curves'][name] = lists = {}
    for multiple, curve in by_multiple.items():
      # The model refuses texts of this length.
      if curve is None:
        lists[str(multiple)] = None
        continue
      lists[str(multiple)] = curve.tolist()
      figure = f'loss at {multiple} × length'
      if name != position:
        figure += f' ({name})'
      figures[figure] = mean_loss(curve, texts[multiple])
  return figures


def mean_loss(curve: Any, text: TokensByPosition,
              where: slice = slice(None)) -> float:
  """Returns the loss of the tokens at some positions; nan: there are none."""
  losses = curve[where]
  weights = text.weights[where]
  there = text.tokens[where] > 0
  if not there.any():
    return math.nan
  return float(np.average(losses[there], weights=weights[there]))


def _load_sources(evaluation: Evaluation,
                  multiple: int) -> Iterator[SourceBatches]:
  """Yields each source, in as many tokens a batch as the mesh allows, but of
  the same rows whatever their number. The rows are those of the longest
  multiple, cut into pieces of this one's length: at each length the same tokens
  are predicted."""
  config = evaluation.run.config.copy_and_resolve_references()
  place = evaluation.run.place
  longest = max(LENGTH_MULTIPLES)
  length = config.data.length * longest
  pieces = longest // multiple
  # Rows of the longest text, as many as a batch of training has tokens for.
  shards = math.prod(evaluation.run.mesh.shape.values())
  rows = max(config.data.batch_size // longest // shards, 1) * shards
  config.data.update(length=length, batch_size=rows)

  # Each process reads its slice of the rows, and cuts them up.
  index, count = devices.batch_shard(place, rows)
  for loader in pipeline.make_evaluation_loaders(config,
                                                 tokenizer=evaluation.tokenizer,
                                                 process_index=index,
                                                 process_count=count):
    batches = []
    tokens = 0.0
    for whole in loader.cut(-(-LEAST_TOKENS // length)).iterate():
      cut = _cut_rows(whole, pieces, evaluation.tokenizer)
      batch = devices.put(cut, place)
      batches.append(batch)
      tokens += float(batch['weights'].sum())
    yield SourceBatches(token_weight=loader.share / tokens, batches=batches)


def _cut_rows(batch: Mapping[str, np.ndarray], pieces: int, tokenizer: Tokenizer
         ) -> dict[str, np.ndarray]:
  """Returns the rows of a batch cut into so many, each of which begins anew."""
  cut = {name: x.reshape(len(x) * pieces, -1) for name, x in batch.items()}
  if 'positions' not in cut:
    return cut

  # The rows are packed documents, which are counted from a row's beginning.
  segments = []
  places = []
  for row_L in cut['tokens']:
    documents = objectives.number_documents(row_L == tokenizer.separator_id)
    segments.append(documents['segment_ids'])
    places.append(documents['positions'])
  cut['segment_ids'] = np.stack(segments)
  cut['positions'] = np.stack(places)
  return cut


def _sum_over_batches(function: Callable, batches: Sequence) -> np.ndarray:
  """Returns the sum of a function of batches, [L], in float64."""
  length = batches[0]['tokens'].shape[1]
  total = np.zeros(length)
  for batch in progress.show_items(
      batches, f'evaluating rows of {length:,} tokens'):
    total += np.asarray(jax.device_get(function(batch)), np.float64)
  return total


def _count_tokens(sources: Sequence[SourceBatches]) -> TokensByPosition:
  """Returns how many tokens the sources predict at each position, and what
  these count."""
  count = jax.jit(lambda batch: batch['weights'].sum(0))
  counts = [_sum_over_batches(count, source.batches) for source in sources]
  token_weights = [source.token_weight for source in sources]
  return TokensByPosition(tokens=np.sum(counts, axis=0).astype(int),
              weights=np.dot(token_weights, counts))


def _loss_by_position(evaluation: Evaluation, model: ModelConfig,
                      sources: Sequence[SourceBatches], text: TokensByPosition
                      ) -> np.ndarray:
  """Returns the mean loss at each position, [L], in nats; nan where there is
  no token.

  Args:
    evaluation: the evaluation of the run.
    model: the variant of the model that reads the text.
    sources: the batches of each source.
    text: how many tokens there are at each position, and what they count.
  """
  module = architectures.build(model)
  objective = objectives.find_objective(evaluation.run.config)

  def sums_of(params: Any, batch: Any):
    """Returns the sum of a batch's losses at each position, [L]."""
    loss_BL = objective.token_losses(module, params, batch).loss
    return jnp.sum(loss_BL * batch['weights'], 0)

  step = evaluation.jit_once(sums_of, 'extrapolation', model)
  # A source counts as much as its share of the held-out text.
  total_L = np.zeros(len(text.tokens))
  for source in sources:
    sums_L = _sum_over_batches(lambda batch: step(evaluation.params, batch),
                               source.batches)
    total_L += source.token_weight * sums_L
  loss_L = np.full(total_L.shape, np.nan)
  return np.divide(total_L, text.weights, out=loss_L, where=text.tokens > 0)


def format_table(curves: Curves, texts: Mapping[int, TokensByPosition],
                 length: int) -> str:
  """Returns the mean loss at each length, by variant, and over how many tokens;
  '—': what is stretched for longer texts is not tried at this length."""
  rows = {'': [f'{multiple}x' for multiple in LENGTH_MULTIPLES]}
  for name, by_multiple in curves.items():
    rows[name] = []
    for multiple in LENGTH_MULTIPLES:
      curve = by_multiple.get(multiple)
      # Not every variant is tried at every length.
      cell = '—'
      if curve is not None:
        cell = f'{mean_loss(curve, texts[multiple]):.3f}'
      elif multiple in by_multiple:
        cell = 'refused'
      rows[name].append(cell)
  rows['tokens'] = [f'{texts[m].tokens.sum():,}' for m in LENGTH_MULTIPLES]

  # Columns of one width.
  lines = [f'loss in nats per token at multiples of the training length '
           f'{length}']
  for name, cells in rows.items():
    padded = [f'{cell:>9}' for cell in cells]
    lines.append(f'{name:<24}' + ''.join(padded))
  return '\n'.join(lines)


def draw_losses(curves: Curves, texts: Mapping[int, TokensByPosition],
                length: int, path: Any
         ) -> None:
  """Draws the loss by position at the longest length that each one takes.

  Args:
    curves: the losses by position.
    texts: the texts that they were measured on, by multiple.
    length: the training length.
    path: the file of the picture.
  """
  from matplotlib.figure import Figure
  figure = Figure(figsize=(8, 4.5), layout='constrained')
  axes = figure.subplots()
  for name, by_multiple in curves.items():
    taken = [m for m, curve in by_multiple.items() if curve is not None]
    if not taken:
      continue
    longest = max(taken)
    curve = by_multiple[longest]
    text = texts[longest]

    # Bins of equal width on the logarithmic axis; a loss of nan is a gap.
    places = np.geomspace(1, len(curve), 25)
    edges = np.unique(places.astype(int))
    losses = []
    for first, end in zip(edges, edges[1:]):
      losses.append(mean_loss(curve, text, slice(first, end)))
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
