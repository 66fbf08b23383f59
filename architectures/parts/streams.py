"""Residual streams: what a branch reads of the branches before it, and where
its result goes.

A branch F is attention, or the network, with its norms; k counts the branches
of a stack from 0. The first one reads the embedding e.

  plain      x' = x + residual_scale F(x)
  hyper      x'_v = sum over u of A_uv x_u  +  b_v F(sum over u of a_u x_u)
  mhc        the same, with a in (0, 1), b in (0, 2) and A doubly stochastic
  gated      x'_v = x_v + b_v F(mean over u of g_u * n_u(x_u)),  b in (0, 2)
  attention  v_(k+1) = F(sum over i of p_i v_i),   v_0 = e
  balanced   x' = sqrt(1 - g^2) x + g F(x)
  affine     x' = s (x + b) + s' (F(x) + b')
  embedding  x' = r + F(r),   r = a x + c e

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

The last three learn the plain sum. balanced (Muse Spark's ResidualGate, in
transformers) has for each feature g = sigmoid(w / streams.temperature), so that
the variance of a sum of independent parts stays as it is. affine (Zaya's
ResidualScaling, in transformers) has s, b, s' and b' for each feature, and
begins as the plain sum. embedding (modded-nanogpt's and nanochat's x0_lambdas,
there one pair for each layer) has the numbers a and c for each branch, 1 and 0
at first.

An entry of RESIDUALS is all that there is of one form; but blocks.py has the
plain one, of which a reader need not enter this file.
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
from common.errors import RequestError
from common.fields import field, FUNCTION, SHAPES

# In a new mhc: the logits of A off its diagonal, and the weight with which
# branch k reads stream k mod count.
LOGIT_OFF_DIAGONAL = -8.0
READ_WEIGHT_OF_OWN_STREAM = 0.75
# mhc adds it to weights, and to sums that it divides by, so that none is 0.
SMALLEST_WEIGHT = 1e-6
# The first value of s, the factor of what depends on the token.
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
  temperature: float = field(
      0.3, 'for balanced: the temperature of the gates', above=0,
      resume=FUNCTION)
  block_size: int = field(
      1, 'for attention: how many attentions and networks are summed before '
      'they are attended to; 1: each stands for itself', least=1,
      resume=FUNCTION)


@struct.dataclass
class Streams:
  """The state that goes from layer to layer, where that is not one array.

  Attributes:
    x_BLUD: the U streams; or, with residual attention, what the branches
      returned, in slots of which those not yet written are 0.
    branch: how many branches have run so far, int32.
    branches: how many branches the whole stack has.
  """
  x_BLUD: jax.Array
  branch: jax.Array
  branches: int = struct.field(pytree_node=False)


# The input of a layer: [B, L, D], or Streams.
LayerInput = jax.Array | Streams


class StreamWeights(NamedTuple):
  """How a branch mixes streams, in float32; B and L are 1 where all tokens are
  mixed alike.

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
  """The module that holds the parameters with which a branch reads streams. A
  branch is attention or the feed-forward network of a layer."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x: Streams) -> tuple[jax.Array, Optional[StreamWeights]]:
    """Returns the input of the branch, [B, L, D], and how its result is added
    to the streams later, as `add_to_streams` takes it."""
    x_BLD, weights = RESIDUALS[self.config.residual].read(self, x)
    return sharding.constrain_stream(x_BLD, 'embed'), weights


def begin_streams(config: ModelConfig, x_BLD: jax.Array, branches: int
                  ) -> Streams:
  """Returns the streams that the first layer reads.

  Args:
    config: the model.
    x_BLD: the embedding of the tokens, [batch, length, d_model].
    branches: how many residual branches (an attention or a feed-forward
      network each) the whole stack of layers has.

  Returns:
    Streams, whose array is [B, L, U, D] with U streams, and whose count of
    branches run is 0.
  """
  residual = RESIDUALS[config.residual]
  x_BLUD = residual.begin(x_BLD, residual.count(config, branches))
  return Streams(x_BLUD=pin_streams(x_BLUD), branch=jnp.zeros((), jnp.int32),
                 branches=branches)


def add_to_streams(config: ModelConfig, x: Streams, y_BLD: jax.Array,
                   weights: Optional[StreamWeights]) -> Streams:
  """Returns the streams with the result y of a branch added to them, as
  blocks.add_to_residual documents."""
  x_BLUD = RESIDUALS[config.residual].add(config, x, y_BLD, weights)
  # The next branch finds its own stream, or slot, by this count.
  return x.replace(x_BLUD=x_BLUD, branch=x.branch + 1)


def pin_streams(x_BLUD: jax.Array) -> jax.Array:
  """Returns several streams constrained to their place on the mesh, so that XLA
  never reshards them between two layers."""
  return sharding.constrain_stream(x_BLUD, None, 'embed')


class Residual:
  """The base of the forms of the residual, the entries of RESIDUALS. Those that
  are not plain define the methods.

  Attributes:
    settings: the group of fields of config.model that the form reads.
    fields: the fields of config.model that this form reads and others may not.
    is_sum: whether the first stream is the sum of all results before it. To
      such a stream something else can be added (model.skips).
  """
  settings: Optional[type] = None
  fields: tuple[str, ...] = ('residual_scale',)
  is_sum = False

  def count(self, config: ModelConfig, branches: int) -> int:
    """Returns how many arrays go from layer to layer in a stack with this
    number of branches."""
    raise NotImplementedError

  def begin(self, x_BLD: jax.Array, count: int) -> jax.Array:
    """Returns the `count` streams of the first layer, [B, L, U, D], made of the
    embedding of the tokens."""
    raise NotImplementedError

  def read(self, module: Any, x: Streams
           ) -> tuple[jax.Array, Optional[StreamWeights]]:
    """Returns the input of a branch, [B, L, D], and how its result is added to
    the streams. The form declares its parameters in `module`."""
    raise NotImplementedError

  def add(self, config: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: Optional[StreamWeights]) -> jax.Array:
    """Returns the streams, [B, L, U, D], with the result y of a branch added to
    them."""
    raise NotImplementedError

  def end(self, module: Any, x: Streams) -> jax.Array:
    """Returns the input of the final norm, [B, L, D]. The form declares its
    parameters in `module`."""
    raise NotImplementedError


# Streams that are mixed: hyper, mhc, gated.


class Mixed(Residual):
  """Streams that begin as copies of the embedding, and end as their mean."""
  settings = StreamsConfig

  def count(self, config: ModelConfig, branches: int) -> int:
    return config.part(StreamsConfig).count

  def begin(self, x_BLD: jax.Array, count: int) -> jax.Array:
    return jnp.repeat(x_BLD[:, :, None], count, 2)

  def weights(self, module: Any, x: Streams) -> StreamWeights:
    """Returns how a branch mixes the streams. Its parameters are declared in
    `module`."""
    raise NotImplementedError

  def read(self, module: Any, x: Streams) -> tuple[jax.Array, StreamWeights]:
    """Returns the input of a branch, the sum over u of a_u x_u, [B, L, D]; and
    the weights a, b and A of the branch. The sum is computed again in the
    backward pass, so that no array of the size of all streams is kept."""
    weights = self.weights(module, x)
    num_streams = x.x_BLUD.shape[2]
    flops_of_feature = 2 * num_streams
    weighted_sum = recompute_in_backward(layers.count_flops_by_result(
        _sum_weighted_streams, flops_of_feature))
    return weighted_sum(x.x_BLUD, weights.read_BLU), weights

  def add(self, config: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: Optional[StreamWeights]) -> jax.Array:
    """Returns the streams after a branch with the result y, [B, L, U, D]: x'_v
    = sum over u of A_uv x_u + b_v y."""
    num_streams = x.x_BLUD.shape[2]
    flops_of_feature = 2 * (num_streams + 1)
    mix_and_write = recompute_in_backward(layers.count_flops_by_result(
        _mix_and_write_streams, flops_of_feature))
    return mix_and_write(x.x_BLUD, y_BLD, weights)

  def end(self, module: Any, x: Streams) -> jax.Array:
    """Returns the mean of the streams, [B, L, D], in their dtype."""
    mean_BLD = x.x_BLUD.astype(jnp.float32).mean(-2)
    return mean_BLD.astype(x.x_BLUD.dtype)


def _sum_weighted_streams(x_BLUD: jax.Array, w_BLU: jax.Array) -> jax.Array:
  """Returns the sum over u of w_u x_u, [B, L, D]."""
  y_BLD = (x_BLUD.astype(jnp.float32) * w_BLU[..., None]).sum(-2)
  return y_BLD.astype(x_BLUD.dtype)


def _mix_and_write_streams(x_BLUD: jax.Array, y_BLD: jax.Array,
                           weights: StreamWeights) -> jax.Array:
  """Returns the residual streams after a branch,

    x'_v = sum over u of A_uv x_u + b_v y,

  in the dtype of x, computed in float32.

  Args:
    x_BLUD: the streams x_u, [batch, length, U streams, d_model].
    y_BLD: the result y of the branch.
    weights: A (`mix_BLUU`; None: the identity) and b (`write_BLU`). Their B and
      L may be 1.

  Returns:
    x', [B, L, U, D].
  """
  x32_BLUD = x_BLUD.astype(jnp.float32)
  # The mixture A. Each term takes one old stream u, [B, L, 1, D], and its
  # weights in all new streams v, [B, L, U, 1].
  mixed_BLUD = x32_BLUD
  if weights.mix_BLUU is not None:
    mixed_BLUD = sum(
        x32_BLUD[:, :, u, None] * weights.mix_BLUU[:, :, u, :, None]
        for u in range(x_BLUD.shape[2]))
  # The result of the branch is added to each new stream v, times b_v.
  y32_BL1D = y_BLD[:, :, None].astype(jnp.float32)
  written_BLUD = y32_BL1D * weights.write_BLU[..., None]
  return (mixed_BLUD + written_BLUD).astype(x_BLUD.dtype)


def _declare_in_float32(module: Any, name: str, init: Callable, *shape: int
                        ) -> jax.Array:
  """Declares parameters whose number does not depend on the model's width, and
  returns them in float32."""
  role = Role(axes=(None,) * len(shape))
  return declare(module, name, init=init, shape=shape, role=role).astype(
      jnp.float32)


class Hyper(Mixed):
  """Hyper-connections (Zhu et al. 2024, equations 10 to 14):

    a = e_(k mod count) + a_k + s tanh(n(x) W_a)
    b = b_k + s' tanh(n(x) W_b)
    A = A_k + s tanh(n(x) W_A)
  """
  fields = ('streams.count', 'streams.dynamic')

  def weights(self, module: Any, x: Streams) -> StreamWeights:
    """Returns the weights of hyper-connections, by which a branch F reads
    several residual streams and adds its result to them (Zhu et al. 2024,
    equations 10 to 14):

      x'_v = sum over u of A_u,v x_u + b_v F(sum over u of a_u x_u)

    Each is a parameter of the branch plus s tanh(n(x) W), which depends on the
    token and is left out without `dynamic`.

    The suffixes name axes: B batch, L length, U streams (`count` of them), D
    d_model, I = U + 2 numbers of a stream.

    Args:
      module: the Flax module of the branch, which declares the parameters.
      x: the streams x_1 to x_count, and the number k of the branch.

    Returns:
      a to read the streams by [batch, length, count], b to write to them
      likewise, and A to mix them by [batch, length, count, count]; batch and
      length are 1 where all tokens have the same.
    """
    config: ModelConfig = module.config
    count, D = x.x_BLUD.shape[2:]
    # Below, U are the `count` streams.
    # The part that is alike for all tokens: a_k, b_k and A_k. In a new model,
    # branch k reads stream k mod count alone, adds its result to every stream,
    # and leaves the streams as they are.
    read_U = _declare_in_float32(module, 'read', nn.initializers.zeros, count)
    read_U = read_U + jax.nn.one_hot(x.branch % count, count)
    write_U = _declare_in_float32(module, 'write', nn.initializers.ones, count)
    mix_UU = _declare_in_float32(module, 'mix', _identity_matrix, count, count)
    read_11U, write_11U = read_U[None, None], write_U[None, None]
    mix_11UU = mix_UU[None, None]
    if not config.part(StreamsConfig).dynamic:
      return StreamWeights(read_BLU=read_11U, write_BLU=write_11U,
                           mix_BLUU=mix_11UU)
    # The part that depends on the token: tanh(n(x) W). W makes I = count + 2
    # numbers of each stream u: its a_u, its b_u, and its row A_u of A.
    role = Role(axes=('embed', None), inputs=(0,), kind='logits')
    w_DI = declare(module, 'dynamic', init=nn.initializers.zeros,
                   shape=(D, count + 2), role=role)
    scale_2 = _declare_in_float32(
        module, 'dynamic_scale',
        nn.initializers.constant(INITIAL_SCALE_OF_DYNAMIC_PART), 2)
    n_BLUD = norm(config, 'norm')(x.x_BLUD)
    z_BLUI = layers.einsum('BLUD,DI->BLUI', n_BLUD, w_DI,
                           dtype=config.compute_dtype, out_dtype=jnp.float32)
    z_BLUI = jnp.tanh(z_BLUI / config.widening)
    # The sums of both parts. a and A have one factor s, and b has its own.
    return StreamWeights(
        read_BLU=read_11U + scale_2[0] * z_BLUI[..., 0],
        write_BLU=write_11U + scale_2[1] * z_BLUI[..., 1],
        mix_BLUU=mix_11UU + scale_2[0] * z_BLUI[..., 2:])


def _identity_matrix(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
                     ) -> jax.Array:
  """Returns the identity matrix, as an initializer of A_k."""
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
    """Returns the weights of manifold-constrained hyper-connections, by which a
    branch reads several residual streams and adds its result to them (Xie et
    al. 2025, equations 7 to 9):

      a = sigmoid(c_k + z_a),   b = 2 sigmoid(z_b),   A = Sinkhorn(exp(z_A))
      z = s rms(x) W + d_k

    Sinkhorn's algorithm makes the rows and columns of A sum to 1.

    The suffixes name axes: B batch, L length, U streams (`count` of them), D
    d_model, I = U (U + 2) numbers of a token.

    Args:
      module: the Flax module of the branch, which declares the parameters.
      x: the streams x_1 to x_count, and the number k of the branch.

    Returns:
      a to read the streams by [batch, length, count], b to write to them
      likewise, and A to mix them by [batch, length, count, count].
    """
    config: ModelConfig = module.config
    B, L, count, _ = x.x_BLUD.shape
    fields = config.part(StreamsConfig)
    # The part that is alike for all tokens: c_k of a, and d_k of b and of A.
    # The initial c_k is added to a parameter that begins at 0, as it depends on
    # the number of the branch, which is no constant inside a scan over layers.
    initial_U = 0
    if not fields.learned_end:
      initial_U = initial_read_logits(count, x.branch)
    read_U = initial_U + _declare_in_float32(
        module, 'read', nn.initializers.zeros, count)
    write_U = _declare_in_float32(
        module, 'write', nn.initializers.zeros, count)
    mix_UU = _declare_in_float32(
        module, 'mix', _logits_of_identity, count, count)
    # The part that depends on the token: s rms(x) W, with a factor s for each
    # of a, b and A. Of its I numbers, `count` are a's, `count` b's, and the
    # rest are A's, row by row.
    z_BLI = _logits_of_all_streams(module, x.x_BLUD, count * (count + 2))
    scale_3 = _declare_in_float32(
        module, 'dynamic_scale',
        nn.initializers.constant(INITIAL_SCALE_OF_DYNAMIC_PART), 3)
    read_BLU, write_BLU, mix_BLI = jnp.split(z_BLI, (count, 2 * count), -1)
    # The logits are the sums of both parts.
    read_BLU = scale_3[0] * read_BLU + read_U[None, None]
    write_BLU = scale_3[1] * write_BLU + write_U[None, None]
    mix_BLI = scale_3[2] * mix_BLI + mix_UU.reshape(-1)[None, None]

    def make_doubly_stochastic(logits_BLUU: jax.Array) -> jax.Array:
      return sinkhorn(logits_BLUU, fields.iterations)

    mix_BLUU = recompute_in_backward(make_doubly_stochastic)(
        mix_BLI.reshape(B, L, count, count))
    return StreamWeights(
        read_BLU=jax.nn.sigmoid(read_BLU) + SMALLEST_WEIGHT,
        write_BLU=2 * jax.nn.sigmoid(write_BLU), mix_BLUU=mix_BLUU)

  def end(self, module: Any, x: Streams) -> jax.Array:
    """Joins the residual streams after the last layer to the one that the head
    of the model reads. With `learned_end` (DeepSeek-V4) this is a weighted sum
    of the streams u, by weights of each token:

      y = sum over u of sigmoid(z_u) x_u,   z = s rms(x) W + d

    Otherwise it is the plain end of the base class.

    The suffixes name axes: B batch, L length, U streams, D d_model. There may
    be an axis of layers in front of B.

    Args:
      module: the Flax module of the stack, which declares the parameters.
      x: the streams, whose array is [..., B, L, U, D].

    Returns:
      y, [..., B, L, D].
    """
    if not module.config.part(StreamsConfig).learned_end:
      return super().end(module, x)
    # The logits z, one for each stream.
    count = x.x_BLUD.shape[-2]
    z_BLU = _logits_of_all_streams(module, x.x_BLUD, count)
    scale_1 = _declare_in_float32(
        module, 'dynamic_scale',
        nn.initializers.constant(INITIAL_SCALE_OF_DYNAMIC_PART), 1)
    read_U = _declare_in_float32(module, 'read', nn.initializers.zeros, count)
    # There may be an axis of layers in front of B.
    read_BLU = read_U.reshape((1,) * (z_BLU.ndim - 1) + (-1,))
    z_BLU = scale_1[0] * z_BLU + read_BLU
    # The weighted sum. Its inputs are kept for the backward pass, and no
    # further array of the size of all streams.
    weighted_sum = recompute_in_backward(
        layers.count_flops_by_result(_sum_weighted_streams, 2 * count))
    return weighted_sum(x.x_BLUD, jax.nn.sigmoid(z_BLU) + SMALLEST_WEIGHT)


def _logits_of_identity(key: jax.Array, shape: tuple[int, ...],
                        dtype: jnp.dtype) -> jax.Array:
  """Returns logits of a matrix that is nearly the identity, as an initializer:
  0 on the diagonal, and LOGIT_OFF_DIAGONAL beside it."""
  del key
  return LOGIT_OFF_DIAGONAL * (1 - jnp.eye(shape[0], dtype=dtype))


def _logits_of_all_streams(module: Any, x_BLUD: jax.Array, size: int
                           ) -> jax.Array:
  """Makes logits for each token, rms(x) W, where x are all residual streams of
  the token joined to one vector (mHC: Xie et al. 2025, equation 7).

  The suffixes name axes: B batch, L length, U streams, D d_model, I = U D, O
  logits. There may be an axis of layers in front of B.

  Args:
    module: the module that declares W, as its parameter 'dynamic'.
    x_BLUD: the streams.
    size: O, the number of logits.

  Returns:
    The logits, float32 [..., B, L, O].
  """
  config: ModelConfig = module.config
  *leading_shape, count, D = x_BLUD.shape
  # W is 0 at first, so that a new model mixes the streams of all tokens alike.
  # In DeepSeek-V4's form it is drawn.
  init = nn.initializers.zeros
  if config.part(StreamsConfig).learned_end:
    init = nn.initializers.normal(config.init_stddev)
  role = Role(axes=(None, 'embed', None), inputs=(0, 1), kind='logits')
  w_UDO = declare(module, 'dynamic', init=init, shape=(count, D, size),
                  role=role)

  def normalise_and_multiply(x_BLI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """Returns rms(x) W, in float32."""
    n_BLI = rmsnorm(x_BLI, None, config.norm_eps)
    return layers.einsum('...I,IO->...O', n_BLI, w_IO,
                         dtype=config.compute_dtype, out_dtype=jnp.float32)

  # Join the streams of a token to one vector, so that the root mean square is
  # taken over all streams at once. W is declared with both axes, so that it can
  # be sharded over D.
  x_BLI = x_BLUD.reshape(*leading_shape, -1)
  w_IO = w_UDO.reshape(count * D, -1)
  z_BLO = recompute_in_backward(normalise_and_multiply)(x_BLI, w_IO)
  # muP divides logits by `widening`, the ratio of the model's width to its base
  # model's, which is 1 without muP.
  return z_BLO / config.widening


def initial_read_logits(count: int, branch: jax.Array) -> jax.Array:
  """Returns the logits with which a branch of a new model reads each residual
  stream, where the form of the residual is mhc (Xie et al. 2025).

  Their sigmoids are READ_WEIGHT_OF_OWN_STREAM for stream `branch` mod `count`,
  and equal parts of the rest for the other streams. So they sum to 1, and the
  branch reads what a plain model would, as all streams are equal at first.

  Args:
    count: the number of streams, U.
    branch: the number of the branch in the stack, from 0 on; int32.

  Returns:
    The logits, [U].
  """
  is_own_U = jax.nn.one_hot(branch % count, count) > 0
  weight_of_others = (1 - READ_WEIGHT_OF_OWN_STREAM) / (count - 1)
  return jnp.where(is_own_U, _logit(READ_WEIGHT_OF_OWN_STREAM),
                   _logit(weight_of_others))


def _logit(p: float) -> float:
  """Returns the number whose sigmoid is p."""
  return math.log(p / (1 - p))


def sinkhorn(logits_BLUU: jax.Array, iterations: int) -> jax.Array:
  """Returns exp(logits) made doubly stochastic: all rows and all columns sum to
  1, up to the error of a few rounds of Sinkhorn's algorithm.

  Each round divides the rows and then the columns by their sums. As in
  DeepSeek-V4, the first rows are a softmax, and SMALLEST_WEIGHT is added to it
  and to later sums, so that none is 0.

  Args:
    logits_BLUU: the logits, [batch, length, U, U]: a matrix for each token.
    iterations: the number of rounds, at least 1.

  Returns:
    The matrices, [B, L, U, U].
  """
  # The first round: softmax divides the rows by their sums, and is safe from
  # overflow where exp alone is not.
  first_BLUU = _divide_by_sums(
      jax.nn.softmax(logits_BLUU) + SMALLEST_WEIGHT, axis=-2)
  # The later rounds, whose FLOPs are counted as 0. Each is one of the scanned
  # numbers, which have no other meaning.
  later_rounds = jnp.arange(1, iterations)
  run_rounds = layers.count_flops_by_result(_run_rounds_of_sinkhorn, 0)
  return run_rounds(first_BLUU, later_rounds)


def _divide_by_sums(matrix_BLUU: jax.Array, axis: int) -> jax.Array:
  """Returns the matrices divided by their sums along an axis."""
  sums = matrix_BLUU.sum(axis, keepdims=True) + SMALLEST_WEIGHT
  return matrix_BLUU / sums


def _run_rounds_of_sinkhorn(matrix_BLUU: jax.Array, rounds: jax.Array
                            ) -> jax.Array:
  """Returns the matrices after one round of Sinkhorn's algorithm, of rows and
  then columns, for each number in `rounds`.

  The suffixes name axes: B batch, L length, U residual streams.
  """
  def run_round(matrix_BLUU: jax.Array, _):
    rows_BLUU = _divide_by_sums(matrix_BLUU, axis=-1)
    return _divide_by_sums(rows_BLUU, axis=-2), None

  last_BLUU, _ = jax.lax.scan(run_round, matrix_BLUU, rounds)
  return last_BLUU


class Gated(Mixed):
  """Means of streams through gates (Qwen4-Exp's GatedResidual):

    x'_v = x_v + b_v F(mean over u of g_u * n_u(x_u))
    b = 2 sigmoid(sum over u of n_u(x_u) W_b,u / count)
  """
  fields = ('streams.count', 'streams.rank')

  def read(self, module: Any, x: Streams) -> tuple[jax.Array, StreamWeights]:
    """Makes the input of a residual branch (attention or the feed-forward
    network) of several residual streams, as their mean through gates. It also
    returns the weights b by which the branch's result is added to each stream:

      b = 2 sigmoid(sum over u of n_u(x_u) W_b,u / count)

    where n_u(x_u) is stream u after a norm.

    The suffixes name axes: B batch, L length, U (and V) streams, D d_model.

    Args:
      module: the Flax module of the branch, which declares the parameters.
      x: the streams, whose array is [B, L, U, D].

    Returns:
      The input [B, L, D]; and the weights b, which mix no streams.
    """
    config: ModelConfig = module.config
    read_BLD, n_BLUD = _read_through_gates(module, x)
    # The weights b are made of the normalised streams.
    count, D = n_BLUD.shape[2:]
    w_UDU = layers.weight(module, 'write', shape=(count, D, count),
                          axes=(None, 'embed', None), in_axes=(0, 1),
                          output=True)
    z_BLU = layers.einsum('BLUD,UDV->BLV', n_BLUD, w_UDU,
                          dtype=config.compute_dtype, out_dtype=jnp.float32)
    write_BLU = 2 * jax.nn.sigmoid(z_BLU / (count * config.widening))
    return read_BLD, StreamWeights(read_BLU=None, write_BLU=write_BLU)

  def add(self, config: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: Optional[StreamWeights]) -> jax.Array:
    """Returns the streams after a branch with the result y, [B, L, U, D]: x'_v
    = x_v + b_v y. No streams are mixed, so there are 2 FLOPs for each feature
    of each."""
    write = recompute_in_backward(
        layers.count_flops_by_result(_mix_and_write_streams, 2))
    return write(x.x_BLUD, y_BLD, weights)

  def end(self, module: Any, x: Streams) -> jax.Array:
    """Returns one more mean of the streams through gates, [B, L, D]."""
    mean_BLD, _ = _read_through_gates(module, x)
    return mean_BLD


def _read_through_gates(module: Any, x: Streams
                        ) -> tuple[jax.Array, jax.Array]:
  """Returns the mean of several residual streams, each normalised and times a
  gate in (0, 1) for each of its features:

    y = mean over u of g_u * n_u(x_u)
    g = sigmoid(silu(sum over u of n_u(x_u) W_down,u / count) W_up)

  This is Qwen4-Exp's GatedResidual. The product W_down W_up has the low rank R.

  Args:
    module: the module that declares the norms n_u and the weights.
    x: the U streams, whose array is [batch, length, U, d_model]. There may be
      an axis of layers in front of B.

  Returns:
    The mean y, [B, L, D], and the normalised streams n_u(x_u), [B, L, U, D],
    of which a branch also computes how its result is added.
  """
  config: ModelConfig = module.config
  # The normalised streams, and the weights.
  n_BLUD = layers.norm_of_streams(config, 'norm')(x.x_BLUD)
  count, D = n_BLUD.shape[-2:]
  rank = config.part(StreamsConfig).rank
  down_UDR = layers.weight(module, 'down', shape=(count, D, rank),
                           axes=(None, 'embed', None), in_axes=(0, 1),
                           output=True)
  up_RUD = layers.weight(module, 'up', shape=(rank, count, D),
                         axes=(None, None, 'embed'))
  # The logits of the gates. The sum over all streams and features is divided by
  # the count, and by the width over that of muP's base (`widening`, 1 without
  # muP), so that its size depends on neither.
  z_BLR = layers.einsum('...UD,UDR->...R', n_BLUD, down_UDR,
                        dtype=config.compute_dtype, out_dtype=jnp.float32)
  z_BLR = jax.nn.silu(z_BLR / (count * config.widening))
  gate_BLUD = layers.einsum('...R,RUD->...UD', z_BLR, up_RUD,
                            dtype=config.compute_dtype)
  # The sigmoid and the mean are one step that is computed again in the backward
  # pass, so that no further array of the size of all streams is kept.
  mean_through_gates = recompute_in_backward(
      layers.count_flops_by_result(_mean_through_gates, 2 * count))
  return mean_through_gates(gate_BLUD, n_BLUD), n_BLUD


def _mean_through_gates(gate_BLUD: jax.Array, n_BLUD: jax.Array) -> jax.Array:
  """Returns the mean over the streams u of sigmoid(gate_u) * n_u, [B, L, D]."""
  gate32_BLUD = jax.nn.sigmoid(gate_BLUD.astype(jnp.float32))
  mean_BLD = (gate32_BLUD * n_BLUD.astype(jnp.float32)).mean(-2)
  return mean_BLD.astype(n_BLUD.dtype)


# Attention to the branches before.


class Attended(Residual):
  """Attention residuals (Kimi Team 2026, arXiv 2603.15031, equations 2 to 6):

    v_(k+1) = F(sum over i of p_i v_i),   v_0 = e

  The streams are slots for the results v_i of the branches F, of which those
  not yet written are 0. With streams.block_size above 1, the results of a block
  of branches add up in one slot.
  """
  settings = StreamsConfig
  fields = ('streams.block_size', 'norm_eps')

  def count(self, config: ModelConfig, branches: int) -> int:
    return _count_attended_slots(config, branches)

  def begin(self, x_BLD: jax.Array, count: int) -> jax.Array:
    # The first slot has the embedding.
    first_BL1D = x_BLD[:, :, None]
    empty_slots = (0, count - 1)
    return jnp.pad(first_BL1D, ((0, 0), (0, 0), empty_slots, (0, 0)))

  def read(self, module: Any, x: Streams) -> tuple[jax.Array, None]:
    """Returns the input of a branch, [B, L, D]: attention to the results of the
    branches before it. Its own result is added without a weight: None."""
    # The branches of a scan run one program, but each attends to another number
    # of slots. So the program counts the mean number of slots.
    slots_of_all_branches = sum(
        _count_attended_slots(module.config, k) for k in range(x.branches))
    y_BLD = _attend_to_slots(module, x, num_slots=slots_of_all_branches,
                             num_reads=x.branches)
    return y_BLD, None

  def add(self, config: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: Optional[StreamWeights]) -> jax.Array:
    """Returns the slots with the result y of a branch added to its own slot,
    [B, L, U, D]."""
    # The first slot is that of the embedding. The number of the branch is not
    # known when the program is made, so y is added to all slots, and the sum is
    # kept in the right one.
    slot = 1 + x.branch // config.part(StreamsConfig).block_size
    is_slot_U = jnp.arange(x.x_BLUD.shape[2]) == slot
    added_BLUD = x.x_BLUD + y_BLD[:, :, None]
    return jnp.where(is_slot_U[None, None, :, None], added_BLUD, x.x_BLUD)

  def end(self, module: Any, x: Streams) -> jax.Array:
    """Returns the attention of one more query to all slots, [B, L, D]."""
    all_slots = x.x_BLUD.shape[-2]
    return _attend_to_slots(module, x, num_slots=all_slots, num_reads=1)


def _count_attended_slots(config: ModelConfig, branch: Any) -> Any:
  """Returns how many slots branch k attends to: the embedding's, one for each
  whole block of branches before it, and one for a block that has begun.

  Args:
    config: the model.
    branch: k, an int or a scalar on the device.
  """
  size = config.part(StreamsConfig).block_size
  has_begun_block = branch % size > 0
  return 1 + branch // size + has_begun_block


def _attend_to_slots(module: Any, x: Streams, num_slots: int, num_reads: int
                     ) -> jax.Array:
  """Returns the attention of one learned query to the results of the residual
  branches so far (Kimi Team 2026, arXiv 2603.15031, equations 2 to 4).

  Args:
    module: the module that declares the query, [D, 1], and the scale of the
      norm of the keys, [D].
    x: the results of the branches. Its array is [batch, length, U slots,
      d_model], and slots that no branch has written yet are 0.
    num_slots: how many slots are attended to in `num_reads` calls together,
      which is for the count of FLOPs alone. It grows from branch to branch, so
      the number of one call need not be whole.
    num_reads: the number of these calls.

  Returns:
    The weighted sum of the slots, [B, L, D].
  """
  config: ModelConfig = module.config
  D = x.x_BLUD.shape[-1]
  role = Role(axes=('embed', None), inputs=(0,), kind='logits')
  query_D1 = declare(module, 'query', init=nn.initializers.zeros, shape=(D, 1),
                     role=role)
  scale_D = declare(module, 'scale', init=nn.initializers.ones, shape=(D,),
                    role=Role(axes=('embed',)))
  # For each feature of a slot, 2 FLOPs are in the score and 2 in the sum.
  attend = recompute_in_backward(layers.count_flops_by_result(
      _attention_over_slots, 4 * num_slots, num_reads))
  # The query is declared as a matrix with one output, as muP's rules take it.
  # Its logits are divided by `widening`, the width over that of muP's base.
  return attend(x.x_BLUD, query_D1[:, 0] / config.widening, scale_D,
                _count_attended_slots(config, x.branch),
                jnp.float32(config.norm_eps))


def _attention_over_slots(x_BLUD: jax.Array, query_D: jax.Array,
                          scale_D: jax.Array, num_slots: jax.Array,
                          eps: jax.Array) -> jax.Array:
  """Returns the attention of one query to slots of each token, in float32
  (Kimi Team 2026, arXiv 2603.15031, equations 2 to 4):

    y = sum over i of p_i v_i,   p = softmax over i of w . rms(v_i)

  Args:
    x_BLUD: the slots v_i, [batch, length, U slots, d_model]. There may be an
      axis of layers in front of B.
    query_D: the query w.
    scale_D: the scale of rms, by which each feature is multiplied.
    num_slots: how many slots are attended to, from the first one on: a scalar,
      or [N] with an axis of N layers.
    eps: the number that rms adds to the mean square.

  Returns:
    y, [B, L, D], in the dtype of x.
  """
  # The logits of the slots. The values stay as they are; only the keys are
  # normalised, so that a large result does not draw all attention.
  x32_BLUD = x_BLUD.astype(jnp.float32)
  keys_BLUD = rmsnorm(x32_BLUD, scale_D, eps)
  logits_BLU = jnp.einsum('...D,D->...', keys_BLUD, query_D.astype(jnp.float32))
  # Which slots are attended to. The others hold 0, which would still get some
  # weight. Three axes of 1 stand for B, L and U, behind an axis of layers.
  slot_U = jnp.arange(x_BLUD.shape[-2])
  slot_BLU = slot_U.reshape((1,) * (logits_BLU.ndim - 1) + (-1,))
  is_seen_BLU = slot_BLU < num_slots.reshape(*num_slots.shape, 1, 1, 1)
  # The weighted sum.
  p_BLU = jax.nn.softmax(jnp.where(is_seen_BLU, logits_BLU, -jnp.inf))
  y_BLD = (p_BLU[..., None] * x32_BLUD).sum(-2)
  return y_BLD.astype(x_BLUD.dtype)


# Sums with learned factors.


class SumFactors(NamedTuple):
  """How the result of a branch is added to one stream, for each feature, in
  float32: x' = stream (x + stream_shift) + branch (y + branch_shift).

  Attributes:
    stream_D: the factor of the stream x.
    branch_D: the factor of the branch's result y.
    stream_shift_D: what is added to x before.
    branch_shift_D: what is added to y before.
  """
  stream_D: jax.Array
  branch_D: jax.Array
  stream_shift_D: jax.Array
  branch_shift_D: jax.Array


def _add_with_factors(x_BLD: jax.Array, y_BLD: jax.Array, factors: SumFactors
                      ) -> jax.Array:
  """Adds the result of a branch to the stream, for each feature:

    x' = stream (x + stream_shift) + branch (y + branch_shift)

  Args:
    x_BLD: the stream x, [batch, length, d_model].
    y_BLD: the result y of the branch.
    factors: the factors and shifts, [D].

  Returns:
    x', [B, L, D], in the dtype of x. The sum is computed in float32.
  """
  # Each factor gets axes of batch and length in front.
  stream_D, branch_D, stream_shift_D, branch_shift_D = (
      factor_D[None, None] for factor_D in factors)
  shifted_x_BLD = x_BLD.astype(jnp.float32) + stream_shift_D
  shifted_y_BLD = y_BLD.astype(jnp.float32) + branch_shift_D
  sum_BLD = stream_D * shifted_x_BLD + branch_D * shifted_y_BLD
  return sum_BLD.astype(x_BLD.dtype)


class LearnedSum(Residual):
  """One stream x, to which the results of branches F are added with learned
  factors and shifts of each feature (SumFactors):

    x' = s (x + b) + s' (F(x) + b')

  A subclass says what these are.
  """
  fields: tuple[str, ...] = ()
  is_sum = True

  def count(self, config: ModelConfig, branches: int) -> int:
    return 1

  def begin(self, x_BLD: jax.Array, count: int) -> jax.Array:
    return x_BLD[:, :, None]

  def factors(self, module: Any, size: int) -> SumFactors:
    """Declares the parameters of the factors of a branch, and makes them.

    Args:
      module: the module in which the parameters are declared.
      size: D, the number of features.

    Returns:
      The factors and shifts, [D] each, in float32.
    """
    raise NotImplementedError

  def read(self, module: Any, x: Streams) -> tuple[jax.Array, SumFactors]:
    """Returns the stream x itself, [B, L, D], and the factors of the sum."""
    x_BLD = x.x_BLUD[:, :, 0]
    return x_BLD, self.factors(module, x_BLD.shape[-1])

  def add(self, config: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: SumFactors) -> jax.Array:
    """Returns the one stream with the result y of a branch added to it by these
    factors, [B, L, 1, D]."""
    # 5 FLOPs for each feature: two products and three sums.
    add = recompute_in_backward(
        layers.count_flops_by_result(_add_with_factors, 5))
    sum_BLD = add(x.x_BLUD[:, :, 0], y_BLD, weights)
    return sum_BLD[:, :, None]

  def end(self, module: Any, x: Streams) -> jax.Array:
    return x.x_BLUD[..., 0, :]


# The least square in the root of `Balanced`, so that its gradient stays finite.
SMALLEST_SQUARE_OF_FACTOR = 1e-3


class Balanced(LearnedSum):
  """A sum that keeps the variance of independent parts (Muse Spark):

    x' = sqrt(1 - g^2) x + g F(x),   g = sigmoid(w / temperature)

  with a learned number w for each feature. Where x and F(x) are independent and
  of one variance, x' has it too, since the squares of both factors sum to 1.
  """
  settings = StreamsConfig
  fields = ('streams.temperature',)

  def factors(self, module: Any, size: int) -> SumFactors:
    """Declares a number w for each feature, and returns the factors of the sum

      x' = sqrt(1 - g^2) x + g F(x),    g = sigmoid(w / temperature)

    of the stream x and the branch F(x). Nothing is added to either.

    The suffix D names the axis of the features.

    Args:
      module: the layer, which gets the parameter `gate` [D].
      size: the number D of features.
    """
    # Compute g from the learned numbers w, in float32.
    config: ModelConfig = module.config
    w_D = declare(module, 'gate', shape=(size,), role=Role(('embed',)),
                  init=nn.initializers.normal(config.init_stddev))
    logit_D = w_D.astype(jnp.float32) / config.part(StreamsConfig).temperature
    g_D = jax.nn.sigmoid(logit_D)

    # 1 - g^2 is computed as (1 - g) (1 + g), where 1 - sigmoid(z) is
    # sigmoid(-z), so that no digits are lost where g is near 1.
    square_D = jax.nn.sigmoid(-logit_D) * (1 + g_D)
    stream_D = jnp.sqrt(jnp.maximum(square_D, SMALLEST_SQUARE_OF_FACTOR))

    no_shift_D = jnp.zeros_like(g_D)
    return SumFactors(stream_D=stream_D, branch_D=g_D,
                      stream_shift_D=no_shift_D, branch_shift_D=no_shift_D)


class Affine(LearnedSum):
  """A sum of two affine functions of each feature (Zaya):

    x' = s (x + b) + s' (F(x) + b')
  """

  def factors(self, module: Any, size: int) -> SumFactors:
    """Declares and returns s (stream_scale), s' (branch_scale), b (stream_bias)
    and b' (branch_bias), each of `size` features. The sum is x + F(x) at first.

    Args:
      module: the layer, which gets the parameters.
      size: the number of features.
    """
    def declare_features(name: str, init: Callable) -> jax.Array:
      return declare(module, name, init=init, shape=(size,),
                     role=Role(('embed',))).astype(jnp.float32)

    return SumFactors(
        stream_D=declare_features('stream_scale', nn.initializers.ones),
        branch_D=declare_features('branch_scale', nn.initializers.ones),
        stream_shift_D=declare_features('stream_bias', nn.initializers.zeros),
        branch_shift_D=declare_features('branch_bias', nn.initializers.zeros))


class WithEmbedding(Residual):
  """A sum that every branch mixes with the embedding e of the tokens before it
  reads it (modded-nanogpt, nanochat):

    x' = r + F(r),   r = a x + c e

  The two streams are x and e.
  """
  fields = ()
  is_sum = True

  def count(self, config: ModelConfig, branches: int) -> int:
    return 2

  def begin(self, x_BLD: jax.Array, count: int) -> jax.Array:
    return jnp.stack([x_BLD, x_BLD], axis=2)

  def read(self, module: Any, x: Streams) -> tuple[jax.Array, jax.Array]:
    """Returns the input of a branch, r = a x + c e, [B, L, D]; and once more r,
    to which the result of the branch will be added. The learned numbers a and c
    are 1 and 0 at first.

    The suffixes name axes: B batch, L length, U = 2 streams (x and the
    embedding), D d_model.
    """
    share = _declare_in_float32(module, 'stream', nn.initializers.ones)
    share_of_embedding = _declare_in_float32(
        module, 'embedding', nn.initializers.zeros)
    shares_BLU = jnp.stack([share, share_of_embedding])[None, None]
    # 4 FLOPs for each feature: a product and a sum for each of two streams.
    mix = recompute_in_backward(
        layers.count_flops_by_result(_sum_weighted_streams, 4))
    r_BLD = mix(x.x_BLUD, shares_BLU)
    return r_BLD, r_BLD

  def add(self, config: ModelConfig, x: Streams, y_BLD: jax.Array,
          weights: jax.Array) -> jax.Array:
    """Returns the two streams after a branch with the result y, [B, L, 2, D]:
    x' = r + y, where `weights` is r; and e as it is."""
    return x.x_BLUD.at[:, :, 0].set(weights + y_BLD)

  def end(self, module: Any, x: Streams) -> jax.Array:
    """Returns the stream x, [B, L, D], without e."""
    return x.x_BLUD[..., 0, :]


class Plain(Residual):
  """The plain sum, of which blocks.py has all."""
  is_sum = True


RESIDUALS = {
    'plain': Plain(),
    'hyper': Hyper(),
    'mhc': MHC(),
    'gated': Gated(),
    'attention': Attended(),
    'balanced': Balanced(),
    'affine': Affine(),
    'embedding': WithEmbedding(),
}


# Skips from the first half of the layers to the second (model.skips), as in a
# U-net (Ronneberger et al. 2015; modded-nanogpt). Of N layers, layer l of the
# first half is paired with layer N - 1 - l of the second: the first layer with
# the last one, the second with the last but one, and so on. The later layer of
# a pair also reads what the earlier one returned, times a learned number. In an
# odd number of layers the middle one has no partner.


@struct.dataclass
class Skips:
  """The results of the layers of the first half of a stack, on their way to
  their partners in the second half.

  All layers run the same program (a scan), so each writes a result and reads
  one. There is one slot more than layers in the first half: layers of the first
  half read it, and get 0; later it takes what nobody reads.

  The suffixes name axes: B batch, L length, U slots, D d_model.

  Attributes:
    kept_BLUD: the results, in a slot for each layer of the first half, and one
      more. Slots that are not written yet are 0.
    weight_U: the learned number of each slot, 0 for the last one.
    layer: how many layers have run so far, int32.
    num_layers: how many layers the whole stack has.
  """
  kept_BLUD: jax.Array
  weight_U: jax.Array
  layer: jax.Array
  num_layers: int = struct.field(pytree_node=False)

  @property
  def last_slot(self) -> int:
    """The number of the slot that belongs to no layer."""
    return self.kept_BLUD.shape[2] - 1


def begin_skips(module: Any, x_BLD: jax.Array, num_layers: int) -> Skips:
  """Makes the Skips that the first layer is given, whose slots are 0, and
  declares their learned numbers, 1 at first, in the module of the stack.

  The suffixes name axes: B batch, L length, D d_model, U slots.

  Args:
    module: the module of the stack.
    x_BLD: the embedding of the tokens.
    num_layers: how many layers the stack has.

  Returns:
    The Skips, with a slot for each layer of the first half, and one that
    belongs to no layer. Its number is 0.
  """
  num_layers_of_half = num_layers // 2
  weights = _declare_in_float32(
      module, 'skip_streams', nn.initializers.ones, num_layers_of_half)
  weight_U = jnp.pad(weights, (0, 1))
  B, L, D = x_BLD.shape
  num_slots = num_layers_of_half + 1
  kept_BLUD = jnp.zeros((B, L, num_slots, D), x_BLD.dtype)
  return Skips(kept_BLUD=pin_streams(kept_BLUD), weight_U=weight_U,
               layer=jnp.zeros((), jnp.int32), num_layers=num_layers)


def read_skip(x: LayerInput, skips: Skips) -> LayerInput:
  """Adds to the input of a layer what its partner in the first half of the
  stack returned (modded-nanogpt, as in U-nets). For layer l of N, in the second
  half,

    x'_l = x_l + w_(N-1-l) y_(N-1-l)

  where y_i is what layer i returned, and w_i a learned number. A layer of the
  first half reads x alone.

  Args:
    x: the residual stream, [B, L, D], or Streams, whose first is the sum of
      what came before.
    skips: the results of the first half.

  Returns:
    x' of the type and shapes of x.
  """
  # The slot of the partner. That of a layer in the first half, or in the middle
  # of an odd number, would be past the end: it reads the last slot, whose
  # weight is 0. The suffixes name axes: B batch, L length, U slots, D d_model.
  partner = skips.num_layers - 1 - skips.layer
  slot = jnp.minimum(partner, skips.last_slot)
  kept_BLD = jax.lax.dynamic_index_in_dim(
      skips.kept_BLUD, slot, axis=2, keepdims=False)
  weight = jax.lax.dynamic_index_in_dim(skips.weight_U, slot, keepdims=False)

  # The sum, with 2 FLOPs for each feature.
  add = recompute_in_backward(layers.count_flops_by_result(_add_weighted, 2))
  if isinstance(x, Streams):
    sum_BLD = add(x.x_BLUD[:, :, 0], kept_BLD, weight)
    return x.replace(x_BLUD=x.x_BLUD.at[:, :, 0].set(sum_BLD))
  return add(x, kept_BLD, weight)


def _add_weighted(x_BLD: jax.Array, y_BLD: jax.Array, weight: jax.Array
                  ) -> jax.Array:
  """Returns x + weight y, in the dtype of x."""
  sum_BLD = x_BLD.astype(jnp.float32) + weight * y_BLD.astype(jnp.float32)
  return sum_BLD.astype(x_BLD.dtype)


def write_skip(x: LayerInput, skips: Skips) -> Skips:
  """Keeps the result of a layer for its partner in the second half of the
  stack, which reads it by `read_skip`.

  All layers run the same program (a scan), so those of the second half, which
  have no such partner, write too: into the last slot, which none of them reads.

  Args:
    x: the result of the layer, [B, L, D], or Streams, whose first is the sum of
      what came before.
    skips: the results of the layers before.

  Returns:
    The Skips with this result, whose `layer` is that of the next one.
  """
  x_BLD = x
  if isinstance(x, Streams):
    x_BLD = x.x_BLUD[:, :, 0]
  slot = jnp.minimum(skips.layer, skips.last_slot)
  kept_BLUD = jax.lax.dynamic_update_index_in_dim(
      skips.kept_BLUD, x_BLD, slot, axis=2)
  return skips.replace(kept_BLUD=pin_streams(kept_BLUD), layer=skips.layer + 1)


def check_skips(config: ModelConfig) -> None:
  """Checks that the layers of a model can have skips: with model.skips, each
  layer of the second half of a stack adds the result of a layer of the first
  half to the residual sum, x' = x + w y (see `read_skip`).

  So a stack must have two halves, and a residual stream that is the sum of what
  came before. Layers that loop are refused, because the halves are those of the
  whole stack, and a pass over these layers has none.

  Args:
    config: the config of the whole model.

  Raises:
    RequestError: for a single layer, layers that loop, and residual streams
      none of which is the sum.
  """
  num_layers_of_smallest_stack = min(config.num_layers,
                                     config.num_decoder_layers)
  if num_layers_of_smallest_stack < 2:
    raise RequestError(
        'model.skips is True, and a stack has one layer, which has no other '
        'half: set model.num_layers to 2 or more')
  # A sum is a form of the residual whose first stream is x plus the results of
  # all branches so far. The skip is added to it.
  if not RESIDUALS[config.residual].is_sum:
    sums = [name for name, form in RESIDUALS.items() if form.is_sum]
    raise RequestError(
        'model.skips is True, which adds to the residual sum, and '
        f'model.residual {config.residual!r} has none: choose it from '
        f'{", ".join(sums)}')
  if config.loop != 'none':
    raise RequestError(
        'model.skips is True, whose halves no pass of model.loop '
        f"{config.loop!r} has: set it to 'none'")
