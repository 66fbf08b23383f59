"""Loss by position at 1, 2, 4 and 8 times the training length.

Each position encoding goes past its training length in its own way:
sinusoidal, ALiBi, T5's relative bias and none as they are; RoPE as it is and
with each scaling, its factor the multiple of the length; learned positions
end at max_len, and are stretched only on request (--interpolate).

Every figure is a mean over tokens, the same ones at each length, and says over
how many: where the text is shorter than a row, no token reaches the row's end,
and there is no loss. Of several sources each token counts by its source's
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
from training.evals import Evaluation, Flag, Task, without
from training.objectives import pipeline
from training.workdir import storage

FILE = 'extrapolation.png'
MULTIPLES = (1, 2, 4, 8)
TOKENS = 2 ** 17  # at each length, at least


class Text(NamedTuple):
  """What a length is measured on, by position, [L].

  Attributes:
    tokens: how many tokens are predicted there.
    weights: what they count in all.
  """
  tokens: np.ndarray
  weights: np.ndarray


def loss_at(curve: Any, text: Text, where: slice = slice(None)) -> float:
  """Returns the loss of the tokens at some positions; nan: there are none."""
  there = text.tokens[where] > 0
  if not there.any():
    return math.nan
  return float(np.average(curve[where][there],
                          weights=text.weights[where][there]))


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints the table; writes extrapolation.png into the workdir."""
  model, length = evaluation.run.model, evaluation.run.config.data.length
  curves, texts = {}, {}
  for multiple in MULTIPLES:
    sources = list(_sources(evaluation, multiple))
    texts[multiple] = _text(sources)
    # None where the model refuses the length.
    variants = positions.of(model).longer(model, length, multiple,
                                          evaluation.options.interpolate)
    for name, variant in variants.items():
      curves.setdefault(name, {})[multiple] = None if variant is None else (
          _by_position(evaluation, variant, sources, texts[multiple]))
  print(table(curves, texts, length))
  path = evaluation.workdir / FILE
  plot(curves, texts, length, path)
  print(f'loss by position: {path}')
  return {'length': length,
          'texts': {str(m): {name: x.tolist()
                             for name, x in text._asdict().items()}
                    for m, text in texts.items()},
          'curves': {name: {str(m): None if c is None else c.tolist()
                            for m, c in by.items()}
                     for name, by in curves.items()}} | {
              f'loss at {m} × length' + f' ({name})' * (name != model.position):
              loss_at(c, texts[m]) for name, by in curves.items()
              for m, c in by.items() if c is not None}


def _sources(evaluation: Evaluation, multiple: int
             ) -> Iterator[tuple[float, list]]:
  """Yields (weight of a token, batches) of each source, in as many tokens a
  batch as the mesh allows, but of the same rows whatever their number. The rows
  are those of the longest multiple, cut into pieces of this one's length: at
  each length the same tokens are predicted."""
  config = evaluation.run.config.copy_and_resolve_references()
  longest, place = max(MULTIPLES), evaluation.run.place
  length, pieces = config.data.length * longest, longest // multiple
  shards = math.prod(evaluation.run.mesh.shape.values())
  rows = max(config.data.batch_size // longest // shards, 1) * shards
  config.data.update(length=length, batch_size=rows)
  for loader in pipeline.held_out(config, evaluation.tokenizer,
                                  *devices.batch_shard(place, rows)):
    batches = [devices.put(_cut(batch, pieces, evaluation.tokenizer), place)
               for batch in loader.cut(-(-TOKENS // length)).iterate()]
    tokens = sum(float(batch['weights'].sum()) for batch in batches)
    yield loader.share / tokens, batches


def _cut(batch: Mapping[str, np.ndarray], pieces: int, tokenizer: Tokenizer
         ) -> dict[str, np.ndarray]:
  """Returns the rows of a batch cut into so many, each of which begins anew."""
  cut = {name: x.reshape(len(x) * pieces, -1) for name, x in batch.items()}
  if 'positions' in cut:  # of packed documents
    each = [objectives.documents(row_L == tokenizer.separator_id)
            for row_L in cut['tokens']]
    cut |= {name: np.stack([row[name] for row in each])
            for name in ('segment_ids', 'positions')}
  return cut


def _sum(function: Callable, batches: Sequence) -> np.ndarray:
  """Sums a function of batches, [L], in float64."""
  rows = f'evaluating rows of {batches[0]["tokens"].shape[1]:,} tokens'
  return sum(np.asarray(jax.device_get(function(batch)), np.float64)
             for batch in progress.each(batches, rows))


def _text(sources: Sequence[tuple[float, list]]) -> Text:
  count = jax.jit(lambda batch: batch['weights'].sum(0))
  tokens = [_sum(count, batches) for _, batches in sources]
  return Text(sum(tokens).astype(int),
              sum(each * x for (each, _), x in zip(sources, tokens)))


def _by_position(evaluation: Evaluation, model: ModelConfig,
                 sources: Sequence[tuple[float, list]], text: Text
                 ) -> np.ndarray:
  """Returns the mean loss at each position, [L], in nats; nan where there is
  no token."""
  module = architectures.build(model)
  objective = objectives.of(evaluation.run.config)

  def sums_of(params: Any, batch: Any):
    loss_BL = objective.token_losses(module, params, batch).loss
    return jnp.sum(loss_BL * batch['weights'], 0)

  step = evaluation.program(sums_of, 'extrapolation', model)
  total = sum(each * _sum(lambda batch: step(evaluation.params, batch),
                          batches) for each, batches in sources)
  return np.divide(total, text.weights, where=text.tokens > 0,
                   out=np.full(total.shape, np.nan))


def table(curves: Mapping, texts: Mapping[int, Text], length: int) -> str:
  """Mean loss at each length, by variant, and over how many tokens; '—': what
  is stretched for longer texts is not tried at this length."""
  def shown(by: Mapping, multiple: int) -> str:
    if by.get(multiple) is None:
      return 'refused' if multiple in by else '—'
    return f'{loss_at(by[multiple], texts[multiple]):.3f}'

  rows = {'': [f'{m}x' for m in MULTIPLES]}
  rows |= {name: [shown(by, m) for m in MULTIPLES]
           for name, by in curves.items()}
  rows['tokens'] = [f'{texts[m].tokens.sum():,}' for m in MULTIPLES]
  return '\n'.join([
      f'loss in nats per token at multiples of the training length {length}',
      *(f'{name:<24}' + ''.join(f'{cell:>9}' for cell in cells)
        for name, cells in rows.items())])


def plot(curves: Mapping, texts: Mapping[int, Text], length: int,
         path: Any) -> None:
  """Draws the loss by position at the longest length that each one takes."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(8, 4.5), layout='constrained')
  axes = figure.subplots()
  for name, by in curves.items():
    longest = max((m for m, c in by.items() if c is not None), default=None)
    if longest is None:
      continue
    edges = np.unique(np.geomspace(1, len(by[longest]), 25).astype(int))
    axes.plot(np.sqrt(edges[:-1] * edges[1:]),  # the middle of each bin
              [loss_at(by[longest], texts[longest], slice(a, b))  # nan: a gap
               for a, b in zip(edges, edges[1:])], label=name)
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


TASKS = {'extrapolation': Task(
    'loss by position at 1, 2, 4 and 8 times the training length', run,
    without(lambda objective: objective.every_token,
            'does not predict every token, so it has no loss by position'),
    file=FILE, figures=('length', 'loss at *'), flags=(
        Flag('interpolate', False, 'Stretch learned positions past max_len.'),
    ))}
