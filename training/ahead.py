"""The loss of tokens further ahead, which model.mtp_depth predicts (DeepSeek-AI
2024b, arXiv 2412.19437, equations 24 and 25).

  L_k = -1/T  sum over i of  log p_k(t_(i+k+1) | t_1 ... t_(i+k))
  loss + lambda / D  sum over k = 1 ... D of  L_k

T is the number of tokens that the loss itself is a mean over, and lambda is
train.mtp_weight. Of packed documents a module predicts only tokens of the
document that it reads.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from training import losses

NAME = 'ahead_{}_loss'  # of the loss at a depth


def shifted(batch: Mapping[str, jax.Array], depth: int
            ) -> tuple[jax.Array, jax.Array]:
  """Returns the targets of a depth, [B, L], and their weights."""
  targets_BL = jnp.roll(batch['targets'], -depth, 1)
  L = targets_BL.shape[1]
  there_BL = jnp.arange(L)[None] < L - depth
  if 'segment_ids' in batch:
    ids_BL = batch['segment_ids']
    there_BL &= ids_BL == jnp.roll(ids_BL, -depth, 1)
  weights_BL = jnp.roll(batch['weights'], -depth, 1)
  return targets_BL, jnp.where(there_BL, weights_BL, 0)


def sums(output: Any, batch: Mapping[str, jax.Array],
         train: ml_collections.ConfigDict
         ) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns (weighted sum, weight) of the loss and the accuracy of each depth;
  {} of a model that looks no further than the next token.

  Args:
    output: a skeletons.Output.
    batch: tokens, targets and weights [B, L].
    train: config.train.
  """
  found = {}
  for depth, hidden_BLD in enumerate(output.extra.get('ahead', ()), 1):
    targets_BL, weights_BL = shifted(batch, depth)
    loss, own = losses.cross_entropy(
        hidden_BLD, output.head, targets_BL, weights_BL, z_loss=train.z_loss,
        label_smoothing=train.label_smoothing, chunk=train.loss_chunk)
    found[NAME.format(depth)] = loss, own['weight']
    found[f'ahead_{depth}_accuracy'] = own['accuracy'], own['weight']
  return found


def share(figures: Mapping[str, Any], config: ml_collections.ConfigDict
          ) -> jax.Array | float:
  """Returns what these losses add to the sum of the tokens' losses.

  Args:
    figures: an objective's, by name.
    config: the run's.
  """
  depth = config.model.mtp_depth
  own = [figures[name].total for name in map(NAME.format, range(1, depth + 1))
         if name in figures]
  return config.train.mtp_weight / depth * sum(own) if own else 0.0
