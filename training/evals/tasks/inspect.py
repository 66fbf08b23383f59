"""A look inside a model as it reads --prompt, as one HTML page that opens
without network.

The text is shown to the model as in training, as far as the objective has a
way to show one. The decoder of an encoder-decoder is shown --target, or else
what the model itself writes. training/evals/inspection.py says what is looked
at. The tables of the page in ../templates stand in the HTML; inspect.js draws
the attention maps from arrays that stand in the file too.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jinja2
import markupsafe
import numpy as np

import architectures
from common.errors import RequestError, require, short
from training import generate, objectives
from training.costs import totals
from training.data import texts as text_files
from training.evals import Evaluation, Flag, Task, inspection
from training.evals.inspection import Experts, Inspection, Lens, Stream
from training.evals.tasks import reading
from training.hf import generation as hf_generation
from training.workdir import storage

FILE = 'inspect.html'
MOST = 512  # tokens, whose attention maps a browser can show
WRITTEN = 32  # tokens that an encoder-decoder writes, where none are given
REPEATED, ROWS = 25, 4  # random tokens that come twice, in some rows
FEATURES = 3  # of a layer, that are named
OUTLIERS = 64  # features, that are named
SHARES = 8  # of a router, the largest, that are named
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
  """The text that the model reads.

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


class Guess(NamedTuple):
  """A token of the logit lens, and its probability."""
  token: int
  probability: float


# {name of attention: {figure: [N, H]}}, one number a head.
Measures = Mapping[str, Mapping[str, np.ndarray]]
Spell = Callable[[int], str]  # an id -> the token as a reader is shown it


