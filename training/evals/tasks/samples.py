"""Text that the model writes, from a prompt or from nothing."""

from typing import Any

from configs.errors import require
from training.evals.task import Evaluation, Flag, Task, without


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints --samples continuations of --prompt (or of several, by '|||');
  of an encoder-decoder, what it writes when it has read the prompt."""
  import jax

  from training import chat, generate, progress
  from training.hf import generation as hf_generation
  options, model = evaluation.options, evaluation.run.model
  config, tokenizer = evaluation.run.config, evaluation.tokenizer
  texts = options.prompt.split('|||')
  rows = [text for text in texts for _ in range(options.samples)]
  how = beams(options)
  prompts, ends = chat.shown(
      rows if how is None else texts, config, tokenizer,
      hf_generation.published(evaluation.workdir, evaluation.step))
  room = model.max_len - prompts.tokens.shape[1]
  count = options.max_new_tokens or min(256, room)
  require(count > 0, f'the prompt fills all {model.max_len} positions of the '
          'model: shorten it')
  with progress.during('writing'):
    given = (evaluation.run.module, evaluation.params, prompts.tokens,
             prompts.lengths)
    more = dict(max_new_tokens=count, stop_token=ends, **prompts.arguments)
    if how is None:
      tokens = generate.generate(
          *given, jax.random.key(options.sample_seed),
          sampling=sampling(options), **more)
    else:  # the best of each prompt
      found, _ = generate.beam_search(*given, beams=how, **more)
      tokens = found[:, :options.samples].reshape(-1, count)
    tokens = jax.device_get(tokens)
  each = len(tokens) // len(prompts.tokens)  # of a prompt
  written = [generate.before(prompts.text(
      i // each, generate.until(row, ends), tokenizer), stops(options))
             for i, row in enumerate(tokens)]
  for i, (prompt, text) in enumerate(zip(rows, written)):
    print(f'sample {i + 1} of {len(rows)}:\n{prompt}{prompts.gap}{text}\n')
  return {'samples': [{'prompt': p, 'text': t}
                      for p, t in zip(rows, written)]}


def sampling(options: Any):
  """Returns the generate.Sampling of the flags of SAMPLING."""
  from training import generate
  return generate.Sampling(options.temperature, options.top_k, options.top_p,
                           options.min_p, options.repetition_penalty)


def beams(options: Any):
  """Returns the generate.Beams of the flags of BEAMS; None of a single beam,
  which takes the likeliest token each time, as generate.generate does."""
  from training import generate
  how = generate.Beams(options.beams, options.length_penalty, options.penalty,
                   options.early_stopping)
  return how if how.count > 1 else None


def check(options: Any) -> None:
  """Refuses what cannot be honoured."""
  from training import generate
  from training.data import texts
  texts.checked(options.prompt, '--prompt')
  drawn = sampling(options)
  check_beams(options)
  if beams(options) is None:
    return
  require(drawn in (generate.Sampling(), generate.Sampling(temperature=0))
          and not options.sample_seed, f'--beams is {options.beams}, which '
          'looks for the likeliest text: leave out the flags of how a token is '
          'drawn, such as --temperature')
  require(options.samples <= options.beams, f'--samples is {options.samples}, '
          f'but --beams={options.beams} finds no more than that many texts')


def check_beams(options: Any) -> None:
  """Raises RequestError for flags of BEAMS that cannot be honoured: of how
  beams are followed, where there are none."""
  searches = beams(options) is not None
  for flag in BEAMS[1:]:
    value = getattr(options, flag.name)
    require(searches or value == flag.default, f'--{flag.name} is {value!r}, '
            'which is read with --beams above 1 alone')


def check_fits(config: Any, options: Any) -> None:
  """Raises RequestError for more --max_new_tokens than follow --prompt."""
  if not options.max_new_tokens:
    return
  from architectures.parts import positions
  from training import objectives, runs
  from training.data import tokenizers
  prompts = objectives.of(config).prompt(
      options.prompt.split('|||'), config,
      tokenizers.load(config.data.tokenizer))
  length, most = prompts.tokens.shape[1], positions.reach(
      runs.resolve_alone(config))
  require(length + options.max_new_tokens <= most, '--max_new_tokens is '
          f'{options.max_new_tokens}, the prompt has {length} tokens with '
          f'what begins it, and this model has learned {most} positions: '
          'choose fewer tokens')


def stops(options: Any) -> list[str]:
  """Returns the stop strings of --stop; an escape of a line break is one."""
  return [stop.replace('\\n', '\n')
          for stop in options.stop.split('|||') if stop]


# How a token is drawn, and where a text ends.
SAMPLING = (
    Flag('temperature', 1.0,
         'Divides the logits; 0: always the likeliest token.'),
    Flag('top_k', 0, 'Draw from the k likeliest tokens; 0: from all.', 0,
         2**26),
    Flag('top_p', 1.0, 'Draw from the likeliest tokens that together reach '
         'the probability p.'),
    Flag('min_p', 0.0, 'Draw from the tokens that are at least so many times '
         'as likely as the likeliest.'),
    Flag('repetition_penalty', 1.0, 'Divides the logits above 0 of tokens that '
         'the text has already, and multiplies those below 0.'),
    Flag('stop', '', "Ends a text before this string; several: 'A|||B'; a "
         'line break is written \\n.'))

# Beam search instead of draws, or of the likeliest token each time.
BEAMS = (
    Flag('beams', 1, 'Texts that a beam search follows; 1: no beam search.', 1,
         1000),
    Flag('length_penalty', 0.6, "The exponent of a beam search's penalty of "
         'length; 0: none.'),
    Flag('penalty', 'gnmt', 'What that exponent is of: gnmt, (5 + length) / 6, '
         'as for the Transformer; or power, length, as in transformers.'),
    Flag('early_stopping', False, 'End a beam search with as many finished '
         'texts as beams.'))


TASKS = {'samples': Task(
    'texts that the model writes, also asked for by --samples or --prompt', run,
    without(lambda objective: objective.prompt, 'does not write text'),
    check=check, fits=check_fits, figures=lambda config: (),
    held_out=False,
    flags=(
        Flag('samples', 1, 'Texts to write for each prompt.', 1, 10_000,
             asks=True),
        Flag('prompt', '', "What a text begins with; several: 'A|||B'.",
             asks=True),
        Flag('max_new_tokens', 0,
             'Tokens to write; 0: as many as fit, 256 at most.', 0, 2**24),
        *SAMPLING,
        *BEAMS,
        Flag('sample_seed', 0, 'The seed of the draws.', 0, 2**32 - 1)))}
