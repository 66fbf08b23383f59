"""The tasks of models that write: samples and diffusion_samples print texts,
from a prompt or from nothing; exact and translation write the targets of
held-out pairs, or of spans that were cut out, and give the share that is
written to its end, and the BLEU.

BLEU is sacrebleu's corpus BLEU (Post 2018), on text; where the package is
absent the request is refused. Targets are written of the likeliest tokens, one
by one, or are the best text of --beams.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import RequestError, require
from training import generate, objectives, progress
from training.data import texts as text_files
from training.evals import Evaluation, Flag, Task, held_out, items
from training.hf import generation as hf_generation
from training.objectives import pipeline

# Between the prompts of --prompt, and between the strings of --stop.
PROMPT_SEPARATOR = '|||'

# How a token is drawn, and where a text ends.
TEMPERATURE_FLAG = Flag(
    name='temperature', default=1.0,
    help='Divides the logits; 0: always the likeliest token.')
SAMPLING_FLAGS = (
    TEMPERATURE_FLAG,
    Flag(name='top_k', default=0,
         help='Draw from the k likeliest tokens; 0: from all.', least=0,
         most=2**26),
    Flag(name='top_p', default=1.0,
         help='Draw from the likeliest tokens that together reach the '
         'probability p.'),
    Flag(name='min_p', default=0.0,
         help='Draw from the tokens that are at least so many times as likely '
         'as the likeliest.'),
    Flag(name='repetition_penalty', default=1.0,
         help='Divides the logits above 0 of tokens that the text has already, '
         'and multiplies those below 0.'),
    Flag(name='stop', default='',
         help="Ends a text before this string; several: 'A|||B'; a line break "
         'is written \\n.'),
)

# Beam search instead of draws, or of the likeliest token each time.
BEAM_FLAGS = (
    Flag(name='beams', default=1,
         help='Texts that a beam search follows; 1: no beam search.', least=1,
         most=1000),
    Flag(name='length_penalty', default=0.6,
         help="The exponent of a beam search's penalty of length; 0: none.",
         needed_flag='beams'),
    Flag(name='penalty', default='gnmt',
         help='What that exponent is of: gnmt, (5 + length) / 6, as for the '
         'Transformer; or power, length, as in transformers.',
         needed_flag='beams'),
)

# A number of rows, and not of batches, so that no figure depends on their size.
TARGETS_FLAG = Flag(
    name='targets', default=512,
    help='Held-out targets to write of each source; 0: all.', least=0,
    most=2**24)
SAMPLES_FLAG = Flag(
    name='samples', default=1, help='Texts to write for each prompt.', least=1,
    most=10_000)
PROMPT_FLAG = Flag(
    name='prompt', default='',
    help="What a text begins with; several: 'A|||B'.")
LENGTH_FLAG = Flag(
    name='max_new_tokens', default=0,
    help='Tokens to write; 0: as many as fit, 256 at most.', least=0,
    most=2**24)
SEED_FLAG = Flag(
    name='sample_seed', default=0, help='The seed of the draws.', least=0,
    most=2**32 - 1)


class PreparedPrompts(NamedTuple):
  """The prompts that a model goes on from, and how long it writes.

  Attributes:
    prompts: the prompts as the model is shown them.
    stop_tokens: the token, or tokens, that end a text.
    num_tokens: the largest number of tokens to write.
  """
  prompts: objectives.Prompts
  stop_tokens: Any
  num_tokens: int


class Samples(Task):
  """Prints --samples continuations of --prompt (or of several, by '|||'); an
  encoder-decoder writes when it has read the prompt."""

  help = ('texts that the model writes, also asked for by --samples or '
          '--prompt')
  why_not_allowed = 'does not write text'
  figure_names = ()
  reads_held_out = False
  flags = (SAMPLES_FLAG._replace(requests_task=True),
           PROMPT_FLAG._replace(requests_task=True), LENGTH_FLAG,
           *SAMPLING_FLAGS, *BEAM_FLAGS, SEED_FLAG)

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.writes

  def check(self, options: Any, config: Any) -> None:
    """Checks that the flags of how a text is written fit each other.

    Args:
      options: the values of the task's flags, by name.
      config: the config of the run, or None.

    Raises:
      RequestError: where a flag would have no effect.
    """
    text_files.check_text(options.prompt, '--prompt')
    sampling = make_sampling(options)
    seed = options.sample_seed

    # At temperature 0 nothing is drawn at random, so flags about drawing would
    # be ignored. A penalty for repetition is none of these: it also changes
    # which token is the likeliest.
    if options.temperature <= 0:
      greedy_with_penalty = generate.Sampling(
          temperature=0, repetition_penalty=options.repetition_penalty)
      if sampling != greedy_with_penalty or seed:
        raise RequestError(
            '--temperature=0 draws no token: leave out the other flags of how '
            'one is drawn, such as --top_k and --sample_seed')
    if make_beams(options) is None:
      return

    # A beam search draws nothing at random, either.
    default = generate.Sampling()
    greedy = generate.Sampling(temperature=0)
    if sampling not in (default, greedy) or seed:
      raise RequestError(
          f'--beams is {options.beams}, which looks for the likeliest text: '
          'leave out the flags of how a token is drawn, such as --temperature')
    require(options.samples <= options.beams, f'--samples is {options.samples},'
            f' but --beams={options.beams} finds no more than that many texts')

  def prepare(self, evaluation: Evaluation) -> PreparedPrompts:
    """Returns the prompts as the model is shown them, one row for each
    sample.

    Args:
      evaluation: the evaluation of the run, with the flags of the prompts.
    """
    options = evaluation.options
    rows_of_prompt = options.samples
    if make_beams(options):  # which finds all texts of a prompt at once
      rows_of_prompt = 1
    folder = hf_generation.load_if_published(evaluation.workdir,
                                             evaluation.step)
    prompts, stop_tokens = hf_generation.encode_prompts(
        _repeat_prompts(options, rows_of_prompt), config=evaluation.run.config,
        tokenizer=evaluation.tokenizer, generation=folder)
    return PreparedPrompts(
        prompts=prompts, stop_tokens=stop_tokens,
        num_tokens=_num_tokens_to_write(evaluation, prompts))

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Writes texts that go on from the prompts, and prints them.

    The suffixes name axes: B prompts, K texts of a beam search, T new tokens.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      `samples`, the prompt and the text of each.
    """
    options = evaluation.options
    prepared = evaluation.prepared
    prompts = prepared.prompts
    beams = make_beams(options)
    args = (evaluation.run.module, evaluation.params, prompts.tokens,
            prompts.lengths)
    keywords = dict(max_new_tokens=prepared.num_tokens,
                    stop_token=prepared.stop_tokens, **prompts.arguments)
    with progress.show_task('writing'):
      if beams is None:
        key = jax.random.key(options.sample_seed)
        tokens_BT = generate.generate(
            *args, key, sampling=make_sampling(options), **keywords)
      else:
        # Take the best texts of each prompt, and join them to one list.
        best_BKT, _ = generate.beam_search(*args, beams=beams, **keywords)
        best_BKT = best_BKT[:, :options.samples]
        tokens_BT = best_BKT.reshape(-1, prepared.num_tokens)
      tokens_BT = jax.device_get(tokens_BT)
    samples = _print_samples(evaluation, prepared=prepared, tokens_BT=tokens_BT,
                             stop_strings=split_stop_strings(options))
    return {'samples': samples}


