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
from common.errors import RequestError, require, shorten
from training import generate, objectives
from training.costs import totals
from training.data import texts as text_files
from training.evals import Evaluation, Flag, Task, inspection
from training.evals.inspection import ExpertRouting, Inspection
from training.evals.inspection import LogitLens, ResidualStream
from training.evals.tasks import reading
from training.hf import generation as hf_generation
from training.workdir import storage

PAGE_FILE = 'inspect.html'
# The longest text. Its attention maps grow with the square of its length, and a
# browser has to draw them.
MOST_TOKENS = 512
# How many tokens an encoder-decoder itself writes where --target is not given:
# enough to see what its decoder looks at.
MOST_WRITTEN_TOKENS = 32
# The induction score is measured on rows of random tokens that come twice.
NUM_REPEATED_TOKENS = 25
NUM_REPEATED_ROWS = 4
# How many are named in the page's tables, the largest first.
MOST_FEATURES_OF_LAYER = 3
MOST_OUTLIER_FEATURES = 64
MOST_ROUTER_PROBABILITIES = 8

# The stack whose tokens are the queries of an attention, and the stack whose
# tokens are its keys, by the name of the attention in the record.
STACK_OF_QUERIES = {
    'encoder': 'encoder', 'decoder': 'decoder', 'cross': 'decoder'}
STACK_OF_KEYS = {
    'encoder': 'encoder', 'decoder': 'decoder', 'cross': 'encoder'}
TITLE_OF_ATTENTION = {
    'encoder': "the encoder's self-attention",
    'decoder': "the decoder's self-attention",
    'cross': "the decoder's attention to the encoder's output"}
MEANING_OF_FIGURE = {
    'entropy': 'of a query’s weights, in nats; log n where n keys weigh alike',
    'first token': 'the mean weight on the first token, on which many models '
                   'put what they need nowhere else (Xiao et al. 2023)',
    'learned sink': 'the mean share that the head’s sink takes',
    'previous token': 'the mean weight on the token before',
    'induction': 'on random tokens that come twice, the weight on what '
                 'followed the query’s token before (Olsson et al. 2022)'}


class TextForModel(NamedTuple):
  """The text that the model reads, as the arguments of its module.

  Attributes:
    arrays: the module's arguments by name, of one row.
    tokens: the tokens that each stack reads: {'encoder' or 'decoder': int [L]}.
    notes: sentences for the reader on how the text came to be.
  """
  arrays: dict[str, np.ndarray]
  tokens: dict[str, np.ndarray]
  notes: list[str]


class TableCell(NamedTuple):
  """A coloured cell of a table of the page.

  Attributes:
    text: what stands in it.
    value: how strong its colour is, from 0 to 1.
    tip: what is shown beside it where the mouse points at it.
    hue: the hue of the colour in degrees; None: that of all tables.
  """
  text: str
  value: float
  tip: str
  hue: int | None = None


class LensGuess(NamedTuple):
  """A token of the logit lens, and its probability."""
  token: int
  probability: float


# {name of attention: {figure: [N, H]}}, one number for each head of each layer.
FiguresByHead = Mapping[str, Mapping[str, np.ndarray]]
# A function: the id of a token -> the token as a reader is shown it.
SpellToken = Callable[[int], str]


