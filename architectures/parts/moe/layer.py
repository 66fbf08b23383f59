"""The mixture of experts, as a feed-forward part: a router and E networks.

y = shared(x) + sum over the chosen experts of gate * FFN_e(x)

With `shared_gate`, shared(x) is multiplied by sigmoid(w x) (Qwen1.5-MoE,
Qwen3-Next). With `zero_experts`, a token may choose so many experts more that
multiply nothing, FFN_e(x) = x (LongCat-Flash: Meituan 2025, arXiv 2509.01322,
section 2.1); with `zero_experts_skip`, FFN_e(x) = 0 (Zaya). With `latent_dim`,
experts read W_down x, and W_up multiplies their sum; the router and the shared
experts read x (Nemotron 3 Super).

The router runs in float32 (Switch, section 2.4), on TPU and GPU too, which
multiply float32 arrays in fewer digits unless told. Shared experts
(DeepSeekMoE: Dai et al. 2024) are one dense network, `shared_experts` times as
wide.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Optional

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context, Report
from architectures.parts.layers import ClampConfig
from architectures.parts.moe import dispatch
from architectures.parts.moe import routing
from architectures.parts.moe.dispatch import ExpertDropout, ExpertWeights
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.sharding import Role, declare
from common.errors import require

BIAS, TABLE = 'router_bias', 'experts_of'
# The first router_bias of experts that return nothing, as Zaya's: a new router
# skips a token only where it is sure.
FIRST_BIAS_OF_SKIPS = -1.0


class MoE(nn.Module):
  """The mixture: (x_BLD, context) -> (y_BLD, report).

  The report has the losses, weighted, and the panel of routing.report; the load
  of each expert, where a router's bias moves against it; and with
  context.keep_layers the `choices`.
  """
  settings = MoEConfig
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context
               ) -> tuple[jax.Array, Report]:
    """Computes a mixture of experts: y = sum over the chosen experts e of
    g_e(x) FFN_e(x), for the input x of each token.

    The suffixes name axes: B batch, L length, T = B L tokens, D d_model, E
    experts, A assignments (pairs of a token and its expert), I features of a
    narrower input, U features of the router's state, X hashed experts.

    Args:
      x_BLD: the input.
      ctx: the context of the layer: padding, random keys, and the state that
        the router of the layer before has reported.

    Returns:
      The output y [B, L, D], and a report of losses and figures.
    """
    config, moe = self.config, self.config.part(MoEConfig)
    B, L, D = x_BLD.shape
    # The T = B L tokens of the batch, and which of them are no padding.
    valid_T = ctx.real_tokens(B, L).reshape(-1)
    # If the length is sharded over `tensor`, XLA makes one axis of batch and
    # length by collecting all rows on every device.
    x_BLD = sharding.constrain(x_BLD, 'batch', 'length', 'embed')
    x_TD = x_BLD.reshape(-1, D)

    # Which experts see a token.
    logits_TE, state_TU = self._logits(x_TD, ctx)
    inputs = routing.RouterInputs(
        logits_TE=logits_TE,
        valid_T=valid_T,
        expert_TX=self._hashed(ctx, (B, L)),
        bias_E=self._bias(),
        key=self._noise_key(routing.router_of(moe).draws, ctx),
        groups=routing_groups(moe.group_size, B * L),
        train=not ctx.deterministic)
    routed = routing.route_tokens(moe, inputs)

    # The experts, on the input or a narrower product of it. With gate_inputs
    # the one gate of a token multiplies its input, and the output's gate is 1.
    if moe.latent_dim:
      x_BLI = self._product('latent_down', x_BLD, ctx)
      x_TD = x_BLI.reshape(-1, moe.latent_dim)
    if moe.gate_inputs:  # a token has one gate
      x_TD = x_TD * routed.gate_A[:, None].astype(x_TD.dtype)
      routed = routed.replace(gate_A=(routed.gate_A > 0).astype(jnp.float32))
    x_TD = x_TD.astype(config.compute_dtype)
    y_TD, kept_A = self._experts(x_TD, routed=routed, inputs=inputs, ctx=ctx)
    # Zero experts return their input: a token is added as often as its gates
    # for them say. They always have room.
    if moe.zero_experts:
      zero_A, gate_T = routing.find_zero_experts(moe, routed)
      if not moe.zero_experts_skip:
        y_TD = y_TD + gate_T[:, None].astype(y_TD.dtype) * x_TD
      kept_A = kept_A | zero_A

    # The report.
    report = routing.report_routing(
        moe, routed=routed, logits_TE=inputs.logits_TE, valid_T=valid_T,
        kept_A=kept_A, shards=dispatch.num_expert_shards(), rows=B)
    if inputs.bias_E is not None:
      # The training step moves the bias at this path by the load.
      path = '/'.join((*self.path, BIAS))
      report = report.replace(loads={path: report.health['load_E']})
    if state_TU is not None:
      report = report.replace(router_BLU=sharding.constrain(
          state_TU.reshape(B, L, -1), 'batch', 'length', None))
    if ctx.keep_layers:
      experts = {}
      for name, x_TE in choices(routed, kept_A).items():
        experts[name] = x_TE.reshape(B, L, -1)
      report = report.replace(experts=experts)

    # Out of the space of the experts, and the shared experts beside them.
    y_BLD = y_TD.reshape(B, L, -1)
    if moe.latent_dim:
      y_BLD = self._product('latent_up', y_BLD, ctx)
    y_BLD = sharding.constrain(y_BLD, 'batch', 'length', 'embed')
    if moe.shared_experts:
      shared = layers.FFN(config, kind=moe.ffn,
                          width=moe.shared_experts * moe.d_ff, name='shared')
      shared_BLD, _ = shared(x_BLD, ctx)
      y_BLD = y_BLD + self._gated(shared_BLD, x_BLD)
    return y_BLD, report

  def _experts(self, x_TD: jax.Array, routed: routing.Routing,
               inputs: routing.RouterInputs, ctx: Context
               ) -> tuple[jax.Array, jax.Array]:
    """Applies the experts to the tokens that go to them.

    The suffixes name axes: T tokens, D features, A assignments (pairs of a
    token and an expert that it goes to).

    Args:
      x_TD: the tokens.
      routed: what the router decided: the assignments and their gates.
      inputs: the inputs of the router, which say how tokens are grouped.
      ctx: the context of the layer.

    Returns:
      For each token, the sum of its experts' results weighed by their gates,
      [T, D]; and which assignments the experts had room for, bool [A].
    """
    # Zero experts return their input, and are no part of the computation.
    config, moe = self.config, self.config.part(MoEConfig)
    # Parameters are initialised by the plain products, so that no platform
    # refuses them.
    if self.is_initializing():
      moe = dataclasses.replace(moe, grouped_kernel='xla')
    clamp = config.find_part(ClampConfig)
    hidden = layers.HiddenUnits(kind=moe.ffn, clamp=clamp)
    return dispatch.compute_experts(
        moe, x_TD, routed=routing.void_zero_experts(moe, routed),
        w=self._weights(), hidden=hidden, groups=inputs.groups,
        dropout=self._dropout(ctx), train=inputs.train,
        recompute=layers.remat_of_model(config).recomputes_products)

  def _product(self, name: str, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Projects tokens from d_model features to the fewer features that experts
    read (latent_dim), or back.

    The suffixes name axes: B batch, L length, D input features, U output
    features.

    Args:
      name: 'latent_down' for the way to the experts, or 'latent_up' for the way
        back. It is the name of the weight, which is declared here.
      x_BLD: the input.
      ctx: the context of the layer.

    Returns:
      The product, [B, L, U].
    """
    config = self.config
    latent_dim = config.part(MoEConfig).latent_dim
    shape: tuple[int, int] = (config.d_model, latent_dim)
    axes: tuple[str | None, str | None] = ('embed', None)
    # The product back ends in the residual stream, and is initialised for that.
    is_up = name == 'latent_up'
    if is_up:
      shape, axes = (latent_dim, config.d_model), (None, 'embed')
    return layers.dense(
        self, name, spec='BLD,DU->BLU', x=x_BLD, shape=shape, axes=axes,
        with_bias=config.ffn_bias, residual=is_up,
        deterministic=ctx.deterministic)

  def _gated(self, shared_BLD: jax.Array, x_BLD: jax.Array) -> jax.Array:
    """Multiplies the results of the shared experts, which see every token, by a
    gate sigmoid(w x), one number for each token. Without moe.shared_gate they
    are returned as they are.

    The suffixes name axes: B batch, L length, D d_model, and U = 1 gate.

    Args:
      shared_BLD: the results of the shared experts.
      x_BLD: the layer's input, of which the gate is made.

    Returns:
      The gated results, [B, L, D].
    """
    config = self.config
    if not config.part(MoEConfig).shared_gate:
      return shared_BLD
    gate_DU = layers.weight(
        self, 'shared_gate', shape=(config.d_model, 1), axes=('embed', None),
        output=True)
    gate_BLU = layers.einsum(
        'BLD,DU->BLU', x_BLD, w=gate_DU, dtype=config.compute_dtype)
    # A token has a single gate however wide the model is. So muP divides its
    # logit by `widening`, the ratio of the model's width to its base model's,
    # as it does the router's logits. Otherwise `widening` is 1.
    return shared_BLD * jax.nn.sigmoid(gate_BLU / config.widening)

  def _logits(self, x_TD: jax.Array, ctx: Context
              ) -> tuple[Optional[jax.Array], Optional[jax.Array]]:
    """Computes the router's logits, one for each token and expert:

      logits = x W / widening + bias + noise

    `widening` is muP's factor, the ratio of the model's width to that of its
    base model, which is 1 without muP. It divides the product alone, and
    neither the bias nor the noise. x is the token with jitter, or what an MLP
    makes of it (with moe.router_dim). The parts that the config does not ask
    for are left out.

    The suffixes name axes: T tokens, D d_model, E experts, U features of the
    router's state.

    Args:
      x_TD: the tokens.
      ctx: the context of the layer, which says whether this is training. Jitter
        and noise are added in training only.

    Returns:
      The logits, float32 [T, E]; None for a router that has none. And the state
      of the router, float32 [T, U]; None without moe.router_dim.
    """
    moe = self.config.part(MoEConfig)
    if not routing.router_of(moe).has_logits:
      return None, None

    # The router's input, times a jitter in training (Switch, section 2.4).
    x_TD = x_TD.astype(jnp.float32)
    jitter_key = self._noise_key(moe.jitter, ctx)
    if jitter_key is not None:
      jitter_TD = jax.random.uniform(
          jitter_key, x_TD.shape, dtype=jnp.float32, minval=1 - moe.jitter,
          maxval=1 + moe.jitter)
      x_TD = x_TD * jitter_TD

    # The input of the product: the token, or what an MLP makes of the router's
    # state, whose features are not split over devices.
    state_TU = None
    input_TD = x_TD
    axis_of_input: Optional[str] = 'embed'
    if moe.router_dim:
      state_TU = self._router_state(x_TD, ctx)
      input_TD = self._router_mlp(state_TU)
      axis_of_input = None

    # The product with a vector of each expert. gpt-oss has a bias as well.
    router_DE = layers.weight(
        self, 'router', shape=(input_TD.shape[1], moe.all_experts),
        axes=(axis_of_input, None), output=True, scale=moe.scale(self.config))
    logits_TE = _multiply_in_float32(input_TD, router_DE)
    logits_TE = logits_TE / self.config.widening
    if moe.logit_bias:
      bias_E = layers.bias(
          self, 'logit_bias', shape=(moe.all_experts,), axes=(None,),
          scale=moe.scale(self.config))
      logits_TE = layers.add_bias(logits_TE, bias_E)

    # Noise on the logits, in training.
    noise_key = self._noise_key(moe.logit_noise, ctx)
    if noise_key is not None:
      noise_TE = jax.random.normal(noise_key, logits_TE.shape)
      logits_TE += moe.logit_noise * noise_TE
    return logits_TE, state_TU

  def _router_state(self, x_TD: jax.Array, ctx: Context) -> jax.Array:
    """Computes the state of a router with a memory (Zaya, in transformers):

      r_n = W x + b + s * r_(n-1)

    r_(n-1) is the state of the last router before this one, for the same token,
    and 0 if there is none; s is a learned factor of each feature, 1 at first.
    With moe.router_memory=False, r_n = W x + b.

    The suffixes name axes: T tokens, D d_model, U features of the state
    (moe.router_dim).

    Args:
      x_TD: the router's input x, in float32.
      ctx: the context of the layer, with r_(n-1), [batch, length, U].

    Returns:
      r_n, float32 [T, U].
    """
    # The part that this layer makes of the token.
    moe = self.config.part(MoEConfig)
    down_DU = layers.weight(
        self, 'router_down', shape=(x_TD.shape[1], moe.router_dim),
        axes=('embed', None))
    bias_U = layers.bias(
        self, 'router_down_bias', shape=(moe.router_dim,), axes=(None,))
    state_TU = _multiply_in_float32(x_TD, down_DU)
    state_TU = layers.add_bias(state_TU, bias_U)
    if not moe.router_memory:
      return state_TU

    # The part that the last router has left. The factor is declared in a first
    # layer too, which reads none, so that all layers have the same parameters.
    factor_U = declare(self, 'router_factor', init=nn.initializers.ones,
                       shape=(moe.router_dim,), role=Role((None,)))
    if ctx.shared.router_BLU is None:
      return state_TU
    previous_TU = ctx.shared.router_BLU.reshape(state_TU.shape)
    return state_TU + factor_U.astype(jnp.float32)[None] * previous_TU

  def _router_mlp(self, state_TU: jax.Array) -> jax.Array:
    """Computes what a router with a state r makes of it, for the product with
    the experts' vectors (Zaya, in transformers):

      y = gelu(W_2 gelu(W_1 rms(r) + b_1) + b_2),   rms(r): RMSNorm with a scale

    Args:
      state_TU: r, float32 [T tokens, U features].

    Returns:
      y, float32 [T, U].
    """
    # The norm, and two layers of the same size.
    size = state_TU.shape[1]
    scale_U = declare(self, 'router_norm', init=nn.initializers.ones,
                      shape=(size,), role=Role((None,)))
    y_TU = layers.rmsnorm(state_TU, scale_U, self.config.norm_eps)
    for name in ('router_hidden_1', 'router_hidden_2'):
      w_UU = layers.weight(self, name, shape=(size, size),
                           axes=(None, 'latent'))
      bias_U = layers.bias(self, f'{name}_bias', shape=(size,), axes=(None,))
      z_TU = layers.add_bias(_multiply_in_float32(y_TU, w_UU), bias_U)
      y_TU = jax.nn.gelu(z_TU, approximate=False)
    return y_TU

  def _noise_key(self, wanted: float, ctx: Context) -> Optional[jax.Array]:
    """Returns a key in training, where noise is wanted; else None."""
    if not wanted or ctx.deterministic:
      return None
    return self.make_rng('router')

  def _hashed(self, ctx: Context, shape: tuple[int, int]
              ) -> Optional[jax.Array]:
    """Returns the experts that a fixed hash gives each token by its id.

    The suffixes name axes: T tokens, X experts of a token, V vocabulary.

    Args:
      ctx: the context of the layer, with the tokens' ids.
      shape: (batch, length) of the layer's input. The ids may have a batch of 1
        that stands for all rows.

    Returns:
      int32 [T, X]; None for a router that does not hash.
    """
    config, moe = self.config, self.config.part(MoEConfig)
    if not routing.router_of(moe).hashes:
      return None
    # The hash is computed, unless the router keeps it as a table among the
    # parameters, as some published models do.
    tokens_T = jnp.broadcast_to(ctx.tokens_BL, shape).reshape(-1)
    if not routing.router_of(moe).has_table:
      return routing.experts_of_token_ids(moe, tokens_T)

    def hash_vocabulary(key: jax.Array, shape: tuple[int, ...],
                        dtype: jnp.dtype) -> jax.Array:
      """Initialises the table with the hashed experts of each token."""
      del key
      ids_V = jnp.arange(shape[0])
      return routing.experts_of_token_ids(moe, ids_V).astype(dtype)

    # The numbers of experts are stored as float32, like other parameters; no
    # gradient changes them.
    table_VX = declare(
        self, TABLE, init=hash_vocabulary, shape=(config.vocab_size, moe.top_k),
        role=Role((None, None)), dtype=jnp.float32)
    return jax.lax.stop_gradient(table_VX)[tokens_T].astype(jnp.int32)

  def _bias(self) -> Optional[jax.Array]:
    """Declares the bias by which a router chooses experts, but does not weigh
    them (DeepSeek-V3's balance without a loss). No gradient moves it, but
    `move_biases` does.

    Returns:
      The bias, float32 [E experts]; None where the router has none.
    """
    moe = self.config.part(MoEConfig)
    if not routing.router_of(moe).has_bias:
      return None

    def initial_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
                     ) -> jax.Array:
      """Returns zeros. The last experts, those without a network, begin with
      another number if they are skips."""
      bias_E = nn.initializers.zeros(key, shape, dtype)
      if not moe.zero_experts_skip:
        return bias_E
      return bias_E.at[moe.num_experts:].set(FIRST_BIAS_OF_SKIPS)

    return declare(self, BIAS, init=initial_bias, shape=(moe.all_experts,),
                   role=Role((None,)), dtype=jnp.float32)

  def _dropout(self, ctx: Context) -> Optional[ExpertDropout]:
    """Returns the dropout of the hidden units in training, if there is any."""
    rate = self.config.part(MoEConfig).expert_dropout
    if not rate or ctx.deterministic:
      return None
    seed = jax.random.bits(self.make_rng('dropout'))
    return ExpertDropout(seed=seed, rate=rate)

  def _weights(self) -> ExpertWeights:
    """Declares the weights of the experts' networks as parameters of this
    layer, and returns them in the compute dtype.

    The suffixes name axes: E experts, D features that they read and return, F
    hidden units.
    """
    # The sizes by logical axis: the features that experts read and return, and
    # their hidden units.
    config, moe = self.config, self.config.part(MoEConfig)
    size = {'embed': moe.latent_dim or config.d_model, 'mlp': moe.d_ff}

    def weight(name: str, into: str, out: str) -> jax.Array:
      """Returns a matrix of each expert."""
      matrix = layers.weight(
          self, name, shape=(moe.num_experts, size[into], size[out]),
          axes=('experts', into, out), in_axes=(1,), batch_axes=(0,),
          residual=name == 'down',
          scale=moe.scale(config, is_down=name == 'down'))
      return matrix.astype(config.compute_dtype)

    def bias(name: str, axis: str) -> Optional[jax.Array]:
      """Returns a bias of each expert, where networks have biases."""
      if not config.ffn_bias:
        return None
      vector = layers.bias(
          self, name, shape=(moe.num_experts, size[axis]),
          axes=('experts', axis), batch_axes=(0,), scale=moe.scale(config))
      return vector.astype(config.compute_dtype)

    # Parameters draw their initial values in this order, so that another order
    # would be another model by the same seed.
    gate_EDF = None
    gate_bias_EF = None
    gated = layers.FFNS[moe.ffn].gated
    up_EDF = weight('up', 'embed', 'mlp')
    if gated:
      gate_EDF = weight('gate', 'embed', 'mlp')
    down_EFD = weight('down', 'mlp', 'embed')
    up_bias_EF = bias('up_bias', 'mlp')
    if gated:
      gate_bias_EF = bias('gate_bias', 'mlp')
    down_bias_ED = bias('down_bias', 'embed')
    return ExpertWeights(
        up_EDF=up_EDF, down_EFD=down_EFD, gate_EDF=gate_EDF,
        up_bias_EF=up_bias_EF, gate_bias_EF=gate_bias_EF,
        down_bias_ED=down_bias_ED)


