"""Writes what a model computes as one HTML file that opens without network.

page.html is the template. The tables stand in the HTML; page.js draws the
attention maps from arrays that stand in the file too.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
import json
import pathlib
from typing import Any, NamedTuple

import jinja2
import markupsafe
import numpy as np

from training.inspect.record import Experts, Inspection, Stream

FEATURES = 3  # of a layer, that are named
QUERIES = {'encoder': 'encoder', 'decoder': 'decoder', 'cross': 'decoder'}
KEYS = QUERIES | {'cross': 'encoder'}
TITLES = {'encoder': "the encoder's self-attention",
          'decoder': "the decoder's self-attention",
          'cross': "the decoder's attention to the encoder's output"}
MEANINGS = {
    'entropy': 'entropy: of a query’s weights in nats, as a mean over the '
               'queries; log n where n keys weigh the same.',
    'first token': 'first token: the mean weight on the first token, on which '
                   'many models put what they need nowhere else (Xiao et al. '
                   '2023). The first query of a causal head, which sees '
                   'nothing else, does not count.',
    'learned sink': 'learned sink: the mean share that the head’s sink takes.',
    'previous token': 'previous token: the mean weight on the token before.',
    'induction': 'induction: on random tokens that come twice, the weight on '
                 'the tokens that followed the query’s token the first time '
                 '(Olsson et al. 2022). 1: an induction head.',
}


class Shown(NamedTuple):
  """What a page says besides the record.

  Attributes:
    title: a short one.
    about: sentences on what was looked at.
    texts: the tokens as a reader is shown them, by name.
    spell: an id -> the same of any token.
    measures: {attention: {figure: [N, H]}}, one number a head; nan: none.
  """
  title: str
  about: Sequence[str]
  texts: Mapping[str, Sequence[str]]
  spell: Callable[[int], str]
  measures: Mapping[str, Mapping[str, np.ndarray]]


class Cell(NamedTuple):
  """A cell of a table: its colour is as strong as its value, from 0 to 1, or
  of the hue of an expert; the tip is shown beside it on request."""
  text: str
  value: float
  tip: str
  hue: int | None = None


def page(found: Inspection, shown: Shown) -> str:
  """Returns the whole file; of a record with several rows, the first."""
  # '<' would end the script early if a token held </script>.
  data = json.dumps(
      {'tokens': {name: list(texts) for name, texts in shown.texts.items()},
       'maps': _maps(found, shown)}, allow_nan=False).replace('<', '\\u003c')
  template = jinja2.Environment(
      loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
      autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined,
  ).get_template('page.html')
  return template.render(
      shown=shown, sections=list(_sections(found, shown)), data=data).lstrip()


def _maps(found: Inspection, shown: Shown) -> list[dict[str, Any]]:
  """Returns what page.js draws, each into its section."""
  maps = []
  for name, attention in found.attention.items():
    weights_NHLM = attention.weights[:, 0]
    units = np.round(np.clip(weights_NHLM, 0, 1) * 65535).astype('<u2')
    maps.append(dict(
        name=name, queries=QUERIES[name], keys=KEYS[name],
        shape=weights_NHLM.shape,
        weights=base64.b64encode(units.tobytes()).decode('ascii'),
        measures={of: [[None if np.isnan(x) else round(float(x), 4)
                        for x in row] for row in values]
                  for of, values in shown.measures[name].items()}))
  return maps


def _sections(found: Inspection, shown: Shown) -> Iterator[dict[str, Any]]:
  """Yields what the template is given of each section. A table is its columns,
  the names of its rows, and these."""
  for name in found.attention:
    yield dict(id=f'maps-{name}', heading=f'Attention: {TITLES[name]}',
               kind='maps', notes=[MEANINGS[of] for of in shown.measures[name]])
  for name, stream in found.stream.items():
    yield dict(id=f'stream-{name}', heading=f'Residual stream of the {name}',
               kind='stream', **_stream(stream, shown.texts[name]))
  if found.lens is not None:
    name = 'decoder' if 'decoder' in found.stream else 'encoder'
    texts = shown.texts[name]
    rows = [[Cell(shown.spell(ids[0]), shares[0], '\n'.join([
        _where(texts, i), _after(n), *(f'{p:.4f}  {shown.spell(x)}'
                                       for x, p in zip(ids, shares))]))
             for i, (ids, shares) in enumerate(zip(*layer))]
            for n, layer in enumerate(zip(
                found.lens.ids[:, 0].tolist(),
                found.lens.probabilities[:, 0].tolist()))]
    yield dict(id='lens', heading='Logit lens', kind='lens',
               predicted='the next token' if name == 'decoder' else
               'the token itself',
               table=(texts, _layers(len(rows))[::-1], rows[::-1]))
  for name, experts in found.experts.items():
    texts = shown.texts[name]
    yield dict(id=f'experts-{name}', heading=f'Experts of the {name}',
               kind='experts', count=experts.probabilities.shape[-1],
               table=(texts, experts.layers, [
                   [_expert(experts, n, i, f'{_where(texts, i)}\nlayer {layer}')
                    for i in range(len(texts))]
                   for n, layer in enumerate(experts.layers)]))


def _stream(stream: Stream, texts: Sequence[str]) -> dict[str, Any]:
  """Returns the table of norms, the largest features of each layer, and which
  features are outliers."""
  norms = stream.norms[:, 0]
  logs = np.log(np.maximum(norms, 1e-9))
  heat = (logs - logs.min()) / max(logs.max() - logs.min(), 1e-9)
  rows = [[Cell(f'{x:.3g}', v,
                f'{_where(texts, i)}\n{_after(n)}\nnorm {x:.5g}')
           for i, (x, v) in enumerate(zip(norms[n], heat[n]))]
          for n in range(len(norms))]
  names, layers = _layers(len(norms)), []
  times = lambda x, of: f'{x / of:.3g}' if of > 0 else '∞'
  for n, peaks_D in enumerate(stream.peaks[:, 0]):
    median, rms = stream.median[n, 0], stream.rms[n, 0]
    layers.append((
        names[n], f'{norms[n].mean():.4g}', f'{median:.3g}', f'{rms:.3g}',
        '; '.join(f'{d}: {peaks_D[d]:.3g} (× {times(peaks_D[d], median)}, × '
                  f'{times(peaks_D[d], rms)})' for d in largest(peaks_D))))
  features = np.flatnonzero(stream.outliers[0]).tolist()
  more = f' and {len(features) - 64} more' if len(features) > 64 else ''
  return dict(table=(texts, names, rows), layers=layers,
              outliers=', '.join(map(str, features[:64])) + more or 'none')


def largest(peaks_D: np.ndarray) -> list[int]:
  """Returns the features of a layer that are named, the largest first."""
  return np.argsort(-peaks_D, kind='stable')[:FEATURES].tolist()


def _expert(experts: Experts, n: int, i: int, where: str) -> Cell:
  """Returns the cell of a token in a layer of experts."""
  gates_E, shares_E = experts.gates[n, 0, i], experts.probabilities[n, 0, i]
  chosen = np.flatnonzero(experts.chosen[n, 0, i])
  chosen = chosen[np.argsort(-gates_E[chosen], kind='stable')]
  lost = markupsafe.Markup('<s class="lost">{}</s>')
  text = markupsafe.Markup(' ').join(
      e if gates_E[e] else lost.format(e) for e in chosen) or '–'
  tip = '\n'.join([
      where, *(f'expert {e}: gate {gates_E[e]:.4f}'
               + ('' if gates_E[e] else ', no room') for e in chosen),
      'router: ' + ', '.join(f'{e} {shares_E[e]:.3f}' for e in np.argsort(
          -shares_E, kind='stable')[:8])])
  hue = 360 * int(chosen[0]) // len(gates_E) if len(chosen) else None
  return Cell(text, 0.0, tip, hue)


def _layers(count: int) -> list[str]:
  return ['embedding', *map(str, range(count - 1))]


def _after(n: int) -> str:
  return f'after layer {n - 1}' if n else 'before the first layer'


def _where(texts: Sequence[str], i: int) -> str:
  return f'{texts[i]} (token {i})'
