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

from collections.abc import Iterable, Iterator, Mapping
import math
from typing import Any, NamedTuple

import numpy as np

from configs.errors import require
from training.evals.task import Evaluation, Flag, Task, without

FILE = 'extrapolation.png'
MULTIPLES = (1, 2, 4, 8)
BUCKETS = 8  # of the positions of the longest, in the table


class Text(NamedTuple):
  """What a length is measured on, by position, [L].

  Attributes:
    tokens: how many tokens are predicted there.
    weights: what they count in all.
  """
  tokens: np.ndarray
  weights: np.ndarray


def loss_at(curve: Any, text: Text, where: slice) -> float:
  """Returns the loss of the tokens at some positions; nan: there are none."""
  there = text.tokens[where] > 0
  if not there.any():
    return math.nan
  return float(np.average(curve[where][there],
                          weights=text.weights[where][there]))


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints the table; writes extrapolation.png into the workdir."""
  from architectures.parts import positions
  from training.evals import lengths
  model, length = evaluation.run.model, evaluation.run.config.data.length
  curves, texts = {}, {}
  for multiple in MULTIPLES:
    sources = list(lengths.sources(evaluation, multiple, max(MULTIPLES)))
    texts[multiple] = Text(*lengths.text(sources))
    # None where the model refuses the length.
    variants = positions.of(model).longer(model, length, multiple,
                                          evaluation.options.interpolate)
    for name, variant in variants.items():
      curves.setdefault(name, {})[multiple] = None if variant is None else (
          lengths.by_position(evaluation, variant, sources, texts[multiple]))
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


def table(curves: Mapping, texts: Mapping[int, Text], length: int) -> str:
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


def _rows(curves: Mapping, texts: Mapping[int, Text],
          places: Iterable[tuple[int, slice]]) -> Iterator[str]:
  """A row for each variant, and one that says how many tokens there are; '—':
  what is stretched for longer texts is not tried at this length."""
  for name, by in curves.items():
    yield _row(name, [_shown(by[m], texts[m], where) if m in by else '—'
                      for m, where in places])
  yield _row('tokens', [f'{texts[m].tokens[where].sum():,}'
                        for m, where in places])


def _row(name: str, cells: Iterable) -> str:
  return f'{name:<24}' + ''.join(f'{cell:>9}' for cell in cells)


def _shown(curve: np.ndarray | None, text: Text, where: slice) -> str:
  if curve is None:
    return 'refused'
  loss = loss_at(curve, text, where)
  return 'no text' if math.isnan(loss) else f'{loss:.3f}'


def plot(curves: Mapping, texts: Mapping[int, Text], length: int,
         path: Any) -> None:
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


def _fits(config: Any, options: Any) -> None:
  """Refuses --interpolate where it would change nothing."""
  if not options.interpolate:
    return
  from architectures.parts import positions
  from training import runs
  model, length = runs.resolve_alone(config), config.data.length
  as_asked, without_it = (
      [positions.of(model).longer(model, length, multiple, interpolate)
       for multiple in MULTIPLES] for interpolate in (True, False))
  require(as_asked != without_it, '--interpolate stretches learned positions '
          f'past model.max_len, and this run has model.position '
          f'{model.position!r} and model.max_len {model.max_len:,}, so that '
          f'{max(MULTIPLES)} times its data.length {length:,} needs no '
          'stretching: leave --interpolate out')


TASKS = {'extrapolation': Task(
    'loss by position at 1, 2, 4 and 8 times the training length', run,
    without(lambda objective: objective.every_token,
            'does not predict every token, so it has no loss by position'),
    fits=_fits, flags=(Flag('interpolate', False,
                'Stretch learned positions past max_len.'),),
    file=FILE, figures=lambda config: ('length',))}
