"""Text that a model of masked diffusion writes, from a prompt or nothing."""

import math
from typing import Any

from configs.errors import require
from training.evals.task import Evaluation, Flag, Task, without


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints --samples continuations of --prompt (or of several, by '|||')."""
  import jax

  from training import generate, progress
  from training.objectives import record
  options, model = evaluation.options, evaluation.run.model
  config, tokenizer = evaluation.run.config, evaluation.tokenizer
  texts = [text for text in options.prompt.split('|||')
           for _ in range(options.samples)]
  prompts = record.after_separator(texts, config, tokenizer)
  new = _new(options, prompts.tokens.shape[1], model.max_len)
  steps = options.unmask_steps or new
  with progress.during('writing'):
    tokens = jax.device_get(jax.jit(
        generate.write_diffusion, static_argnums=0,
        static_argnames=('new', 'steps', 'mask', 'temperature'))(
            evaluation.run.module, evaluation.params, prompts.tokens,
            prompts.lengths, jax.random.key(options.sample_seed), new=new,
            steps=steps, mask=tokenizer.mask_id,
            temperature=options.temperature))
  end = tokenizer.separator_id
  written = [prompts.text(i, generate.until(row, end), tokenizer)
             for i, row in enumerate(tokens)]
  for i, (prompt, text) in enumerate(zip(texts, written)):
    print(f'sample {i + 1} of {len(texts)}:\n{prompt}{text}\n')
  return {'samples': [{'prompt': p, 'text': t}
                      for p, t in zip(texts, written)], 'steps': steps}


def _new(options: Any, length: int, max_len: int) -> int:
  """Returns how many tokens are written after prompts of a length."""
  room = max_len - length
  new = options.max_new_tokens or min(256, room)
  require(0 < new <= room, f'the prompt has {length} tokens and '
          f'--max_new_tokens is {options.max_new_tokens}, and the model takes '
          f'max_len {max_len}: shorten one of them')
  return new


def _fits(config: Any, options: Any) -> None:
  from training import runs
  from training.data import tokenizers
  from training.objectives import record
  prompts = record.after_separator(options.prompt.split('|||'), config,
                                   tokenizers.load(config.data.tokenizer))
  _new(options, prompts.tokens.shape[1], runs.resolve_alone(config).max_len)


def _check(options: Any) -> None:
  from training.data import texts
  require(0 <= options.temperature < math.inf, '--temperature is '
          f'{options.temperature}: it must be >= 0')
  texts.checked(options.prompt, '--prompt')


TASK = Task(
    'texts that a model of masked diffusion writes', run,
    without(lambda objective: objective.bound,
            'does not unmask text: the task is for masked_diffusion'),
    check=_check, fits=_fits, figures=lambda config: ('steps',),
    held_out=False,
    flags=(
        Flag('samples', 1, 'Texts to write for each prompt.', 1, 10_000),
        Flag('prompt', '', "What a text begins with; several: 'A|||B'."),
        Flag('max_new_tokens', 0,
             'Tokens to write; 0: as many as fit, 256 at most.', 0, 2**24),
        Flag('unmask_steps', 0, 'Steps in which they are written; 0: one for '
             'each token.', 0, 2**24),
        Flag('temperature', 1.0,
             'Divides the logits; 0: always the likeliest token.'),
        Flag('sample_seed', 0, 'The seed of the draws.', 0, 2**32 - 1)))
