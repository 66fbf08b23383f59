"""Writes what is inside a model as one HTML file that opens without network.

The tables stand in the HTML; page.js draws the attention maps from arrays that
stand in the file too.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from training.insides.record import Experts, Insides, Stream

HERE = pathlib.Path(__file__).parent
# Nothing is fetched, and the browser is told so.
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'")
BYTES = 2  # of a weight, before base64 makes four of three
FEATURES = 3  # of a layer, that are named
QUERIES = {'encoder': 'encoder', 'decoder': 'decoder', 'cross': 'decoder'}
KEYS = QUERIES | {'cross': 'encoder'}
TITLES = {'encoder': "the encoder's self-attention",
          'decoder': "the decoder's self-attention",
          'cross': "the decoder's attention to the encoder's output"}


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


def page(found: Insides, shown: Shown) -> str:
  """Returns the whole file; of a record with several rows, the first."""
  sections = [*_attention(found, shown), *_streams(found, shown),
              *_lens(found, shown), *_experts(found, shown)]
  body = ''.join(
      f'<section id="{name}"><h2>{escape(heading)}</h2>\n{html}</section>\n'
      for name, heading, html in sections)
  links = ''.join(f'<a href="#{name}">{escape(heading)}</a>'
                  for name, heading, _ in sections)
  about = ''.join(f'<p class="about">{escape(line)}</p>\n'
                  for line in shown.about)
  # '<' would end the script early if a token held </script>.
  data = json.dumps(
      {'tokens': {name: list(texts) for name, texts in shown.texts.items()},
       'maps': _maps(found, shown)}, allow_nan=False).replace('<', '\\u003c')
  return f'''<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(shown.title)}: inside</title>
<style>
{(HERE / 'page.css').read_text()}</style>
<h1>{escape(shown.title)}</h1>
{about}<nav aria-label="sections">{links}</nav>
{body}<div class="tip" role="status" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>
{(HERE / 'page.js').read_text()}</script>
</html>
'''


def size(found: Insides) -> int:
  """Returns about how many bytes the attention maps take in a page."""
  return sum(map_size(x.weights.shape) for x in found.attention.values())


def map_size(shape: Sequence[int]) -> int:
  """The same of one stack's, [N, B, H, L, M], of which one row is shown."""
  N, _, H, L, M = shape
  return N * H * L * M * BYTES * 4 // 3


def _attention(found: Insides, shown: Shown) -> Iterable[tuple[str, str, str]]:
  told = ('Each square is a head: a row for each query, a column for each key, '
          'the darker the larger its weight (by its square root). Choose one '
          'to see it below; hover over it for weights; click on a row, or on a '
          'token, to see what that token looks at.')
  for name in found.attention:
    yield (f'maps-{name}', f'Attention: {TITLES[name]}', f'''<p>{told}</p>
<div class="controls"><label>Below each head:
<select class="measure"></select></label></div>
<div class="scroll"><table class="heads"></table></div>
<p class="chosen" aria-live="polite"></p>
<p class="strip"></p>
<div class="map"><div class="scroll">
<canvas class="large" tabindex="0" role="img"></canvas></div>
<div class="side" aria-live="polite"></div></div>
<ul class="notes">{_notes(shown.measures[name])}</ul>
''')


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


def _notes(measures: Mapping[str, np.ndarray]) -> str:
  return ''.join(f'<li>{escape(MEANINGS[name])}</li>' for name in measures)


def _maps(found: Insides, shown: Shown) -> list[dict[str, Any]]:
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


def _streams(found: Insides, shown: Shown) -> Iterable[tuple[str, str, str]]:
  for name, stream in found.stream.items():
    norms = stream.norms[:, 0]
    low, high = np.log(np.maximum([norms.min(), norms.max()], 1e-9))
    heat = (np.log(np.maximum(norms, 1e-9)) - low) / max(high - low, 1e-9)
    texts = shown.texts[name]
    rows = [[_cell(f'{x:.3g}', v, f'{_at(texts, i)}\n{_after(n)}\nnorm {x:.5g}')
             for i, (x, v) in enumerate(zip(norms[n], heat[n]))]
            for n in range(len(norms))]
    yield (f'stream-{name}', f'Residual stream of the {name}', f'''<p>The
Euclidean norm of each token’s state: what the first layer is given, and what
each layer returns.</p>
{_table(texts, rows, _layer_names(len(norms)))}
<h3>Largest features</h3>
{_features(stream)}
''')


def _features(stream: Stream) -> str:
  """Returns the table of the largest features, and which are outliers."""
  head = ''.join(f'<th scope="col">{x}</th>' for x in (
      'layer', 'mean norm', 'median', 'RMS',
      f'{FEATURES} largest features: magnitude, × the median, × the RMS'))
  rows = []
  for n, peaks_D in enumerate(stream.peaks[:, 0]):
    median, rms = stream.median[n, 0], stream.rms[n, 0]
    cells = [f'{stream.norms[n, 0].mean():.4g}', f'{median:.3g}', f'{rms:.3g}',
             '; '.join(f'{d}: {peaks_D[d]:.3g} (× {_times(peaks_D[d], median)}'
                       f', × {_times(peaks_D[d], rms)})'
                       for d in largest(peaks_D))]
    rows.append(f'<tr><th scope="row">{_layer_names(n + 1)[n]}</th>'
                + ''.join(f'<td>{x}</td>' for x in cells) + '</tr>')
  features = np.flatnonzero(stream.outliers[0])
  told = ('There are none' if not len(features) else
          f'{"These are" if len(features) > 1 else "This is"} '
          + ', '.join(map(str, features[:64])) + (
              f' and {len(features) - 64} more' if len(features) > 64 else ''))
  return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>'
          + '\n'.join(rows) + '</tbody></table></div>\n'
          '<p>Outlier features by the criterion of Dettmers et al. 2022, of a '
          'magnitude of at least 6 in a quarter of the layers and for 6 % of '
          f'the tokens: {told.lower()}.</p>')


