"""Mamba: a selective state space model whose state decays by a number of each
feature and each entry of its state (Gu and Dao 2023, arXiv 2312.00752, section
3; in transformers MambaMixer).

  x, z   = silu(conv(W_x u) + b), W_z u            I = expand * D features each
  dt     = softplus(W_up W_down x + bias)          I numbers
  B, C   = W_B x, W_C x                            N numbers each
  h_t    = exp(dt_t A) * h_t-1 + (dt_t * x_t) B_t^T,   A = -exp(A_log)   [I, N]
  y_t    = h_t C_t + D * x_t
  out    = W_o (y * silu(z))

No two features decay alike, so that a row is no product of matrices: pieces of
it are scanned by `jax.lax.associative_scan`, one after another, and the
backward pass computes a piece again from the state before it. Wherever the
segment id changes, a document begins with a state of zero. With a cache,
padding changes no state. FLOPs are those of writing and of reading the state.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import layers, sharding
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from architectures.parts.recurrent import features, layer
from architectures.parts.report import Report
from architectures.parts.sharding import Role, declare
from common.errors import require
from common.fields import field, SHAPES

PLACES = 16  # of a piece


@dataclasses.dataclass(frozen=True)
class MambaConfig:
  """Of mixer mamba."""
  expand: int = field(2, 'features of x for each of d_model', least=1,
                      resume=SHAPES)
  state: int = field(16, 'entries of the state of a feature', above=0,
                     resume=SHAPES)
  rank: int = field(0, 'rank of the product for dt; derived: d_model / 16',
                    resume=SHAPES)
  conv: int = field(
      4, 'tokens that the convolution sees, the token itself included', least=1,
      resume=SHAPES)
  conv_bias: bool = field(True, 'whether the convolution has a bias')

  def derived(self, c: ModelConfig) -> 'MambaConfig':
    return dataclasses.replace(self, rank=self.rank or -(-c.d_model // 16))


@struct.dataclass
class State:
  """What a layer keeps of a row: the state after its last token, in float32,
  and the last inputs of the convolution."""
  state_BIN: jax.Array
  input_BWI: jax.Array


class Mamba(nn.Module):
  """(x_BLD, context, cache) -> (y_BLD, cache, report), over x itself."""
  FUSED = True  # there are no scores
  config: ModelConfig
  kind: LayerKind

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[State]):
    layer.check_context('mamba', ctx)
    c, m = self.config, self.config.part(MambaConfig)
    D, inner = c.d_model, m.expand * c.d_model
    valid_BL = None if cache is None else ctx.valid_BL
    how: dict[str, Any] = dict(with_bias=False, deterministic=ctx.deterministic)
    x_BLI, z_BLI = (sharding.constrain(layers.dense(
        self, name, 'BLD,DI->BLI', x_BLD, (D, inner), ('embed', 'mlp'), **how),
        'batch', 'length', 'mlp') for name in ('value', 'output_gate'))
    x_BLI, input_BWI = features.convolved(
        self, 'conv', x_BLI, m.conv, ('mlp',), m.conv_bias, silu=True,
        before_BWHK=cache and cache.input_BWI,
        segment_ids_BL=ctx.segment_ids_BL, valid_BL=valid_BL)
    down, up = ('mlp', 'latent'), ('latent', 'mlp')
    step_BLR, b_BLN, c_BLN = (layers.einsum(
        'BLI,IN->BLN', x_BLI, layers.weight(self, name, (inner, size), down),
        c.compute_dtype, axes=down)
        for name, size in (('step_down', m.rank), ('key', m.state),
                           ('query', m.state)))
    step_BLI = layers.einsum(
        'BLR,RI->BLI', step_BLR, layers.weight(
            self, 'step_up', (m.rank, inner), up), c.compute_dtype, axes=up)
    dt_BLI = jax.nn.softplus(step_BLI.astype(jnp.float32) + self._of_feature(
        'step_bias', layer.step_bias)[None, None])
    if valid_BL is not None:
      dt_BLI = jnp.where(valid_BL[..., None] != 0, dt_BLI, 0)
    a_IN = -jnp.exp(declare(self, 'decay_scale', _entries, (inner, m.state),
                            Role(('mlp', None))).astype(jnp.float32))
    x32_BLI = x_BLI.astype(jnp.float32)
    state_BIN = cache.state_BIN if cache is not None else jnp.zeros(
        (len(x_BLD), inner, m.state))
    kept_BL = jnp.ones(x_BLD.shape[:2])  # 0 where a document begins
    if ctx.segment_ids_BL is not None:
      kept_BL *= ~features.begins(ctx.segment_ids_BL)
    y_BLI, state_BIN = layers.counted(_scanned, 4 * m.state)(
        a_IN, dt_BLI, dt_BLI * x32_BLI, b_BLN.astype(jnp.float32),
        c_BLN.astype(jnp.float32), kept_BL, state_BIN)
    if cache is not None:
      cache = State(state_BIN, input_BWI)
    y_BLI += features.weighted(
        x32_BLI, self._of_feature('skip', nn.initializers.ones))
    y_BLI *= jax.nn.silu(z_BLI.astype(jnp.float32))
    return layers.dense(
        self, 'out', 'BLI,ID->BLD', y_BLI.astype(c.compute_dtype), (inner, D),
        ('mlp', 'embed'), residual=True, **how), cache, Report()

  def _of_feature(self, name: str, init: Callable) -> jax.Array:
    """Declares a number of each feature; returns them in float32."""
    m = self.config.part(MambaConfig)
    return declare(self, name, init, (m.expand * self.config.d_model,),
                   Role(('mlp',))).astype(jnp.float32)


def _scanned(a_IN: jax.Array, dt_BLI: jax.Array, x_BLI: jax.Array,
             b_BLN: jax.Array, c_BLN: jax.Array, kept_BL: jax.Array,
             state_BIN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns what is read at each place, [B, L, I], and the last state. A place
  of zeros that fills up the last piece keeps the state."""
  B, L = x_BLI.shape[:2]
  P = min(PLACES, L)

  def cut(y_BL: jax.Array, fill: float = 0) -> jax.Array:
    ends = ((0, 0), (0, -L % P), *((0, 0) for _ in y_BL.shape[2:]))
    y_BL = jnp.pad(y_BL, ends, constant_values=fill)
    return jnp.moveaxis(y_BL.reshape(B, -1, P, *y_BL.shape[2:]), 1, 0)

  @jax.checkpoint
  def piece(state_BIN: jax.Array, here: tuple[jax.Array, ...]):
    dt_BPI, x_BPI, b_BPN, c_BPN, kept_BP = here
    decay_BPIN = jnp.exp(dt_BPI[..., None] * a_IN[None, None]) * (
        kept_BP[..., None, None])
    decay_BPIN, h_BPIN = jax.lax.associative_scan(
        _after, (decay_BPIN, x_BPI[..., None] * b_BPN[:, :, None]), axis=1)
    h_BPIN += decay_BPIN * state_BIN[:, None]
    return h_BPIN[:, -1], jnp.einsum('BPIN,BPN->BPI', h_BPIN, c_BPN)
  state_BIN, y = jax.lax.scan(piece, state_BIN, (
      cut(dt_BLI), cut(x_BLI), cut(b_BLN), cut(c_BLN), cut(kept_BL, 1)))
  return jnp.moveaxis(y, 0, 1).reshape(B, -1, y.shape[3])[:, :L], state_BIN


