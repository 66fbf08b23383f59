"""The mixture of experts, as a feed-forward part: a router and E networks.

y = shared(x) + sum over the chosen experts of gate * FFN_e(x)

With `shared_gate`, shared(x) is multiplied by sigmoid(w x) (Qwen1.5-MoE,
Qwen3-Next). With `zero_experts`, a token may choose so many experts more that
multiply nothing, FFN_e(x) = x (LongCat-Flash: Meituan 2025, arXiv 2509.01322,
section 2.1). With `latent_dim`, experts read W_down x, and W_up multiplies
their sum; the router and the shared experts read x (Nemotron 3 Super).

The router runs in float32 (Switch, section 2.4), on TPU and GPU too, which
multiply float32 arrays in fewer digits unless told. Shared experts
(DeepSeekMoE: Dai et al. 2024) are one dense network, `shared_experts` times as
wide.
"""

from collections.abc import Mapping
from typing import Any, Optional

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.layers import ClampConfig
from architectures.parts.moe import dispatch
from architectures.parts.moe import routing
from architectures.parts.moe.dispatch import ExpertDropout, ExpertWeights
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.report import Report
from architectures.parts.sharding import Role, declare
from common.errors import require

BIAS, TABLE = 'router_bias', 'experts_of'


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
    c, m = self.config, self.config.part(MoEConfig)
    B, L, D = x_BLD.shape
    valid_T = ctx.real_tokens(B, L).reshape(-1)
    # If the length is sharded over `tensor`, XLA makes one axis of batch and
    # length by collecting all rows on every device.
    x_BLD = sharding.constrain(x_BLD, 'batch', 'length', 'embed')
    x_TD = x_BLD.reshape(-1, D)

    # Which experts see a token.
    inputs = routing.RouterInputs(
        logits_TE=self._logits(x_TD, ctx),
        valid_T=valid_T,
        expert_TX=self._hashed(ctx, (B, L)),
        bias_E=self._bias(),
        key=self._noise_key(routing.router_of(m).draws, ctx),
        groups=routing_groups(m.group_size, B * L),
        train=not ctx.deterministic)
    routed = routing.route_tokens(m, inputs)

    # The experts.
    if m.latent_dim:
      x_TD = self._product('latent_down', x_BLD, ctx).reshape(-1, m.latent_dim)
    if m.gate_inputs:  # a token has one gate
      x_TD = x_TD * routed.gate_A[:, None].astype(x_TD.dtype)
      routed = routed.replace(gate_A=(routed.gate_A > 0).astype(jnp.float32))
    x_TD = x_TD.astype(c.compute_dtype)
    y_TD, kept_A = self._experts(x_TD, routed, inputs, ctx)
    if m.zero_experts:
      zero_A, gate_T = routing.find_zero_experts(m, routed)
      y_TD = y_TD + gate_T[:, None].astype(y_TD.dtype) * x_TD
      kept_A = kept_A | zero_A

    # The report.
    report = routing.report_routing(
        m, routed, logits_TE=inputs.logits_TE, valid_T=valid_T, kept_A=kept_A,
        shards=dispatch.num_expert_shards(), rows=B)
    if inputs.bias_E is not None:
      path = '/'.join((*self.path, BIAS))
      report = report.replace(loads={path: report.health['load_E']})
    if ctx.keep_layers:
      experts = {}
      for name, x_TE in choices(routed, kept_A).items():
        experts[name] = x_TE.reshape(B, L, -1)
      report = report.replace(experts=experts)

    # Out of the space of the experts, and the shared experts beside them.
    y_BLD = y_TD.reshape(B, L, -1)
    if m.latent_dim:
      y_BLD = self._product('latent_up', y_BLD, ctx)
    y_BLD = sharding.constrain(y_BLD, 'batch', 'length', 'embed')
    if m.shared_experts:
      shared = layers.FFN(c, m.ffn, width=m.shared_experts * m.d_ff,
                          name='shared')
      shared_BLD, _ = shared(x_BLD, ctx)
      y_BLD = y_BLD + self._gated(shared_BLD, x_BLD)
    return y_BLD, report

  def _experts(self, x_TD: jax.Array, routed: routing.Routing,
               inputs: routing.RouterInputs, ctx: Context
               ) -> tuple[jax.Array, jax.Array]:
    """Returns what the experts make of their tokens, y_TD, and which
    assignments found room, bool [A]."""
    c, m = self.config, self.config.part(MoEConfig)
    hidden = layers.HiddenUnits(kind=m.ffn, clamp=c.find(ClampConfig))
    return dispatch.compute_experts(
        m, x_TD, routed=routing.void_zero_experts(m, routed), w=self._weights(),
        hidden=hidden, groups=inputs.groups, dropout=self._dropout(ctx),
        train=inputs.train,
        recompute=layers.remat_of_model(c).recomputes_products)

  def _product(self, name: str, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns a product into the space of the experts, or out of it."""
    c = self.config
    latent_dim = c.part(MoEConfig).latent_dim
    shape: tuple[int, int] = (c.d_model, latent_dim)
    axes: tuple[str | None, str | None] = ('embed', None)
    out = name == 'latent_up'
    if out:
      shape, axes = (latent_dim, c.d_model), (None, 'embed')
    return layers.dense(
        self, name, spec='BLD,DU->BLU', x=x_BLD, shape=shape, axes=axes,
        with_bias=c.ffn_bias, residual=out, deterministic=ctx.deterministic)

  def _gated(self, shared_BLD: jax.Array, x_BLD: jax.Array) -> jax.Array:
    """Returns what the shared experts add. A token has one gate at every width,
    so muP divides the gate's logit as it divides the router's."""
    c = self.config
    if not c.part(MoEConfig).shared_gate:
      return shared_BLD
    gate_DU = layers.weight(
        self, 'shared_gate', shape=(c.d_model, 1), axes=('embed', None),
        output=True)
    gate_BLU = layers.einsum(
        'BLD,DU->BLU', x_BLD, w=gate_DU, dtype=c.compute_dtype)
    return shared_BLD * jax.nn.sigmoid(gate_BLU / c.widening)

  def _logits(self, x_TD: jax.Array, ctx: Context) -> Optional[jax.Array]:
    """Returns the router's logits, float32 [T, E]; None where it has none."""
    m = self.config.part(MoEConfig)
    if not routing.router_of(m).has_logits:
      return None
    router_DE = layers.weight(
        self, 'router', shape=(x_TD.shape[1], m.all_experts),
        axes=('embed', None), output=True)
    x_TD = x_TD.astype(jnp.float32)
    key = self._noise_key(m.jitter, ctx)
    if key is not None:  # Switch, section 2.4: multiplicative jitter
      jitter_TD = jax.random.uniform(
          key, x_TD.shape, dtype=jnp.float32, minval=1 - m.jitter,
          maxval=1 + m.jitter)
      x_TD = x_TD * jitter_TD

    logits_TE = jnp.einsum('TD,DE->TE', x_TD, router_DE.astype(jnp.float32),
                           precision=jax.lax.Precision.HIGHEST)
    logits_TE = checkpoint_name(logits_TE, layers.NAME_OF_PRODUCT)
    logits_TE = logits_TE / self.config.widening  # muP's output multiplier
    if m.logit_bias:  # gpt-oss; muP's multiplier is not the bias's
      bias_E = layers.bias(
          self, 'logit_bias', shape=(m.all_experts,), axes=(None,))
      logits_TE = layers.add_bias(logits_TE, bias_E)
    key = self._noise_key(m.logit_noise, ctx)
    if key is not None:
      logits_TE += m.logit_noise * jax.random.normal(key, logits_TE.shape)
    return logits_TE

  def _noise_key(self, wanted: float, ctx: Context) -> Optional[jax.Array]:
    """Returns a key in training, where noise is wanted; else None."""
    if not wanted or ctx.deterministic:
      return None
    return self.make_rng('router')

  def _hashed(self, ctx: Context, shape: tuple[int, int]
              ) -> Optional[jax.Array]:
    """Returns the experts by the tokens' ids, int32 [T, X], for routers that
    hash; else None."""
    c, m = self.config, self.config.part(MoEConfig)
    if not routing.router_of(m).hashes:
      return None
    tokens_T = jnp.broadcast_to(ctx.tokens_BL, shape).reshape(-1)
    if not routing.router_of(m).has_table:
      return routing.experts_of_token_ids(m, tokens_T)

    def hashes(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
               ) -> jax.Array:
      """Initialises the table with the hashed experts of each token."""
      del key
      ids_V = jnp.arange(shape[0])
      return routing.experts_of_token_ids(m, ids_V).astype(dtype)

    table_VX = declare(
        self, TABLE, hashes, shape=(c.vocab_size, m.top_k),
        role=Role((None, None)), dtype=jnp.float32)
    return jax.lax.stop_gradient(table_VX)[tokens_T].astype(jnp.int32)

  def _bias(self) -> Optional[jax.Array]:
    """Returns DeepSeek-V3's bias, [E], which no gradient moves, but
    `move_biases` does; None where the router has none."""
    m = self.config.part(MoEConfig)
    if not routing.router_of(m).has_bias:
      return None
    return declare(
        self, BIAS, nn.initializers.zeros, shape=(m.all_experts,),
        role=Role((None,)), dtype=jnp.float32)

  def _dropout(self, ctx: Context) -> Optional[ExpertDropout]:
    """Returns the dropout of the hidden units in training, if there is any."""
    rate = self.config.part(MoEConfig).expert_dropout
    if not rate or ctx.deterministic:
      return None
    seed = jax.random.bits(self.make_rng('dropout'))
    return ExpertDropout(seed=seed, rate=rate)

  def _weights(self) -> ExpertWeights:
    """Declares the weights of the experts; returns them in the compute dtype.
    """
    c, m = self.config, self.config.part(MoEConfig)
    size = {'embed': m.latent_dim or c.d_model, 'mlp': m.d_ff}

    def weight(name: str, into: str, out: str) -> jax.Array:
      """Returns a matrix of each expert."""
      matrix = layers.weight(
          self, name, shape=(m.num_experts, size[into], size[out]),
          axes=('experts', into, out), in_axes=(1,), batch_axes=(0,),
          residual=name == 'down')
      return matrix.astype(c.compute_dtype)

    def bias(name: str, axis: str) -> Optional[jax.Array]:
      """Returns a bias of each expert, where networks have biases."""
      if not c.ffn_bias:
        return None
      vector = layers.bias(
          self, name, shape=(m.num_experts, size[axis]),
          axes=('experts', axis), batch_axes=(0,))
      return vector.astype(c.compute_dtype)

    # Parameters are drawn in this order.
    gate_EDF = gate_bias_EF = None
    gated = layers.FFNS[m.ffn].gated
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


def choices(routed: routing.Routing, kept_A: jax.Array
            ) -> dict[str, jax.Array]:
  """Returns what a router did with each token, [T, E] of each name.

  probabilities: the router's, float32. chosen: bool, whether the token goes to
  the expert, or would if there were room. gates: float32, the weight of the
  expert's output, which is 0 where it was not chosen or had no room.
  """
  def table(value_A: jax.Array) -> jax.Array:
    """Returns the values by token and expert; void ones fall outside."""
    zeros_TE = jnp.zeros_like(routed.probs_TE)
    return zeros_TE.at[routed.token_A, routed.expert_A].add(
        value_A, mode='drop')

  return dict(probabilities=routed.probs_TE,
              chosen=table(jnp.ones_like(routed.gate_A)) > 0,
              gates=table(jnp.where(kept_A, routed.gate_A, 0)))


def move_biases(c: ModelConfig, params: dict[str, Any],
                loads: Mapping[str, jax.Array], applied: jax.typing.ArrayLike
                ) -> dict[str, Any]:
  """Returns params with each router's bias moved against its load.

  The training step calls it after the optimiser, whose gradient of a bias is
  zero.

  Args:
    c: the model.
    params: the model's parameters, arrays without boxes.
    loads: the load of each expert, by the path of its router's bias; without
      any, params stay as they are.
    applied: 0 in a step to leave out, else 1.
  """
  def move(path: tuple, x: jax.Array) -> jax.Array:
    """Returns a parameter, moved where it is a bias of a router."""
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    if path not in loads:
      return x
    rate = c.part(MoEConfig).bias_rate
    return routing.move_bias_against_load(x, loads[path], applied * rate)

  return jax.tree_util.tree_map_with_path(move, params)


def without_capacity(c: ModelConfig) -> ModelConfig:
  """Returns the config to write text by, a token at a time.

  Over the tokens of one step a capacity would be one or two, and whether a row
  is served would hang on who else is in the batch, padding included.
  """
  moe = c.find(MoEConfig)
  if moe is None or routing.router_of(moe).experts_choose:
    return c  # the capacity of experts that choose is what they choose
  way = moe.dispatch
  if way == 'sorted':
    way = 'dropless'
  return c.with_part(MoEConfig, eval_capacity_factor=0.0, group_size=0,
                     dispatch=way)


def routing_groups(size: int, tokens: int) -> int:
  """Returns how many groups of `size` tokens there are; 0: one of all. Fewer
  tokens than a group (in decoding) are one group."""
  if not size or tokens <= size:
    return 1
  require(tokens % size == 0,
          f'model.moe.group_size is {size}, which does not divide the {tokens} '
          'tokens of a batch: choose a divisor, or 0 for one group')
  return tokens // size
