"""The encoder-decoder skeleton (Vaswani et al. 2017, figure 1).

The encoder reads the source, every token seeing all; the decoder writes the
target, a token seeing those before it and, by cross-attention, all of the
encoder's output: the memory. One embedding serves both and, tied, the head.
"""

from typing import Any, Optional

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.heads import Unembed
from architectures.parts.skeletons import Embed, Output, Stack, any_cache
from configs.errors import require


class EncoderDecoder(nn.Module):
  """Source [B, M] and target [B, L] -> Output.

  The target is what the decoder is shown: its output at l predicts target
  l + 1. To generate: `encode` once, `decode` the start with an empty cache
  and the memory, then token by token with the cache alone, which holds the
  keys and values of the memory from then on.
  """
  STACK = 'encoder-decoder'
  config: ModelConfig

  def setup(self):
    c = self.config
    self.embed = Embed(c)
    self.encoder = Stack(c, c.sections(c.num_layers, causal=False))
    self.decoder = Stack(c, c.sections(c.num_decoder_layers, cross=True))
    self.head = Unembed(c)

  def __call__(self, tokens_BM: Optional[jax.Array],
               decoder_tokens_BL: Optional[jax.Array] = None, *,
               positions_BM: Optional[jax.Array] = None,
               segment_ids_BM: Optional[jax.Array] = None,
               decoder_positions_BL: Optional[jax.Array] = None,
               decoder_segment_ids_BL: Optional[jax.Array] = None,
               cache: Any = None, memory: Optional[jax.Array] = None,
               deterministic: bool = True, keep_layers: bool = False,
               keep_attention: bool = False, one_by_one: bool = False
               ) -> Output:
    """Runs both stacks, or the decoder alone.

    Args:
      tokens_BM: the source; None with `memory` or a cache that holds it.
      decoder_tokens_BL: what the decoder is shown; default: the source.
      positions_BM: default: 0..M-1.
      segment_ids_BM: 0 where the source is padding.
      decoder_positions_BL: default: 0..L-1; with a cache, where the tokens go.
      decoder_segment_ids_BL: 0 where the target is padding.
      cache: of the decoder; see architectures.init_cache.
      memory: the encoder's output, where it is known.
      deterministic: whether nothing is drawn (no dropout, no router noise).
      keep_layers: whether aux['layers'] holds what the first layer of each
        stack is given and what each layer returns, aux['readouts'] what the
        head would read of the decoder's, and aux['experts'] the choices of
        the layers of experts, the encoder's first.
      keep_attention: whether aux['attention'] holds the attention weights of
        each layer, the encoder's first, and aux['cross_attention'] those of
        the decoder over the memory.
      one_by_one: whether parameters and cache are those that
        skeletons.one_by_one returns.
    """
    aux = {}
    if memory is None and tokens_BM is not None:
      memory, aux = self.encode(
          tokens_BM, positions_BM=positions_BM, segment_ids_BM=segment_ids_BM,
          deterministic=deterministic, keep_layers=keep_layers,
          keep_attention=keep_attention)
    if decoder_tokens_BL is None:
      decoder_tokens_BL = tokens_BM
    output = self.decode(
        decoder_tokens_BL, memory=memory, memory_segment_ids_BM=segment_ids_BM,
        positions_BL=decoder_positions_BL,
        segment_ids_BL=decoder_segment_ids_BL, cache=cache,
        deterministic=deterministic, keep_layers=keep_layers,
        keep_attention=keep_attention, one_by_one=one_by_one)
    return output.replace(aux=join_aux(aux, output.aux))

  def encode(self, tokens_BM: jax.Array, *,
             positions_BM: Optional[jax.Array] = None,
             segment_ids_BM: Optional[jax.Array] = None,
             deterministic: bool = True, keep_layers: bool = False,
             keep_attention: bool = False) -> tuple[jax.Array, dict]:
    """Returns the memory [B, M, D] and aux."""
    chex.assert_rank(tokens_BM, 2)
    in_order = positions_BM is None or segment_ids_BM is not None
    if positions_BM is None:
      positions_BM = jnp.arange(tokens_BM.shape[1])[None]
    x_BMD, _ = self.embed(tokens_BM, positions_BM, deterministic=deterministic)
    ctx = Context(positions_BM, segment_ids_BM, tokens_BL=tokens_BM,
                  in_order=in_order, deterministic=deterministic,
                  keep_layers=keep_layers, keep_attention=keep_attention)
    memory_BMD, _, aux = self.encoder(x_BMD, ctx)
    return memory_BMD, aux

  def decode(self, tokens_BL: jax.Array, *, memory: Optional[jax.Array] = None,
             memory_segment_ids_BM: Optional[jax.Array] = None,
             positions_BL: Optional[jax.Array] = None,
             segment_ids_BL: Optional[jax.Array] = None, cache: Any = None,
             deterministic: bool = True, keep_layers: bool = False,
             keep_attention: bool = False, one_by_one: bool = False) -> Output:
    """Returns what follows each target token; `memory` may be left out where
    the cache has been given it. Positions with segment ids are a promise, as
    skeletons.Decoder says."""
    chex.assert_rank(tokens_BL, 2)
    require(memory is not None or (
        cache is not None
        and any_cache(cache).memory_key_BMJK is not None),
            'a decoder attends to a memory: pass the source, `memory`, or a '
            'cache that was filled with one')
    require(cache is None or segment_ids_BL is None,
            'a cache holds one target a row: pass no decoder segment ids')
    in_order = positions_BL is None or segment_ids_BL is not None
    if positions_BL is None:
      positions_BL = jnp.arange(tokens_BL.shape[1])[None]
    x_BLD, table_DV = self.embed(tokens_BL, positions_BL,
                                 deterministic=deterministic)
    ctx = Context(positions_BL, segment_ids_BL, memory_BMD=memory,
                  memory_segment_ids_BM=memory_segment_ids_BM,
                  tokens_BL=tokens_BL, in_order=in_order,
                  deterministic=deterministic, keep_layers=keep_layers,
                  keep_attention=keep_attention, one_by_one=one_by_one)
    x_BLD, cache, aux = self.decoder(x_BLD, ctx, cache)
    return Output(x_BLD, self.head(table_DV), cache, aux, memory=memory)


def join_aux(encoder: dict, decoder: dict) -> dict:
  """Sums the stacks' losses; the encoder's layers come first in the rest."""
  if not encoder or not decoder:
    return encoder or decoder
  joined = {}
  if 'losses' in decoder:
    joined['losses'] = jax.tree.map(
        jnp.add, encoder['losses'], decoder['losses'])
    joined['health'] = jax.tree.map(
        lambda *x: jnp.concatenate(x), encoder['health'], decoder['health'])
    if 'experts' in decoder:
      joined['experts'] = {name: (*encoder['experts'][name], *x)
                           for name, x in decoder['experts'].items()}
    joined['loads'] = encoder['loads'] | decoder['loads']
  for name in ('layers', 'attention'):
    if name in decoder:
      joined[name] = (*encoder[name], *decoder[name])
  for name in ('readouts', 'cross_attention'):
    if name in decoder:
      joined[name] = decoder[name]
  return joined
