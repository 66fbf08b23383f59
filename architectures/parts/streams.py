"""Residual streams: what a branch reads of the branches before it, and where
its result goes.

A branch F is attention, or the network, with its norms; k counts the branches
of a stack from 0. The first one reads the embedding e.

  plain      x' = x + residual_scale F(x)
  hyper      x'_v = sum over u of A_uv x_u  +  b_v F(sum over u of a_u x_u)
  mhc        the same, with a in (0, 1), b in (0, 2) and A doubly stochastic
  gated      x'_v = x_v + b_v F(mean over u of g_u * n_u(x_u)),  b in (0, 2)
  attention  v_(k+1) = F(sum over i of p_i v_i),   v_0 = e

hyper (Zhu et al. 2024, arXiv 2409.19606, equations 10 to 14) has
streams.count streams, which begin as copies of e, and n is the model's norm:

  a = e_(k mod count) + a_k + s tanh(n(x) W_a)
  b = b_k + s' tanh(n(x) W_b)
  A = A_k + s tanh(n(x) W_A)

At first b_k = 1, A_k = I, s = 0.01, and a_k and all W are 0. With
streams.dynamic=False, nothing depends on the token: there are no W and no s.

mhc (Xie et al. 2025, arXiv 2512.24880, equations 7 to 9), with rms over the
features of all streams at once:

  a = sigmoid(c_k + z_a),   b = 2 sigmoid(z_b),   A = Sinkhorn(exp(z_A))
  z = s rms(x) W + d_k

Sinkhorn divides by sums over v, then over u, streams.iterations times, so
that A neither adds to the streams nor takes from them. The paper does not
publish the initial values of c_k and d_k. Here c_k are the logits of 3/4 for
stream k mod count and of equal parts of the rest for the other streams; d_k
is 0, and -8 off A's diagonal; W is 0, where the paper draws it, and s = 0.01.

So in a new model all streams equal the stream of a plain model. Both forms
end with the mean of the streams. (The paper takes their sum, which is count
times the mean; the final norm removes the factor.) With streams.learned_end
they end as DeepSeek-V4 (arXiv 2606.19348): sum over u of sigmoid(z_u) x_u,
z = s rms(x) W + d. There c_k is 0, and W is drawn.

gated (Qwen4-Exp's GatedResidual, in transformers) has gates g in (0, 1) for
each feature of each stream, by a product of low rank, streams.rank:

  g = sigmoid(silu(sum over u of n_u(x_u) W_down,u / count) W_up)
  b = 2 sigmoid(sum over u of n_u(x_u) W_b,u / count)

n_u is the model's norm with scales of the stream's own. One more such mean
ends the stack. As it is of what is normalised already, there may be no other
norm: block no_norm.

attention (Kimi Team 2026, arXiv 2603.15031, equations 2 to 6): every branch
has a query w, which is 0 at first, and

  p = softmax over i of w . rms(v_i)

With streams.block_size=S above 1, each v_i after e is the sum of S branches,
and the last one the sum of the earlier branches of the reader's own block.
One more query reads the result of the stack. A new model reads means where a
plain model reads sums. A norm makes the two equal (up to norm_eps); out_norm
and ffn_norm, whose attention reads x without a norm, do not.

An entry of RESIDUALS is all that there is of one form.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple, Optional

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.layers import norm, recompute_in_backward, rmsnorm
from architectures.parts.sharding import Role, declare
from common.fields import field, FUNCTION, SHAPES

LOGIT_OFF_DIAGONAL = -8.0  # logits off A's diagonal in a new mhc
# how much a branch of a new mhc reads of stream k mod count
READ_WEIGHT_OF_OWN_STREAM = 0.75
SMALLEST_WEIGHT = 1e-6  # added in mhc to weights, and to what divides them
# the initial factor s of what depends on the token
INITIAL_SCALE_OF_DYNAMIC_PART = 0.01


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
  """The fields of a residual that is not plain."""
  GROUP = 'streams'
  count: int = field(4, 'the number of streams, for hyper, mhc and gated',
                     least=2, resume=SHAPES)
  rank: int = field(320, "for gated: the rank of the gates' product", least=1,
                    resume=SHAPES)
  dynamic: bool = field(
      True, 'for hyper: whether the mixture depends on the token',
      resume=SHAPES)
  iterations: int = field(20, "for mhc: rounds of Sinkhorn's algorithm",
                          least=1, resume=FUNCTION)
  learned_end: bool = field(
      False, 'for mhc: whether a mixture by the token ends the streams, and a '
      'new branch reads all of them alike', resume=SHAPES)
  block_size: int = field(
      1, 'for attention: how many attentions and networks are summed before '
      'they are attended to; 1: each stands for itself', least=1,
      resume=FUNCTION)


@struct.dataclass
class Streams:
  """The state that goes from layer to layer, where that is not one array.

  Attributes:
    x_BLUD: the streams, or what is attended to; slots not yet written are 0.
    branch: how many branches have run so far, int32.
    branches: how many the whole stack has.
  """
  x_BLUD: jax.Array
  branch: jax.Array
  branches: int = struct.field(pytree_node=False)


# The input of a layer: [B, L, D], or Streams.
LayerInput = jax.Array | Streams


class StreamWeights(NamedTuple):
  """How a branch mixes streams, for each token or for all (axes of 1), in
  float32.

  Attributes:
    read_BLU: how much of each stream the branch reads; None: it reads them
      otherwise.
    write_BLU: how much of its result is added to each stream.
    mix_BLUU: [u, v], how much of stream u goes into stream v; None: each stays
      as it is.
  """
  read_BLU: Optional[jax.Array]
  write_BLU: jax.Array
  mix_BLUU: Optional[jax.Array] = None


class Branch(nn.Module):
  """The module that holds the parameters with which a branch reads streams.

  Streams -> (what the branch reads of them, x_BLD; how its result is added, as
  `add` takes it).
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x: Streams) -> tuple[jax.Array, Optional[StreamWeights]]:
    x_BLD, weights = RESIDUALS[self.config.residual].read(self, x)
    return sharding.constrain_stream(x_BLD, 'embed'), weights