def largest(peaks_D: np.ndarray) -> list[int]:
  """Returns the features of a layer that are named, the largest first."""
  return np.argsort(-peaks_D, kind='stable')[:FEATURES].tolist()


def _times(x: float, of: float) -> str:
  return f'{x / of:.3g}' if of > 0 else '∞'


def _lens(found: Insides, shown: Shown) -> Iterable[tuple[str, str, str]]:
  if found.lens is None:
    return
  name = 'decoder' if 'decoder' in found.stream else 'encoder'
  texts = shown.texts[name]
  rows = [[_cell(shown.spell(ids[0]), probabilities[0], f'{_at(texts, i)}\n'
                 f'{_after(n)}\n' + '\n'.join(
                     f'{p:.4f}  {shown.spell(x)}'
                     for x, p in zip(ids, probabilities)))
           for i, (ids, probabilities) in enumerate(zip(*layer))]
          for n, layer in enumerate(zip(
              found.lens.ids[:, 0].tolist(),
              found.lens.probabilities[:, 0].tolist()))]
  what = ('the next token' if name == 'decoder' else 'the token itself')
  yield ('lens', 'Logit lens', f'''<p>What the model would predict if the final
norm and the head read what each layer returns (nostalgebraist 2020): in each
cell the likeliest token, the darker the more probable. What is predicted is
{what}. The top row is the model’s own prediction.</p>
{_table(texts, rows[::-1], _layer_names(len(rows))[::-1])}
''')


def _experts(found: Insides, shown: Shown) -> Iterable[tuple[str, str, str]]:
  for name, experts in found.experts.items():
    texts, rows = shown.texts[name], []
    count = experts.probabilities.shape[-1]
    for n, layer in enumerate(experts.layers):
      rows.append([_expert_cell(experts, n, i, count,
                                f'{_at(texts, i)}\nlayer {layer}\n')
                   for i in range(len(texts))])
    yield (f'experts-{name}', f'Experts of the {name}', f'''<p>The experts to
which each token goes, of {count} in each layer; the one with the largest gate
comes first and gives the colour. A token that found no room at an expert has
its number struck out.</p>
{_table(texts, rows, [str(n) for n in experts.layers])}
''')


def _expert_cell(experts: Experts, n: int, i: int, count: int, where: str
                 ) -> str:
  gates_E = experts.gates[n, 0, i]
  chosen = np.flatnonzero(experts.chosen[n, 0, i])
  chosen = chosen[np.argsort(-gates_E[chosen], kind='stable')]
  text = ' '.join(str(e) if gates_E[e] else f'<s class="lost">{e}</s>'
                  for e in chosen) or '–'
  probabilities_E = experts.probabilities[n, 0, i]
  likeliest = np.argsort(-probabilities_E, kind='stable')[:8]
  tip = where + '\n'.join([
      *(f'expert {e}: gate {gates_E[e]:.4f}'
        + ('' if gates_E[e] else ', no room') for e in chosen),
      'router: ' + ', '.join(f'{e} {probabilities_E[e]:.3f}'
                             for e in likeliest)])
  hue = 360 * int(chosen[0]) / count if len(chosen) else 0
  kind = 'heat expert' if len(chosen) else 'heat'
  return (f'<td class="{kind}" style="--v:0;--h:{hue:.0f}" '
          f'data-tip="{escape(tip)}">{text}</td>')


def _cell(text: str, value: float, tip: str) -> str:
  return (f'<td class="heat" style="--v:{value:.3f}" '
          f'data-tip="{escape(tip)}">{escape(text)}</td>')


def _table(texts: Sequence[str], rows: Sequence[Sequence[str]],
           names: Sequence[str]) -> str:
  """Returns a table with a column for each token and a row for each layer."""
  head = ''.join(f'<th scope="col" class="token" title="token {i}">'
                 f'{escape(text)}</th>' for i, text in enumerate(texts))
  body = '\n'.join(f'<tr><th scope="row">{escape(name)}</th>{"".join(row)}</tr>'
                   for name, row in zip(names, rows))
  # By keyboard a table is one stop, within which the arrow keys move.
  body = body.replace('<td ', '<td tabindex="0" ', 1).replace(
      '<td class', '<td tabindex="-1" class')
  return (f'<div class="scroll"><table><thead><tr><th scope="col">layer</th>'
          f'{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>')


def _layer_names(count: int) -> list[str]:
  return ['embedding', *map(str, range(count - 1))]


def _after(n: int) -> str:
  return f'after layer {n - 1}' if n else 'before the first layer'


def _at(texts: Sequence[str], i: int) -> str:
  return f'{texts[i]} (token {i})'


