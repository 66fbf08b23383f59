"""Block wirings, side by side. Each is (x, context, cache) -> (x, cache, aux).

The docstring of each begins with its equation and those who have it;
docs/architectures.md has them in a table. A is self-attention and, in a decoder
with a memory, C follows it wired alike. With model.ffn 'none' a block ends
before F, as Mamba-2's do: x + A(n(x)).

To add one, write a class and its entry in BLOCKS, at the end of this file. What
else it can do than self-attention and F on one stream it says by the attributes
of Block; what it does not say is refused. tests/architectures/parts_test.py
has the equations again.
"""

from collections.abc import Callable
from typing import Optional

import flax.linen as nn
import jax

from architectures.parts import layers
from architectures.parts import mixers
from architectures.parts import sharding
from architectures.parts import streams
from architectures.parts.attention.multi_head import Attention
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Cache, Context
from architectures.parts.layers import FFN, NO_FFN, norm
from architectures.parts.moe.layer import MoE


class Block(nn.Module):
  """What the wirings share: their parts by name.

  FINAL_NORM: whether what the last block returns is not normalised yet.
  CROSS: whether it has C too, where its kind of layer asks for it.
  WITHOUT_FFN: whether it ends before F, where its kind of layer has none.
  STREAMS: whether x may be several streams (streams.py): everything that the
    block adds to x is then added by `branch`, as often as `branches` says.
  """
  FINAL_NORM = True
  CROSS = False
  WITHOUT_FFN = False
  STREAMS = False
  config: ModelConfig
  kind: LayerKind

  def norm(self, name: str) -> nn.Module:
    return norm(self.config, name)

  def attention(self) -> nn.Module:
    mixer = mixers.of(self.config)
    return mixer.module(self.config, self.kind, name='attention')

  def cross_attention(self) -> nn.Module:
    return Attention(self.config, self.kind, cross=True,
                     name='cross_attention')

  def ffn(self) -> nn.Module:
    if self.kind.ffn == 'moe':
      return MoE(self.config, name='ffn')
    return FFN(self.config, self.kind.ffn, name='ffn')

  def branch(self, name: str, x: streams.X) -> streams.Read:
    """Returns what a branch reads of x, and a function that adds its result to
    x."""
    return streams.branch(self.config, name, x)

  @staticmethod
  def branches(kind: LayerKind) -> int:
    """Returns how often a layer of this wiring adds to x."""
    return 1 + kind.cross + (kind.ffn != NO_FFN)

  def drop(self, x: jax.Array, ctx: Context) -> jax.Array:
    return layers.Dropout(self.config.dropout)(
        x, deterministic=ctx.deterministic)


def residual(x: streams.X) -> streams.X:
  """Pins the residual stream, so that XLA never reshards it in between."""
  if isinstance(x, streams.Streams):
    return x.replace(x_BLUD=streams.pin(x.x_BLUD))
  return sharding.constrain_stream(x, 'embed')


class PreNorm(Block):
  """x + A(n(x)); x + F(n(x)) (GPT-2, LLaMA)."""
  CROSS = WITHOUT_FFN = STREAMS = True

  @nn.compact
  def __call__(self, x: streams.X, ctx: Context, cache: Optional[Cache]):
    x_BLD, add = self.branch('attention', x)
    y_BLD, cache = self.attention()(
        self.norm('attention_norm')(x_BLD), ctx, cache)
    x = add(self.drop(y_BLD, ctx))
    if self.kind.cross:
      x_BLD, add = self.branch('cross', x)
      y_BLD, cache = self.cross_attention()(
          self.norm('cross_norm')(x_BLD), ctx, cache)
      x = add(self.drop(y_BLD, ctx))
    if self.kind.ffn == NO_FFN:
      return residual(x), cache, {}
    x_BLD, add = self.branch('ffn', x)
    y_BLD, aux = self.ffn()(self.norm('ffn_norm')(x_BLD), ctx)
    return residual(add(self.drop(y_BLD, ctx))), cache, aux


class FfnNorm(Block):
  """x + A(x); x + F(n(x)) (the first layer of ModernBERT, whose input is
  normalised already)."""
  CROSS = STREAMS = True  # without F it would have no norm

  @nn.compact
  def __call__(self, x: streams.X, ctx: Context, cache: Optional[Cache]):
    x_BLD, add = self.branch('attention', x)
    y_BLD, cache = self.attention()(x_BLD, ctx, cache)
    x = add(self.drop(y_BLD, ctx))
    if self.kind.cross:
      x_BLD, add = self.branch('cross', x)
      y_BLD, cache = self.cross_attention()(x_BLD, ctx, cache)
      x = add(self.drop(y_BLD, ctx))
    x_BLD, add = self.branch('ffn', x)
    y_BLD, aux = self.ffn()(self.norm('ffn_norm')(x_BLD), ctx)
    return residual(add(self.drop(y_BLD, ctx))), cache, aux


