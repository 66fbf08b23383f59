"""What a model writes: texts, from a prompt or from nothing, and the targets of
held-out pairs, or of spans that were cut out: the share that is written to its
end, and the BLEU.

BLEU is sacrebleu's corpus BLEU (Post 2018), on text; where the package is
absent the request is refused. Targets are written of the likeliest tokens, one
by one, or are the best text of --beams.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import require
from training import generate, objectives, progress
from training.data import texts as text_files
from training.evals import Evaluation, Flag, Task, held_out, items, without
from training.hf import generation as hf_generation
from training.objectives import pipeline


def samples(evaluation: Evaluation) -> dict[str, Any]:
  """Prints --samples continuations of --prompt (or of several, by '|||');
  of an encoder-decoder, what it writes when it has read the prompt."""
  options, how = evaluation.options, beams(evaluation.options)
  prompts, ends, count = evaluation.shown
  with progress.during('writing'):
    args = (evaluation.run.module, evaluation.params, prompts.tokens,
            prompts.lengths)
    more = dict(max_new_tokens=count, stop_token=ends, **prompts.arguments)
    if how is None:
      tokens = generate.generate(*args, jax.random.key(options.sample_seed),
                                 sampling=sampling(options), **more)
    else:  # the best of each prompt
      best, _ = generate.beam_search(*args, beams=how, **more)
      tokens = best[:, :options.samples].reshape(-1, count)
    tokens = jax.device_get(tokens)
  return {'samples': _print_samples(evaluation, prompts, tokens, ends,
                                    stops(options))}


def _shown(evaluation: Evaluation) -> tuple[objectives.Prompts, Any, int]:
  """Returns the prompts, the tokens that end a text, and how many may come."""
  options = evaluation.options
  prompts, ends = hf_generation.shown(
      _prompts(options, 1 if beams(options) else options.samples),
      evaluation.run.config, evaluation.tokenizer,
      hf_generation.published(evaluation.workdir, evaluation.step))
  return prompts, ends, _room(evaluation, prompts)


def diffusion_samples(evaluation: Evaluation) -> dict[str, Any]:
  """The same of a model of masked diffusion."""
  options, tokenizer = evaluation.options, evaluation.tokenizer
  prompts, new = evaluation.shown
  steps = options.diffusion_steps or new
  with progress.during('writing'):
    write = jax.jit(generate.write_diffusion, static_argnums=0,
                    static_argnames=('new', 'steps', 'mask', 'temperature'))
    tokens = jax.device_get(write(
        evaluation.run.module, evaluation.params, prompts.tokens,
        prompts.lengths, jax.random.key(options.sample_seed), new=new,
        steps=steps, mask=tokenizer.mask_id, temperature=options.temperature))
  return {'samples': _print_samples(evaluation, prompts, tokens,
                                    tokenizer.separator_id), 'steps': steps}


def _shown_diffusion(evaluation: Evaluation) -> tuple[objectives.Prompts, int]:
  """Returns the prompts, and how many tokens are written."""
  options = evaluation.options
  prompts = objectives.after_separator(
      _prompts(options, options.samples), evaluation.run.config,
      evaluation.tokenizer)
  return prompts, _room(evaluation, prompts)


def _prompts(options: Any, each: int) -> list[str]:
  return [text for text in options.prompt.split('|||') for _ in range(each)]


def _room(evaluation: Evaluation, prompts: objectives.Prompts) -> int:
  """Returns how many tokens are written after prompts."""
  length, most = prompts.tokens.shape[1], evaluation.run.model.max_len
  room, new = most - length, evaluation.options.max_new_tokens
  bound = evaluation.run.config.objective == 'masked_diffusion'
  require(room > 0 and not (bound and new > room), f'the prompt has {length} '
          f'tokens and --max_new_tokens is {new}, and the model takes max_len '
          f'{most}: shorten one of them')
  return new or min(256, room)


def _print_samples(evaluation: Evaluation, prompts: objectives.Prompts,
                   tokens: np.ndarray, ends: Any, stop: Sequence[str] = ()
                   ) -> list[dict[str, str]]:
  """Prints and returns what was written after each prompt, up to one of the
  tokens `ends` or the texts `stop`."""
  texts = _prompts(evaluation.options, evaluation.options.samples)
  each, results = len(tokens) // len(prompts.tokens), []
  for i, (prompt, row) in enumerate(zip(texts, tokens)):
    text = generate.before(prompts.text(
        i // each, generate.until(row, ends), evaluation.tokenizer), stop)
    print(f'sample {i + 1} of {len(texts)}:\n{prompt}{prompts.gap}{text}\n')
    results.append({'prompt': prompt, 'text': text})
  return results


def sampling(options: Any) -> generate.Sampling:
  """Returns how a token is drawn by the flags of SAMPLING."""
  return generate.Sampling(options.temperature, options.top_k, options.top_p,
                           options.min_p, options.repetition_penalty)


def beams(options: Any) -> generate.Beams | None:
  """Returns how texts are searched by the flags of BEAMS; None of a single
  beam, which takes the likeliest token each time, as generate.generate does."""
  how = generate.Beams(options.beams, options.length_penalty, options.penalty)
  return how if how.count > 1 else None


def stops(options: Any) -> list[str]:
  """Returns the stop strings of --stop; an escape of a line break is one."""
  return [stop.replace('\\n', '\n')
          for stop in options.stop.split('|||') if stop]


def translation(evaluation: Evaluation) -> dict[str, Any]:
  """Translates --targets held-out pairs of each source."""
  bleu = _bleu()

  def score(pairs: Sequence[tuple]) -> float:
    hypotheses, references, _ = zip(*pairs)
    return bleu.corpus_score(hypotheses, [references]).score

  figures = _scored(evaluation, 'pairs', bleu=score, exact=_share)
  figures['signature'] = str(bleu.get_signature())
  print(f'  {figures["signature"]}')
  return figures


def _bleu() -> Any:
  """Returns sacrebleu's metric, with its own tokenisation (13a)."""
  return text_files.imported('sacrebleu.metrics', 'task translation',
                             'bleu').BLEU()


