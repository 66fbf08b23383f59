"""The gated short convolution: a filter over the last few tokens for each
feature, between two gates (Liquid AI 2025, "LFM2 Technical Report", arXiv
2511.23404; in transformers Lfm2ShortConv).

  B, C, x = W_B u, W_C u, W_x u             one product, [D, 3, I] with I = D
  z_l     = b + sum over i < W of w_i * (B * x)_(l - W + 1 + i)
  y       = W_out (C * z)

The products by B and C are of each feature by itself, and no function is
applied to them. What a layer keeps of a row is B * x of the last W - 1 tokens.
Wherever the segment id changes, a document begins, and what stands before it
counts as zero. With a cache, padding at the end of a row is left out.
"""

import dataclasses
from typing import Any, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import layers, mixer, sharding
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context, Report
from architectures.parts.recurrent import features
from common.fields import field, MOST_TAPS, SHAPES


@dataclasses.dataclass(frozen=True)
class ShortConvConfig:
  """The fields of mixer short_conv."""
  kernel: int = field(
      3, 'tokens that the convolution sees, the token itself included', least=1,
      most=MOST_TAPS, resume=SHAPES)
  bias: bool = field(
      False, 'whether the convolution and the products have a bias')


@struct.dataclass
class State:
  """The last inputs of the convolution, B * x of W - 1 tokens."""
  input_BWI: jax.Array


class ShortConv(nn.Module):
  """(x_BLD, context, cache) -> (y_BLD, cache, report), over x itself."""
  settings = ShortConvConfig
  config: ModelConfig
  kind: LayerKind

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[State]):
    """Applies a gated short convolution over tokens to the layer's input u
    (LFM2):

      B, C, x = W_B u, W_C u, W_x u
      y       = W_out (C * conv(B * x))

    The suffixes name axes: B batch, L length, D d_model, U = 3 for B, C and x,
    I inner features, W the last inputs of the convolution.

    Args:
      x_BLD: the layer's input u.
      ctx: the context of the call: positions, documents, padding.
      cache: what the layer keeps of earlier tokens; None: there is none.

    Returns:
      The output [B, L, D], the cache after these tokens (None where there was
      none), and an empty report.
    """
    mixer.check_context_of_recurrence('short_conv', ctx)
    D, kernel = self.config.d_model, self.config.part(ShortConvConfig).kernel
    options: dict[str, Any] = dict(
        with_bias=self.config.part(ShortConvConfig).bias,
        deterministic=ctx.deterministic)

    # One product makes B, C and x. Its weight is an array [D, 3, I]; axis 1 is
    # declared a batch axis, so that optimisers which work on matrices treat the
    # three matrices one by one.
    bcx_BLUI = layers.dense(self, 'in', 'BLD,DUI->BLUI', x_BLD, shape=(D, 3, D),
                            axes=('embed', None, 'mlp'), batch_axes=(1,),
                            **options)
    bcx_BLUI = sharding.constrain(bcx_BLUI, 'batch', 'length', None, 'mlp')
    b_BLI, c_BLI, x_BLI = (bcx_BLUI[:, :, i] for i in range(3))

    # The convolution of B * x over the last W tokens. A cache has the last
    # W - 1 of its inputs, those that the next token sees.
    z_BLI, input_BWI = features.declare_and_convolve(
        self, 'conv', b_BLI * x_BLI, width=kernel, axes=('mlp',),
        with_bias=options['with_bias'], before_BWHK=cache and cache.input_BWI,
        segment_ids_BL=ctx.segment_ids_BL,
        valid_BL=None if cache is None else ctx.valid_BL)
    if cache is not None:
      cache = State(input_BWI)
    return layers.dense(self, 'out', 'BLI,ID->BLD', c_BLI * z_BLI, shape=(D, D),
                        axes=('mlp', 'embed'), residual=True,
                        **options), cache, Report()


class ShortConvMixer(mixer.Mixer):
  """The entry of the short convolution in the table of mixers."""
  module = ShortConv
  sources = 'num_heads', 'head_dim', 'mup_base_head_dim'

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> State:
    last = *shape[:-1], config.part(ShortConvConfig).kernel - 1, config.d_model
    return State(input_BWI=jnp.zeros(last, config.compute_dtype))

  def fields_to_divide(self, config: ModelConfig) -> mixer.AxesAndFields:
    return [('tensor', 'd_model')]

  def widest_step_of_token(self, config: ModelConfig, length: int) -> int:
    return 3 * config.d_model  # B, C and x