def zero_router_state(config: ModelConfig, x_BLD: jax.Array
                      ) -> Optional[jax.Array]:
  """Returns the state that the first router of a stack is given in place of one
  from a router before it: zeros. So all layers have inputs of the same
  structure, as a scan over layers needs.

  The suffixes name axes: B batch, L length, D d_model, U features of the state
  (moe.router_dim).

  Args:
    config: the config of a model with experts.
    x_BLD: the input of the first layer, which gives B and L.

  Returns:
    Zeros, float32 [B, L, U]; None for a model whose routers have no state.
  """
  moe = config.part(MoEConfig)
  if not moe.router_dim:
    return None
  zeros_BLU = jnp.zeros((*x_BLD.shape[:2], moe.router_dim), jnp.float32)
  return sharding.constrain(zeros_BLU, 'batch', 'length', None)


def _multiply_in_float32(x_TI: jax.Array, w_IO: jax.Array) -> jax.Array:
  """Returns x W in all digits of float32, as routers need it."""
  y_TO = jnp.einsum('TI,IO->TO', x_TI, w_IO.astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST)
  return checkpoint_name(y_TO, layers.NAME_OF_PRODUCT)


def choices(routed: routing.Routing, kept_A: jax.Array
            ) -> dict[str, jax.Array]:
  """Returns what a router did with each token, as tables by token and expert.

  The suffixes name axes: T tokens, E experts, A assignments. An assignment is a
  pair of a token and an expert that it goes to.

  Args:
    routed: the assignments of the tokens, and the router's probabilities.
    kept_A: bool, the assignments that the expert had room for.

  Returns:
    A dict of arrays [T, E]:
      probabilities: float32, the router's.
      chosen: bool, whether the token chose the expert, even if there was no
        room.
      gates: float32, the weight of the expert's output, which is 0 where it was
        not chosen or had no room.
  """
  def table(value_A: jax.Array) -> jax.Array:
    """Returns the values by token and expert, [T, E]. A void assignment has the
    expert number E, which is outside the table and dropped."""
    zeros_TE = jnp.zeros_like(routed.probs_TE)
    return zeros_TE.at[routed.token_A, routed.expert_A].add(
        value_A, mode='drop')

  return dict(probabilities=routed.probs_TE,
              chosen=table(jnp.ones_like(routed.gate_A)) > 0,
              gates=table(jnp.where(kept_A, routed.gate_A, 0)))