def _after(first: tuple[jax.Array, jax.Array],
           then: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Two steps h -> decay * h + added, one after the other, as one."""
  return first[0] * then[0], then[0] * first[1] + then[1]


def _entries(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
  """An initializer: the logarithms of 1 to N, for each feature (S4D-Real)."""
  del key
  return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)),
                          shape)


def empty(c: ModelConfig, shape: tuple[int, ...]) -> State:
  """Returns the state of rows without a token; `shape` is [..., B, M], and the
  state does not depend on M."""
  m, rows = c.part(MambaConfig), shape[:-1]
  inner = m.expand * c.d_model
  return State(jnp.zeros((*rows, inner, m.state)),
               jnp.zeros((*rows, m.conv - 1, inner), c.compute_dtype))


def at_once(c: ModelConfig) -> int:
  """Returns how many numbers of a token a piece of a row holds at once: decays
  and states, before and after the scan."""
  return 4 * c.part(MambaConfig).expand * c.d_model * c.part(MambaConfig).state


def check(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer of Mamba cannot be."""
  layer.check_state('mamba', c, stack)
  require(c.parametrization != 'mup', "model.mixer is 'mamba', and "
          "model.parametrization is 'mup', which says nothing of its steps and "
          'states: choose standard, or the mixer mamba2')