def read_streams(c: ModelConfig, name: str, x: LayerInput
         ) -> tuple[jax.Array, Optional[StreamWeights]]:
  """Returns what a branch reads of x, [B, L, D], and how its result is added.

  Args:
    c: the model.
    name: the name of the branch, which begins that of its parameters.
    x: the input of the layer, or what the branches before have made of it.
  """
  if isinstance(x, Streams):
    return Branch(c, name=f'{name}_streams')(x)
  return x, None


def add_to_streams(
  c: ModelConfig,
  x: LayerInput,
  y_BLD: jax.Array,
   weights: Optional[StreamWeights] ) -> LayerInput:
  """Returns x with the result of a branch added to it.

  Args:
    c: the model.
    x: the argument of `read`.
    y_BLD: the result of the branch.
    weights: how it is added, as `read` says.
  """
  if isinstance(x, Streams):
    x_BLUD = RESIDUALS[c.residual].add(c, x, y_BLD, weights)
    return x.replace(x_BLUD=x_BLUD, branch=x.branch + 1)
  if c.residual_scale != 1:
    y_BLD = layers.multiply_exactly(y_BLD, c.residual_scale)
  return x + y_BLD


def count_streams(c: ModelConfig, branches: int) -> int:
  """Returns how many arrays [B, L, D] go from layer to layer in a stack with
  this number of branches."""
  return RESIDUALS[c.residual].slots(c, branches)


def begin_streams(
  c: ModelConfig,
  x_BLD: jax.Array,
   branches: int) -> LayerInput:
  """Returns what the first layer is given, in a stack with this number of
  branches."""
  x_BLUD = RESIDUALS[c.residual].begin(x_BLD, count_streams(c, branches))
  if x_BLUD is None:
    return x_BLD
  return Streams(x_BLUD=pin_streams(x_BLUD), branch=jnp.zeros((), jnp.int32),
                 branches=branches)