class Inspect(Task):
  """Writes inspect.html into the workdir."""

  help = ('attention maps, residual stream, logit lens and experts as the '
          'model reads --prompt, as an HTML page')
  lacks = reading.NO_TEXT
  file = FILE
  held_out = False
  flags = (
      Flag(name='prompt', default='', help='The text to read.'),
      Flag(name='target', default='',
           help='What the decoder of an encoder-decoder is shown; default: '
           'what the model writes.'),
      Flag(name='top_tokens', default=5,
           help='So many tokens of each layer in the logit lens.', least=1,
           most=1000),
  )

  def allows(self, objective: objectives.Objective) -> bool:
    return reading.reads_text(objective)

  def check(self, options: Any, config: Any) -> None:
    require(bool(options.prompt.strip()), 'task inspect reads a text: pass '
            "--prompt='My fellow citizens'")
    require('|||' not in options.prompt, "task inspect shows one prompt: pass "
            "--prompt without '|||'")
    for name in ('prompt', 'target'):
      text_files.checked(getattr(options, name), f'--{name}')

  def shown(self, evaluation: Evaluation) -> Read:
    """Lays out --prompt, and --target of an encoder-decoder."""
    tokenizer = evaluation.tokenizer
    prompt = evaluation.options.prompt
    target = evaluation.options.target
    stack = architectures.stack(evaluation.run.model)
    if target and stack != 'encoder-decoder':
      raise RequestError(f'--target is {short(target)}, but a {stack} has no '
                         'other text to be shown than its prompt')
    require(len(tokenizer.encode(prompt)) > 0, f'the prompt {short(prompt)} '
            f'has no token that the tokenizer {tokenizer.name!r} knows')
    # A map of attention grows with the square of the length.
    read = _read(evaluation, stack)
    most = min(evaluation.run.model.max_len, MOST)
    for name, ids_L in read.tokens.items():
      text = '--target' if name == 'decoder' and target else 'prompt'
      require(len(ids_L) <= most, f'the {name} is shown {len(ids_L)} tokens, '
              f'and {most} can be shown: shorten the {text}')
    return read

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Writes the page on what the model does with the prompt."""
    model = evaluation.run.model
    tokenizer = evaluation.tokenizer
    read = evaluation.shown

    # The record of the model, with the induction that is measured apart.
    inspected = inspection.of(
        evaluation.run.module, params=evaluation.params, arrays=read.arrays,
        top=min(evaluation.options.top_tokens, model.vocab_size))
    measures = by_head(inspected, _repeated(evaluation))

    # The tokens as a reader is shown them.
    def spell(token: int) -> str:
      return reading.readable(token, tokenizer)

    texts = {}
    for name, ids_L in read.tokens.items():
      texts[name] = [spell(token) for token in ids_L]

    # The page.
    about = [f'{model.arch} of {evaluation.workdir}, step {evaluation.step}, '
             f'reading {evaluation.options.prompt!r}.', *read.notes,
             *totals.describe_layers(model)]
    if inspected.lens is None:
      about.append("There is no logit lens: the model's head scores no tokens "
                   'of the vocabulary.')
    path = evaluation.workdir / FILE
    storage.write_file(path, page(
        inspected, title=f'Inside {model.arch}', about=about, texts=texts,
        spell=spell, measures=measures))
    print('\n'.join([*about[1:], f'attention maps and all else: {path}']))
    figures = _figures(inspected, texts=texts, measures=measures, spell=spell)
    figures['page'] = str(path)
    return figures


def _read(evaluation: Evaluation, stack: str) -> Read:
  """Returns what a model that stacks `stack` reads, as in training."""
  config = evaluation.run.config
  tokenizer = evaluation.tokenizer
  prompt = evaluation.options.prompt
  objective = objectives.of(config)
  # A source and a target.
  if stack == 'encoder-decoder':
    prompts = objective.prompt([prompt], config, tokenizer)
    source_1M = prompts.arguments['source_BM']
    shown_1L, note = _target(evaluation, prompts)
    return Read(
        arrays=dict(tokens_BM=source_1M, decoder_tokens_BL=shown_1L),
        tokens=dict(encoder=source_1M[0], decoder=shown_1L[0]), notes=[note])

  # A text that the model would go on from.
  if objective.writes:
    folder = hf_generation.published(evaluation.workdir, evaluation.step)
    prompts, _ = hf_generation.shown([prompt], config=config,
                                     tokenizer=tokenizer, generation=folder)
    return Read(arrays=dict(tokens_BL=prompts.tokens, **prompts.arguments),
                tokens={stack: prompts.tokens[0]}, notes=[])

  # A text that is read as a whole, as an encoder is trained.
  before, after = reading.around(evaluation)
  ids = reading.with_masks(prompt, tokenizer)
  ids_L = np.concatenate([before, ids, after]).astype(np.int32)
  return Read(arrays=dict(tokens_BL=ids_L[None]), tokens={stack: ids_L},
              notes=[])


def _target(evaluation: Evaluation, prompts: objectives.Prompts
            ) -> tuple[np.ndarray, str]:
  """Returns what the decoder of an encoder-decoder is shown, [1, L], and a
  sentence on it."""
  tokenizer = evaluation.tokenizer
  target = evaluation.options.target
  start_1L = prompts.tokens
  if target:
    ids = tokenizer.encode(target)
    note = f'The decoder is shown {target!r}.'
  else:
    # A longer source is refused afterwards.
    room = min(WRITTEN, evaluation.run.model.max_len - start_1L.shape[1])
    end = tokenizer.separator_id
    written_1T = np.asarray(generate.generate(
        evaluation.run.module, evaluation.params, start_1L, prompts.lengths,
        jax.random.key(0), max_new_tokens=room, stop_token=end,
        sampling=generate.Sampling(temperature=0), **prompts.arguments))
    ids = generate.tokens_before_stop(written_1T[0], end)
    note = (f'The decoder is shown the {len(ids)} tokens that the model itself '
            f'writes: {tokenizer.decode(ids)!r}.')
  shown_L = np.concatenate([start_1L[0], ids]).astype(np.int32)
  return shown_L[None], note


def _repeated(evaluation: Evaluation) -> np.ndarray | None:
  """Returns the induction score of each head of a decoder, [N, H], on random
  tokens that come twice; None of other models, and of very short ones."""
  model = evaluation.run.model
  tokenizer = evaluation.tokenizer
  if architectures.stack(model) != 'decoder':
    return None

  # If there were fewer usual tokens, some would come more than twice.
  size = min(REPEATED, (model.max_len - 1) // 2)
  every = np.arange(min(tokenizer.vocab_size, model.vocab_size))
  special = [*tokenizer.special_ids.values(), *tokenizer.sentinel_ids]
  usual = np.setdiff1d(every, special)
  if size < 4 or size > len(usual):
    return None

  random = np.random.default_rng(0)
  rows = []
  for _ in range(ROWS):
    drawn = random.choice(usual, size, replace=False)
    rows.append(np.concatenate([[tokenizer.separator_id], drawn, drawn]))
  tokens_BL = np.stack(rows).astype(np.int32)
  inspected = inspection.of(evaluation.run.module, params=evaluation.params,
                            arrays=dict(tokens_BL=tokens_BL), top=0)
  return inspected.attention['decoder'].induction.mean(1)


def by_head(inspected: Inspection, induction_NH: np.ndarray | None
            ) -> dict[str, dict[str, np.ndarray]]:
  """Returns one number a head of each figure, [N, H], by name of attention.

  Args:
    inspected: the record, of whose rows the first counts.
    induction_NH: the induction score of a decoder, which is measured apart.
  """
  measures = {}
  for name, attention in inspected.attention.items():
    # A causal query sees nothing but the first token, where that is its own.
    every_BL = inspected.real[QUERIES[name]]
    later_BL = every_BL.copy()
    if name == 'decoder' and every_BL.shape[1] > 1:
      later_BL[:, 0] = False

    measures[name] = heads = {}
    heads['entropy'] = _mean(attention.entropy, every_BL)
    heads['first token'] = _mean(attention.first, later_BL)
    if attention.sink.max() > 1e-3:
      heads['learned sink'] = _mean(attention.sink, every_BL)
    if attention.previous is not None:
      heads['previous token'] = attention.previous[:, 0]
    if name == 'decoder' and induction_NH is not None:
      heads['induction'] = induction_NH
  return measures


def _mean(values_NBHL: np.ndarray, counted_BL: np.ndarray) -> np.ndarray:
  """Returns the mean of each head over the queries that count of the first
  row, [N, H]."""
  return inspection.mean_of_queries(values_NBHL, counted_BL)[:, 0]


def _figures(inspected: Inspection, texts: Mapping[str, Sequence[str]],
             measures: Measures, spell: Spell) -> dict[str, Any]:
  """Returns what goes into --json; the maps themselves stand in the page.

  Args:
    inspected, texts, spell, measures: those of `page`.
  """
  # One row was looked at: the first of each array.
  figures: dict[str, Any] = {
      'tokens': dict(texts), 'attention': {}, 'stream': {}, 'experts': {}}
  for name, heads in measures.items():
    figures['attention'][name] = {
        figure: values_NH.tolist() for figure, values_NH in heads.items()}
  for name, stream in inspected.stream.items():
    figures['stream'][name] = {
        'norms': stream.norms[:, 0].tolist(),
        'median': stream.median[:, 0].tolist(),
        'rms': stream.rms[:, 0].tolist(),
        'outliers': np.flatnonzero(stream.outliers[0]).tolist()}
  for name, experts in inspected.experts.items():
    figures['experts'][name] = {
        'layers': experts.layers.tolist(),
        'gates': experts.gates[:, 0].tolist(),
        'probabilities': experts.probabilities[:, 0].tolist()}
  if inspected.lens is None:
    return figures

  # The logit lens: for each layer, the guesses at each token.
  figures['lens'] = []
  for layer in _guesses(inspected.lens):
    places = []
    for guesses in layer:
      place = []
      for guess in guesses:
        place.append(dict(text=spell(guess.token), id=guess.token,
                          probability=guess.probability))
      places.append(place)
    figures['lens'].append(places)
  return figures


def _guesses(lens: Lens) -> list[list[list[Guess]]]:
  """Returns the likeliest tokens by layer and place, the best first."""
  layers = []
  for ids_LK, p_LK in zip(lens.ids[:, 0].tolist(),
                          lens.probabilities[:, 0].tolist()):
    layer = []
    for ids_K, p_K in zip(ids_LK, p_LK):
      layer.append([Guess(*pair) for pair in zip(ids_K, p_K)])
    layers.append(layer)
  return layers


def page(inspected: Inspection, title: str, about: Sequence[str],
         texts: Mapping[str, Sequence[str]], spell: Spell, measures: Measures
         ) -> str:
  """Returns the whole file.

  Args:
    inspected: the record; of several rows, the first is shown.
    title: a short one.
    about: sentences on what was looked at.
    texts: the tokens as a reader is shown them, by name.
    spell: an id -> the token as a reader is shown it.
    measures: {attention: {figure: [N, H]}}, one number a head; nan: none.
  """
  # The data that inspect.js draws. '<' would end the script early if a token
  # held </script>.
  drawn = {'tokens': {name: list(row) for name, row in texts.items()},
           'maps': _maps(inspected, measures)}
  data = json.dumps(drawn, allow_nan=False).replace('<', '\\u003c')

  # An undefined name in the template is an error.
  folder = pathlib.Path(__file__).parents[1] / 'templates'
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True,
      undefined=jinja2.StrictUndefined)
  template = environment.get_template('inspect.html')
  sections = list(_sections(inspected, texts=texts, spell=spell,
                            measures=measures))
  return template.render(
      title=title, about=about, data=data, sections=sections).lstrip()


def _maps(inspected: Inspection, measures: Measures) -> list[dict[str, Any]]:
  """Returns what inspect.js draws of each attention, as JSON has it."""
  maps = []
  for name, attention in inspected.attention.items():
    # Weights as integers of 16 bits.
    weights_NHLM = attention.weights[:, 0]
    units = np.round(np.clip(weights_NHLM, 0, 1) * 65535).astype('<u2')
    text = base64.b64encode(units.tobytes()).decode('ascii')

    # Figures to four digits; null: there is none.
    figures = {}
    for figure, values_NH in measures[name].items():
      figures[figure] = rows = []
      for values_H in values_NH:
        rows.append([_rounded(x) for x in values_H])
    maps.append(dict(name=name, queries=QUERIES[name], keys=KEYS[name],
                     shape=weights_NHLM.shape, weights=text, measures=figures))
  return maps


def _rounded(x: float) -> float | None:
  """Returns a number to four digits; None: it is nan."""
  if np.isnan(x):
    return None
  return round(float(x), 4)


def _sections(inspected: Inspection, texts: Mapping[str, Sequence[str]],
              spell: Spell, measures: Measures) -> Iterator[dict[str, Any]]:
  """Yields what the template is given of each section, as a dict. A table is a
  tuple: its columns, the names of its rows, and the rows.

  Args:
    inspected, texts, spell, measures: those of `page`.
  """
  for name in inspected.attention:
    notes = [f'{figure}: {MEANINGS[figure]}' for figure in measures[name]]
    yield dict(id=f'maps-{name}', heading=f'Attention: {TITLES[name]}',
               kind='maps', notes=notes)
  for name, stream in inspected.stream.items():
    yield dict(id=f'stream-{name}', heading=f'Residual stream of the {name}',
               kind='stream', **_stream(stream, texts[name]))
  # The lens shows the stack that predicts tokens, its last layer on top.
  if inspected.lens is not None:
    name = 'encoder'
    predicted = 'the token itself'
    if 'decoder' in inspected.stream:
      name = 'decoder'
      predicted = 'the next token'
    rows = _lens(inspected.lens, texts[name], spell)
    yield dict(id='lens', heading='Logit lens', kind='lens',
               predicted=predicted,
               table=(texts[name], _layers(len(rows))[::-1], rows[::-1]))
  # A cell of this table is a layer of experts at a token.
  for name, experts in inspected.experts.items():
    rows = []
    for n in range(len(experts.layers)):
      row = []
      for i in range(len(texts[name])):
        row.append(_expert(experts, n=n, i=i, texts=texts[name]))
      rows.append(row)
    yield dict(id=f'experts-{name}', heading=f'Experts of the {name}',
               kind='experts', count=experts.probabilities.shape[-1],
               table=(texts[name], experts.layers, rows))


def _lens(lens: Lens, texts: Sequence[str], spell: Spell) -> list[list[Cell]]:
  """Returns the rows of the logit lens, a layer each."""
  rows = []
  for n, layer in enumerate(_guesses(lens)):
    row = []
    for i, guesses in enumerate(layer):
      # A reader sees the best guess, and all guesses where the mouse points.
      tip = [_where(texts, i), _after(n)]
      for guess in guesses:
        tip.append(f'{guess.probability:.4f}  {spell(guess.token)}')
      best = guesses[0]
      row.append(Cell(text=spell(best.token), value=best.probability,
                      tip='\n'.join(tip)))
    rows.append(row)
  return rows


def _stream(stream: Stream, texts: Sequence[str]) -> dict[str, Any]:
  """Returns the table of norms, the largest features of each layer, and which
  features are outliers."""
  # The norm of each token after each layer: the darker the larger.
  norms_NL = stream.norms[:, 0]
  logs_NL = np.log(np.maximum(norms_NL, 1e-9))
  least = logs_NL.min()
  most = logs_NL.max()
  heat_NL = (logs_NL - least) / max(most - least, 1e-9)
  rows = []
  for n in range(len(norms_NL)):
    row = []
    for i, norm in enumerate(norms_NL[n]):
      tip = f'{_where(texts, i)}\n{_after(n)}\nnorm {norm:.5g}'
      row.append(Cell(text=f'{norm:.3g}', value=heat_NL[n, i], tip=tip))
    rows.append(row)

  # The largest features of each layer.
  names = _layers(len(norms_NL))
  layers = []
  for n, peaks_D in enumerate(stream.peaks[:, 0]):
    median = stream.median[n, 0]
    rms = stream.rms[n, 0]
    largest = []
    for d in np.argsort(-peaks_D, kind='stable')[:FEATURES].tolist():
      peak = peaks_D[d]
      largest.append(f'{d}: {peak:.3g} (× {_times(peak, median)}, × '
                     f'{_times(peak, rms)})')
    layers.append((names[n], f'{norms_NL[n].mean():.4g}', f'{median:.3g}',
                   f'{rms:.3g}', '; '.join(largest)))

  # The outliers.
  features = np.flatnonzero(stream.outliers[0]).tolist()
  outliers = ', '.join(map(str, features[:OUTLIERS])) or 'none'
  if len(features) > OUTLIERS:
    outliers += f' and {len(features) - OUTLIERS} more'
  return dict(table=(texts, names, rows), layers=layers, outliers=outliers)


def _times(x: float, of: float) -> str:
  """Returns how many times as large x is as a magnitude, for a reader."""
  return f'{x / of:.3g}' if of > 0 else '∞'


def _expert(experts: Experts, n: int, i: int, texts: Sequence[str]) -> Cell:
  """Returns the cell of token i in layer n of the layers of experts."""
  gates_E = experts.gates[n, 0, i]
  shares_E = experts.probabilities[n, 0, i]

  # The experts that the router chose, the largest gate first.
  chosen = np.flatnonzero(experts.chosen[n, 0, i])
  chosen = chosen[np.argsort(-gates_E[chosen], kind='stable')]
  names: list[Any] = []
  tip = [f'{_where(texts, i)}\nlayer {experts.layers[n]}']
  for e in chosen:
    gate = f'expert {e}: gate {gates_E[e]:.4f}'
    if gates_E[e]:
      names.append(e)
    else:
      names.append(markupsafe.Markup('<s class="lost">{}</s>').format(e))
      gate += ', no room'
    tip.append(gate)
  text = markupsafe.Markup(' ').join(names) or '–'

  # The largest of the router's probabilities.
  likeliest = np.argsort(-shares_E, kind='stable')[:SHARES]
  shares = [f'{e} {shares_E[e]:.3f}' for e in likeliest]
  tip.append('router: ' + ', '.join(shares))

  hue = None
  if len(chosen):
    hue = 360 * int(chosen[0]) // len(gates_E)
  return Cell(text=text, value=0.0, tip='\n'.join(tip), hue=hue)


def _layers(count: int) -> list[str]:
  return ['embedding', *map(str, range(count - 1))]


def _after(n: int) -> str:
  return f'after layer {n - 1}' if n else 'before the first layer'


def _where(texts: Sequence[str], i: int) -> str:
  return f'{texts[i]} (token {i})'


TASKS = {'inspect': Inspect()}