def _share(pairs: Sequence[tuple]) -> float:
  """Returns the share of one source's targets that were written exactly."""
  return float(np.mean([same for _, _, same in pairs]))


def _scored(evaluation: Evaluation, things: str,
            **scores: Callable[[Sequence[tuple]], float]) -> dict[str, Any]:
  """Prints and returns the scores of what is written for --targets held-out
  targets, of each source and in the mean by weight; `things` is what is
  counted."""
  options = evaluation.options
  loaders = [loader.cut(options.targets) for loader in pipeline.held_out(
      evaluation.run.config, evaluation.tokenizer)]
  pairs = [written(evaluation, loader, beams(options)) for loader in loaders]
  each = [{name: score(source_pairs) for name, score in scores.items()}
          for source_pairs in pairs]
  figures: dict[str, Any] = {
      name: held_out.mix([one[name] for one in each], loaders)
      for name in scores}
  say = lambda one: ', '.join(f'{name} {one[name]:.4f}' for name in scores)
  for loader, source_pairs, one in zip(loaders, pairs, each):
    print(f'{loader.text}: {len(source_pairs)} held-out {things}: {say(one)}')
  if len(loaders) > 1:
    print(f'the mean by weight: {say(figures)}')
    main = next(iter(scores))
    figures |= {f'{main}/{loader.name}': one[main]
                for loader, one in zip(loaders, each)}
  *_, same = zip(*pairs[0])
  return figures | {things: sum(map(len, pairs))} | ({'items': {
      'exact': items.of(same, [target for _, target, _ in pairs[0]])}}
          if len(loaders) == 1 else {})


def written(evaluation: Evaluation, loader: pipeline.Loader,
            how: generate.Beams | None = None) -> list[tuple[str, str, bool]]:
  """Returns what `translate` returns of a loader's batches."""
  return [pair for batch in progress.each(loader.iterate(), 'writing',
                                          loader.num_batches)
          for pair in translate(evaluation.run.module, evaluation.params, batch,
                                evaluation.tokenizer, how)]