class Inspect(Task):
  """Writes inspect.html into the run's folder: attention maps, residual stream,
  logit lens and experts as the model reads --prompt."""

  help = ('attention maps, residual stream, logit lens and experts as the '
          'model reads --prompt, as an HTML page')
  why_not_allowed = reading.READS_NO_TEXT
  file = PAGE_FILE
  reads_held_out = False
  flags = (
      Flag(name='prompt', default='', help='The text to read.'),
      Flag(name='target', default='',
           help='What the decoder of an encoder-decoder is shown; default: '
           'what the model writes.'),
      Flag(name='top_tokens', default=5,
           help='So many tokens of each layer in the logit lens.', least=1,
           most=1000),
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return reading.reads_text(objective)

  def check(self, options: Any, config: Any) -> None:
    """Raises RequestError where --prompt is not one text."""
    require(bool(options.prompt.strip()), 'task inspect reads a text: pass '
            "--prompt='My fellow citizens'")
    require('|||' not in options.prompt, "task inspect shows one prompt: pass "
            "--prompt without '|||'")
    for name in ('prompt', 'target'):
      text_files.check_text(getattr(options, name), f'--{name}')

  def prepare(self, evaluation: Evaluation) -> TextForModel:
    """Lays out --prompt as the model reads it, and --target of an
    encoder-decoder.

    Args:
      evaluation: the evaluation of the run, with these flags.

    Raises:
      RequestError: for a text without a token, or with too many, and for a
        --target that the model has no decoder for.
    """
    # The flags must fit the model.
    tokenizer = evaluation.tokenizer
    prompt = evaluation.options.prompt
    target = evaluation.options.target
    stack = architectures.stack(evaluation.run.model)
    if target and stack != 'encoder-decoder':
      raise RequestError(f'--target is {shorten(target)}, but a {stack} has no '
                         'other text to be shown than its prompt')
    require(len(tokenizer.encode(prompt)) > 0, f'the prompt {shorten(prompt)} '
            f'has no token that the tokenizer {tokenizer.name!r} knows')

    # The text with its special tokens must be short enough to be drawn.
    text = _lay_out_text(evaluation, stack)
    most = min(evaluation.run.model.max_len, MOST_TOKENS)
    for name, ids_L in text.tokens.items():
      flag = '--target' if name == 'decoder' and target else 'prompt'
      require(len(ids_L) <= most, f'the {name} is shown {len(ids_L)} tokens, '
              f'and {most} can be shown: shorten the {flag}')
    return text

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Writes a page that shows what the layers of the model do with a text.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      The figures behind the page, without the maps of attention; and `page`,
      the file.
    """
    model = evaluation.run.model
    tokenizer = evaluation.tokenizer
    text = evaluation.prepared

    # Run the model on the text, and keep what its layers do; and measure the
    # induction score, on random tokens.
    inspected = inspection.inspect_model(
        evaluation.run.module, params=evaluation.params, arrays=text.arrays,
        top=min(evaluation.options.top_tokens, model.vocab_size))
    measures = figures_by_head(inspected, _measure_induction(evaluation))

    # Spell the tokens as a reader is shown them.
    def spell(token: int) -> str:
      return reading.spell_token_visibly(token, tokenizer)

    spelled_tokens = {}
    for name, ids_L in text.tokens.items():
      spelled_tokens[name] = [spell(token) for token in ids_L]

    # Write the page, under sentences on the model and on the text.
    about = [f'{model.arch} of {evaluation.workdir}, step {evaluation.step}, '
             f'reading {evaluation.options.prompt!r}.', *text.notes,
             *totals.describe_layers(model)]
    if inspected.lens is None:
      about.append("There is no logit lens: the model's head scores no tokens "
                   'of the vocabulary.')
    path = evaluation.workdir / PAGE_FILE
    storage.write_file(path, render_page(
        inspected, title=f'Inside {model.arch}', about=about,
        spelled_tokens=spelled_tokens, spell=spell, measures=measures))
    print('\n'.join([*about[1:], f'attention maps and all else: {path}']))

    figures = _figures_for_json(inspected, spelled_tokens=spelled_tokens,
                                measures=measures, spell=spell)
    figures['page'] = str(path)
    return figures


def _lay_out_text(evaluation: Evaluation, stack: str) -> TextForModel:
  """Encodes the text of --prompt in the form in which the model has read texts
  in training.

  Args:
    evaluation: the evaluation, with --prompt and --target.
    stack: 'encoder', 'decoder' or 'encoder-decoder'.

  Returns:
    The arguments of the model, a batch of one row; the tokens of each stack;
    and sentences for the user.
  """
  config = evaluation.run.config
  tokenizer = evaluation.tokenizer
  prompt = evaluation.options.prompt
  objective = objectives.find_objective(config)

  # An encoder-decoder reads the prompt as its source, and a target.
  if stack == 'encoder-decoder':
    prompts = objective.prompt([prompt], config, tokenizer)
    source_1M = prompts.arguments['source_BM']
    target_1L, note = _decoder_tokens(evaluation, prompts)
    return TextForModel(
        arrays=dict(tokens_BM=source_1M, decoder_tokens_BL=target_1L),
        tokens=dict(encoder=source_1M[0], decoder=target_1L[0]), notes=[note])

  # A model that writes text reads the prompt as the beginning of a text.
  if objective.writes:
    folder = hf_generation.load_if_published(evaluation.workdir,
                                             evaluation.step)
    prompts, _ = hf_generation.encode_prompts([prompt], config=config,
                                              tokenizer=tokenizer,
                                              generation=folder)
    return TextForModel(
        arrays=dict(tokens_BL=prompts.tokens, **prompts.arguments),
        tokens={stack: prompts.tokens[0]}, notes=[])

  # Any other model, an encoder, reads the prompt as a whole text.
  tokens_before, tokens_after = reading.tokens_around_text(evaluation)
  prompt_ids = reading.encode_with_masks(prompt, tokenizer)
  ids_L = np.concatenate([tokens_before, prompt_ids, tokens_after])
  ids_L = ids_L.astype(np.int32)
  return TextForModel(arrays=dict(tokens_BL=ids_L[None]), tokens={stack: ids_L},
                      notes=[])


def _decoder_tokens(evaluation: Evaluation, prompts: objectives.Prompts
                    ) -> tuple[np.ndarray, str]:
  """Makes the tokens that the decoder of an encoder-decoder reads.

  They are --target, or else the likeliest tokens that the model itself writes
  for the prompt, after the tokens that begin each target.

  Args:
    evaluation: the evaluation of the run.
    prompts: the prompt as the source, with the tokens that begin a target.

  Returns:
    The tokens, int [1, L], and a sentence for the reader.
  """
  tokenizer = evaluation.tokenizer
  target = evaluation.options.target
  start_1L = prompts.tokens
  if target:
    target_ids = tokenizer.encode(target)
    note = f'The decoder is shown {target!r}.'
  else:
    # Write as many tokens as fit; the check of the lengths comes afterwards.
    room = evaluation.run.model.max_len - start_1L.shape[1]
    end_token = tokenizer.separator_id
    written_1T = np.asarray(generate.generate(
        evaluation.run.module, evaluation.params, start_1L, prompts.lengths,
        jax.random.key(0), max_new_tokens=min(MOST_WRITTEN_TOKENS, room),
        stop_token=end_token, sampling=generate.Sampling(temperature=0),
        **prompts.arguments))
    target_ids = generate.tokens_before_stop(written_1T[0], end_token)
    note = (f'The decoder is shown the {len(target_ids)} tokens that the model '
            f'itself writes: {tokenizer.decode(target_ids)!r}.')
  ids_L = np.concatenate([start_1L[0], target_ids]).astype(np.int32)
  return ids_L[None], note


def _measure_induction(evaluation: Evaluation) -> np.ndarray | None:
  """Measures the induction score of each attention head of a decoder, on rows
  of random tokens that come twice (Olsson et al. 2022).

  Args:
    evaluation: the evaluation of the run.

  Returns:
    float [N, H] for N layers of H heads; None for a model that is no decoder,
    or that has too few positions or tokens for such rows.
  """
  model = evaluation.run.model
  tokenizer = evaluation.tokenizer
  if architectures.stack(model) != 'decoder':
    return None

  # Find the tokens to draw from: all but special ones. A row needs that many
  # different tokens, or some would come more than twice.
  num_tokens = min(NUM_REPEATED_TOKENS, (model.max_len - 1) // 2)
  all_tokens = np.arange(min(tokenizer.vocab_size, model.vocab_size))
  special_tokens = [*tokenizer.special_ids.values(), *tokenizer.sentinel_ids]
  text_tokens = np.setdiff1d(all_tokens, special_tokens)
  if num_tokens < 4 or num_tokens > len(text_tokens):
    return None

  # Make rows of the separator, random tokens, and the same tokens again. The
  # seed is fixed, so that all models see the same rows. Average the scores over
  # them.
  random = np.random.default_rng(0)
  rows = []
  for _ in range(NUM_REPEATED_ROWS):
    drawn = random.choice(text_tokens, num_tokens, replace=False)
    rows.append(np.concatenate([[tokenizer.separator_id], drawn, drawn]))
  tokens_BL = np.stack(rows).astype(np.int32)
  inspected = inspection.inspect_model(
      evaluation.run.module, params=evaluation.params,
      arrays=dict(tokens_BL=tokens_BL), top=0)
  return inspected.attention['decoder'].induction.mean(1)


def figures_by_head(inspected: Inspection, induction_NH: np.ndarray | None
                    ) -> dict[str, dict[str, np.ndarray]]:
  """Reduces the attention to a text to one number for each head and each
  figure, such as its mean entropy (MEANING_OF_FIGURE lists them).

  Args:
    inspected: what was recorded of the model, of whose rows the first counts.
    induction_NH: the induction score of each head of a decoder, from
      `_measure_induction`; None: there is none.

  Returns:
    {attention: {figure: [N, H]}}, for N layers of H heads.
  """
  measures = {}
  for name, attention in inspected.attention.items():
    # In a decoder, the first query can only attend to the first token. As that
    # says nothing about a head, leave this query out of its weight there.
    all_queries_BL = inspected.is_real[STACK_OF_QUERIES[name]]
    later_queries_BL = all_queries_BL.copy()
    if name == 'decoder' and all_queries_BL.shape[1] > 1:
      later_queries_BL[:, 0] = False

    figures = {}
    figures['entropy'] = _mean_of_heads(attention.entropy, all_queries_BL)
    figures['first token'] = _mean_of_heads(attention.first_token,
                                            later_queries_BL)
    # Rounding makes a small sink in models that have none.
    if attention.sink.max() > 1e-3:
      figures['learned sink'] = _mean_of_heads(attention.sink, all_queries_BL)
    if attention.previous_token is not None:
      figures['previous token'] = attention.previous_token[:, 0]
    if name == 'decoder' and induction_NH is not None:
      figures['induction'] = induction_NH
    measures[name] = figures
  return measures


def _mean_of_heads(values_NBHL: np.ndarray, counted_BL: np.ndarray
                   ) -> np.ndarray:
  """Returns for each head of each layer the mean of a value of each query,
  [N, H], over those queries of the first row that count (bool)."""
  return inspection.mean_over_queries(values_NBHL, counted_BL)[:, 0]


def _figures_for_json(inspected: Inspection,
                      spelled_tokens: Mapping[str, Sequence[str]],
                      measures: FiguresByHead, spell: SpellToken
                      ) -> dict[str, Any]:
  """Collects the figures of the page as lists, for --json; the attention maps
  stand in the page alone.

  Args:
    inspected: the record of the model; of several rows, the first is shown.
    spelled_tokens: the tokens as a reader is shown them, by stack ('encoder' or
      'decoder').
    measures: {attention: {figure: [N layers, H heads]}}, one number a head.
    spell: a function that returns the token of an id as a reader is shown it.

  Returns:
    tokens, attention, stream and experts, each a dict by 'encoder', 'decoder'
    or 'cross'; and lens, where there is a logit lens.
  """
  # Collect the attention. Other arrays have an axis of rows after that of
  # layers, of which the first row is taken.
  attention = {}
  for name, figures in measures.items():
    attention[name] = {
        figure: values_NH.tolist() for figure, values_NH in figures.items()}
  # Collect the sizes of the states between layers (the residual stream).
  streams = {}
  for name, stream in inspected.stream.items():
    streams[name] = {
        'norms': stream.norms[:, 0].tolist(),
        'median': stream.median[:, 0].tolist(),
        'rms': stream.rms[:, 0].tolist(),
        'outliers': np.flatnonzero(stream.outliers[0]).tolist()}
  # Collect how tokens are routed to experts, in the layers that have them.
  experts = {}
  for name, routing in inspected.experts.items():
    experts[name] = {
        'layers': routing.layers.tolist(),
        'gates': routing.gates[:, 0].tolist(),
        'probabilities': routing.probabilities[:, 0].tolist()}

  figures_for_json = {'tokens': dict(spelled_tokens), 'attention': attention,
                      'stream': streams, 'experts': experts}
  if inspected.lens is not None:
    figures_for_json['lens'] = _lens_for_json(inspected.lens, spell)
  return figures_for_json


def _lens_for_json(lens: LogitLens, spell: SpellToken
                   ) -> list[list[list[dict[str, Any]]]]:
  """Returns the guesses of the logit lens as values for JSON: the tokens that
  the model would predict if a layer were its last one.

  Args:
    lens: the guesses for each layer and token of the text.
    spell: returns the text of a token id for the reader.

  Returns:
    A list by layer, in it a list by token of the text, and in that the guesses,
    the best one first, each with text, id and probability.
  """
  layers = []
  for guesses_of_layer in _guesses_by_layer(lens):
    tokens = []
    for guesses in guesses_of_layer:
      objects = []
      for guess in guesses:
        objects.append(dict(text=spell(guess.token), id=guess.token,
                            probability=guess.probability))
      tokens.append(objects)
    layers.append(tokens)
  return layers


def _guesses_by_layer(lens: LogitLens) -> list[list[list[LensGuess]]]:
  """Returns the guesses of the logit lens for the first row: the tokens that
  the model would predict if a layer were its last one.

  Args:
    lens: token ids and probabilities, [layers, rows, L tokens of the text, K
      guesses].

  Returns:
    A list by layer, in it a list by token of the text, and in that the guesses,
    the best one first.
  """
  layers = []
  for ids_LK, p_LK in zip(lens.ids[:, 0].tolist(),
                          lens.probabilities[:, 0].tolist()):
    layer = []
    for ids_K, p_K in zip(ids_LK, p_LK):
      guesses = []
      for token, probability in zip(ids_K, p_K):
        guesses.append(LensGuess(token=token, probability=probability))
      layer.append(guesses)
    layers.append(layer)
  return layers


def render_page(inspected: Inspection, title: str, about: Sequence[str],
                spelled_tokens: Mapping[str, Sequence[str]], spell: SpellToken,
                measures: FiguresByHead) -> str:
  """Renders an HTML page that shows what a model does with a text.

  Args:
    inspected: what was recorded of the model; of several rows, the first is
      shown.
    title: the title of the page.
    about: sentences on what was looked at.
    spelled_tokens: {'encoder' or 'decoder': the tokens of the text as they are
      shown}.
    spell: returns the text of a token id for the reader.
    measures: {attention: {figure: [N, H]}}, a number for each of H heads in N
      layers; nan: there is none.
  """
  # Prepare the data that the script inspect.js draws, which are written into
  # the page. '<' is escaped, as a token may contain </script>.
  tokens = {name: list(texts) for name, texts in spelled_tokens.items()}
  drawn = {'tokens': tokens, 'maps': _maps_for_script(inspected, measures)}
  data = json.dumps(drawn, allow_nan=False).replace('<', '\\u003c')

  # Read the template. Text is escaped, as tokens may contain anything. A name
  # in the template that has no value is an error.
  folder = pathlib.Path(__file__).parents[1] / 'templates'
  environment = jinja2.Environment(
      loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True,
      undefined=jinja2.StrictUndefined)
  template = environment.get_template('inspect.html')

  # Collect the sections in the order of the page, and fill in the template.
  sections = [
      *_attention_sections(measures),
      *_stream_sections(inspected.stream, spelled_tokens),
      *_lens_sections(inspected, spelled_tokens=spelled_tokens, spell=spell),
      *_expert_sections(inspected.experts, spelled_tokens)]
  return template.render(
      title=title, about=about, data=data, sections=sections).lstrip()


def _maps_for_script(inspected: Inspection, measures: FiguresByHead
                     ) -> list[dict[str, Any]]:
  """Encodes the attention maps as values for JSON, in the form that the script
  inspect.js reads.

  The suffixes name axes: N layers, H heads, L queries, M keys.

  Args:
    inspected: what was recorded of the model.
    measures: {attention: {figure: [N layers, H heads]}}.

  Returns:
    For each attention its name, the stacks of its queries and keys, the shape
    and the weights of its maps, and its figures.
  """
  maps = []
  for name, attention in inspected.attention.items():
    # Encode the weights as little-endian integers of 16 bits, in base64, as the
    # script expects. As numbers in JSON they would be several times as long.
    weights_NHLM = attention.weights[:, 0]
    units = np.round(np.clip(weights_NHLM, 0, 1) * 65535).astype('<u2')
    encoded_weights = base64.b64encode(units.tobytes()).decode('ascii')

    # Round the figures to four digits. nan becomes None, as JSON has no nan.
    figures = {}
    for figure, values_NH in measures[name].items():
      layers = []
      for values_H in values_NH:
        layers.append([_round_or_none(value) for value in values_H])
      figures[figure] = layers
    maps.append(dict(
        name=name, queries=STACK_OF_QUERIES[name], keys=STACK_OF_KEYS[name],
        shape=weights_NHLM.shape, weights=encoded_weights, measures=figures))
  return maps


def _round_or_none(value: float) -> float | None:
  """Returns a number to four digits; None: it is nan."""
  if np.isnan(value):
    return None
  return round(float(value), 4)


# Each of the next functions yields sections of the page: dicts of what the
# template inspect.html reads. A table is a tuple: its columns, the names of its
# rows, and the rows.


def _attention_sections(measures: FiguresByHead) -> Iterator[dict[str, Any]]:
  """Yields a section of attention maps for each attention, which explains the
  figures of its heads."""
  for name, figures in measures.items():
    notes = [f'{figure}: {MEANING_OF_FIGURE[figure]}' for figure in figures]
    yield dict(id=f'maps-{name}',
               heading=f'Attention: {TITLE_OF_ATTENTION[name]}',
               kind='maps', notes=notes)


def _stream_sections(streams: Mapping[str, ResidualStream],
                     spelled_tokens: Mapping[str, Sequence[str]]
                     ) -> Iterator[dict[str, Any]]:
  """Lays out a section on the hidden states between layers (residual stream) of
  each stack: the norms of the tokens, the largest features of each layer, and
  the outlier features.

  Args:
    streams: {stack: the figures of its residual stream}.
    spelled_tokens: {stack: the tokens as a reader is shown them}.

  Yields:
    Each section, as the template reads it.
  """
  for name, stream in streams.items():
    tokens = spelled_tokens[name]
    layer_names = _name_layers(len(stream.norms))
    yield dict(
        id=f'stream-{name}', heading=f'Residual stream of the {name}',
        kind='stream', table=(tokens, layer_names, _norm_rows(stream, tokens)),
        layers=_feature_rows(stream), outliers=_list_outliers(stream))


def _lens_sections(inspected: Inspection,
                   spelled_tokens: Mapping[str, Sequence[str]],
                   spell: SpellToken) -> Iterator[dict[str, Any]]:
  """Lays out the section of the logit lens, what the head would predict from
  each layer: a table with a row for each layer, the last one on top, and a
  column for each token.

  Args:
    inspected: the record of the model.
    spelled_tokens: {stack: the tokens as a reader is shown them}.
    spell: a function that returns the token of an id as a reader is shown it.

  Yields:
    The section, as the template reads it, where there is a logit lens.
  """
  if inspected.lens is None:
    return
  # The lens is of the stack that predicts tokens.
  stack = 'encoder'
  predicted = 'the token itself'
  if 'decoder' in inspected.stream:
    stack = 'decoder'
    predicted = 'the next token'
  tokens = spelled_tokens[stack]
  rows = _lens_rows(inspected.lens, tokens, spell)
  layer_names = _name_layers(len(rows))
  yield dict(id='lens', heading='Logit lens', kind='lens',
             predicted=predicted,
             table=(tokens, layer_names[::-1], rows[::-1]))


def _expert_sections(experts: Mapping[str, ExpertRouting],
                     spelled_tokens: Mapping[str, Sequence[str]]
                     ) -> Iterator[dict[str, Any]]:
  """Lays out a section on the experts of each stack that has some: a table with
  a row for each layer of experts, and a column for each token.

  Args:
    experts: {stack: the decisions of its routers}.
    spelled_tokens: {stack: the tokens as a reader is shown them}.

  Yields:
    Each section, as the template reads it.
  """
  for name, routing in experts.items():
    tokens = spelled_tokens[name]
    rows = []
    for n in range(len(routing.layers)):
      cells = []
      for i in range(len(tokens)):
        cells.append(_expert_cell(routing, n=n, i=i, spelled_tokens=tokens))
      rows.append(cells)
    yield dict(id=f'experts-{name}', heading=f'Experts of the {name}',
               kind='experts', count=routing.probabilities.shape[-1],
               table=(tokens, routing.layers, rows))


def _lens_rows(lens: LogitLens, spelled_tokens: Sequence[str],
               spell: SpellToken) -> list[list[TableCell]]:
  """Lays out the table of the logit lens: what the head would predict from the
  states of each layer.

  Args:
    lens: the likeliest tokens by layer and place, with their probabilities.
    spelled_tokens: the tokens of the text as a reader is shown them.
    spell: a function that returns the token of an id as a reader is shown it.

  Returns:
    A row for each layer, and in it a cell for each token of the text.
  """
  rows = []
  for n, guesses_of_layer in enumerate(_guesses_by_layer(lens)):
    cells = []
    for i, guesses in enumerate(guesses_of_layer):
      # The cell shows the best guess, and its tip shows all of them.
      tip_lines = [_describe_token(spelled_tokens, i), _describe_layer(n)]
      for guess in guesses:
        tip_lines.append(f'{guess.probability:.4f}  {spell(guess.token)}')
      best_guess = guesses[0]
      cells.append(TableCell(
          text=spell(best_guess.token), value=best_guess.probability,
          tip='\n'.join(tip_lines)))
    rows.append(cells)
  return rows


def _norm_rows(stream: ResidualStream, spelled_tokens: Sequence[str]
               ) -> list[list[TableCell]]:
  """Makes the table of the norms of the hidden states.

  The suffixes name axes: N states of the residual stream, L tokens.

  Args:
    stream: the figures of the states between layers.
    spelled_tokens: the tokens as they are shown to the reader.

  Returns:
    A row for the input of the first layer and one for the output of each layer,
    with a cell for each token. A cell is the darker, the larger the norm.
  """
  # Scale the logarithms of all norms to 0 to 1, as norms differ by powers of
  # ten. 1e-9 avoids the logarithm of 0, and a division by 0 if all are equal.
  norms_NL = stream.norms[:, 0]
  logs_NL = np.log(np.maximum(norms_NL, 1e-9))
  lowest = logs_NL.min()
  highest = logs_NL.max()
  heat_NL = (logs_NL - lowest) / max(highest - lowest, 1e-9)

  rows = []
  for n in range(len(norms_NL)):
    cells = []
    for i, norm in enumerate(norms_NL[n]):
      tip_lines = [_describe_token(spelled_tokens, i), _describe_layer(n),
                   f'norm {norm:.5g}']
      cells.append(TableCell(text=f'{norm:.3g}', value=heat_NL[n, i],
                             tip='\n'.join(tip_lines)))
    rows.append(cells)
  return rows


def _feature_rows(stream: ResidualStream) -> list[tuple[str, ...]]:
  """Lists the largest features of the hidden states between layers.

  Args:
    stream: the figures of these states, of whose rows the first is shown.

  Returns:
    A tuple of texts for each layer: its name; the mean norm; the median and the
    root mean square of the features; and the largest features, each with its
    ratio to the median and to the root mean square.
  """
  norms_NL = stream.norms[:, 0]
  layer_names = _name_layers(len(norms_NL))
  rows = []
  for n, peaks_D in enumerate(stream.peaks[:, 0]):
    median = stream.median[n, 0]
    rms = stream.rms[n, 0]
    # Describe the largest features of the layer.
    largest_features = np.argsort(-peaks_D, kind='stable')
    descriptions = []
    for d in largest_features[:MOST_FEATURES_OF_LAYER].tolist():
      peak = peaks_D[d]
      descriptions.append(f'{d}: {peak:.3g} (× {_format_ratio(peak, median)}, '
                          f'× {_format_ratio(peak, rms)})')
    rows.append((layer_names[n], f'{norms_NL[n].mean():.4g}', f'{median:.3g}',
                 f'{rms:.3g}', '; '.join(descriptions)))
  return rows


def _list_outliers(stream: ResidualStream) -> str:
  """Returns the numbers of the outlier features as a text; of many, the first
  ones and how many more there are."""
  features = np.flatnonzero(stream.outliers[0]).tolist()
  if not features:
    return 'none'
  text = ', '.join(map(str, features[:MOST_OUTLIER_FEATURES]))
  if len(features) > MOST_OUTLIER_FEATURES:
    text += f' and {len(features) - MOST_OUTLIER_FEATURES} more'
  return text


def _format_ratio(value: float, reference: float) -> str:
  """Returns value / reference for a reader; ∞ where the reference is 0."""
  if reference > 0:
    return f'{value / reference:.3g}'
  return '∞'


def _expert_cell(routing: ExpertRouting, n: int, i: int,
                 spelled_tokens: Sequence[str]) -> TableCell:
  """Makes the table cell for a token in a layer of experts. It lists the
  experts to which the token goes; those that had no room for it are struck out.

  Args:
    routing: the decisions of the routers of a stack.
    n: the number of the layer, among those with experts.
    i: the index of the token in the first row.
    spelled_tokens: the tokens as they are shown to the reader.
  """
  gates_E = routing.gates[n, 0, i]
  probabilities_E = routing.probabilities[n, 0, i]
  tip_lines = [_describe_token(spelled_tokens, i), f'layer {routing.layers[n]}']

  # List the chosen experts, the largest gate first. A chosen expert whose gate
  # is 0 had no room. Markup marks text as HTML that must not be escaped.
  chosen = np.flatnonzero(routing.chosen[n, 0, i])
  chosen = chosen[np.argsort(-gates_E[chosen], kind='stable')]
  numbers: list[Any] = []
  for e in chosen:
    line = f'expert {e}: gate {gates_E[e]:.4f}'
    if gates_E[e]:
      numbers.append(e)
    else:
      struck_out = markupsafe.Markup('<s class="lost">{}</s>').format(e)
      numbers.append(struck_out)
      line += ', no room'
    tip_lines.append(line)
  text = markupsafe.Markup(' ').join(numbers) or '–'

  # List the largest of the router's probabilities.
  likeliest = np.argsort(-probabilities_E, kind='stable')
  likeliest = likeliest[:MOST_ROUTER_PROBABILITIES]
  probabilities = [f'{e} {probabilities_E[e]:.3f}' for e in likeliest]
  tip_lines.append('router: ' + ', '.join(probabilities))

  # The number of the expert with the largest gate gives the colour of the cell,
  # as an angle on the circle of colours.
  hue = None
  if len(chosen):
    hue = 360 * int(chosen[0]) // len(gates_E)
  return TableCell(text=text, value=0.0, tip='\n'.join(tip_lines), hue=hue)


def _name_layers(num_states: int) -> list[str]:
  """Returns the names of the states of a stack: what the first layer is given,
  and what each layer returns."""
  return ['embedding', *map(str, range(num_states - 1))]


def _describe_layer(n: int) -> str:
  """Returns where state n of a stack lies; 0: what the first layer is given."""
  if n == 0:
    return 'before the first layer'
  return f'after layer {n - 1}'


def _describe_token(spelled_tokens: Sequence[str], i: int) -> str:
  """Returns the text and the number of a token."""
  return f'{spelled_tokens[i]} (token {i})'


TASKS = {'inspect': Inspect()}
