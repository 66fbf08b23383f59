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

In names, I counts the features of x, N the entries of the state of each, R the
rank of the product for dt, P the places of a piece, and W the last inputs of
the convolution.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import layers, mixer, sharding
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context, Report
from architectures.parts.recurrent import features, layer
from architectures.parts.sharding import Role, declare
from common.errors import RequestError
from common.fields import field, MOST_TAPS, SHAPES

PLACES = 16  # the places of a piece


@dataclasses.dataclass(frozen=True)
class MambaConfig:
  """The fields of mixer mamba."""
  expand: int = field(2, 'features of x for each of d_model', least=1,
                      resume=SHAPES)
  state: int = field(16, 'entries of the state of a feature', above=0,
                     resume=SHAPES)
  rank: int = field(0, 'rank of the product for dt; derived: d_model / 16',
                    resume=SHAPES)
  conv: int = field(
      4, 'tokens that the convolution sees, the token itself included', least=1,
      most=MOST_TAPS, resume=SHAPES)
  conv_bias: bool = field(True, 'whether the convolution has a bias')

  def derived(self, config: ModelConfig) -> 'MambaConfig':
    return dataclasses.replace(self, rank=self.rank or -(-config.d_model // 16))


@struct.dataclass
class State:
  """The cache of a layer: the state after a row's last token, in float32, and
  the last inputs of the convolution."""
  state_BIN: jax.Array
  input_BWI: jax.Array


class Mamba(nn.Module):
  """(x_BLD, context, cache) -> (y_BLD, cache, report), over x itself."""
  settings = MambaConfig
  config: ModelConfig
  kind: LayerKind

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[State]):
    """Computes Mamba's selective state space model, by the equations at the
    head of this file, which also says what the letters of names count.

    Args:
      x_BLD: the input, u in the equations.
      ctx: the context of the layer, with documents and padding.
      cache: the state after the tokens before; None: it is zero, and none is
        kept.

    Returns:
      The output [B, L, D], the cache after these tokens, and an empty report.
    """
    mixer.check_context_of_recurrence('mamba', ctx)
    config, sizes = self.config, self.config.part(MambaConfig)
    # Padding matters only where a state goes on after it.
    valid_BL = None if cache is None else ctx.valid_BL

    # x and z: two products, and a convolution of x.
    x_BLI = self._project('value', x_BLD, ctx)
    z_BLI = self._project('output_gate', x_BLD, ctx)
    x_BLI, input_BWI = features.declare_and_convolve(
        self, 'conv', x_BLI, width=sizes.conv, axes=('mlp',),
        with_bias=sizes.conv_bias, silu=True,
        before_BWHK=None if cache is None else cache.input_BWI,
        segment_ids_BL=ctx.segment_ids_BL, valid_BL=valid_BL)

    # The numbers of the state space model that x chooses: dt, B and C. A step
    # dt of 0 neither decays the state nor writes to it, so padding has it.
    inner = sizes.expand * config.d_model
    dt_BLI, b_BLN, c_BLN = self._selection(x_BLI)
    if valid_BL is not None:
      dt_BLI = jnp.where(valid_BL[..., None] != 0, dt_BLI, 0)

    # Those that it does not choose, A = -exp(A_log), and the state before.
    a_log_IN = declare(self, 'decay_scale', init=_logs_of_entry_numbers,
                       shape=(inner, sizes.state), role=Role(('mlp', None)))
    a_IN = -jnp.exp(a_log_IN.astype(jnp.float32))
    x32_BLI = x_BLI.astype(jnp.float32)
    if cache is None:
      state_BIN = jnp.zeros((len(x_BLD), inner, sizes.state))
    else:
      state_BIN = cache.state_BIN

    # The scan over the row. Each result counts as 4 N FLOPs: a product and a
    # sum for writing to each of N entries of the state, and for reading it.
    kept_BL = jnp.ones(x_BLD.shape[:2])  # 0 where a document begins
    if ctx.segment_ids_BL is not None:
      kept_BL *= ~features.begins_document(ctx.segment_ids_BL)
    scan_row = layers.count_flops_by_result(_selective_scan, 4 * sizes.state)
    y_BLI, state_BIN = scan_row(
        a_IN, dt_BLI, dt_BLI * x32_BLI, b_BLN.astype(jnp.float32),
        c_BLN.astype(jnp.float32), kept_BL, state_BIN)
    if cache is not None:
      cache = State(state_BIN=state_BIN, input_BWI=input_BWI)

    # The skip, the gate and the last product.
    skip_I = self._declare_by_feature('skip', nn.initializers.ones)
    y_BLI += features.multiply_by_weights(x32_BLI, skip_I)
    y_BLI *= jax.nn.silu(z_BLI.astype(jnp.float32))
    y_BLD = layers.dense(
        self, 'out', spec='BLI,ID->BLD', x=y_BLI.astype(config.compute_dtype),
        shape=(inner, config.d_model), axes=('mlp', 'embed'), residual=True,
        with_bias=False, deterministic=ctx.deterministic)
    return y_BLD, cache, Report()

  def _project(self, name: str, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns a product of the input, [B, L, I]."""
    D = self.config.d_model
    inner = self.config.part(MambaConfig).expand * D
    y_BLI = layers.dense(
        self, name, spec='BLD,DI->BLI', x=x_BLD, shape=(D, inner),
        axes=('embed', 'mlp'), with_bias=False,
        deterministic=ctx.deterministic)
    return sharding.constrain(y_BLI, 'batch', 'length', 'mlp')

  def _selection(self, x_BLI: jax.Array
                 ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes the numbers by which a token selects what the state of Mamba takes
    in and what is read of it (section 3.2 of the paper): the step dt and the
    vectors B and C.

    The suffixes name axes: B batch, L length, I features, N entries of a
    feature's state, R rank of the product that makes dt.

    Args:
      x_BLI: the input of the state space model.

    Returns:
      dt, the step of each feature, float32 [B, L, I]; and B and C, by which the
      states are written and read, [B, L, N] each.
    """
    config, sizes = self.config, self.config.part(MambaConfig)
    inner = x_BLI.shape[-1]
    down_axes, up_axes = ('mlp', 'latent'), ('latent', 'mlp')

    def project_down(name: str, size: int) -> jax.Array:
      """Returns a product of x with a weight that has few outputs."""
      w_IN = layers.weight(self, name, shape=(inner, size), axes=down_axes)
      return layers.einsum(
          'BLI,IN->BLN', x_BLI, w=w_IN, dtype=config.compute_dtype,
          axes=down_axes)

    # Three products with few outputs. A second product takes that of dt up to
    # all features again.
    step_BLR = project_down('step_down', sizes.rank)
    b_BLN = project_down('key', sizes.state)
    c_BLN = project_down('query', sizes.state)
    w_RI = layers.weight(self, 'step_up', shape=(sizes.rank, inner),
                         axes=up_axes)
    step_BLI = layers.einsum(
        'BLR,RI->BLI', step_BLR, w=w_RI, dtype=config.compute_dtype,
        axes=up_axes)
    step_BLI = step_BLI.astype(jnp.float32)

    # A softplus makes the step positive.
    bias_I = self._declare_by_feature('step_bias', layer.step_bias)
    dt_BLI = jax.nn.softplus(step_BLI + bias_I[None, None])
    return dt_BLI, b_BLN, c_BLN

  def _declare_by_feature(self, name: str, init: Callable) -> jax.Array:
    """Declares a number of each feature; returns them in float32."""
    inner = self.config.part(MambaConfig).expand * self.config.d_model
    numbers_I = declare(
        self, name, init=init, shape=(inner,), role=Role(('mlp',)))
    return numbers_I.astype(jnp.float32)


class _PieceOfRow(NamedTuple):
  """The inputs of the selective scan at the P places (tokens) of a piece of a
  row. In a scan over pieces, the axis of the pieces stands in front."""
  dt_BPI: jax.Array  # the step of each feature
  x_BPI: jax.Array  # dt * x
  b_BPN: jax.Array  # B, by which the entries of the states are written
  c_BPN: jax.Array  # C, by which they are read
  kept_BP: jax.Array  # 0 where a document begins, else 1


def _selective_scan(a_IN: jax.Array, dt_BLI: jax.Array, x_BLI: jax.Array,
                    b_BLN: jax.Array, c_BLN: jax.Array, kept_BL: jax.Array,
                    state_BIN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Computes the selective scan of a row (Gu and Dao 2023, section 3.3),

    h_t = kept_t exp(dt_t A) * h_t-1 + (dt_t x_t) B_t^T,   y_t = h_t C_t

  in pieces of PLACES places, one piece after another.

  Args:
    a_IN: A, for each of I features and each of the N entries of its state.
    dt_BLI: dt, [batch, length, features].
    x_BLI: dt * x.
    b_BLN: B, by which the entries of the states are written.
    c_BLN: C, by which they are read.
    kept_BL: 0 where a document begins, so that the state before is forgotten;
      else 1.
    state_BIN: the state h before the first place.

  Returns:
    y, [B, L, I], and the state after the last place, [B, I, N].
  """
  B, L, inner = x_BLI.shape
  P = min(PLACES, L)

  def cut(x_BL: jax.Array, fill: float = 0) -> jax.Array:
    """Returns the pieces of a row, [pieces, B, P, ...]; the last one is filled
    up."""
    feature_shape = x_BL.shape[2:]
    padding = [(0, 0), (0, -L % P)] + [(0, 0)] * len(feature_shape)
    x_BL = jnp.pad(x_BL, padding, constant_values=fill)
    # The scan goes over the first axis.
    return jnp.moveaxis(x_BL.reshape(B, -1, P, *feature_shape), 1, 0)

  @jax.checkpoint
  def run_piece(state_BIN: jax.Array, piece: _PieceOfRow
                ) -> tuple[jax.Array, jax.Array]:
    """Runs the recurrence over one piece of a row (P tokens) by a parallel
    scan. The backward pass computes the piece again, because the states
    [B, P, I, N] of all pieces would take too much memory.

      h_t = kept_t exp(dt_t A) * h_t-1 + (dt_t x_t) B_t^T,   y_t = h_t C_t

    The suffixes name axes: B batch, P tokens of the piece, I features, N
    entries of a feature's state.

    Args:
      state_BIN: the state h before the piece.
      piece: the inputs of the piece's tokens.

    Returns:
      The state after the piece, and y, what each token reads, [B, P, I].
    """
    # Each token is a step h -> decay * h + added.
    decay_BPIN = jnp.exp(piece.dt_BPI[..., None] * a_IN[None, None])
    decay_BPIN = decay_BPIN * piece.kept_BP[..., None, None]
    added_BPIN = piece.x_BPI[..., None] * piece.b_BPN[:, :, None]

    # Compose the steps from the start of the piece up to each token. The
    # summand of such a step is the state if that before the piece were zero.
    decay_so_far_BPIN, h_from_zero_BPIN = jax.lax.associative_scan(
        _compose_steps, (decay_BPIN, added_BPIN), axis=1)
    h_BPIN = h_from_zero_BPIN + decay_so_far_BPIN * state_BIN[:, None]
    last_BIN = h_BPIN[:, -1]
    y_BPI = jnp.einsum('BPIN,BPN->BPI', h_BPIN, piece.c_BPN)
    return last_BIN, y_BPI

  # A place of zeros that fills up the last piece keeps the state: its decay is
  # exp(0), and it writes nothing. Its result is cut off.
  pieces = _PieceOfRow(
      dt_BPI=cut(dt_BLI), x_BPI=cut(x_BLI), b_BPN=cut(b_BLN),
      c_BPN=cut(c_BLN), kept_BP=cut(kept_BL, fill=1))
  state_BIN, y_of_pieces = jax.lax.scan(run_piece, state_BIN, pieces)
  y_BLI = jnp.moveaxis(y_of_pieces, 0, 1).reshape(B, -1, inner)[:, :L]
  return y_BLI, state_BIN


def _compose_steps(first: tuple[jax.Array, jax.Array],
                   then: tuple[jax.Array, jax.Array]
                   ) -> tuple[jax.Array, jax.Array]:
  """Composes two steps of a recurrence, h -> decay * h + added, into one:

    d' (d h + a) + a' = (d' d) h + (d' a + a')

  The composition is associative, so a parallel scan may group the steps of a
  row in any way.

  Args:
    first: the decay d and the summand a of the earlier step.
    then: the decay d' and the summand a' of the later step.

  Returns:
    The decay and the summand of both steps together.
  """
  decay, added = first
  then_decay, then_added = then
  return decay * then_decay, then_decay * added + then_added


def _logs_of_entry_numbers(key: jax.Array, shape: tuple[int, ...],
                           dtype: jnp.dtype):
  """Initialises with the logarithms of 1 to N, for each feature (S4D-Real: Gu
  et al. 2022, arXiv 2206.11893)."""
  del key
  log_N = jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype))
  return jnp.broadcast_to(log_N, shape)


class MambaMixer(mixer.Mixer):
  """The entry of Mamba in the table of mixers."""
  module = Mamba
  sources = 'num_heads', 'head_dim'

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> State:
    m, rows = config.part(MambaConfig), shape[:-1]
    inner = m.expand * config.d_model
    return State(
        state_BIN=jnp.zeros((*rows, inner, m.state)),
        input_BWI=jnp.zeros((*rows, m.conv - 1, inner), config.compute_dtype))

  def fields_to_divide(self, config: ModelConfig) -> mixer.AxesAndFields:
    return [('tensor', 'd_model')]

  def widest_step_of_token(self, config: ModelConfig, length: int) -> int:
    """Returns how many numbers of a token a piece of a row holds at once:
    decays and states, before and after the scan."""
    m = config.part(MambaConfig)
    return 4 * m.expand * config.d_model * m.state

  def check(self, config: ModelConfig, stack: str) -> None:
    super().check(config, stack)
    if config.parametrization == 'mup':
      raise RequestError(
          "model.mixer is 'mamba', and model.parametrization is 'mup', which "
          'says nothing of its steps and states: choose standard, or the mixer '
          'mamba2')
