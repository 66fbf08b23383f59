"""Linear attention whose state decays: Gated DeltaNet, Kimi Delta Attention,
gated linear attention and retention.

Each class has its equations. What is not of one recurrence alone is in
layer.py; positions are read by retention alone.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts import layers, positions
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.positions import RopeConfig
from architectures.parts.recurrent import features, layer, recurrence
from architectures.parts.sharding import Role, declare
from common.errors import RequestError
from common.fields import AT_START, field, FUNCTION, MOST_TAPS, RECIPE
from common.fields import SHAPES


@dataclasses.dataclass(frozen=True)
class _Heads:
  """Heads that, where they are left open, are those of attention."""
  key_heads: int = field(0, 'heads of queries and keys; derived: num_heads',
                         resume=SHAPES)
  value_heads: int = field(0, 'a multiple of key_heads, which is the default',
                           resume=SHAPES)
  key_dim: int = field(0, "size of a head's query and key; derived: head_dim",
                       resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: head_dim",
                         resume=SHAPES)

  householders = 1

  def derived(self, config: ModelConfig):
    return dataclasses.replace(
        self, key_heads=self.key_heads or config.num_heads,
        value_heads=self.value_heads or self.key_heads or config.num_heads,
        key_dim=self.key_dim or config.head_dim,
        value_dim=self.value_dim or config.head_dim)


CURVATURE_EPS = 1e-6  # beside a sum of squares, as in the authors' program
PRECONDITION = dict(
    doc='the preconditioner multiplies each feature of a key that is written '
    'by a number between 1 / this and this (paper: 1.5); 1: there is none',
    least=1, most=2, resume=SHAPES)


@dataclasses.dataclass(frozen=True)
class _DeltaRule(_Heads):
  """The fields of mixers deltanet and comba."""
  conv: int = field(4, 'tokens that a convolution sees; 0: no convolution',
                    most=MOST_TAPS, resume=SHAPES)
  negative: bool = field(
      False, 'rates up to 2, not 1: eigenvalues may be negative',
      resume=FUNCTION)
  norm_eps: float = field(
      0.0, 'epsilon of the norm of what is read; derived: norm_eps', least=0,
      most=1, resume=FUNCTION)
  gate: str = field('silu', 'what the gate on what is read goes through',
                    choices=('silu', 'sigmoid'), resume=FUNCTION)

  def derived(self, config: ModelConfig):
    return dataclasses.replace(super().derived(config),
                               norm_eps=self.norm_eps or config.norm_eps)


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(_DeltaRule):
  """The fields of mixer deltanet. What is left open is as attention has it."""
  decay: bool = field(
      True, 'the state decays (Gated DeltaNet), or not (DeltaNet)')
  householders: int = field(
      1, 'steps of the delta rule a token, each with a key, a value and a rate '
      'of its own (DeltaProduct)', least=1, resume=SHAPES)
  precondition: float = field(1.0, **PRECONDITION)


class DeltaNet(layer.Layer):
  """Gated DeltaNet: the state of a head, [K, U], stands for all tokens before
  (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464; as in Qwen3-Next).

    q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x))
    q, k    = q / (|q| sqrt(K)), k / |k|        a head by itself
    b       = sigmoid(W_b x)                    doubled with `negative`
    log a   = -exp(A) softplus(W_a x + bias)    0 without `decay` (DeltaNet)
    S_t     = a_t (I - b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T,   o_t = S_t^T q_t
    y       = W_o (RMSNorm(o) * silu(W_z x))    or the sigmoid, by `gate`

  Without convolutions (`conv` 0) the SiLU stays, as in flash-linear-attention:
  q = silu(W_q x).

  A step of the state has the eigenvalues a and a (1 - b), which with `negative`
  are above -1 instead of 0 (Grazzi et al. 2024, arXiv 2411.12537).

  With `householders` n above 1 a token takes n steps (DeltaProduct: Siems et
  al. 2025, arXiv 2502.10297). Step i has a key, a value and a rate of its own,
  from products and convolutions of its own; the state decays once a token, and
  is read after the last step, which is S_t below:

    S_t,i   = (I - b_i k_i k_i^T) S_t,i-1 + b_i k_i v_i^T,   S_t,0 = a_t S_t-1

  The transition of a token is a product of n reflections or less, so that with
  `negative` n = 2 can be a rotation, and any permutation of n + 1 things.

  With `precondition` above 1 the key that is written is multiplied by numbers
  that stand for the inverse of the keys' covariance (see `run`).
  """
  settings = DeltaNetConfig
  silu_without_conv = True

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of the gated delta rule, a recurrence over tokens t with
    a state S, decays a and rates b (Gated DeltaNet):

      S_t = a_t (I - b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T,   o_t = S_t^T q_t

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
    features of a key, H heads of values, U features of a value.

    Args:
      x_BLD: the layer's input, of which decays and rates are made.
      q_BLJK: the queries.
      k_BLJK: the keys.
      v_BLHU: the values.
      ctx: the context of the layer; not read here.

    Returns:
      Queries, keys and values, the logarithm of the decay a, and the rate b.
    """
    del ctx
    log_decay_BLHK = self.log_decay(x_BLD)

    # Keys are scaled to the length 1, and queries to 1 / sqrt(K), where K is
    # that of muP's base model.
    unit_q_BLJK = features.normalize_length(q_BLJK, self.base_key_dim ** -0.5)
    unit_k_BLJK = features.normalize_length(k_BLJK)

    # A token may take n steps of the recurrence (n "householders"). Then it has
    # n keys, values and rates, which are moved one after another in the row.
    move_steps_to_length = functools.partial(
        layer.steps_to_places, self.sizes.householders)
    return recurrence.Inputs(
        q_BLJK=unit_q_BLJK, k_BLJK=move_steps_to_length(unit_k_BLJK),
        v_BLHU=move_steps_to_length(v_BLHU), log_decay_BLHK=log_decay_BLHK,
        rate_BLH=move_steps_to_length(self.rate(x_BLD)))

  def run(self, inputs: recurrence.Inputs, x_BLD: jax.Array, ctx: Context,
          cache: layer.State | None) -> tuple[jax.Array, layer.State]:
    """Runs the recurrence, with a preconditioner if the layer has one (Tumma,
    Loo and Rus 2026, arXiv 2604.21100, as the authors' program has it).

    The delta rule is a step of gradient descent on |v - S^T k|^2. A Newton step
    would write P k in place of k, with P the inverse of the sum of all k k^T.
    That sum is replaced by its diagonal C, [K] of a head of keys, in which old
    keys decay as in the state, and its inverse by a bounded power of it:

      C_t  = a'_t C_t-1 + b'_t k_t * k_t       a' and b' made as a and b are
      r    = log(C_t + 1e-6) - c               c: a number for each head of keys
      M_t  = x^(-r / (1 + |r|))                between 1 / x and x
      S_t  = A_t S_t-1 + b_t (M_t * k_t) (v_t - (A_t S_t-1)^T k_t)^T

    Here x is `precondition` and A the decay of the layer; without one, a' is 1.
    C is itself a recurrence, with keys of one feature and values k * k.

    The arguments and results are those of `Layer.run`.
    """
    sizes = self.sizes
    if not layer.has_preconditioner(sizes):
      return super().run(inputs, x_BLD, ctx=ctx, cache=cache)

    # The decays a' and the rates b' of the curvature, and c.
    key_axis = self.key_axes[0]
    log_decay_BLJ1 = None
    if getattr(sizes, 'decay', True):
      log_decay_BLJ1 = self.softplus_decay(
          self.project_to_heads('curvature_decay', x_BLD, of_keys=True),
          least=0.01, name='curvature_decay', axis=key_axis)[..., None]
    rate_BLJ1 = jax.nn.sigmoid(self.project_to_heads(
        'curvature_rate', x_BLD, of_keys=True))[..., None]
    center_J = declare(
        self, 'curvature_center', init=nn.initializers.constant(-0.2),
        shape=(sizes.key_heads,), role=Role((key_axis,)))

    # The curvature C, with 1 as its query, b' as its key and k * k as its
    # value. A square falls as 1 / K where muP widens heads, which the factor
    # makes good.
    k_BLJK = inputs.k_BLJK.astype(jnp.float32)
    squares = recurrence.Inputs(
        q_BLJK=jnp.ones_like(rate_BLJ1), k_BLJK=rate_BLJ1,
        v_BLHU=self.config.head_widening * jnp.square(k_BLJK),
        log_decay_BLHK=log_decay_BLJ1)
    squares = layer.reset_at_documents(
        squares, ctx, keeps_state=cache is not None)
    previous_BJ1K = None
    if cache is not None:
      previous_BJ1K = cache.curvature_BJ1K
    curvature_BLJK, curvature_BJ1K = recurrence.run_recurrence(
        squares, previous_BJ1K)

    # The preconditioner M. Only what is written has it: the key alone reads.
    center_1J1 = center_J.astype(jnp.float32)[None, None, :, None]
    excess_BLJK = jnp.log(curvature_BLJK + CURVATURE_EPS) - center_1J1
    bounded_BLJK = excess_BLJK / (1 + jnp.abs(excess_BLJK))
    multiplier_BLJK = jnp.exp(-math.log(sizes.precondition) * bounded_BLJK)
    inputs = inputs._replace(k_BLJK=multiplier_BLJK * k_BLJK,
                             erase_BLJK=inputs.k_BLJK)
    o_BLHU, states = super().run(inputs, x_BLD, ctx=ctx, cache=cache)
    return o_BLHU, states.replace(curvature_BJ1K=curvature_BJ1K)

  def log_decay(self, x_BLD: jax.Array) -> jax.Array | None:
    """Returns log a, [B, L, H, 1]; None: there is no decay."""
    if not self.sizes.decay:
      return None
    decay_BLH = self.softplus_decay(
        self.project_to_heads('decay', x_BLD), least=0.01)
    return decay_BLH[..., None]


@dataclasses.dataclass(frozen=True)
class CombaConfig(_DeltaRule):
  """The fields of mixer comba: those of deltanet, and a correction."""
  correction: float = field(
      1.0, 'first value of d, how much of the key leaves the query; the '
      'authors took 0.02 for 340M parameters and 1 for 1.3B', resume=AT_START,
      about=RECIPE)
  gate: str = field('sigmoid', 'what the gate on what is read goes through',
                    choices=('silu', 'sigmoid'), resume=FUNCTION)
  decay = True


class Comba(DeltaNet):
  """Comba: a delta rule whose state reads itself before it decays, and whose
  query is corrected as its value is (Hu et al. 2025, arXiv 2506.02475, equation
  5, whose state is transposed; as in flash-linear-attention).

    S_t = (a_t I - b'_t k_t k_t^T) S_t-1 + b_t k_t v_t^T    [K, U] of a head
    o_t = S_t^T (q_t - d k_t) / sqrt(K)
    b'  = sigmoid(c) b       c and d: a number for each head of keys, from 1

  q, k, v, a, b and y are those of Gated DeltaNet, with unit q and k. There the
  transition is a_t (I - b_t k_t k_t^T), so that a decay of 0 erases all; here
  one scalar is added to a matrix of rank 1 (SPLR). The authors' program scales
  q - d k to the length 1, and k with the factor sigmoid(c) too, which is then
  without effect: this is the paper's equation.
  """
  settings = CombaConfig

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of Comba's recurrence (arXiv 2506.02475, equation 5):

      S_t = (a_t I - sigmoid(c) b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T
      o_t = S_t^T (q_t - d k_t) / sqrt(K)

    They are those of the gated delta rule with three changes: the query loses
    d k; the state is read by sigmoid(c) k, not by k; and it is read before its
    decay.

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, H
    heads of values, K features of a key, U features of a value.

    Args:
      x_BLD: the input of the layer.
      q_BLJK, k_BLJK: queries and keys, whose length is not yet 1.
      v_BLHU: the values.
      ctx: the context of the layer.

    Returns:
      The inputs. Their query is (q - d k) / sqrt(K).
    """
    gated_delta_rule = super().inputs(
        x_BLD, q_BLJK=q_BLJK, k_BLJK=k_BLJK, v_BLHU=v_BLHU, ctx=ctx)
    unit_k_BLJK = gated_delta_rule.k_BLJK.astype(jnp.float32)

    # The superclass has divided the query by sqrt(K) already, so what leaves
    # it is d k / sqrt(K). Under muP, K is the size of the base model's heads.
    correction_JK = self._declare_factors(
        'correction', initial=self.sizes.correction)
    removed_BLJK = features.multiply_by_weights(
        unit_k_BLJK, self.base_key_dim ** -0.5 * correction_JK)
    corrected_q_BLJK = gated_delta_rule.q_BLJK - removed_BLJK

    # The vector sigmoid(c) k by which a step reads what it then erases.
    logit_JK = self._declare_factors('feedback', initial=1.0)
    erase_BLJK = features.multiply_by_weights(
        unit_k_BLJK, jax.nn.sigmoid(logit_JK))

    # A mark of 1 says that a token's step reads the state before its decay.
    B, L = x_BLD.shape[:2]
    return gated_delta_rule._replace(
        q_BLJK=corrected_q_BLJK, erase_BLJK=erase_BLJK,
        undecayed_BL1=jnp.ones((B, L, 1)))

  def _declare_factors(self, name: str, initial: float) -> jax.Array:
    """Declares one learned number for each of J heads of keys, and returns it
    repeated for the K features of a key, float32 [J, K]."""
    J, K = self.sizes.key_heads, self.sizes.key_dim
    factors_J = declare(
        self, name, shape=(J,), role=Role(self.key_axes[:1]),
        init=nn.initializers.constant(initial)).astype(jnp.float32)
    return jnp.broadcast_to(factors_J[:, None], (J, K))


@dataclasses.dataclass(frozen=True)
class GDN2Config(_Heads):
  """The fields of mixer gdn2. What is left open is as attention has it, and
  products of low rank are as wide as a head's value."""
  conv: int = field(4, 'tokens that a convolution sees; 0: no convolution',
                    most=MOST_TAPS, resume=SHAPES)
  rank: int = field(
      0, "rank of the decays' and gate's product; derived: value_dim",
      resume=SHAPES)
  negative: bool = field(
      False, 'rates up to 2, not 1: eigenvalues may be negative',
      resume=FUNCTION)

  def derived(self, config: ModelConfig):
    sizes = super().derived(config)
    return dataclasses.replace(sizes, rank=self.rank or sizes.value_dim)


@dataclasses.dataclass(frozen=True)
class KDAConfig(GDN2Config):
  """The fields of mixer kda: those of gdn2, and a preconditioner."""
  precondition: float = field(1.0, **PRECONDITION)


class KDA(DeltaNet):
  """Kimi Delta Attention: Gated DeltaNet with a decay of each feature of a key
  (Kimi Team 2025, "Kimi Linear", arXiv 2510.26692).

    log a   = -exp(A) softplus(W_up W_down x + bias)      K numbers of a head
    S_t     = (I - b_t k_t k_t^T) Diag(a_t) S_t-1 + b_t k_t v_t^T
    o_t     = S_t^T q_t
    y       = W_o (RMSNorm(o) * sigmoid(W_up' W_down' x)) a head by itself

  The state first decays, and what the key finds in it then is corrected. Both
  products of low rank have `rank`.
  """
  settings = KDAConfig

  def log_decay(self, x_BLD: jax.Array) -> jax.Array:
    return self.softplus_decay(
        self.project_low_rank('decay', x_BLD, self.sizes.key_dim), least=1.0)

  def gate(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    del ctx
    z_BLHU = self.project_low_rank('gate', x_BLD, self.sizes.value_dim)
    return jax.nn.sigmoid(z_BLHU)


class GDN2(KDA):
  """Gated DeltaNet 2: KDA that erases and writes by gates of their own, one for
  each feature of a key and one for each of a value, where KDA has one rate for
  both (Hatamizadeh, Choi and Kautz 2026, arXiv 2605.22791; as in
  flash-linear-attention's gdn2).

    b, w    = sigmoid(W_b x), sigmoid(W_w x)    [K] and [U] of a head; with
                                                `negative` b is doubled
    S_t     = (I - k_t (b_t * k_t)^T) Diag(a_t) S_t-1 + k_t (w_t * v_t)^T

  q, k, v, a, o and y are those of KDA, whose gate has no bias; the authors'
  has. Where all of b and of w are one number, it is KDA.
  """
  settings = GDN2Config

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of Gated DeltaNet 2, a recurrence over tokens t with a
    state S and decays a. Its gates b and w say, feature by feature, what is
    erased from the state and what is written to it:

      b, w = sigmoid(W_b x), sigmoid(W_w x)
      S_t  = (I - k_t (b_t * k_t)^T) Diag(a_t) S_t-1 + k_t (w_t * v_t)^T

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
    features of a key, H heads of values, U features of a value.

    Args:
      x_BLD: the layer's input, of which decays and gates are made.
      q_BLJK: the queries.
      k_BLJK: the keys.
      v_BLHU: the values.
      ctx: the context of the layer.

    Returns:
      Queries, keys, gated values w * v, the logarithm of the decay a, and b * k
      (`erase_BLJK`), by which the state is read for erasing.
    """
    # The gates b, over the features of a key, and w, over those of a value.
    sizes = self.sizes
    erase_logits_BLJK = self.project(
        'erase', x_BLD, axes=self.key_axes,
        shape=(sizes.key_heads, sizes.key_dim), ctx=ctx)
    erase_BLJK = jax.nn.sigmoid(erase_logits_BLJK.astype(jnp.float32))
    write_logits_BLHU = self.project(
        'write', x_BLD, axes=layer.VALUE_AXES,
        shape=(sizes.value_heads, sizes.value_dim), ctx=ctx)
    write_BLHU = jax.nn.sigmoid(write_logits_BLHU.astype(jnp.float32))

    # With the setting `negative`, b is doubled. Then more than all may be
    # erased, which flips the sign of a part of the state.
    most_erased = 1
    if sizes.negative:
      most_erased = 2

    # Keys have the length 1, and queries 1 / sqrt(K), where K is that of muP's
    # base model.
    unit_q_BLJK = features.normalize_length(q_BLJK, self.base_key_dim ** -0.5)
    unit_k_BLJK = features.normalize_length(k_BLJK)
    return recurrence.Inputs(
        q_BLJK=unit_q_BLJK, k_BLJK=unit_k_BLJK, v_BLHU=write_BLHU * v_BLHU,
        log_decay_BLHK=self.log_decay(x_BLD),
        erase_BLJK=most_erased * erase_BLJK * unit_k_BLJK)


class LowRank(layer.Recurrence):
  """The entry of KDA, and of GDN-2."""

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that a model can have this recurrence, whose decays are made by
    products of low rank.

    Raises:
      RequestError: if heads are wider than in the base model of muP, or for
        what no recurrence goes with.
    """
    super().check(config, stack)
    if config.head_widening != 1:
      raise RequestError(
          "model.parametrization is 'mup' and a head is "
          f'{config.head_widening:g} times as wide as at the base, but the '
          f'products of low rank of model.mixer {config.mixer!r} have the rank '
          'of the base: set model.mup_base_head_dim to model.head_dim, and '
          'widen by more heads')


@dataclasses.dataclass(frozen=True)
class States:
  """Each head has a query, a key and a value of its own."""
  heads: int = field(0, 'heads, each with a state; derived: num_heads',
                     resume=SHAPES)
  householders = 1

  @property
  def key_heads(self) -> int:
    return self.heads

  @property
  def value_heads(self) -> int:
    return self.heads


@dataclasses.dataclass(frozen=True)
class GLAConfig(States):
  """The fields of mixer gla. The paper's keys are half as wide as the values.
  """
  key_dim: int = field(
      0, "size of a head's query and key; derived: head_dim / 2",
      resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: head_dim",
                         resume=SHAPES)
  conv: int = field(0, 'tokens that a convolution sees; 0: no convolution',
                    most=MOST_TAPS, resume=SHAPES)
  rank: int = field(16, 'rank of the product for decays', least=1,
                    resume=SHAPES)
  temperature: float = field(16.0, 'divides the logarithms of the decays',
                             above=0, resume=FUNCTION)

  def derived(self, config: ModelConfig) -> 'GLAConfig':
    return dataclasses.replace(
        self, heads=self.heads or config.num_heads,
        key_dim=self.key_dim or -(-config.head_dim // 2),
        value_dim=self.value_dim or config.head_dim)


class GLA(layer.Layer):
  """Gated linear attention: a decay of each feature of a key, and no delta rule
  (Yang et al. 2023, arXiv 2312.06635).

    q, k, v = W_q x, W_k x, W_v x       with `conv`: each through silu(conv(.))
    log a   = logsigmoid(W_up W_down x + bias) / temperature      K of a head
    S_t     = Diag(a_t) S_t-1 + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    y       = W_o (RMSNorm(o) * silu(W_z x))              a head by itself

  The convolutions are an option of the authors' program, which the paper does
  not have.
  """
  settings = GLAConfig

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of gated linear attention (GLA), a recurrence over
    tokens t with a state S and a decay a for each feature of a key:

      log a = logsigmoid(W_up W_down x + bias) / temperature
      S_t   = Diag(a_t) S_t-1 + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
    features of a key, H heads of values, U features of a value.

    Args:
      x_BLD: the layer's input, of which decays are made.
      q_BLJK: the queries.
      k_BLJK: the keys.
      v_BLHU: the values.
      ctx: the context of the layer; not read here.

    Returns:
      Scaled queries, keys and values, and the logarithm of the decay.
    """
    del ctx
    # The decays. Dividing by the temperature brings them near to 1.
    sizes = self.sizes
    bias_HK = layers.bias(self, 'decay_bias',
                          shape=(sizes.heads, sizes.key_dim),
                          axes=('heads', 'head'))
    product_BLHK = self.project_low_rank('decay', x_BLD, sizes.key_dim)
    logit_BLHK = layers.add_bias(product_BLHK, bias_HK)
    log_decay_BLHK = jax.nn.log_sigmoid(logit_BLHK) / sizes.temperature

    # The scale is 1 / sqrt(K). Under muP it falls as 1 / K where heads are
    # wider than in the base model.
    scale = jnp.asarray(self.base_key_dim ** 0.5 / sizes.key_dim, q_BLJK.dtype)
    return recurrence.Inputs(q_BLJK=scale * q_BLJK, k_BLJK=k_BLJK,
                             v_BLHU=v_BLHU, log_decay_BLHK=log_decay_BLHK)


@dataclasses.dataclass(frozen=True)
class RetNetConfig(States):
  """The fields of mixer retnet. The paper's values are twice as wide as the
  keys."""
  key_dim: int = field(0, "size of a head's query and key; derived: head_dim",
                       resume=SHAPES)
  value_dim: int = field(0, "size of a head's value; derived: 2 head_dim",
                         resume=SHAPES)
  conv = 0

  def derived(self, config: ModelConfig) -> 'RetNetConfig':
    return dataclasses.replace(
        self, heads=self.heads or config.num_heads,
        key_dim=self.key_dim or config.head_dim,
        value_dim=self.value_dim or 2 * config.head_dim)


class RetNet(layer.Layer):
  """The retention of RetNet: a decay of each head that never changes, and no
  delta rule (Sun et al. 2023, arXiv 2307.08621).

    q, k, v = turn(W_q x), turn(W_k x), W_v x   by rotary positions
    a       = 1 - 2^(-5 - h)                    of head h = 0, 1, ...
    S_t     = a S_t-1 + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)
    y       = W_o (RMSNorm(o) * silu(W_z x))    a head by itself

  Queries and keys are turned if model.position is rope, as the paper's are, by
  the position of a token in its document.
  """
  settings = RetNetConfig

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of RetNet's retention, a recurrence over tokens t with a
    state S and a constant decay a for each head h = 0, 1, ...:

      a   = 1 - 2^(-5 - h)
      S_t = a S_t-1 + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
    features of a key, H heads of values, U features of a value.

    Args:
      x_BLD: the layer's input; not read here, as the decays are constant.
      q_BLJK: the queries.
      k_BLJK: the keys.
      v_BLHU: the values.
      ctx: the context of the layer, with the positions that queries and keys
        are rotated by.

    Returns:
      Rotated and scaled queries, rotated keys, values, and the logarithm of a.
    """
    del x_BLD
    config, sizes = self.config, self.sizes
    # Queries and keys are rotated by their positions, if these are rotary.
    rotate = positions.position_of(config).rotate
    if rotate:
      rope_config = config_of_rotated_heads(config)
      q_BLJK = rotate(q_BLJK, ctx.positions_BL, rope_config, ctx.length)
      k_BLJK = rotate(k_BLJK, ctx.positions_BL, rope_config, ctx.length)
    # The scale is 1 / sqrt(K). Under muP it falls as 1 / K where heads are
    # wider than in the base model.
    scale = jnp.asarray(self.base_key_dim ** 0.5 / sizes.key_dim, q_BLJK.dtype)

    # The decays, as logarithms. log1p is exact for decays near 1.
    log_decay_H = np.log1p(-2.0 ** (-5 - np.arange(sizes.heads)))
    log_decay_BLH1 = jnp.broadcast_to(
        jnp.asarray(log_decay_H, jnp.float32)[None, None, :, None],
        (*v_BLHU.shape[:3], 1))
    return recurrence.Inputs(q_BLJK=scale * q_BLJK, k_BLJK=k_BLJK,
                             v_BLHU=v_BLHU, log_decay_BLHK=log_decay_BLH1)


def config_of_rotated_heads(config: ModelConfig) -> ModelConfig:
  """Returns a config whose heads have the size of the queries and keys, which
  positions rotate."""
  return dataclasses.replace(config, head_dim=config.part(RetNetConfig).key_dim)


class Retention(layer.Recurrence):
  """The entry of RetNet."""
  positional = True

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that a model can have layers of retention (RetNet).

    Args:
      config: the config of the model.
      stack: the kind of stack: 'encoder', 'decoder' or 'encoder-decoder'.

    Raises:
      RequestError: if the position encoding adds a bias to attention's scores,
        which retention does not have; or if it rotates a key by the length of
        the row, which may grow after the key has entered the state.
    """
    super().check(config, stack)
    position = positions.position_of(config)
    if position.has_bias:
      raise RequestError(
          "model.mixer is 'retnet', which has no scores for the bias of "
          f'model.position {config.position!r}: choose rope or none')
    if not position.rotate:
      return

    # A key is turned once, as it enters the state. A scaling by the length of
    # the row would have to turn it again as the row grows.
    rope = config.part(RopeConfig)
    if positions.SCALINGS[rope.scaling].depends_on_length:
      raise RequestError(
          "model.mixer is 'retnet', whose state holds keys that were "
          'turned when the row was shorter, and model.rope.scaling '
          f'{rope.scaling!r} turns by the length of the row: choose '
          'another')
    # Positions turn a part of a head. Here heads are as wide as retnet.key_dim
    # says, not as model.head_dim.
    positions.check_rope(
        config_of_rotated_heads(config), head='model.retnet.key_dim')