class EndOfStreams(nn.Module):
  """The end of streams: the result of a layer -> x_BLD, as the final norm reads
  it. The arrays may have an axis of layers in front of theirs."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x: LayerInput) -> jax.Array:
    return RESIDUALS[self.config.residual].end(self, x)


def pin_residual(x: LayerInput) -> LayerInput:
  """Pins the residual stream, so that XLA never reshards it in between."""
  if isinstance(x, Streams):
    return x.replace(x_BLUD=pin_streams(x.x_BLUD))
  return sharding.constrain_stream(x, 'embed')


def pin_streams(x_BLUD: jax.Array) -> jax.Array:
  """Keeps XLA from resharding streams between layers."""
  return sharding.constrain_stream(x_BLUD, None, 'embed')


class Plain:
  """One stream, and the base of the other forms.

  Attributes:
    settings: the group of fields of config.model that the form reads.
    fields: of config.model, those that this form reads and others may not.
  """
  settings: Optional[type] = None
  fields: tuple[str, ...] = ('residual_scale',)

  def slots(self, c: ModelConfig, branches: int) -> int:
    """Returns how many arrays go from layer to layer in a stack."""
    return 1

  def begin(self, x_BLD: jax.Array, slots: int) -> Optional[jax.Array]:
    """Returns the streams of the first layer, made of the embedding; None: the
    form has one stream."""
    return None

  def read(self, module: Any, x: Streams
           ) -> tuple[jax.Array, Optional[StreamWeights]]:
    """Returns what a branch reads, and how its result is added."""
    raise NotImplementedError

  def add(self, c: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: Optional[StreamWeights]) -> jax.Array:
    """Returns the streams [B, L, U, D] after a branch that returned y."""
    raise NotImplementedError

  def end(self, module: Any, x: Any) -> jax.Array:
    """Returns what the final norm reads."""
    return x


# Streams that are mixed: hyper, mhc, gated.


class Mixed(Plain):
  """Streams that begin as copies of the embedding, and end as their mean."""
  settings = StreamsConfig

  def slots(self, c: ModelConfig, branches: int) -> int:
    return c.part(StreamsConfig).count

  def begin(self, x_BLD: jax.Array, slots: int) -> jax.Array:
    return jnp.repeat(x_BLD[:, :, None], slots, 2)

  def weights(self, module: Any, x: Streams) -> StreamWeights:
    """Returns how a branch mixes the streams."""
    raise NotImplementedError

  def read(self, module: Any, x: Streams) -> tuple[jax.Array, StreamWeights]:
    weights = self.weights(module, x)
    count = x.x_BLUD.shape[2]
    weighed = recompute_in_backward(
  layers.count_flops_by_result(
    _sum_weighted_streams, 2 * count))
    return weighed(x.x_BLUD, weights.read_BLU), weights

  def add(self, c: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: Optional[StreamWeights]) -> jax.Array:
    flops = 2 * (x.x_BLUD.shape[2] + 1)  # for each feature of each stream
    written = recompute_in_backward(
  layers.count_flops_by_result(
    _mix_and_write_streams, flops))
    return written(x.x_BLUD, y_BLD, weights)

  def end(self, module: Any, x: Streams) -> jax.Array:
    mean_BLD = x.x_BLUD.astype(jnp.float32).mean(-2)
    return mean_BLD.astype(x.x_BLUD.dtype)


def _sum_weighted_streams(x_BLUD: jax.Array, w_BLU: jax.Array) -> jax.Array:
  """Returns the sum over u of w_u x_u."""
  y_BLD = (x_BLUD.astype(jnp.float32) * w_BLU[..., None]).sum(-2)
  return y_BLD.astype(x_BLUD.dtype)


def _mix_and_write_streams(
  x_BLUD: jax.Array,
  y_BLD: jax.Array,
   w: StreamWeights) -> jax.Array:
  """Returns x_v = sum over u of A_uv x_u + b_v y."""
  x32_BLUD = x_BLUD.astype(jnp.float32)
  mixed_BLUD = x32_BLUD
  if w.mix_BLUU is not None:
    mixed_BLUD = sum(
        x32_BLUD[:, :, u, None] * w.mix_BLUU[:, :, u, :, None]
        for u in range(x_BLUD.shape[2]))
  y_BLUD = y_BLD[:, :, None].astype(jnp.float32) * w.write_BLU[..., None]
  return (mixed_BLUD + y_BLUD).astype(x_BLUD.dtype)


def _declare_in_float32(
  module: Any,
  name: str,
  init: Callable,
   *shape: int) -> jax.Array:
  """Declares parameters whose number does not depend on the width; returns them
  in float32."""
  role = Role(axes=(None,) * len(shape))
  return declare(module, name, init, shape, role).astype(jnp.float32)


class Hyper(Mixed):
  """Hyper-connections (Zhu et al. 2024, equations 10 to 14):

    a = e_(k mod count) + a_k + s tanh(n(x) W_a)
    b = b_k + s' tanh(n(x) W_b)
    A = A_k + s tanh(n(x) W_A)
  """
  fields = ('streams.count', 'streams.dynamic')

  def weights(self, module: Any, x: Streams) -> StreamWeights:
    c: ModelConfig = module.config
    count, D = x.x_BLUD.shape[2:]
    # The part of the branch: a_k, b_k and A_k.
    read_U = _declare_in_float32(module, 'read', nn.initializers.zeros, count)
    read_U = read_U + jax.nn.one_hot(x.branch % count, count)
    write_U = _declare_in_float32(module, 'write', nn.initializers.ones, count)
    mix_UU = _declare_in_float32(module, 'mix', _identity_matrix, count, count)
    read_11U, write_11U = read_U[None, None], write_U[None, None]
    mix_11UU = mix_UU[None, None]
    if not c.part(StreamsConfig).dynamic:
      return StreamWeights(read_BLU=read_11U, write_BLU=write_11U,
                     mix_BLUU=mix_11UU)
    # The part of the token: tanh(n(x) W), for each stream. W makes count + 2
    # features I of it: one of a, one of b, and a row of A.
    role = Role(axes=('embed', None), inputs=(0,), kind='logits')
    w_DI = declare(module, 'dynamic', nn.initializers.zeros, (D, count + 2),
                   role)
    scale_U = _declare_in_float32(module, 'dynamic_scale',
                     nn.initializers.constant(INITIAL_SCALE_OF_DYNAMIC_PART), 2)
    n_BLUD = norm(c, 'norm')(x.x_BLUD)
    z_BLUI = layers.einsum('BLUD,DI->BLUI', n_BLUD, w_DI, c.compute_dtype,
                           jnp.float32)
    z_BLUI = jnp.tanh(z_BLUI / c.widening)
    return StreamWeights(read_BLU=read_11U + scale_U[0] * z_BLUI[..., 0],
                   write_BLU=write_11U + scale_U[1] * z_BLUI[..., 1],
                   mix_BLUU=mix_11UU + scale_U[0] * z_BLUI[..., 2:])


def _identity_matrix(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
  """Returns A_k = I; an initializer."""
  del key
  return jnp.eye(shape[0], dtype=dtype)


class MHC(Mixed):
  """Manifold-constrained hyper-connections (Xie et al. 2025, equations 7 to 9):

    a = sigmoid(c_k + z_a),   b = 2 sigmoid(z_b),   A = Sinkhorn(exp(z_A))
    z = s rms(x) W + d_k
  """
  fields = ('streams.count', 'streams.iterations', 'streams.learned_end',
            'norm_eps')

  def weights(self, module: Any, x: Streams) -> StreamWeights:
    c: ModelConfig = module.config
    B, L, count, _ = x.x_BLUD.shape
    fields = c.part(StreamsConfig)
    # The part of the branch: c_k, d_k and d_k of A.
    first_U = 0 if fields.learned_end else initial_read_logits(count, x.branch)
    read_U = _declare_in_float32(
  module,
  'read',
  nn.initializers.zeros,
   count) + first_U
    write_U = _declare_in_float32(module, 'write', nn.initializers.zeros, count)
    mix_U = _declare_in_float32(
      module, 'mix', _logits_of_identity, count, count).reshape(-1)
    # The part of the token: s rms(x) W.
    z_BLU = _logits_of_all_streams(module, x.x_BLUD, count * (count + 2))
    scale_U = _declare_in_float32(module, 'dynamic_scale',
                     nn.initializers.constant(INITIAL_SCALE_OF_DYNAMIC_PART), 3)
    read_BLU, write_BLU, mix_BLU = jnp.split(z_BLU, (count, 2 * count), -1)
    read_BLU = scale_U[0] * read_BLU + read_U[None, None]
    write_BLU = scale_U[1] * write_BLU + write_U[None, None]
    mix_BLU = scale_U[2] * mix_BLU + mix_U[None, None]

    def stochastic(z_BLUU: jax.Array) -> jax.Array:
      return sinkhorn(z_BLUU, fields.iterations)

    mix_BLUU = recompute_in_backward(stochastic)(
      mix_BLU.reshape(B, L, count, count))
    return StreamWeights(read_BLU=jax.nn.sigmoid(read_BLU) + SMALLEST_WEIGHT,
                   write_BLU=2 * jax.nn.sigmoid(write_BLU), mix_BLUU=mix_BLUU)

  def end(self, module: Any, x: Streams) -> jax.Array:
    if not module.config.part(StreamsConfig).learned_end:
      return super().end(module, x)
    count = x.x_BLUD.shape[-2]
    z_BLU = _logits_of_all_streams(module, x.x_BLUD, count)
    scale_1 = _declare_in_float32(module, 'dynamic_scale',
                     nn.initializers.constant(INITIAL_SCALE_OF_DYNAMIC_PART), 1)
    read_U = _declare_in_float32(module, 'read', nn.initializers.zeros, count)
    read_BLU = read_U.reshape((1,) * (z_BLU.ndim - 1) + (-1,))
    z_BLU = scale_1[0] * z_BLU + read_BLU
    weighed = recompute_in_backward(
  layers.count_flops_by_result(
    _sum_weighted_streams, 2 * count))
    return weighed(x.x_BLUD, jax.nn.sigmoid(z_BLU) + SMALLEST_WEIGHT)


def _logits_of_identity(
  key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
  """Returns the logits 0 on the diagonal, and OFF beside it; an initializer.
  """
  del key
  return LOGIT_OFF_DIAGONAL * (1 - jnp.eye(shape[0], dtype=dtype))


def _logits_of_all_streams(
  module: Any,
  x_BLUD: jax.Array,
   size: int) -> jax.Array:
  """Returns rms(x) W, logits of each token made of all its streams,
  [..., size].

  Args:
    module: the module that holds W.
    x_BLUD: the streams.
    size: the number of logits, O. I are the features of all streams.
  """
  c: ModelConfig = module.config
  *rows, count, D = x_BLUD.shape
  init = nn.initializers.zeros
  if c.part(StreamsConfig).learned_end:
    init = nn.initializers.normal(c.init_stddev)
  role = Role(axes=(None, 'embed', None), inputs=(0, 1), kind='logits')
  w_UDO = declare(module, 'dynamic', init, (count, D, size), role)

  def logits(x_BLI: jax.Array, w_IO: jax.Array) -> jax.Array:
    n_BLI = rmsnorm(x_BLI, None, c.norm_eps)
    return layers.einsum('...I,IO->...O', n_BLI, w_IO, c.compute_dtype,
                         jnp.float32)

  x_BLI = x_BLUD.reshape(*rows, -1)
  w_IO = w_UDO.reshape(count * D, -1)
  return recompute_in_backward(logits)(x_BLI, w_IO) / c.widening


def initial_read_logits(count: int, branch: jax.Array) -> jax.Array:
  """Returns the logits, [count], of what a branch of a new mhc reads."""
  turn_U = jax.nn.one_hot(branch % count, count)
  rest = (1 - READ_WEIGHT_OF_OWN_STREAM) / (count - 1)
  return jnp.where(turn_U > 0, _logit(READ_WEIGHT_OF_OWN_STREAM), _logit(rest))


def _logit(p: float) -> float:
  return math.log(p / (1 - p))


def sinkhorn(logits_BLUU: jax.Array, iterations: int) -> jax.Array:
  """Returns exp(logits) after rounds of Sinkhorn's algorithm, each of which
  divides the rows and then the columns by their sums. As in DeepSeek-V4, the
  first rows are a softmax, and FLOOR is added to it and to later sums, none of
  which is 0."""
  first_BLUU = _divide_by_sums(
  jax.nn.softmax(logits_BLUU) + SMALLEST_WEIGHT, -2)
  return layers.count_flops_by_result(
  _run_rounds_of_sinkhorn, 0)(
    first_BLUU, jnp.arange(
      1, iterations))


def _divide_by_sums(m_BLUU: jax.Array, axis: int) -> jax.Array:
  """Returns the matrices over their sums along an axis."""
  return m_BLUU / (m_BLUU.sum(axis, keepdims=True) + SMALLEST_WEIGHT)


def _run_rounds_of_sinkhorn(m_BLUU: jax.Array, rounds: jax.Array) -> jax.Array:
  """Returns the matrices after a round of Sinkhorn's for each of `rounds`."""
  def once(m_BLUU: jax.Array, _):
    return _divide_by_sums(_divide_by_sums(m_BLUU, -1), -2), None

  last_BLUU, _ = jax.lax.scan(once, m_BLUU, rounds)
  return last_BLUU


