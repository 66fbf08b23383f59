"""What happens inside a model as it reads --prompt, as one HTML page that opens
without network.

The text is shown to the model as in training, as far as the objective has a
way to show one. The decoder of an encoder-decoder is shown --target, or else
what the model itself writes. training/evals/inspection.py says what is looked
at. Of the page in ../templates the tables stand in the HTML; inspect.js draws
the attention maps from arrays that stand in the file too.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jinja2
import markupsafe
import numpy as np

import architectures
from common.errors import require, short
from training import generate, objectives
from training.costs import totals
from training.data import texts as text_files
from training.evals import Evaluation, Flag, Task, inspection, without
from training.evals.inspection import Experts, Inspection, Stream
from training.evals.tasks import reading
from training.hf import generation as hf_generation
from training.workdir import storage

FILE = 'inspect.html'
MOST = 512  # tokens, whose attention maps a browser can show
WRITTEN = 32  # tokens that an encoder-decoder writes, where none are given
REPEATED, ROWS = 25, 4  # random tokens that come twice, in some rows
FEATURES = 3  # of a layer, that are named
QUERIES = {'encoder': 'encoder', 'decoder': 'decoder', 'cross': 'decoder'}
KEYS = QUERIES | {'cross': 'encoder'}
TITLES = {'encoder': "the encoder's self-attention",
          'decoder': "the decoder's self-attention",
          'cross': "the decoder's attention to the encoder's output"}
MEANINGS = {
    'entropy': 'of a query’s weights, in nats; log n where n keys weigh alike',
    'first token': 'the mean weight on the first token, on which many models '
                   'put what they need nowhere else (Xiao et al. 2023)',
    'learned sink': 'the mean share that the head’s sink takes',
    'previous token': 'the mean weight on the token before',
    'induction': 'on random tokens that come twice, the weight on what '
                 'followed the query’s token before (Olsson et al. 2022)'}


class Read(NamedTuple):
  """What the model reads.

  Attributes:
    arrays: the module's arguments by name, of one row.
    tokens: int [L], by stack.
    notes: sentences on how it came to be.
  """
  arrays: dict[str, np.ndarray]
  tokens: dict[str, np.ndarray]
  notes: list[str]


class Cell(NamedTuple):
  """A cell of a table: its colour is as strong as its value, from 0 to 1, or
  of the hue of an expert; the tip is shown beside it on request."""
  text: str
  value: float
  tip: str
  hue: int | None = None


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Writes inspect.html into the workdir."""
  model, tokenizer = evaluation.run.model, evaluation.tokenizer
  read = evaluation.shown
  inspected = inspection.of(
      evaluation.run.module, evaluation.params, read.arrays,
      min(evaluation.options.top_tokens, model.vocab_size))
  spell = lambda i: reading.readable(i, tokenizer)
  texts = {name: [spell(i) for i in ids] for name, ids in read.tokens.items()}
  measures = by_head(inspected, _repeated(evaluation))
  about = [f'{model.arch} of {evaluation.workdir}, step {evaluation.step}, '
           f'reading {evaluation.options.prompt!r}.', *read.notes,
           *totals.layers(model)]
  if inspected.lens is None:
    about.append("There is no logit lens: the model's head scores no tokens of "
                 'the vocabulary.')
  path = evaluation.workdir / FILE
  storage.write(path, page(inspected, f'Inside {model.arch}', about, texts,
                           spell, measures))
  print('\n'.join([*about[1:], f'attention maps and all else: {path}']))
  return _figures(inspected, texts, measures, spell) | {'page': str(path)}


