"""The bound on the loss of held-out text, of masked diffusion, by many draws.

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

from training.evals.task import Evaluation, Flag, Task, without


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints the bound in nats a token and in bits a byte of text."""
  import jax

  from training import evaluating, progress
  from training.data import pipeline
  from training.distributed import devices
  own = evaluation.run
  count = evaluation.options.bound_samples
  loaders = pipeline.held_out(
      own.config, evaluation.tokenizer,
      *devices.batch_shard(own.place, own.config.data.batch_size))
  step = evaluation.program(
      lambda: _program(own.module, own.config, evaluation.tokenizer.mask_id,
                       count), 'bound', count)
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
  size = evaluating.mix([loader.bytes_per_token for loader in loaders], loaders)
  loss = evaluating.mix(bounds, loaders)
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
  1977, section 2.11), of the sums of `_program`."""
  if rows < 2:
    return math.nan
  mean = nats / tokens
  spread = max(squares - 2 * mean * products + mean ** 2 * lengths, 0.0)
  return math.sqrt(spread * rows / (rows - 1)) / tokens


def _program(module: Any, config: Any, mask: int, count: int):
  import jax
  import jax.numpy as jnp

  from training import generate, losses, objectives
  objective = objectives.of(config)

  def bound(params: Any, batch: Any, number: jax.Array) -> jax.Array:
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
  return bound


TASK = Task(
    'the bound of masked diffusion on the held-out loss, by many draws', run,
    without(lambda objective: objective.bound,
            'has no bound: its loss is exact, or not one of the text'),
    figures=lambda config: ('loss', 'bits_per_byte', 'standard_error',
                            'samples', 'tokens'),
    flags=(Flag('bound_samples', 32, 'Draws of each row, of how many tokens '
                'are masked and which.', 1, 100_000),))