class Gated(Mixed):
  """Means of streams through gates (Qwen4-Exp's GatedResidual):

    x'_v = x_v + b_v F(mean over u of g_u * n_u(x_u))
    b = 2 sigmoid(sum over u of n_u(x_u) W_b,u / count)
  """
  fields = ('streams.count', 'streams.rank')

  def read(self, module: Any, x: Streams) -> tuple[jax.Array, StreamWeights]:
    c: ModelConfig = module.config
    read_BLD, n_BLUD = _read_through_gates(module, x)
    count, D = n_BLUD.shape[2:]
    w_UDU = layers.weight(module, 'write', (count, D, count),
                          (None, 'embed', None), in_axes=(0, 1), output=True)
    z_BLU = layers.einsum('BLUD,UDV->BLV', n_BLUD, w_UDU, c.compute_dtype,
                          jnp.float32)
    write_BLU = 2 * jax.nn.sigmoid(z_BLU / (count * c.widening))
    return read_BLD, StreamWeights(read_BLU=None, write_BLU=write_BLU)

  def add(self, c: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: Optional[StreamWeights]) -> jax.Array:
    written = recompute_in_backward(
  layers.count_flops_by_result(
    _mix_and_write_streams, 2))
    return written(x.x_BLUD, y_BLD, weights)

  def end(self, module: Any, x: Streams) -> jax.Array:
    mean_BLD, _ = _read_through_gates(module, x)
    return mean_BLD