def _read(evaluation: Evaluation) -> Read:
  """Lays out --prompt, and --target of an encoder-decoder."""
  run_, tokenizer = evaluation.run, evaluation.tokenizer
  prompt, target = evaluation.options.prompt, evaluation.options.target
  objective, stack = objectives.of(run_.config), architectures.stack(run_.model)
  require(not target or stack == 'encoder-decoder', f'--target is '
          f'{short(target)}, but a {stack} has no other text to be shown than '
          'its prompt')
  require(len(tokenizer.encode(prompt)) > 0, f'the prompt {short(prompt)} has '
          f'no token that the tokenizer {tokenizer.name!r} knows')
  if stack == 'encoder-decoder':
    prompts = objective.prompt([prompt], run_.config, tokenizer)
    source_1M = prompts.arguments['source_BM']
    shown_1L, notes = _target(evaluation, prompts)
    read = Read(dict(tokens_BM=source_1M, decoder_tokens_BL=shown_1L),
                dict(encoder=source_1M[0], decoder=shown_1L[0]), notes)
  elif objective.writes:
    folder = hf_generation.published(evaluation.workdir, evaluation.step)
    prompts, _ = hf_generation.shown([prompt], run_.config, tokenizer, folder)
    read = Read(dict(tokens_BL=prompts.tokens, **prompts.arguments),
                {stack: prompts.tokens[0]}, [])
  else:
    before, after = reading.around(evaluation)
    ids_L = np.concatenate([before, reading.with_masks(prompt, tokenizer),
                            after]).astype(np.int32)
    read = Read(dict(tokens_BL=ids_L[None]), {stack: ids_L}, [])
  for name, ids_L in read.tokens.items():
    most = min(run_.model.max_len, MOST)
    require(len(ids_L) <= most, f'the {name} is shown {len(ids_L)} tokens, and '
            f'{most} can be shown: shorten the '
            f'{"--target" if name == "decoder" and target else "prompt"}')
  return read


def _target(evaluation: Evaluation, prompts: Any
            ) -> tuple[np.ndarray, list[str]]:
  """Returns what the decoder of an encoder-decoder is shown, [1, L]."""
  tokenizer, target = evaluation.tokenizer, evaluation.options.target
  start_1L, end = prompts.tokens, tokenizer.separator_id
  if target:
    ids = tokenizer.encode(target)
    note = f'The decoder is shown {target!r}.'
  else:
    # A longer source is refused afterwards.
    room = min(WRITTEN, evaluation.run.model.max_len - start_1L.shape[1])
    ids = generate.until(np.asarray(generate.generate(
        evaluation.run.module, evaluation.params, start_1L, prompts.lengths,
        jax.random.key(0), max_new_tokens=room, stop_token=end,
        sampling=generate.Sampling(temperature=0), **prompts.arguments))[0],
                         end)
    note = (f'The decoder is shown the {len(ids)} tokens that the model itself '
            f'writes: {tokenizer.decode(ids)!r}.')
  return np.concatenate([start_1L[0], ids]).astype(np.int32)[None], [note]


