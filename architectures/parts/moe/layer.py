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
from typing import Any

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
from architectures.parts.moe.dispatch import Dropout, Weights
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.sharding import Role, declare
from common.errors import require

BIAS, TABLE = 'router_bias', 'experts_of'


class MoE(nn.Module):
  """(x_BLD, context) -> (y_BLD, {'losses': weighted, 'health': raw, 'loads':
  the load of each expert, by the path of the bias that it moves; with
  context.keep_layers 'experts': the `choices`})."""
  settings = MoEConfig
  config: ModelConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context):
    c, m = self.config, self.config.part(MoEConfig)
    B, L, D = x_BLD.shape
    valid_T = ctx.counted(B, L).reshape(-1)
    # If the length is sharded over `tensor`, XLA makes one axis of batch and
    # length by collecting all rows on every device.
    x_BLD = sharding.constrain(x_BLD, 'batch', 'length', 'embed')
    x_TD = x_BLD.reshape(-1, D)
    inputs = routing.Inputs(
        self._logits(x_TD, ctx), valid_T, self._hashed(ctx, (B, L)),
        self._bias(), self._noise_key(routing.of(m).draws, ctx),
        routing_groups(m.group_size, B * L), not ctx.deterministic)
    routed = routing.route(m, inputs)
    if m.latent_dim:
      x_TD = self._product('latent_down', x_BLD, ctx).reshape(-1, m.latent_dim)
    if m.gate_inputs:  # a token has one gate
      x_TD = x_TD * routed.gate_A[:, None].astype(x_TD.dtype)
      routed = routed.replace(gate_A=(routed.gate_A > 0).astype(jnp.float32))
    x_TD = x_TD.astype(c.compute_dtype)
    clamp = c.find(ClampConfig)
    y_TD, kept_A = dispatch.experts(
        m, x_TD, routing.networks(m, routed), self._weights(),
        layers.Hidden(m.ffn, clamp), inputs.groups, self._dropout(ctx),
        train=inputs.train, again=layers.remat(c).again)
    if m.zero_experts:
      zero_A, gate_T = routing.zero(m, routed)
      y_TD, kept_A = y_TD + gate_T[:, None].astype(
          y_TD.dtype) * x_TD, kept_A | zero_A
    aux = routing.report(m, routed, inputs.logits_TE, valid_T, kept_A,
                        dispatch.expert_shards(), B)
    aux['loads'] = {} if inputs.bias_E is None else {
        '/'.join((*self.path, BIAS)): aux['health']['load_E']}
    if ctx.keep_layers:
      aux['experts'] = {name: x_TE.reshape(B, L, -1) for name, x_TE in
                        choices(routed, kept_A).items()}
    y_BLD = y_TD.reshape(B, L, -1)
    if m.latent_dim:
      y_BLD = self._product('latent_up', y_BLD, ctx)
    y_BLD = sharding.constrain(y_BLD, 'batch', 'length', 'embed')
    if m.shared_experts:
      shared_BLD, _ = layers.FFN(
          c, m.ffn, width=m.shared_experts * m.d_ff, name='shared')(x_BLD, ctx)
      y_BLD = y_BLD + self._gated(shared_BLD, x_BLD)
    return y_BLD, aux

  def _product(self, name: str, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns a product into the space of the experts, or out of it."""
    c, up = self.config, name == 'latent_up'
    sizes, axes = (c.d_model, c.part(MoEConfig).latent_dim), ('embed', None)
    return layers.dense(
        self, name, 'BLD,DU->BLU', x_BLD, sizes[::-1] if up else sizes,
        axes[::-1] if up else axes, with_bias=c.ffn_bias, residual=up,
        deterministic=ctx.deterministic)

  def _gated(self, shared_BLD: jax.Array, x_BLD: jax.Array) -> jax.Array:
    """Returns what the shared experts add. A token has one gate at every width,
    so muP divides the gate's logit as it divides the router's."""
    c = self.config
    if not c.part(MoEConfig).shared_gate:
      return shared_BLD
    gate_DU = layers.weight(self, 'shared_gate', (c.d_model, 1),
                            ('embed', None), output=True)
    gate_BLU = layers.einsum('BLD,DU->BLU', x_BLD, gate_DU, c.compute_dtype)
    return shared_BLD * jax.nn.sigmoid(gate_BLU / c.widening)

  def _logits(self, x_TD: jax.Array, ctx: Context):
    m = self.config.part(MoEConfig)
    if not routing.of(m).logits:
      return None
    router_DE = layers.weight(self, 'router', (x_TD.shape[1], m.all_experts),
                              ('embed', None), output=True)
    x_TD = x_TD.astype(jnp.float32)
    key = self._noise_key(m.jitter, ctx)
    if key is not None:  # Switch, section 2.4: multiplicative jitter
      x_TD = x_TD * jax.random.uniform(key, x_TD.shape, jnp.float32,
                                       1 - m.jitter, 1 + m.jitter)
    logits_TE = checkpoint_name(jnp.einsum(
        'TD,DE->TE', x_TD, router_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST), layers.PRODUCT)
    logits_TE = logits_TE / self.config.widening  # muP's output multiplier
    if m.logit_bias:  # gpt-oss; after the multiplier, which is not of it
      logits_TE = layers.add_bias(logits_TE, layers.bias(
          self, 'logit_bias', (m.all_experts,), (None,)))
    key = self._noise_key(m.logit_noise, ctx)
    if key is not None:
      logits_TE += m.logit_noise * jax.random.normal(key, logits_TE.shape)
    return logits_TE

  def _noise_key(self, wanted: float, ctx: Context):
    return self.make_rng('router') if wanted and not ctx.deterministic else None

  def _hashed(self, ctx: Context, shape: tuple[int, int]):
    c, m = self.config, self.config.part(MoEConfig)
    if not routing.of(m).hashes:
      return None
    tokens_T = jnp.broadcast_to(ctx.tokens_BL, shape).reshape(-1)
    if not routing.of(m).table:
      return routing.hashed(m, tokens_T)
    table_VX = declare(self, TABLE, lambda _, shape, dtype: routing.hashed(
        m, jnp.arange(shape[0])).astype(dtype), (c.vocab_size, m.top_k),
                       Role((None, None)), jnp.float32)
    return jax.lax.stop_gradient(table_VX)[tokens_T].astype(jnp.int32)

  def _bias(self):
    """DeepSeek-V3's bias: no gradient moves it, `move_biases` does."""
    moe = self.config.part(MoEConfig)
    if not routing.of(moe).bias:
      return None
    return declare(self, BIAS, nn.initializers.zeros,
                   (moe.all_experts,), Role((None,)), jnp.float32)

  def _dropout(self, ctx: Context):
    rate = self.config.part(MoEConfig).expert_dropout
    if not rate or ctx.deterministic:
      return None
    return Dropout(jax.random.bits(self.make_rng('dropout')), rate=rate)

  def _weights(self) -> Weights:
    c, m = self.config, self.config.part(MoEConfig)
    size = {'embed': m.latent_dim or c.d_model, 'mlp': m.d_ff}
    weight = lambda name, *axes: layers.weight(
        self, name, (m.num_experts, *map(size.get, axes)), ('experts', *axes),
        in_axes=(1,), batch_axes=(0,), residual=name == 'down'
        ).astype(c.compute_dtype)
    bias = lambda name, axis: layers.bias(
        self, name, (m.num_experts, size[axis]), ('experts', axis),
        batch_axes=(0,)).astype(c.compute_dtype) if c.ffn_bias else None
    gated = layers.FFNS[m.ffn].gated
    up_EDF = weight('up', 'embed', 'mlp')
    gate_EDF = weight('gate', 'embed', 'mlp') if gated else None
    return Weights(up_EDF, weight('down', 'mlp', 'embed'), gate_EDF,
                   bias('up_bias', 'mlp'),
                   bias('gate_bias', 'mlp') if gated else None,
                   bias('down_bias', 'embed'))


def choices(routed: routing.Routing, kept_A: jax.Array
            ) -> dict[str, jax.Array]:
  """Returns what a router did with each token, [T, E] of each name.

  probabilities: the router's, float32. chosen: bool, whether the token goes to
  the expert, or would if there were room. gates: float32, the weight of the
  expert's output, which is 0 where it was not chosen or had no room.
  """
  def table(value_A: jax.Array) -> jax.Array:  # the void ones fall outside
    return jnp.zeros_like(routed.probs_TE).at[
        routed.token_A, routed.expert_A].add(value_A, mode='drop')
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
    params: its parameters, arrays without boxes.
    loads: aux['loads']; without any, params stay as they are.
    applied: 0 in a step to leave out, else 1.
  """
  def move(path, x: jax.Array) -> jax.Array:
    path = jax.tree_util.keystr(path, simple=True, separator='/')
    if path not in loads:
      return x
    rate = c.part(MoEConfig).bias_rate
    return routing.step_bias(x, loads[path], applied * rate)

  return jax.tree_util.tree_map_with_path(move, params)


def without_capacity(c: ModelConfig) -> ModelConfig:
  """The config to write text by, a token at a time.

  Over the tokens of one step a capacity would be one or two, and whether a row
  is served would hang on who else is in the batch, padding included.
  """
  moe = c.find(MoEConfig)
  if moe is None or routing.of(moe).experts_choose:
    return c  # the capacity of experts that choose is what they choose
  way = 'dropless' if moe.dispatch == 'sorted' else moe.dispatch
  return c.with_part(MoEConfig, eval_capacity_factor=0.0, group_size=0,
                     dispatch=way)


def routing_groups(size: int, tokens: int) -> int:
  """How many groups of `size` tokens; 0: one of all. Fewer tokens than a
  group (in decoding) are one group."""
  if not size or tokens <= size:
    return 1
  require(tokens % size == 0,
          f'model.moe.group_size is {size}, which does not divide the {tokens} '
          'tokens of a batch: choose a divisor, or 0 for one group')
  return tokens // size