def _read_through_gates(module: Any, x: Streams) -> tuple[jax.Array, jax.Array]:
  """Returns the mean over u of g_u * n_u(x_u), and the normalised streams;
  there may be an axis of layers in front. R is the rank of the gates:

    g = sigmoid(silu(sum over u of n_u(x_u) W_down,u / count) W_up)
  """
  c: ModelConfig = module.config
  n_BLUD = layers.norm_of_streams(c, 'norm')(x.x_BLUD)
  count, D = n_BLUD.shape[-2:]
  rank = c.part(StreamsConfig).rank
  down_UDR = layers.weight(module, 'down', (count, D, rank),
                           (None, 'embed', None), in_axes=(0, 1), output=True)
  up_RUD = layers.weight(module, 'up', (rank, count, D), (None, None, 'embed'))
  z_BLR = layers.einsum('...UD,UDR->...R', n_BLUD, down_UDR, c.compute_dtype,
                        jnp.float32)
  z_BLR = jax.nn.silu(z_BLR / (count * c.widening))
  gate_BLUD = layers.einsum('...R,RUD->...UD', z_BLR, up_RUD, c.compute_dtype)
  opened = recompute_in_backward(
  layers.count_flops_by_result(
    _mean_through_gates, 2 * count))
  return opened(gate_BLUD, n_BLUD), n_BLUD