class PostNorm(Block):
  """n(x + A(x)); n(x + F(x)) (the Transformer, BERT).

  The papers of several streams have no equation for a sum that is normalised
  itself."""
  FINAL_NORM = False
  CROSS = WITHOUT_FFN = True

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[Cache]):
    y_BLD, cache = self.attention()(x_BLD, ctx, cache)
    x_BLD = self.norm('attention_norm')(x_BLD + self.drop(y_BLD, ctx))
    if self.kind.cross:
      y_BLD, cache = self.cross_attention()(x_BLD, ctx, cache)
      x_BLD = self.norm('cross_norm')(x_BLD + self.drop(y_BLD, ctx))
    if self.kind.ffn == NO_FFN:
      return residual(x_BLD), cache, {}
    y_BLD, aux = self.ffn()(x_BLD, ctx)
    x_BLD = self.norm('ffn_norm')(x_BLD + self.drop(y_BLD, ctx))
    return residual(x_BLD), cache, aux


class Parallel(Block):
  """x + A(n1(x)) + F(n2(x)) (GPT-NeoX)."""
  CROSS = STREAMS = True  # without F it would be pre_norm

  @staticmethod
  def branches(kind: LayerKind) -> int:
    return 1

  def normed(self, x_BLD: jax.Array) -> Callable[[str], jax.Array]:
    """Returns what each part is given, by its name."""
    return lambda part: self.norm(f'{part}_norm')(x_BLD)

  @nn.compact
  def __call__(self, x: streams.X, ctx: Context, cache: Optional[Cache]):
    x_BLD, add = self.branch('attention', x)
    normed = self.normed(x_BLD)
    y_BLD, cache = self.attention()(normed('attention'), ctx, cache)
    if self.kind.cross:
      z_BLD, cache = self.cross_attention()(normed('cross'), ctx, cache)
      y_BLD = y_BLD + z_BLD
    z_BLD, aux = self.ffn()(normed('ffn'), ctx)
    return residual(add(self.drop(y_BLD + z_BLD, ctx))), cache, aux


class SharedNorm(Parallel):
  """x + A(n(x)) + F(n(x)) (GPT-J, PaLM, Falcon-7B)."""

  def normed(self, x_BLD: jax.Array) -> Callable[[str], jax.Array]:
    n_BLD = self.norm('attention_norm')(x_BLD)
    return lambda part: n_BLD


class Sandwich(Block):
  """x + n(A(n(x))); x + n(F(n(x))) (CogView, Gemma 2)."""
  CROSS = WITHOUT_FFN = STREAMS = True

  @nn.compact
  def __call__(self, x: streams.X, ctx: Context, cache: Optional[Cache]):
    x_BLD, add = self.branch('attention', x)
    y_BLD, cache = self.attention()(
        self.norm('attention_norm')(x_BLD), ctx, cache)
    y_BLD = self.norm('attention_out_norm')(y_BLD)
    x = add(self.drop(y_BLD, ctx))
    if self.kind.cross:
      x_BLD, add = self.branch('cross', x)
      y_BLD, cache = self.cross_attention()(
          self.norm('cross_norm')(x_BLD), ctx, cache)
      y_BLD = self.norm('cross_out_norm')(y_BLD)
      x = add(self.drop(y_BLD, ctx))
    if self.kind.ffn == NO_FFN:
      return residual(x), cache, {}
    x_BLD, add = self.branch('ffn', x)
    y_BLD, aux = self.ffn()(self.norm('ffn_norm')(x_BLD), ctx)
    y_BLD = self.norm('ffn_out_norm')(y_BLD)
    return residual(add(self.drop(y_BLD, ctx))), cache, aux


class OutNorm(Block):
  """x + n(A(x)); x + n(F(x)) (OLMo 2: arXiv 2501.00656, 3.1)."""
  CROSS = WITHOUT_FFN = STREAMS = True

  @nn.compact
  def __call__(self, x: streams.X, ctx: Context, cache: Optional[Cache]):
    x_BLD, add = self.branch('attention', x)
    y_BLD, cache = self.attention()(x_BLD, ctx, cache)
    x = add(self.drop(self.norm('attention_out_norm')(y_BLD), ctx))
    if self.kind.cross:
      x_BLD, add = self.branch('cross', x)
      y_BLD, cache = self.cross_attention()(x_BLD, ctx, cache)
      x = add(self.drop(self.norm('cross_out_norm')(y_BLD), ctx))
    if self.kind.ffn == NO_FFN:
      return residual(x), cache, {}
    x_BLD, add = self.branch('ffn', x)
    y_BLD, aux = self.ffn()(x_BLD, ctx)
    y_BLD = self.drop(self.norm('ffn_out_norm')(y_BLD), ctx)
    return residual(add(y_BLD)), cache, aux


BLOCKS = {
    'pre_norm': PreNorm,
    'post_norm': PostNorm,
    'parallel': Parallel,
    'shared_norm': SharedNorm,
    'sandwich': Sandwich,
    'out_norm': OutNorm,
    'ffn_norm': FfnNorm,
}


def branches(c: ModelConfig, kinds: tuple[LayerKind, ...]) -> int:
  """Returns how often layers of these kinds, one after another, add to x."""
  return sum(BLOCKS[c.of_kind(kind.name).block].branches(kind)
             for kind in kinds)