def move_biases(config: ModelConfig, params: dict[str, Any],
                loads: Mapping[str, jax.Array], applied: jax.typing.ArrayLike
                ) -> dict[str, Any]:
  """Moves the biases of the routers against the load of their experts
  (DeepSeek-V3's balance without a loss; Wang et al. 2024, arXiv 2408.15664):
  the bias of an expert with more tokens than the mean falls by moe.bias_rate,
  so that it is chosen less often, and that of one with fewer rises.

  The training step calls it after the optimiser. The optimiser leaves these
  biases alone, as their gradient is zero.

  Args:
    config: the config of the model.
    params: the model's parameters.
    loads: the loads of the experts, by the path of their router's bias, whose
      parts are joined by '/'. If it is empty, nothing moves.
    applied: 1, or 0 in a training step that is to change nothing.

  Returns:
    The parameters, with the biases moved.
  """
  def move_if_router_bias(path: tuple, x: jax.Array) -> jax.Array:
    """Returns a parameter, moved if it is the bias of a router."""
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name not in loads:
      return x
    rate = config.part(MoEConfig).bias_rate
    return routing.move_bias_against_load(x, loads[name], applied * rate)

  return jax.tree_util.tree_map_with_path(move_if_router_bias, params)


def without_capacity(config: ModelConfig) -> ModelConfig:
  """Returns the config for generating text, in which experts have no capacity
  and take all tokens that choose them.

  Text is generated a token at a time. Over so few tokens a capacity would be
  one or two, and whether a row is served would depend on the other rows of the
  batch, padding included.
  """
  moe = config.find_part(MoEConfig)
  if moe is None or routing.router_of(moe).experts_choose:
    return config  # experts that choose tokens choose as many as their capacity
  # 'sorted' computes a padded batch, whose size is the capacity, so it has to
  # be replaced.
  dispatch_name = moe.dispatch
  if dispatch_name == 'sorted':
    dispatch_name = 'dropless'
  return config.with_part(MoEConfig, eval_capacity_factor=0.0, group_size=0,
                          dispatch=dispatch_name)


def routing_groups(size: int, tokens: int) -> int:
  """Returns how many groups of `size` tokens there are; 0: one of all. Fewer
  tokens than a group (in decoding) are one group."""
  if not size or tokens <= size:
    return 1
  require(tokens % size == 0,
          f'model.moe.group_size is {size}, which does not divide the {tokens} '
          'tokens of a batch: choose a divisor, or 0 for one group')
  return tokens // size