def _mean_through_gates(gate_BLUD: jax.Array, n_BLUD: jax.Array) -> jax.Array:
  """Returns the mean over the streams of sigmoid(gate) * n."""
  gate32_BLUD = jax.nn.sigmoid(gate_BLUD.astype(jnp.float32))
  mean_BLD = (gate32_BLUD * n_BLUD.astype(jnp.float32)).mean(-2)
  return mean_BLD.astype(n_BLUD.dtype)


# Attention to the branches before.


class Attended(Plain):
  """Attention residuals (Kimi Team 2026, equations 2 to 6): the streams are
  what the branches returned, in slots, and those not yet written are 0."""
  settings = StreamsConfig
  fields = ('streams.block_size', 'norm_eps')

  def slots(self, c: ModelConfig, branches: int) -> int:
    return _count_attended_slots(c, branches)

  def begin(self, x_BLD: jax.Array, slots: int) -> jax.Array:
    first_BL1D = x_BLD[:, :, None]
    return jnp.pad(first_BL1D, ((0, 0), (0, 0), (0, slots - 1), (0, 0)))

  def read(self, module: Any, x: Streams) -> tuple[jax.Array, None]:
    # 2 FLOPs in the score and 2 in the sum, for each feature of each slot that
    # is attended to: the mean over all branches.
    seen = sum(
  _count_attended_slots(
    module.config,
    k) for k in range(
      x.branches))
    return _attend_to_slots(module, x, 4 * seen, x.branches), None

  def add(self, c: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: Optional[StreamWeights]) -> jax.Array:
    slot = 1 + x.branch // c.part(StreamsConfig).block_size
    into_U = jnp.arange(x.x_BLUD.shape[2]) == slot
    added_BLUD = x.x_BLUD + y_BLD[:, :, None]
    return jnp.where(into_U[None, None, :, None], added_BLUD, x.x_BLUD)

  def end(self, module: Any, x: Streams) -> jax.Array:
    return _attend_to_slots(module, x, 4 * x.x_BLUD.shape[-2], 1)


