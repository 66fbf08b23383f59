"""Loss by position at 1, 2, 4 and 8 times the training length.

Each position encoding goes past its training length in its own way:
sinusoidal, ALiBi, T5's relative bias and none as they are; RoPE as it is and
with each scaling, its factor the multiple of the length; learned positions
end at max_len, and are stretched only on request (--interpolate).

Every figure is a mean over tokens, and says over how many: where the text is
shorter than a row, no token reaches the row's end, and there is no loss. Of
several sources each token counts by its source's weight.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts import positions
from configs.errors import require
from training import evals
from training import losses
from training import objectives
from training import progress
from training.data import pipeline
from training.distributed import devices
from training.evals.by_position import Text, loss_at

FILE = 'extrapolation.png'
MULTIPLES = (1, 2, 4, 8)
TOKENS = 2 ** 17  # at each length, at least
BUCKETS = 8  # of the positions of the longest, in the table


def check(options, config, workdir) -> None:
  require(objectives.of(config).every_token, f'objective {config.objective!r}: '
          'extrapolation is measured for next-token prediction')
  evals.needs_plot(workdir / FILE)


def run(evaluation) -> dict:
  """Prints the table; writes extrapolation.png into the workdir."""
  config = evaluation.run.config
  length = config.data.length
  curves, texts = {}, {}
  for multiple in MULTIPLES:
    sources = list(_sources(evaluation, length * multiple, multiple))
    texts[multiple] = _text(sources)
    for name, model in variants(evaluation.run.model, length, multiple,
                                evaluation.options.interpolate).items():
      curves.setdefault(name, {})[multiple] = None if model is None else (
          _by_position(evaluation, model, sources, texts[multiple]))
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
                     for name, by in curves.items()}}


def variants(model, length: int, multiple: int, interpolate: bool) -> dict:
  """Returns {name: model config}, None where the model refuses the length."""
  return positions.of(model).longer(model, length, multiple, interpolate)


def _sources(evaluation, length: int, multiple: int):
  """Yields (weight of a token, batches) of each source: the same held-out
  text at each length, in as many tokens a batch as the mesh allows."""
  config = evaluation.run.config.copy_and_resolve_references()
  shards = math.prod(evaluation.run.mesh.shape.values())
  rows = max(config.data.batch_size // multiple // shards, 1) * shards
  config.data.update(length=length, batch_size=rows)
  loaders = pipeline.held_out(config, evaluation.tokenizer,
                          *devices.batch_shard(evaluation.run.place, rows))
  for loader in loaders:
    batches = [devices.put(batch, evaluation.run.place)
               for batch in loader.iterate(0, -(-TOKENS // (rows * length)))]
    tokens = sum(float(batch['weights'].sum()) for batch in batches)
    yield loader.share / tokens, batches


def _sum(fn, batches) -> np.ndarray:
  """Sums a function of batches, [L], in float64."""
  rows = f'evaluating rows of {batches[0]["tokens"].shape[1]:,} tokens'
  return sum(np.asarray(jax.device_get(fn(batch)), np.float64)
             for batch in progress.each(batches, rows))


def _text(sources) -> Text:
  count = jax.jit(lambda batch: batch['weights'].sum(0))
  tokens = [_sum(count, batches) for _, batches in sources]
  return Text(sum(tokens).astype(int),
              sum(each * x for (each, _), x in zip(sources, tokens)))


def _by_position(evaluation, model, sources, text: Text) -> np.ndarray:
  """Mean loss at each position, [L], in nats; nan where there is no token."""
  module = architectures.build(model)
  objective = objectives.of(evaluation.run.config)

  def sums_of(params, batch):
    output = objective.apply(module, params, batch)
    loss_BL = losses.token_losses(output.hidden, output.head,
                                  batch['targets']).loss
    return jnp.sum(loss_BL * batch['weights'], 0)

  step = evaluation.program(lambda: sums_of, 'extrapolation', model)
  total = sum(each * _sum(lambda batch: step(evaluation.params, batch),
                          batches) for each, batches in sources)
  return np.divide(total, text.weights, where=text.tokens > 0,
                   out=np.full(total.shape, np.nan))


def table(curves: dict, texts: dict, length: int) -> str:
  """Mean loss at each length, then by position at the longest."""
  longest = max(MULTIPLES)
  edges = [length * longest * i // BUCKETS for i in range(BUCKETS + 1)]
  whole = slice(None)
  buckets = [(longest, slice(a, b)) for a, b in zip(edges, edges[1:])]
  return '\n'.join([
      'loss in nats per token at multiples of the training length '
      f'{length}',
      _row('', [f'{m}x' for m in MULTIPLES]),
      *_rows(curves, texts, [(m, whole) for m in MULTIPLES]),
      f'by position at {longest}x, up to position',
      _row('', [f'{e:,}' for e in edges[1:]]),
      *_rows(curves, texts, buckets)])


def _rows(curves: dict, texts: dict, places):
  """A row for each variant, and one that says how many tokens there are."""
  for name, by in curves.items():
    yield _row(name, [_shown(by.get(m), texts[m], where)
                      for m, where in places])
  yield _row('tokens', [f'{texts[m].tokens[where].sum():,}'
                        for m, where in places])


def _row(name: str, cells) -> str:
  return f'{name:<24}' + ''.join(f'{cell:>9}' for cell in cells)


def _shown(curve, text: Text, where: slice) -> str:
  if curve is None:
    return 'refused'
  loss = loss_at(curve, text, where)
  return 'no text' if math.isnan(loss) else f'{loss:.3f}'


def plot(curves: dict, texts: dict, length: int, path) -> None:
  """Draws the loss by position at the longest length that each one takes."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
  for name, by in curves.items():
    taken = {m: c for m, c in by.items() if c is not None}
    if not taken:
      continue
    curve, text = taken[max(taken)], texts[max(taken)]
    edges = np.unique(np.geomspace(1, len(curve), 25).astype(int))
    axes.plot(np.sqrt(edges[:-1] * edges[1:]),  # the middle of each bin
              [loss_at(curve, text, slice(a, b))  # nan: a gap in the line
               for a, b in zip(edges, edges[1:])], label=name)
  axes.axvline(length, color='grey', linestyle='--', linewidth=1)
  axes.annotate('training length', (length, 1), xycoords=('data',
                'axes fraction'), xytext=(-4, -12), textcoords='offset points',
                ha='right', color='grey')
  axes.set(xlabel='position in tokens', ylabel='loss in nats per token',
           title='held-out loss by position, of the longest text that each '
           'encoding takes')
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.grid(alpha=0.3)
  figure.legend(loc='outside right upper')
  with path.open('wb') as file:
    figure.savefig(file, dpi=150, format='png')
  pyplot.close(figure)