def translate(module: Any, params: Any, batch: Mapping[str, np.ndarray],
              tokenizer: Any, how: generate.Beams | None = None
              ) -> list[tuple[str, str, bool]]:
  """Returns (hypothesis, reference, whether their tokens are the same) of
  each pair of a batch; rows without a weight are no pairs. `how`: None: the
  likeliest token each time."""
  start = jnp.asarray(batch['decoder_tokens'][:, :1])
  args = module, params, start, jnp.ones(len(start), jnp.int32)
  end = tokenizer.separator_id
  more = dict(max_new_tokens=batch['targets'].shape[1], stop_token=end,
              source_BM=jnp.asarray(batch['tokens']),
              source_lengths_B=jnp.asarray(batch['segment_ids'].sum(1)))
  if how is None:
    tokens = generate.generate(*args, jax.random.key(0), **more,
                               sampling=generate.Sampling(temperature=0))
  else:
    tokens = generate.beam_search(*args, beams=how, **more)[0][:, 0]
  text = lambda ids: tokenizer.decode(generate.until(ids, end))
  pairs = []
  for row, target, weights in zip(
      jax.device_get(tokens), batch['targets'], batch['weights']):
    size = int((weights > 0).sum())
    if size:
      pairs.append((text(row), text(target[:size]),
                    np.array_equal(row[:size], target[:size])))
  return pairs


def _check_samples(options: Any, config: Any) -> None:
  text_files.checked(options.prompt, '--prompt')
  drawn = sampling(options)
  greedy = drawn == generate.Sampling(
      0, repetition_penalty=options.repetition_penalty)
  require(options.temperature > 0 or greedy and not options.sample_seed,
          '--temperature=0 draws no token: leave out the other flags of how '
          'one is drawn, such as --top_k and --sample_seed')
  if beams(options) is None:
    return
  require(drawn in (generate.Sampling(), generate.Sampling(temperature=0))
          and not options.sample_seed, f'--beams is {options.beams}, which '
          'looks for the likeliest text: leave out the flags of how a token is '
          'drawn, such as --temperature')
  require(options.samples <= options.beams, f'--samples is {options.samples}, '
          f'but --beams={options.beams} finds no more than that many texts')


def _check_diffusion(options: Any, config: Any) -> None:
  generate.Sampling(options.temperature)
  text_files.checked(options.prompt, '--prompt')


# How a token is drawn, and where a text ends.
TEMPERATURE = Flag('temperature', 1.0,
                   'Divides the logits; 0: always the likeliest token.')
SAMPLING = (
    TEMPERATURE,
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
         'length; 0: none.', needs='beams'),
    Flag('penalty', 'gnmt', 'What that exponent is of: gnmt, (5 + length) / 6, '
         'as for the Transformer; or power, length, as in transformers.',
         needs='beams'))

# A number of rows, and not of batches, so that no figure depends on their size.
TARGETS = Flag('targets', 512, 'Held-out targets to write of each source; 0: '
               'all.', 0, 2**24)
SAMPLES = Flag('samples', 1, 'Texts to write for each prompt.', 1, 10_000)
PROMPT = Flag('prompt', '', "What a text begins with; several: 'A|||B'.")
LENGTH = Flag('max_new_tokens', 0,
              'Tokens to write; 0: as many as fit, 256 at most.', 0, 2**24)
SEED = Flag('sample_seed', 0, 'The seed of the draws.', 0, 2**32 - 1)
TASKS = {
    'samples': Task(
        'texts that the model writes, also asked for by --samples or --prompt',
        samples,
        without(lambda objective: objective.writes, 'does not write text'),
        check=_check_samples, shown=_shown, figures=(), held_out=False,
        flags=(SAMPLES._replace(asks=True), PROMPT._replace(asks=True), LENGTH,
               *SAMPLING, *BEAMS, SEED)),
    'diffusion_samples': Task(
        'texts that a model of masked diffusion writes', diffusion_samples,
        without(lambda objective: objective.bound,
                'is no masked diffusion, of which the task is'),
        check=_check_diffusion, shown=_shown_diffusion, figures=('steps',),
        held_out=False, flags=(SAMPLES, PROMPT, LENGTH, Flag(
            'diffusion_steps', 0, 'Steps in which they are written; 0: one for '
            'each token.', 0, 2**24), TEMPERATURE, SEED)),
    'exact': Task(
        'the share of held-out targets that are written exactly',
        lambda evaluation: _scored(evaluation, 'targets', exact=_share),
        without(lambda objective: 'encoder-decoder' in objective.stacks,
                'has no targets to write'),
        check=lambda options, config: beams(options) and None,
        flags=(TARGETS, *BEAMS), figures=('exact', 'targets', 'exact/*')),
    'translation': Task(
        'BLEU of held-out pairs, and exact', translation,
        without(lambda objective: 'data.target_length' in objective.reads,
                'has no pairs to translate'),
        check=lambda options, config: (_bleu(), beams(options)) and None,
        flags=(TARGETS, *BEAMS), figures=('bleu', 'exact', 'pairs', 'bleu/*'))}