def _count_attended_slots(c: ModelConfig, branch: Any) -> Any:
  """Returns how many slots a branch attends to; its index may be traced."""
  size = c.part(StreamsConfig).block_size
  return 1 + branch // size + (branch % size > 0)


def _attend_to_slots(
  module: Any,
  x: Streams,
  part: int,
   whole: int) -> jax.Array:
  """Returns what the module's query reads of the slots, [B, L, D].

  Args:
    module: the module that holds the query.
    x: the slots.
    part: the FLOPs that are counted for each feature, times `whole`.
    whole: the number that divides them.
  """
  c: ModelConfig = module.config
  D = x.x_BLUD.shape[-1]
  role = Role(axes=('embed', None), inputs=(0,), kind='logits')
  query_D1 = declare(module, 'query', nn.initializers.zeros, (D, 1), role)
  scale_D = declare(module, 'scale', nn.initializers.ones, (D,),
                    Role(axes=('embed',)))
  over_slots = recompute_in_backward(
  layers.count_flops_by_result(
    _attention_over_slots, part, whole))
  return over_slots(x.x_BLUD, query_D1[:, 0] / c.widening, scale_D,
                    _count_attended_slots(c, x.branch), jnp.float32(c.norm_eps))


def _attention_over_slots(
  x_BLUD: jax.Array,
  query_D: jax.Array,
  scale_D: jax.Array,
  sources: jax.Array,
   eps: jax.Array) -> jax.Array:
  """Returns sum over i of p_i v_i, with p = softmax over i of w . rms(v_i): the
  result of attention to the first `sources` slots, in float32. There may be an
  axis of layers in front."""
  x32_BLUD = x_BLUD.astype(jnp.float32)
  keys_BLUD = rmsnorm(x32_BLUD, scale_D, eps)
  logits_BLU = jnp.einsum('...D,D->...', keys_BLUD, query_D.astype(jnp.float32))
  place_U = jnp.arange(x_BLUD.shape[-2])
  place_BLU = place_U.reshape((1,) * (logits_BLU.ndim - 1) + (-1,))
  seen_BLU = place_BLU < sources.reshape(*sources.shape, 1, 1, 1)
  p_BLU = jax.nn.softmax(jnp.where(seen_BLU, logits_BLU, -jnp.inf))
  y_BLD = (p_BLU[..., None] * x32_BLUD).sum(-2)
  return y_BLD.astype(x_BLUD.dtype)


RESIDUALS = {
    'plain': Plain(),
    'hyper': Hyper(),
    'mhc': MHC(),
    'gated': Gated(),
    'attention': Attended(),
}
