"""Text by unmasking: what masked diffusion writes (LLaDA: Nie et al. 2025,
arXiv 2502.09992, algorithm 5, with its low-confidence remasking).

A text begins as a prompt and N masks. In each of S steps the model fills every
mask; after step s the floor(N s / S) fillings of which it is surest stay, and
the others are masked again. A filling that has stayed once is never taken back.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts.moe.layer import without_capacity


def write(module: nn.Module, params: Any, prompts_BL: jax.Array,
          lengths_B: jax.Array, key: jax.Array, *, new: int, steps: int,
          mask: int, temperature: float) -> jax.Array:
  """Returns the text that follows each prompt, int32 [B, new].

  Args:
    module: an encoder that gives logits of tokens.
    params: its parameters.
    prompts_BL: prompts, padded on the right.
    lengths_B: how many tokens of each row are its prompt's.
    key: of the draws.
    new: tokens to write.
    steps: of unmasking; more than `new` are as many.
    mask: the id that stands for a masked token, which is never written.
    temperature: of the draws; 0: the likeliest token.
  """
  module = module.clone(config=without_capacity(
      module.config))  # type: ignore[attr-defined]
  steps, L = min(steps, new), prompts_BL.shape[1]
  places_L = jnp.arange(L + new)[None]
  ends_B1 = lengths_B[:, None] + new
  asked_BL = (places_L >= lengths_B[:, None]) & (places_L < ends_B1)
  real_BL = (places_L < ends_B1).astype(jnp.int32)
  tokens_BL = jnp.where(asked_BL, mask, jnp.pad(prompts_BL, ((0, 0), (0, new))))

  def step(s: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    masked_BL = asked_BL & (tokens_BL == mask)
    output: Any = module.apply({'params': params}, tokens_BL,
                               segment_ids_BL=real_BL)
    logits_BLV = output.logits.at[..., mask].set(-jnp.inf)
    drawn_BLV = logits_BLV
    if temperature:
      drawn_BLV = logits_BLV / temperature + jax.random.gumbel(
          jax.random.fold_in(key, s), logits_BLV.shape)
    filled_BL = drawn_BLV.argmax(-1).astype(tokens_BL.dtype)
    sure_BL = jnp.take_along_axis(
        jax.nn.softmax(logits_BLV, -1), filled_BL[..., None], -1)[..., 0]
    sure_BL = jnp.where(masked_BL, sure_BL, jnp.where(asked_BL, 2.0, -1.0))
    stays_BL = among_largest(sure_BL, new * (s + 1) // steps)
    return jnp.where(masked_BL & stays_BL, filled_BL, tokens_BL)

  tokens_BL = jax.lax.fori_loop(0, steps, step, tokens_BL)
  return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(
      row, start, new))(tokens_BL, lengths_B)


def among_largest(x_BL: jax.Array, count: jax.Array | int) -> jax.Array:
  """Returns which `count` of each row are the largest, bool [B, L]; of equal
  ones, the first."""
  order_BL = jnp.argsort(-x_BL, axis=1, stable=True)
  return jnp.argsort(order_BL, axis=1) < count
