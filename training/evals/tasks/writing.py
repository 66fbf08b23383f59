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
TARGETS_FLAG = Flag(name='targets', default=512,
               help='Held-out targets to write of each source; 0: all.',
               least=0, most=2**24)
SAMPLES_FLAG = Flag(name='samples', default=1,
               help='Texts to write for each prompt.', least=1, most=10_000)
PROMPT_FLAG = Flag(name='prompt', default='',
              help="What a text begins with; several: 'A|||B'.")
LENGTH_FLAG = Flag(name='max_new_tokens', default=0,
              help='Tokens to write; 0: as many as fit, 256 at most.', least=0,
              most=2**24)
SEED_FLAG = Flag(name='sample_seed', default=0, help='The seed of the draws.',
            least=0, most=2**32 - 1)


class PreparedPrompts(NamedTuple):
  """The prompts of a model that writes.

  Attributes:
    prompts: the prompts.
    ends: the tokens that end a text.
    count: how many tokens are written at most.
  """
  prompts: objectives.Prompts
  ends: Any
  count: int


class Samples(Task):
  """Prints --samples continuations of --prompt (or of several, by '|||'); an
  encoder-decoder writes when it has read the prompt."""

  help = ('texts that the model writes, also asked for by --samples or '
          '--prompt')
  why_not_allowed = 'does not write text'
  figure_names = ()
  reads_held_out = False
  flags = (SAMPLES_FLAG._replace(requests_task=True),
           PROMPT_FLAG._replace(requests_task=True),
           LENGTH_FLAG,
           *SAMPLING_FLAGS, *BEAM_FLAGS, SEED_FLAG)

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.writes

  def check(self, options: Any, config: Any) -> None:
    """Raises RequestError for flags that do not fit each other, or the run."""
    text_files.check_text(options.prompt, '--prompt')
    drawn = make_sampling(options)
    seed = options.sample_seed
    if options.temperature <= 0:
      # A penalty of repetition changes which token is the likeliest.
      plain = generate.Sampling(
          temperature=0, repetition_penalty=options.repetition_penalty)
      if drawn != plain or seed:
        raise RequestError(
            '--temperature=0 draws no token: leave out the other flags of how '
            'one is drawn, such as --top_k and --sample_seed')
    if make_beams(options) is None:
      return
    likeliest = generate.Sampling(temperature=0)
    if drawn not in (generate.Sampling(), likeliest) or seed:
      raise RequestError(
          f'--beams is {options.beams}, which looks for the likeliest text: '
          'leave out the flags of how a token is drawn, such as --temperature')
    require(options.samples <= options.beams, f'--samples is {options.samples},'
            f' but --beams={options.beams} finds no more than that many texts')

  def prepare(self, evaluation: Evaluation) -> PreparedPrompts:
    """Returns the prompts as the model is shown them, one row for each
    sample."""
    options = evaluation.options
    each = options.samples
    if make_beams(options):  # which finds all texts of a prompt at once
      each = 1
    folder = hf_generation.published(evaluation.workdir, evaluation.step)
    prompts, ends = hf_generation.shown(
        _repeat_prompts(options, each), config=evaluation.run.config,
        tokenizer=evaluation.tokenizer, generation=folder)
    return PreparedPrompts(prompts=prompts, ends=ends,
                           count=_num_tokens_to_write(evaluation, prompts))

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and returns texts that go on from the prompts."""
    options = evaluation.options
    shown = evaluation.prepared
    prompts = shown.prompts
    how = make_beams(options)
    args = (evaluation.run.module, evaluation.params, prompts.tokens,
            prompts.lengths)
    more = dict(max_new_tokens=shown.count, stop_token=shown.ends,
                **prompts.arguments)
    with progress.show_task('writing'):
      if how is None:
        key = jax.random.key(options.sample_seed)
        tokens_BT = generate.generate(*args, key,
                                      sampling=make_sampling(options),
                                      **more)
      else:  # the best texts of each prompt
        best_BKT, _ = generate.beam_search(*args, beams=how, **more)
        best_BKT = best_BKT[:, :options.samples]
        tokens_BT = best_BKT.reshape(-1, shown.count)
      tokens_BT = jax.device_get(tokens_BT)
    return {'samples': _print_samples(evaluation, shown=shown,
                                      tokens_BT=tokens_BT,
                                      stop=split_stop_strings(options))}


class DiffusionSamples(Task):
  """Prints the texts that a model of masked diffusion writes."""

  help = 'texts that a model of masked diffusion writes'
  why_not_allowed = 'is no masked diffusion, of which the task is'
  figure_names = ('steps',)
  reads_held_out = False
  flags = (
      SAMPLES_FLAG, PROMPT_FLAG, LENGTH_FLAG,
      Flag(name='diffusion_steps', default=0,
           help='Steps in which they are written; 0: one for each token.',
           least=0, most=2**24),
      TEMPERATURE_FLAG, SEED_FLAG,
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.bound

  def check(self, options: Any, config: Any) -> None:
    generate.Sampling(options.temperature)
    text_files.check_text(options.prompt, '--prompt')

  def prepare(self, evaluation: Evaluation) -> PreparedPrompts:
    options = evaluation.options
    tokenizer = evaluation.tokenizer
    prompts = objectives.prompt_after_separator(
        _repeat_prompts(options,
                        options.samples), evaluation.run.config, tokenizer)
    return PreparedPrompts(prompts=prompts, ends=tokenizer.separator_id,
                 count=_num_tokens_to_write(evaluation, prompts))

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and returns texts that are written by unmasking."""
    options = evaluation.options
    shown = evaluation.prepared
    prompts = shown.prompts
    steps = options.diffusion_steps or shown.count
    write = jax.jit(generate.generate_by_unmasking, static_argnums=0,
                    static_argnames=('new', 'steps', 'mask', 'temperature'))
    with progress.show_task('writing'):
      tokens_BT = jax.device_get(write(
          evaluation.run.module, evaluation.params, prompts.tokens,
          prompts.lengths, jax.random.key(options.sample_seed),
          new=shown.count, steps=steps, mask=evaluation.tokenizer.mask_id,
          temperature=options.temperature))
    return {'samples': _print_samples(evaluation, shown, tokens_BT),
            'steps': steps}