class DiffusionSamples(Task):
  """Prints the texts that a model of masked diffusion writes."""

  help = 'texts that a model of masked diffusion writes'
  why_not_allowed = 'is no masked diffusion, of which the task is'
  figure_names = ('steps',)
  reads_held_out = False
  flags = (
      SAMPLES_FLAG, PROMPT_FLAG, LENGTH_FLAG,
      Flag(name='diffusion_steps', default=0,
           help='Steps in which they are written, in block diffusion each '
           'block; 0: one for each token.',
           least=0, most=2**24),
      TEMPERATURE_FLAG, SEED_FLAG,
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.bound

  def check(self, options: Any, config: Any) -> None:
    """Raises RequestError for a bad --temperature or --prompt."""
    generate.Sampling(options.temperature)
    text_files.check_text(options.prompt, '--prompt')

  def prepare(self, evaluation: Evaluation) -> PreparedPrompts:
    """Returns the prompts, each after the separator, one row for each sample.

    Args:
      evaluation: the evaluation of the run, with the flags of the prompts.
    """
    options = evaluation.options
    tokenizer = evaluation.tokenizer
    prompts = objectives.prompt_after_separator(
        _repeat_prompts(options, options.samples), evaluation.run.config,
        tokenizer=tokenizer)
    return PreparedPrompts(
        prompts=prompts, stop_tokens=tokenizer.separator_id,
        num_tokens=_num_tokens_to_write(evaluation, prompts))

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Writes texts by unmasking (masked diffusion), and prints them.

    The suffixes name axes: B prompts, T new tokens.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      `samples`, the prompt and the text of each; and `steps`, the number of
      steps.
    """
    # By default, a step unmasks one token.
    options = evaluation.options
    prepared = evaluation.prepared
    prompts = prepared.prompts
    block_size = evaluation.run.model.diffusion_block
    num_steps = options.diffusion_steps or block_size or prepared.num_tokens
    write_text = generate.generate_by_unmasking
    if block_size:
      write_text = generate.generate_by_blocks
    # All rows are written by one compiled function.
    write = jax.jit(write_text, static_argnums=0,
                    static_argnames=('new', 'steps', 'mask', 'temperature'))
    with progress.show_task('writing'):
      tokens_BT = jax.device_get(write(
          evaluation.run.module, evaluation.params, prompts.tokens,
          prompts.lengths, jax.random.key(options.sample_seed),
          new=prepared.num_tokens, steps=num_steps,
          mask=evaluation.tokenizer.mask_id, temperature=options.temperature))
    samples = _print_samples(evaluation, prepared=prepared, tokens_BT=tokens_BT)
    return {'samples': samples, 'steps': num_steps}


def _repeat_prompts(options: Any, times: int) -> list[str]:
  """Returns the prompts of --prompt, each of them `times` times in a row."""
  prompts = []
  for text in options.prompt.split(PROMPT_SEPARATOR):
    prompts += [text] * times
  return prompts


def _num_tokens_to_write(evaluation: Evaluation, prompts: objectives.Prompts
                         ) -> int:
  """Returns how many tokens are written after the prompts: --max_new_tokens, or
  as many as the model has room for.

  Args:
    evaluation: the evaluation of the run, with the flag among its options.
    prompts: the prompts, padded to the length of the longest one.

  Raises:
    RequestError: where the model has no room for another token; or, in masked
      diffusion, not for all tokens.
  """
  # A decoder just stops where the room ends. Diffusion writes all tokens, or
  # those of a block, at once, so all of them must fit.
  prompt_length = prompts.tokens.shape[1]
  model = evaluation.run.model
  max_len = model.max_len
  if model.diffusion_block:
    max_len -= max_len % model.diffusion_block
  room = max_len - prompt_length
  asked = evaluation.options.max_new_tokens
  objective = objectives.find_objective(evaluation.run.config)
  is_written_at_once = objective.bound
  if room <= 0 or (is_written_at_once and asked > room):
    raise RequestError(f'the prompt has {prompt_length} tokens and '
                       f'--max_new_tokens is {asked}, and the model takes '
                       f'max_len {max_len}: shorten one of them')
  return asked or min(256, room)


def _print_samples(evaluation: Evaluation, prepared: PreparedPrompts,
                   tokens_BT: np.ndarray, stop_strings: Sequence[str] = ()
                   ) -> list[dict[str, str]]:
  """Decodes and prints what was written after each prompt, up to its end.

  The suffixes name axes: B texts, T tokens.

  Args:
    evaluation: the evaluation of the run.
    prepared: the prompts, and the tokens that end a text.
    tokens_BT: the written tokens, --samples texts for each prompt.
    stop_strings: strings that end a text, too.

  Returns:
    The `prompt` and the `text` of each sample.
  """
  options = evaluation.options
  prompts = prepared.prompts
  prompt_of_sample = _repeat_prompts(options, options.samples)
  # A beam search writes several texts for one row of the prompts; otherwise
  # there is a row for each text. Cut each text at a stop token, and its decoded
  # text at a stop string, which need not begin or end with a token.
  texts_of_row = len(tokens_BT) // len(prompts.tokens)
  samples = []
  for i, (prompt, row_T) in enumerate(zip(prompt_of_sample, tokens_BT)):
    ids = generate.tokens_before_stop(row_T, prepared.stop_tokens)
    whole_text = prompts.text(i // texts_of_row, ids, evaluation.tokenizer)
    text = generate.text_before_stop(whole_text, stop_strings)
    print(f'sample {i + 1} of {len(prompt_of_sample)}:\n'
          f'{prompt}{prompts.gap}{text}\n')
    samples.append({'prompt': prompt, 'text': text})
  return samples


def make_sampling(options: Any) -> generate.Sampling:
  """Returns how a token is drawn, by the flags of SAMPLING_FLAGS."""
  return generate.Sampling(
      temperature=options.temperature, top_k=options.top_k,
      top_p=options.top_p, min_p=options.min_p,
      repetition_penalty=options.repetition_penalty)


def make_beams(options: Any) -> generate.Beams | None:
  """Returns the beam search that the flags of BEAM_FLAGS ask for; None of a
  single beam, which takes the likeliest token each time, as generate.generate
  does."""
  beams = generate.Beams(num_beams=options.beams, penalty=options.penalty,
                         length_penalty=options.length_penalty)
  if beams.num_beams > 1:
    return beams
  return None


def split_stop_strings(options: Any) -> list[str]:
  """Returns the strings of --stop, in which \\n stands for a line break."""
  stop_strings = []
  for stop in options.stop.split(PROMPT_SEPARATOR):
    if stop:
      stop_strings.append(stop.replace('\\n', '\n'))
  return stop_strings


class WrittenTarget(NamedTuple):
  """A text that a model wrote for a held-out pair, and the pair's target.

  Attributes:
    hypothesis: the text that the model wrote.
    reference: the target.
    is_exact: whether their tokens are the same.
  """
  hypothesis: str
  reference: str
  is_exact: bool


class Exact(Task):
  """Writes --targets held-out targets of each source."""

  help = 'the share of held-out targets that are written exactly'
  why_not_allowed = 'has no targets to write'
  figure_names = ('exact', 'targets', 'exact/*')
  flags = (TARGETS_FLAG, *BEAM_FLAGS)

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return 'encoder-decoder' in objective.stacks

  def check(self, options: Any, config: Any) -> None:
    """Raises RequestError for a beam search that there is not."""
    make_beams(options)

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and returns the share of targets that are written exactly."""
    return _write_and_score(evaluation, things='targets', exact=_share_of_exact)


class Translation(Task):
  """Translates --targets held-out pairs of each source."""

  help = 'BLEU of held-out pairs, and exact'
  why_not_allowed = 'has no pairs to translate'
  figure_names = ('bleu', 'exact', 'pairs', 'bleu/*')
  flags = (TARGETS_FLAG, *BEAM_FLAGS)

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return 'data.target_length' in objective.reads

  def check(self, options: Any, config: Any) -> None:
    """Raises RequestError where sacrebleu is missing, and for a beam search
    that there is not."""
    _load_bleu()
    make_beams(options)

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Lets the model write the target of each pair, such as a translation, and
    prints the BLEU.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      `bleu`, the other figures of the pairs, and the `signature` of BLEU.
    """
    bleu = _load_bleu()

    def corpus_bleu(targets: Sequence[WrittenTarget]) -> float:
      """Returns the corpus BLEU of what was written."""
      hypotheses = [target.hypothesis for target in targets]
      references = [target.reference for target in targets]
      return bleu.corpus_score(hypotheses, [references]).score

    figures = _write_and_score(evaluation, things='pairs', bleu=corpus_bleu,
                               exact=_share_of_exact)
    figures['signature'] = str(bleu.get_signature())
    print(f'  {figures["signature"]}')
    return figures


def _load_bleu() -> Any:
  """Returns sacrebleu's metric, with its own tokenisation (13a)."""
  return text_files.import_extra(
      'sacrebleu.metrics', subject='task translation', extra='bleu').BLEU()


def _share_of_exact(targets: Sequence[WrittenTarget]) -> float:
  """Returns the share of one source's targets that were written exactly."""
  return float(np.mean([target.is_exact for target in targets]))


def _write_and_score(evaluation: Evaluation, things: str,
                     **scores: Callable[[Sequence[WrittenTarget]], float]
                     ) -> dict[str, Any]:
  """Lets the model write --targets held-out targets of each source; prints and
  returns their scores, of each source and in the mean by weight.

  Args:
    evaluation: the evaluation of the run.
    things: what the targets are called in the lines and the figures.
    **scores: functions that score the targets of a source, by name; the first
      score is also given of each source.
  """
  options = evaluation.options
  loaders = pipeline.make_evaluation_loaders(evaluation.run.config,
                                             evaluation.tokenizer)

  # All is written before anything is scored.
  targets_by_source = []
  for loader in loaders:
    loader.limit_rows(options.targets)
    targets_by_source.append(
        write_targets(evaluation, loader=loader, beams=make_beams(options)))

  # The scores of each source.
  scores_by_source = []
  for targets in targets_by_source:
    scores_of_source = {}
    for name, score in scores.items():
      scores_of_source[name] = score(targets)
    scores_by_source.append(scores_of_source)
  for loader, targets, scores_of_source in zip(
      loaders, targets_by_source, scores_by_source):
    print(f'{loader.text}: {len(targets)} held-out {things}: '
          f'{_format_scores(scores_of_source)}')

  # Their means.
  figures: dict[str, Any] = {}
  for name in scores:
    scores_of_name = [by_name[name] for by_name in scores_by_source]
    figures[name] = held_out.mean_of_sources(scores_of_name, loaders)
  if len(loaders) > 1:
    print(f'the mean by weight: {_format_scores(figures)}')
    first_name = next(iter(scores))
    for loader, scores_of_source in zip(loaders, scores_by_source):
      figures[f'{first_name}/{loader.name}'] = scores_of_source[first_name]
  figures[things] = sum(map(len, targets_by_source))

  # The score of each target, of a single source.
  if len(loaders) == 1:
    [targets] = targets_by_source
    is_exact = [target.is_exact for target in targets]
    references = [target.reference for target in targets]
    figures['items'] = {'exact': items.record_scores(is_exact, references)}
  return figures


def _format_scores(score_by_name: Mapping[str, float]) -> str:
  """Returns scores in one line for a reader."""
  texts = [f'{name} {score:.4f}' for name, score in score_by_name.items()]
  return ', '.join(texts)


def write_targets(evaluation: Evaluation, loader: pipeline.Loader,
                  beams: generate.Beams | None = None) -> list[WrittenTarget]:
  """Lets the model write the target of each pair of a loader; see
  `write_targets_of_batch`."""
  targets = []
  for batch in progress.show_items(loader.iterate(), text='writing',
                                   total=loader.num_batches):
    targets += write_targets_of_batch(
        evaluation.run.module, params=evaluation.params, batch=batch,
        tokenizer=evaluation.tokenizer, beams=beams)
  return targets


def write_targets_of_batch(module: Any, params: Any,
                           batch: Mapping[str, np.ndarray], tokenizer: Any,
                           beams: generate.Beams | None = None
                           ) -> list[WrittenTarget]:
  """Lets an encoder-decoder write the target of each pair of a batch, such as
  the translation of a sentence.

  The suffixes name axes: B rows, K texts of a beam search, M tokens of a
  source, T tokens of a target.

  Args:
    module: the Flax module of the model.
    params: its parameters, a tree of arrays.
    batch: the pairs, as seq2seq.lay_out_pair lays them out; a row without a
      weight only fills up the batch.
    tokenizer: the tokenizer of the run.
    beams: the beam search; None: the likeliest token each time.

  Returns:
    What the model wrote for each pair, beside its target.
  """
  # Let the model write until it ends its text, at most as many tokens as a
  # target has room for. The first token of each target is given to it.
  start_B1 = jnp.asarray(batch['decoder_tokens'][:, :1])
  args = module, params, start_B1, jnp.ones(len(start_B1), jnp.int32)
  end_token = tokenizer.separator_id
  keywords = dict(max_new_tokens=batch['targets'].shape[1],
                  stop_token=end_token,
                  source_BM=jnp.asarray(batch['tokens']),
                  source_lengths_B=jnp.asarray(batch['segment_ids'].sum(1)))
  if beams is None:
    tokens_BT = generate.generate(*args, jax.random.key(0), **keywords,
                                  sampling=generate.Sampling(temperature=0))
  else:
    # The first of the K texts of each row is the best one.
    best_BKT, _ = generate.beam_search(*args, beams=beams, **keywords)
    tokens_BT = best_BKT[:, 0]
  tokens_BT = jax.device_get(tokens_BT)

  # Put each beside its target, without what pads either. A target counts as
  # written exactly if all of its tokens are, the end included.
  written_targets = []
  for row_T, padded_target_T, weights_T in zip(tokens_BT, batch['targets'],
                                               batch['weights']):
    target_length = int((weights_T > 0).sum())
    if not target_length:
      continue
    target = padded_target_T[:target_length]
    written_ids = generate.tokens_before_stop(row_T, end_token)
    target_ids = generate.tokens_before_stop(target, end_token)
    written_targets.append(WrittenTarget(
        hypothesis=tokenizer.decode(written_ids),
        reference=tokenizer.decode(target_ids),
        is_exact=np.array_equal(row_T[:target_length], target)))
  return written_targets


TASKS = {
    'samples': Samples(),
    'diffusion_samples': DiffusionSamples(),
    'exact': Exact(),
    'translation': Translation(),
}