def _repeated(evaluation: Evaluation) -> np.ndarray | None:
  """Returns the induction score of each head of a decoder, [N, H], on random
  tokens that come twice; None of other models, and of very short ones."""
  model, tokenizer = evaluation.run.model, evaluation.tokenizer
  size = min(REPEATED, (model.max_len - 1) // 2)
  usual = np.setdiff1d(np.arange(min(tokenizer.vocab_size, model.vocab_size)),
                       [*tokenizer.special_ids.values(),
                        *tokenizer.sentinel_ids])
  # Of fewer usual tokens, some would come more than twice.
  if architectures.stack(model) != 'decoder' or not 4 <= size <= len(usual):
    return None
  random = np.random.default_rng(0)
  drawn = np.stack([random.choice(usual, size, replace=False)
                    for _ in range(ROWS)])
  first = np.full((ROWS, 1), tokenizer.separator_id)
  tokens_BL = np.concatenate([first, drawn, drawn], 1).astype(np.int32)
  inspected = inspection.of(evaluation.run.module, evaluation.params,
                            dict(tokens_BL=tokens_BL), 0)
  return inspected.attention['decoder'].induction.mean(1)


def by_head(inspected: Inspection, induction_NH: np.ndarray | None
            ) -> dict[str, dict[str, np.ndarray]]:
  """Returns one number a head of each figure, [N, H], by name of attention.

  Args:
    inspected: of whose rows the first counts.
    induction_NH: of a decoder, measured apart.
  """
  measures = {}
  for name, attention in inspected.attention.items():
    every_BL = inspected.real[QUERIES[name]]
    # A causal query sees nothing but the first token, where that is its own.
    later_BL = every_BL.copy()
    if name == 'decoder' and every_BL.shape[1] > 1:
      later_BL[:, 0] = False
    mean = lambda x, counted_BL: inspection.mean_of_queries(x, counted_BL)[:, 0]
    measures[name] = {'entropy': mean(attention.entropy, every_BL),
                      'first token': mean(attention.first, later_BL)}
    if attention.sink.max() > 1e-3:
      measures[name]['learned sink'] = mean(attention.sink, every_BL)
    if attention.previous is not None:
      measures[name]['previous token'] = attention.previous[:, 0]
    if name == 'decoder' and induction_NH is not None:
      measures[name]['induction'] = induction_NH
  return measures


def _figures(inspected: Inspection, texts: Mapping[str, Sequence[str]],
             measures: Mapping[str, Mapping[str, np.ndarray]], spell: Any
             ) -> dict[str, Any]:
  """Returns what goes into --json; the maps themselves stand in the page."""
  figures = {
      'tokens': dict(texts),
      'attention': {name: {of: x.tolist() for of, x in row.items()}
                    for name, row in measures.items()},
      'stream': {name: {
          'norms': stream.norms[:, 0].tolist(),
          'median': stream.median[:, 0].tolist(),
          'rms': stream.rms[:, 0].tolist(),
          'outliers': np.flatnonzero(stream.outliers[0]).tolist()}
                 for name, stream in inspected.stream.items()},
      'experts': {name: {
          'layers': experts.layers.tolist(),
          'gates': experts.gates[:, 0].tolist(),
          'probabilities': experts.probabilities[:, 0].tolist()}
                  for name, experts in inspected.experts.items()}}
  if inspected.lens is not None:
    figures['lens'] = [
        [[dict(text=spell(i), id=i, probability=p) for i, p in cell]
         for cell in layer] for layer in _lens(inspected)]
  return figures


def _lens(inspected: Inspection) -> list[list[list[tuple[int, float]]]]:
  """Returns the ids and probabilities of each token of each layer."""
  return [[list(zip(*cell)) for cell in zip(*layer)] for layer in zip(
      inspected.lens.ids[:, 0].tolist(),
      inspected.lens.probabilities[:, 0].tolist())]


def page(inspected: Inspection, title: str, about: Sequence[str],
         texts: Mapping[str, Sequence[str]], spell: Any,
         measures: Mapping[str, Mapping[str, np.ndarray]]) -> str:
  """Returns the whole file.

  Args:
    inspected: the record; of several rows, the first.
    title: a short one.
    about: sentences on what was looked at.
    texts: the tokens as a reader is shown them, by name.
    spell: an id -> the same of any token.
    measures: {attention: {figure: [N, H]}}, one number a head; nan: none.
  """
  maps = []
  for name, attention in inspected.attention.items():
    weights_NHLM = attention.weights[:, 0]
    units = np.round(np.clip(weights_NHLM, 0, 1) * 65535).astype('<u2')
    maps.append(dict(
        name=name, queries=QUERIES[name], keys=KEYS[name],
        shape=weights_NHLM.shape,
        weights=base64.b64encode(units.tobytes()).decode('ascii'),
        measures={of: [[None if np.isnan(x) else round(float(x), 4)
                        for x in row] for row in values]
                  for of, values in measures[name].items()}))
  # '<' would end the script early if a token held </script>.
  data = json.dumps(
      {'tokens': {name: list(row) for name, row in texts.items()},
       'maps': maps}, allow_nan=False).replace('<', '\\u003c')
  folder = pathlib.Path(__file__).parents[1] / 'templates'
  template = jinja2.Environment(
      loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True,
      undefined=jinja2.StrictUndefined).get_template('inspect.html')
  return template.render(
      title=title, about=about, data=data,
      sections=list(_sections(inspected, texts, spell, measures))).lstrip()


def _sections(inspected: Inspection, texts: Mapping[str, Sequence[str]],
              spell: Any, measures: Mapping[str, Mapping[str, np.ndarray]]
              ) -> Iterator[dict[str, Any]]:
  """Yields what the template is given of each section. A table is its columns,
  the names of its rows, and these."""
  for name in inspected.attention:
    yield dict(id=f'maps-{name}', heading=f'Attention: {TITLES[name]}',
               kind='maps',
               notes=[f'{of}: {MEANINGS[of]}' for of in measures[name]])
  for name, stream in inspected.stream.items():
    yield dict(id=f'stream-{name}', heading=f'Residual stream of the {name}',
               kind='stream', **_stream(stream, texts[name]))
  if inspected.lens is not None:
    name = 'decoder' if 'decoder' in inspected.stream else 'encoder'
    rows = [[Cell(spell(cell[0][0]), cell[0][1], '\n'.join([
        _where(texts[name], i), _after(n),
        *(f'{p:.4f}  {spell(x)}' for x, p in cell)]))
             for i, cell in enumerate(layer)]
            for n, layer in enumerate(_lens(inspected))]
    yield dict(id='lens', heading='Logit lens', kind='lens',
               predicted='the next token' if name == 'decoder' else
               'the token itself',
               table=(texts[name], _layers(len(rows))[::-1], rows[::-1]))
  for name, experts in inspected.experts.items():
    yield dict(id=f'experts-{name}', heading=f'Experts of the {name}',
               kind='experts', count=experts.probabilities.shape[-1],
               table=(texts[name], experts.layers, [
                   [_expert(experts, n, i,
                            f'{_where(texts[name], i)}\nlayer {layer}')
                    for i in range(len(texts[name]))]
                   for n, layer in enumerate(experts.layers)]))


def _stream(stream: Stream, texts: Sequence[str]) -> dict[str, Any]:
  """Returns the table of norms, the largest features of each layer, and which
  features are outliers."""
  norms = stream.norms[:, 0]
  logs = np.log(np.maximum(norms, 1e-9))
  heat = (logs - logs.min()) / max(logs.max() - logs.min(), 1e-9)
  rows = [[Cell(f'{x:.3g}', v,
                f'{_where(texts, i)}\n{_after(n)}\nnorm {x:.5g}')
           for i, (x, v) in enumerate(zip(*layer))]
          for n, layer in enumerate(zip(norms, heat))]
  names, layers = _layers(len(norms)), []
  times = lambda x, of: f'{x / of:.3g}' if of > 0 else '∞'
  for n, peaks_D in enumerate(stream.peaks[:, 0]):
    median, rms = stream.median[n, 0], stream.rms[n, 0]
    largest = np.argsort(-peaks_D, kind='stable')[:FEATURES].tolist()
    layers.append((
        names[n], f'{norms[n].mean():.4g}', f'{median:.3g}', f'{rms:.3g}',
        '; '.join(f'{d}: {peaks_D[d]:.3g} (× {times(peaks_D[d], median)}, × '
                  f'{times(peaks_D[d], rms)})' for d in largest)))
  features = np.flatnonzero(stream.outliers[0]).tolist()
  more = f' and {len(features) - 64} more' if len(features) > 64 else ''
  return dict(table=(texts, names, rows), layers=layers,
              outliers=', '.join(map(str, features[:64])) + more or 'none')


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


def _check(options: Any, config: Any) -> None:
  require(bool(options.prompt.strip()), 'task inspect reads a text: pass '
          "--prompt='My fellow citizens'")
  require('|||' not in options.prompt, "task inspect shows one prompt: pass "
          "--prompt without '|||'")
  for name in ('prompt', 'target'):
    text_files.checked(getattr(options, name), f'--{name}')


TASKS = {'inspect': Task(
    'attention maps, residual stream, logit lens and experts as the model '
    'reads --prompt, as an HTML page', run,
    without(reading.reads_text, reading.NO_TEXT), check=_check, shown=_read,
    file=FILE, held_out=False, flags=(
        Flag('prompt', '', 'The text to read.'),
        Flag('target', '', 'What the decoder of an encoder-decoder is shown; '
             'default: what the model writes.'),
        Flag('top_tokens', 5, 'So many tokens of each layer in the logit lens.',
             1, 1000)))}