def _repeat_prompts(options: Any, each: int) -> list[str]:
  """Returns the prompts, each of them as often as it is gone on from."""
  prompts = []
  for text in options.prompt.split(PROMPT_SEPARATOR):
    prompts += [text] * each
  return prompts


def _num_tokens_to_write(evaluation: Evaluation,
                         prompts: objectives.Prompts) -> int:
  """Returns how many tokens are written after prompts."""
  length = prompts.tokens.shape[1]
  most = evaluation.run.model.max_len
  room = most - length
  new = evaluation.options.max_new_tokens
  # Masked diffusion writes them all at once.
  at_once = evaluation.run.config.objective == 'masked_diffusion'
  if room <= 0 or (at_once and new > room):
    raise RequestError(f'the prompt has {length} tokens and --max_new_tokens '
                       f'is {new}, and the model takes max_len {most}: shorten '
                       'one of them')
  return new or min(256, room)


def _print_samples(evaluation: Evaluation, shown: PreparedPrompts,
                   tokens_BT: np.ndarray,
                   stop: Sequence[str] = ()) -> list[dict[str, str]]:
  """Prints and returns what was written after each prompt, up to its end.

  Args:
    evaluation: the evaluation of the run.
    shown: the prompts, and the tokens that end a text.
    tokens_BT: the tokens that were written.
    stop: texts that end a text, too.
  """
  options = evaluation.options
  prompts = shown.prompts
  texts = _repeat_prompts(options, options.samples)
  each = len(tokens_BT) // len(prompts.tokens)  # texts of a row of prompts
  results = []
  for i, (prompt, row_T) in enumerate(zip(texts, tokens_BT)):
    ids = generate.tokens_before_stop(row_T, shown.ends)
    whole = prompts.text(i // each, ids, evaluation.tokenizer)
    text = generate.text_before_stop(whole, stop)
    print(f'sample {i + 1} of {len(texts)}:\n{prompt}{prompts.gap}{text}\n')
    results.append({'prompt': prompt, 'text': text})
  return results


def make_sampling(options: Any) -> generate.Sampling:
  """Returns how a token is drawn by the flags of SAMPLING."""
  return generate.Sampling(
      temperature=options.temperature, top_k=options.top_k,
      top_p=options.top_p, min_p=options.min_p,
      repetition_penalty=options.repetition_penalty)


def make_beams(options: Any) -> generate.Beams | None:
  """Returns how texts are searched by the flags of BEAMS; None of a single
  beam, which takes the likeliest token each time, as generate.generate does."""
  how = generate.Beams(num_beams=options.beams, penalty=options.penalty,
                       length_penalty=options.length_penalty)
  return how if how.count > 1 else None


def split_stop_strings(options: Any) -> list[str]:
  """Returns the stop strings of --stop; an escape of a line break is one."""
  strings = []
  for stop in options.stop.split(PROMPT_SEPARATOR):
    if stop:
      strings.append(stop.replace('\\n', '\n'))
  return strings


class WrittenTarget(NamedTuple):
  """A target that was written.

  Attributes:
    hypothesis: the text that the model wrote.
    reference: the target.
    same: whether their tokens are the same.
  """
  hypothesis: str
  reference: str
  same: bool


class Exact(Task):
  """Writes --targets held-out targets of each source."""

  help = 'the share of held-out targets that are written exactly'
  why_not_allowed = 'has no targets to write'
  figure_names = ('exact', 'targets', 'exact/*')
  flags = (TARGETS_FLAG, *BEAM_FLAGS)

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return 'encoder-decoder' in objective.stacks

  def check(self, options: Any, config: Any) -> None:
    make_beams(options)

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    return _write_and_score(evaluation, 'targets', exact=_share_of_exact)


class Translation(Task):
  """Translates --targets held-out pairs of each source."""

  help = 'BLEU of held-out pairs, and exact'
  why_not_allowed = 'has no pairs to translate'
  figure_names = ('bleu', 'exact', 'pairs', 'bleu/*')
  flags = (TARGETS_FLAG, *BEAM_FLAGS)

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return 'data.target_length' in objective.reads

  def check(self, options: Any, config: Any) -> None:
    _load_bleu()
    make_beams(options)

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and returns the BLEU of what the model writes."""
    bleu = _load_bleu()

    def score(pairs: Sequence[WrittenTarget]) -> float:
      """Returns the corpus BLEU of some pairs."""
      hypotheses = [pair.hypothesis for pair in pairs]
      references = [pair.reference for pair in pairs]
      return bleu.corpus_score(hypotheses, [references]).score

    figures = _write_and_score(evaluation, things='pairs', bleu=score,
                               exact=_share_of_exact)
    figures['signature'] = str(bleu.get_signature())
    print(f'  {figures["signature"]}')
    return figures


def _load_bleu() -> Any:
  """Returns sacrebleu's metric, with its own tokenisation (13a)."""
  return text_files.import_extra('sacrebleu.metrics', 'task translation',
                             'bleu').BLEU()


def _share_of_exact(pairs: Sequence[WrittenTarget]) -> float:
  """Returns the share of one source's targets that were written exactly."""
  return float(np.mean([pair.same for pair in pairs]))


def _write_and_score(evaluation: Evaluation, things: str,
            **scores: Callable[[Sequence[WrittenTarget]], float]) -> dict[str,
                                                                          Any]:
  """Prints and returns the scores of what is written for --targets held-out
  targets, of each source and in the mean by weight.

  Args:
    evaluation: the evaluation of the run.
    things: the name of what is counted.
    scores: each score of the pairs of a source, by name; the first is also
      given of each source.
  """
  options = evaluation.options
  loaders = pipeline.make_evaluation_loaders(evaluation.run.config,
                                             evaluation.tokenizer)

  def said(figures: Mapping[str, float]) -> str:
    """Returns the scores for a reader."""
    return ', '.join(f'{name} {figures[name]:.4f}' for name in scores)

  # All is written before anything is scored.
  written_by_source = []
  for loader in loaders:
    loader.cut(options.targets)
    written_by_source.append(write_targets(evaluation, loader,
                                           make_beams(options)))

  # The scores of each source, and their means.
  each = []
  for pairs in written_by_source:
    each.append({name: score(pairs) for name, score in scores.items()})
  figures: dict[str, Any] = {}
  for name in scores:
    figures[name] = held_out.mean_of_sources([one[name] for one in each],
                                             loaders)
  for loader, pairs, one in zip(loaders, written_by_source, each):
    print(f'{loader.text}: {len(pairs)} held-out {things}: {said(one)}')
  if len(loaders) > 1:
    print(f'the mean by weight: {said(figures)}')
    main = next(iter(scores))
    for loader, one in zip(loaders, each):
      figures[f'{main}/{loader.name}'] = one[main]
  figures[things] = sum(map(len, written_by_source))

  # The score of each target, of a single source.
  if len(loaders) == 1:
    [pairs] = written_by_source
    same = [pair.same for pair in pairs]
    references = [pair.reference for pair in pairs]
    figures['items'] = {'exact': items.record_scores(same, references)}
  return figures


def write_targets(evaluation: Evaluation, loader: pipeline.Loader,
            how: generate.Beams | None = None) -> list[WrittenTarget]:
  """Returns what `translate` returns of a loader's batches."""
  pairs = []
  for batch in progress.show_items(loader.iterate(), 'writing',
                                   loader.num_batches):
    pairs += write_targets_of_batch(evaluation.run.module,
                                    params=evaluation.params,
                       batch=batch, tokenizer=evaluation.tokenizer, how=how)
  return pairs


def write_targets_of_batch(module: Any, params: Any,
                           batch: Mapping[str, np.ndarray],
                           tokenizer: Any, how: generate.Beams | None = None
                           ) -> list[WrittenTarget]:
  """Returns what a model writes of each pair of a batch; rows without a weight
  are no pairs.

  Args:
    module: the model.
    params: its parameters.
    batch: the pairs.
    tokenizer: the tokenizer of the run.
    how: how texts are searched; None: the likeliest token each time.
  """
  # The model writes until it ends its text.
  start_B1 = jnp.asarray(batch['decoder_tokens'][:, :1])
  args = module, params, start_B1, jnp.ones(len(start_B1), jnp.int32)
  end = tokenizer.separator_id
  more = dict(max_new_tokens=batch['targets'].shape[1], stop_token=end,
              source_BM=jnp.asarray(batch['tokens']),
              source_lengths_B=jnp.asarray(batch['segment_ids'].sum(1)))
  if how is None:
    tokens_BT = generate.generate(*args, jax.random.key(0), **more,
                                  sampling=generate.Sampling(temperature=0))
  else:
    best_BKT, _ = generate.beam_search(*args, beams=how, **more)
    tokens_BT = best_BKT[:, 0]
  tokens_BT = jax.device_get(tokens_BT)

  # Each beside its target.
  pairs = []
  for row_T, target_T, weights_T in zip(tokens_BT, batch['targets'],
                                        batch['weights']):
    size = int((weights_T > 0).sum())
    if not size:
      continue
    target = target_T[:size]
    written = generate.tokens_before_stop(row_T, end)
    expected = generate.tokens_before_stop(target, end)
    pairs.append(WrittenTarget(
        hypothesis=tokenizer.decode(written),
        reference=tokenizer.decode(expected),
        same=np.array_equal(row_T[:size], target)))
  return pairs


TASKS = {
    'samples': Samples(),
    'diffusion_samples': DiffusionSamples(),
    'exact': Exact(),
    'translation': Translation(),
}
