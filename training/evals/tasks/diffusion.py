"""Masked diffusion over text: the bound on the loss of held-out text, by many
draws, and text that the model writes, from a prompt or nothing.

Of a row of n tokens each draw masks l of them, and counts the losses of the
masked tokens n / l times. l is uniform from 1 to n, which gives the same mean
as a random share of masked tokens and spreads less (LLaDA, arXiv 2502.09992,
equation 6). The draws of a row take its l evenly spread, from a random start.
The standard error is that of the mean over rows: of another held-out text of
the same kind, and by other draws.
"""

import math
from typing import Any

import numpy as np

from configs.errors import require
from training.evals.task import Evaluation, Flag, Task, without


def bound(evaluation: Evaluation) -> dict[str, Any]:
  """Prints the bound in nats a token and in bits a byte of text."""
  import jax

  from training import progress
  from training.evals import held_out
  own, loaders = evaluation.run, evaluation.held_out()
  count, mask = evaluation.options.bound_samples, evaluation.tokenizer.mask_id
  step = evaluation.program(
      lambda: _bound_program(own.module, own.config, mask, count),
      'diffusion_bound', count)
  found = []
  for loader in loaders:
    sums = np.zeros(6)
    for n, batch in enumerate(progress.each(
        loader.iterate(), 'evaluating', loader.num_batches)):
      sums += np.float64(jax.device_get(step(
          evaluation.params, own.put(batch), np.uint32(n))))
    found.append(sums)
  bounds = [sums[0] / sums[1] for sums in found]
  errors = [_error(*sums) for sums in found]
  shares = np.array([loader.share for loader in loaders])
  size = held_out.mix([loader.bytes_per_token for loader in loaders], loaders)
  loss = held_out.mix(bounds, loaders)
  bits = loss / (math.log(2) * size)
  error = float(np.hypot.reduce(shares * errors) / shares.sum())
  tokens = float(sum(sums[1] for sums in found))
  print(f'bound of {tokens:,.0f} tokens by {count} draws of each row:\n'
        f'  loss <=          {loss:.4f} (standard error {error:.4f})\n'
        f'  bits per byte <= {bits:.4f}')
  return dict(loss=loss, bits_per_byte=bits, standard_error=error,
              samples=count, tokens=tokens)


def _error(nats: float, tokens: float, squares: float, products: float,
           lengths: float, rows: float) -> float:
  """Returns the standard error of nats / tokens, a ratio over rows (Cochran
  1977, section 2.11), of the sums of `_bound_program`."""
  if rows < 2:
    return math.nan
  mean = nats / tokens
  spread = max(squares - 2 * mean * products + mean ** 2 * lengths, 0.0)
  return math.sqrt(spread * rows / (rows - 1)) / tokens


def _bound_program(module: Any, config: Any, mask: int, count: int):
  import jax
  import jax.numpy as jnp

  from training import generate, objectives
  from training.objectives import losses
  objective = objectives.of(config)

  def sums(params: Any, batch: Any, number: jax.Array) -> jax.Array:
    """Returns sums over the rows, of x, the mean of a row's draws, and n, its
    tokens: those of x, n, x^2, x n and n^2, and how many rows there are."""
    real_BL = batch['segment_ids'] != 0
    n_B = real_BL.sum(1)
    key = jax.random.fold_in(jax.random.key(0), number)
    start_B = jax.random.uniform(jax.random.fold_in(key, count), n_B.shape)

    def draw(_: None, k: jax.Array):
      share_B = (start_B + k / count) % 1.0
      l_B = jnp.minimum(1 + (share_B * n_B).astype(jnp.int32), n_B)
      noise_BL = jax.random.uniform(jax.random.fold_in(key, k), real_BL.shape)
      masked_BL = real_BL & generate.among_largest(
          jnp.where(real_BL, noise_BL, -1.0), l_B[:, None])
      shown = batch | dict(tokens=jnp.where(
          masked_BL, mask, batch['targets']))
      output = objective.apply(module, params, shown)
      nats_BL = losses.token_losses(
          output.hidden, output.head, batch['targets'],
          chunk=config.train.loss_chunk).loss
      sum_B = jnp.where(masked_BL, nats_BL, 0).sum(1)
      return None, sum_B * n_B / jnp.maximum(l_B, 1)

    x_B = jax.lax.scan(draw, None, jnp.arange(count))[1].mean(0)
    n_B = n_B.astype(jnp.float32)
    return jnp.stack([x_B.sum(), n_B.sum(), (x_B ** 2).sum(), (x_B * n_B).sum(),
                      (n_B ** 2).sum(), (n_B > 0).astype(jnp.float32).sum()])
  return sums


def samples(evaluation: Evaluation) -> dict[str, Any]:
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
  steps = options.diffusion_steps or new
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


_HAS = without(lambda objective: objective.bound,
               'is no masked diffusion, of which the task is')
TASKS = {
    'diffusion_bound': Task(
        'the bound of masked diffusion on the held-out loss, by many draws',
        bound, _HAS,
        figures=lambda config: ('loss', 'bits_per_byte', 'standard_error',
                                'samples', 'tokens'),
        flags=(Flag('bound_samples', 32, 'Draws of each row, of how many '
                    'tokens are masked and which.', 1, 100_000),)),
    'diffusion_samples': Task(
        'texts that a model of masked diffusion writes', samples, _HAS,
        check=_check, fits=_fits, figures=lambda config: ('steps',),
        held_out=False,
        flags=(
            Flag('samples', 1, 'Texts to write for each prompt.', 1, 10_000),
            Flag('prompt', '', "What a text begins with; several: 'A|||B'."),
            Flag('max_new_tokens', 0,
                 'Tokens to write; 0: as many as fit, 256 at most.', 0, 2**24),
            Flag('diffusion_steps', 0, 'Steps in which they are written; 0: '
                 'one for each token.', 0, 2**24),
            Flag('temperature', 1.0,
                 'Divides the logits; 0: always the likeliest token.'),
            Flag('sample_seed', 0, 'The seed of the draws.', 0, 2**32 - 1)))}
