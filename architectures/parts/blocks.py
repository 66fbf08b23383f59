"""What a layer is: what mixes its tokens, the residual streams that it adds to,
and how it is wired.

An entry of MIXERS, of RESIDUALS or of BLOCKS is all that there is of one.
docs/architectures.md has the wirings in a table, and
tests/architectures/parts_test.py has their equations again.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple, Optional

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.attention import compressed
from architectures.parts.attention import indexer
from architectures.parts.attention import latent
from architectures.parts.attention import multi_head
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts import lookup
from architectures.parts.cache import LayerCache
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from architectures.parts.layers import FFN, NO_FFN, norm, recomputed, rmsnorm
from architectures.parts.moe.layer import MoE
from architectures.parts.recurrent import features, layer
from architectures.parts.recurrent import linear_attention, mamba
from architectures.parts.recurrent import mamba2, mamba3, rwkv7, short_conv
from architectures.parts.report import Report
from architectures.parts.sharding import Role, declare
from architectures.parts.streams import StreamsConfig
from common.fields import leaves

# What mixes the tokens of a layer: (x_BLD, context, cache) -> (y_BLD, cache,
# report).
#
# A new mixer is a file like latent.py or, of a recurrence, like
# recurrent/mamba2.py, and its entry in MIXERS.


@dataclasses.dataclass(frozen=True)
class Mixer:
  """One way of mixing tokens.

  Attributes:
    module: of (config, kind), named by the block; its parameters stand under
      that name. Its FUSED says whether it may do without scores [B, H, L, M].
    cache: (config, shape) -> an empty Cache, or the state of a
      recurrence; `shape` is [..., B, M].
    products: config -> which of layers.PRODUCTS a layer has.
    settings: the group of fields of config.model that it reads.
    fields: others of config.model that it reads and not every mixer does.
    sources: fields that others are derived from, where those are left open,
      and that it does not read otherwise.
    divided: (mesh axis, field of config.model that it must divide).
    whole: of these, the fields that a mesh need not divide where they are 1:
      all devices have the same.
    state: whether its cache is a state of one size, as a recurrence's is: what
      has been read cannot be taken back, padding must be told apart, and a row
      stays on one device.
    at_once: config -> how many numbers of a token its widest step holds; None:
      attention's scores.
    positional: whether its layers turn or bias by positions.
    turns_heads: whether what positions turn are heads of head_dim features; if
      not, `check` says what they may be.
    check: (config, stack) -> None; raises RequestError for what cannot be.
      `stack` is what architectures.stack returns.
  """
  module: type[nn.Module]
  cache: Callable[[ModelConfig, tuple[int, ...]], Any]
  products: Callable[[ModelConfig], set[str]]
  settings: Optional[type] = None
  fields: tuple[str, ...] = ()
  sources: tuple[str, ...] = ()
  divided: tuple[tuple[str, str], ...] = ()
  whole: tuple[str, ...] = ()
  state: bool = False
  at_once: Optional[Callable[[ModelConfig], int]] = None
  positional: bool = True
  turns_heads: bool = True
  check: Callable[[ModelConfig, str], None] = lambda c, stack: None


def mixer_of(c: ModelConfig) -> Mixer:
  """Returns the mixer of a model, or of its layers of one kind."""
  return MIXERS[c.mixer]


def readers(c: ModelConfig, field: str) -> list[ModelConfig]:
  """Returns the configs of those kinds of layer whose mixer reads a field."""
  return [config for config in map(c.of_kind, c.kinds_used)
          if field in mixer_of(config).fields]


def with_state(c: ModelConfig) -> bool:
  """Whether some layers of a model read a row in one direction alone and keep
  a state of it: a recurrence, a short convolution before attention or after a
  branch, a memory by n-grams, or an indexer of blocks."""
  return any(mixer_of(config).state or lookup.keeps(config)
             or indexer.has_blocks(config) or config.branch_conv
             for config in map(c.of_kind, c.kinds_used)
             ) or any(config.attention_conv
                      for config in readers(c, 'attention_conv'))


def empty_cache(c: ModelConfig, shape: tuple[int, ...]) -> LayerCache:
  """Returns the cache of a layer that has read nothing; `shape` is [..., B, M].
  """
  memory, inputs = None, {}
  if lookup.keeps(c):
    memory = lookup.empty(c, shape)
  if c.branch_conv:
    last_BWD = jnp.zeros((*shape[:-1], c.branch_conv - 1, c.d_model),
                         c.compute_dtype)
    inputs['attention'] = last_BWD
    if c.ffn != NO_FFN:
      inputs['ffn'] = last_BWD
  return LayerCache(
      mixer=mixer_of(c).cache(c, shape), memory=memory, inputs=inputs)


# Of scores, and of products with a bias.
SCORES = ('attention_kernel', 'attention_softcap', 'attention_sinks',
          'attention_dropout', 'attention_bias', 'attention_out_bias')


def recurrent(module: type[layer.Layer],
              heads: tuple[str, ...] = ('key_heads', 'value_heads'),
              positional: bool = False, check: Callable = layer.check
              ) -> Mixer:
  """Returns the entry of a recurrence.

  Args:
    module: its layer.
    heads: those of its settings that the mesh axis tensor must divide.
    positional: as of a Mixer.
    check: (module, config, stack) -> None, as of a Mixer.
  """
  name = module.NAME
  return Mixer(
      module, functools.partial(layer.empty, module),
      products=lambda c: set(module.PRODUCTS), settings=module.settings,
      fields=('norm_eps',),
      sources=('num_heads', 'head_dim', 'mup_base_head_dim'),
      turns_heads=False,
      divided=tuple(('tensor', f'{name}.{field}') for field in heads),
      state=True, at_once=functools.partial(layer.at_once, module),
      positional=positional, check=functools.partial(check, module))


def with_entries(module: type[compressed.SWA], *fields: str) -> Mixer:
  """Returns the entry of a mixer of compressed.py, which reads `fields` too."""
  return Mixer(
      module, functools.partial(compressed.empty, module.PARTS),
      products=lambda c: {'query_down', 'query_up', 'key', 'out'},
      settings=compressed.CompressedConfig, state=True,
      fields=('attention_scale', 'norm_eps', *SCORES[1:4], *fields),
      divided=(('tensor', 'num_heads'), ('fsdp', 'compressed.q_rank'),
               ('tensor', 'compressed.out_groups')),
      whole=('compressed.out_groups',), check=compressed.check)


MIXERS = {
    'attention': Mixer(
        multi_head.Attention, multi_head.empty,
        products=lambda c: {'query', 'out'} | (
            set() if c.kv_sharing else
            {'key'} if c.keys_as_values else {'key', 'value'}) | (
                multi_head.gate_products(c.attention_gate)),
        fields=('num_kv_heads', 'attention_gate', *SCORES,
                *leaves(AttentionConfig)),
        divided=(('tensor', 'num_heads'), ('tensor', 'num_kv_heads')),
        check=multi_head.check),
    'latent': Mixer(
        latent.LatentAttention, latent.empty, latent.products,
        settings=latent.LatentConfig,
        fields=('attention_gate', 'norm_eps', *SCORES),
        sources=('head_dim', 'mup_base_head_dim'), turns_heads=False,
        divided=(('tensor', 'num_heads'), ('fsdp', 'latent.kv_rank'),
                 ('fsdp', 'latent.q_rank')),
        check=latent.check),
    'swa': with_entries(compressed.SWA),
    'hca': with_entries(compressed.HCA, 'compressed.hca_rate'),
    'csa': with_entries(compressed.CSA, 'compressed.csa_rate', 'indexer'),
    'deltanet': recurrent(linear_attention.DeltaNet),
    'mamba': Mixer(
        mamba.Mamba, mamba.empty,
        products=lambda c: {'value', 'output_gate', 'out'},
        settings=mamba.MambaConfig, sources=('num_heads', 'head_dim'),
        turns_heads=False, divided=(('tensor', 'd_model'),), state=True,
        at_once=mamba.at_once, positional=False, check=mamba.check),
    'mamba2': dataclasses.replace(
        recurrent(mamba2.Mamba2, heads=('heads', 'groups'),
                  check=mamba2.check),
        whole=('mamba2.groups',)),
    'mamba3': dataclasses.replace(
        recurrent(mamba3.Mamba3, heads=('heads', 'groups'),
                  check=mamba3.check),
        whole=('mamba3.groups',), cache=mamba3.empty),
    'kda': recurrent(linear_attention.KDA, check=linear_attention.check_kda),
    'gdn2': recurrent(linear_attention.GDN2, check=linear_attention.check_kda),
    'gla': recurrent(linear_attention.GLA, ('heads',)),
    'retnet': recurrent(linear_attention.RetNet, ('heads',), positional=True,
                        check=linear_attention.check_retnet),
    'rwkv7': dataclasses.replace(
        recurrent(rwkv7.RWKV7, ('heads',), check=rwkv7.check),
        cache=rwkv7.empty),
    'short_conv': Mixer(
        short_conv.ShortConv, short_conv.empty,
        products=lambda c: {'in', 'out'}, settings=short_conv.ShortConvConfig,
        sources=('num_heads', 'head_dim', 'mup_base_head_dim'),
        turns_heads=False, divided=(('tensor', 'd_model'),), state=True,
        at_once=lambda c: 3 * c.d_model, positional=False,
        check=functools.partial(layer.check_state, 'short_conv')),
}


# Residual streams: what a branch reads of the branches before it, and where
# its result goes.
#
# A branch F is attention, or the network, with its norms; k counts the branches
# of a stack from 0. The first one reads the embedding e.
#
#   plain      x' = x + residual_scale F(x)
#   hyper      x'_v = sum over u of A_uv x_u  +  b_v F(sum over u of a_u x_u)
#   mhc        the same, with a in (0, 1), b in (0, 2) and A doubly stochastic
#   gated      x'_v = x_v + b_v F(mean over u of g_u * n_u(x_u)),  b in (0, 2)
#   attention  v_(k+1) = F(sum over i of p_i v_i),   v_0 = e
#
# hyper (Zhu et al. 2024, arXiv 2409.19606, equations 10 to 14) has
# streams.count streams, which begin as copies of e, and n is the model's norm:
#
#   a = e_(k mod count) + a_k + s tanh(n(x) W_a)
#   b = b_k + s' tanh(n(x) W_b)
#   A = A_k + s tanh(n(x) W_A)
#
# At first b_k = 1, A_k = I, s = 0.01, and a_k and all W are 0. With
# streams.dynamic=False, nothing depends on the token: there are no W and no s.
#
# mhc (Xie et al. 2025, arXiv 2512.24880, equations 7 to 9), with rms over the
# features of all streams at once:
#
#   a = sigmoid(c_k + z_a),   b = 2 sigmoid(z_b),   A = Sinkhorn(exp(z_A))
#   z = s rms(x) W + d_k
#
# Sinkhorn divides by sums over v, then over u, streams.iterations times, so
# that A neither adds to the streams nor takes from them. The paper does not
# publish the initial values of c_k and d_k. Here c_k are the logits of 3/4 for
# stream k mod count and of equal parts of the rest for the other streams; d_k
# is 0, and -8 off A's diagonal; W is 0, where the paper draws it, and s = 0.01.
#
# So in a new model all streams equal the stream of a plain model. Both forms
# end with the mean of the streams. (The paper takes their sum, which is count
# times the mean; the final norm removes the factor.) With streams.learned_end
# they end as DeepSeek-V4 (arXiv 2606.19348): sum over u of sigmoid(z_u) x_u,
# z = s rms(x) W + d. There c_k is 0, and W is drawn.
#
# gated (Qwen4-Exp's GatedResidual, in transformers) has gates g in (0, 1) for
# each feature of each stream, by a product of low rank, streams.rank:
#
#   g = sigmoid(silu(sum over u of n_u(x_u) W_down,u / count) W_up)
#   b = 2 sigmoid(sum over u of n_u(x_u) W_b,u / count)
#
# n_u is the model's norm with scales of the stream's own. One more such mean
# ends the stack. As it is of what is normalised already, there may be no other
# norm: block no_norm.
#
# attention (Kimi Team 2026, arXiv 2603.15031, equations 2 to 6): every branch
# has a query w, which is 0 at first, and
#
#   p = softmax over i of w . rms(v_i)
#
# With streams.block_size=S above 1, each v_i after e is the sum of S branches,
# and the last one the sum of the earlier branches of the reader's own block.
# One more query reads the result of the stack. A new model reads means where a
# plain model reads sums. A norm makes the two equal (up to norm_eps); out_norm
# and ffn_norm, whose attention reads x without a norm, do not.

OFF = -8.0  # logits off A's diagonal in a new mhc
READ_WEIGHT = 0.75  # how much a branch of a new mhc reads of stream k mod count
FLOOR = 1e-6  # added in mhc to weights, and to what divides them
SCALE = 0.01  # the initial factor s of what depends on the token


@struct.dataclass
class Streams:
  """What goes from layer to layer, where that is not one array.

  Attributes:
    x_BLUD: the streams, or what is attended to; slots not yet written are 0.
    branch: how many branches have run so far, int32.
    branches: how many the whole stack has.
  """
  x_BLUD: jax.Array
  branch: jax.Array
  branches: int = struct.field(pytree_node=False)


# What a layer is given: [B, L, D], or Streams.
X = Any
Read = tuple[jax.Array, Callable[[jax.Array], X]]


class Weights(NamedTuple):
  """How a branch mixes streams, for each token or for all (axes of 1), in
  float32.

  Attributes:
    read_BLU: how much of each stream the branch reads.
    write_BLU: how much of its result is added to each stream.
    mix_BLUU: [u, v], how much of stream u goes into stream v; None: each stays
      as it is.
  """
  read_BLU: Optional[jax.Array]
  write_BLU: jax.Array
  mix_BLUU: Optional[jax.Array] = None


class Branch(nn.Module):
  """Streams -> (what a branch reads, x_BLD; its result y_BLD -> the next
  Streams)."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x: Streams) -> Read:
    read = RESIDUALS[self.config.residual].read
    assert read is not None
    x_BLD, add = read(self, x)
    return sharding.constrain_stream(x_BLD, 'embed'), add


def branch(c: ModelConfig, name: str, x: X) -> Read:
  """Returns what a branch reads of `x`, and a function that adds its result to
  `x`.

  Args:
    c: the model.
    name: the branch's, which begins the name of its parameters.
    x: what the layer is given.
  """
  if not RESIDUALS[c.residual].read:
    scale = c.residual_scale
    return x, lambda y_BLD: x + (
        y_BLD if scale == 1 else layers.times(y_BLD, scale))
  return Branch(c, name=f'{name}_streams')(x)


def slots(c: ModelConfig, branches: int) -> int:
  """Returns how many arrays [B, L, D] go from layer to layer in a stack with
  this number of branches."""
  return RESIDUALS[c.residual].slots(c, branches)


def begin_streams(c: ModelConfig, x_BLD: jax.Array, branches: int) -> X:
  """Returns what the first layer is given, in a stack with this number of
  branches."""
  entry = RESIDUALS[c.residual]
  if not entry.begin:
    return x_BLD
  x_BLUD = entry.begin(x_BLD[:, :, None], slots(c, branches))
  return Streams(pin(x_BLUD), jnp.zeros((), jnp.int32), branches)


class EndOfStreams(nn.Module):
  """What a layer returns -> x_BLD, as the final norm reads it. The arrays may
  have an axis of layers in front of theirs."""
  config: ModelConfig

  @nn.compact
  def __call__(self, x: X) -> jax.Array:
    return RESIDUALS[self.config.residual].end(self, x)


def pin(x_BLUD: jax.Array) -> jax.Array:
  """Keeps XLA from resharding streams between layers."""
  return sharding.constrain_stream(x_BLUD, None, 'embed')


# Streams that are mixed: hyper, mhc.


def _mixed(weigh: Callable[[nn.Module, Streams], Weights]
           ) -> Callable[[nn.Module, Streams], Read]:
  """Returns Residual.read of streams that are mixed by the weights."""
  def read(module: nn.Module, x: Streams) -> Read:
    w, count = weigh(module, x), x.x_BLUD.shape[2]
    return recomputed(layers.counted(_weighed, 2 * count))(
        x.x_BLUD, w.read_BLU), _adder(x, w, 2 * (count + 1))
  return read


def _adder(x: Streams, w: Weights, flops: int) -> Callable[[jax.Array], X]:
  """Returns what adds a branch's result; it counts as so many FLOPs for each
  feature of each stream."""
  def add(y_BLD: jax.Array) -> Streams:
    x_BLUD = recomputed(layers.counted(_written, flops))(x.x_BLUD, y_BLD, w)
    return x.replace(x_BLUD=x_BLUD, branch=x.branch + 1)
  return add


def _weighed(x_BLUD: jax.Array, w_BLU: jax.Array) -> jax.Array:
  y_BLD = (x_BLUD.astype(jnp.float32) * w_BLU[..., None]).sum(-2)
  return y_BLD.astype(x_BLUD.dtype)


def _written(x_BLUD: jax.Array, y_BLD: jax.Array, w: Weights) -> jax.Array:
  x32_BLUD = x_BLUD.astype(jnp.float32)
  mixed_BLUD = x32_BLUD if w.mix_BLUU is None else sum(
      x32_BLUD[:, :, u, None] * w.mix_BLUU[:, :, u, :, None]
      for u in range(x_BLUD.shape[2]))
  y_BLUD = y_BLD[:, :, None].astype(jnp.float32) * w.write_BLU[..., None]
  return (mixed_BLUD + y_BLUD).astype(x_BLUD.dtype)


def _param(module: nn.Module, name: str, init: Callable, *shape: int
           ) -> jax.Array:
  """Declares parameters whose number does not depend on the width; returns them
  in float32."""
  return declare(module, name, init, shape, Role((None,) * len(shape))).astype(
      jnp.float32)


def _hyper(module: nn.Module, x: Streams) -> Weights:
  c: Any = module.config  # type: ignore[attr-defined]
  count, D = x.x_BLUD.shape[2:]
  eye = lambda key, shape, dtype: jnp.eye(count, dtype=dtype)
  read_U = _param(module, 'read', nn.initializers.zeros, count)
  read_U = read_U + jax.nn.one_hot(x.branch % count, count)
  write_U = _param(module, 'write', nn.initializers.ones, count)
  mix_UU = _param(module, 'mix', eye, count, count)
  w = Weights(*(a[None, None] for a in (read_U, write_U, mix_UU)))
  if not c.part(StreamsConfig).dynamic:
    return w
  w_DU = declare(module, 'dynamic', nn.initializers.zeros, (D, count + 2),
                 Role(('embed', None), inputs=(0,), kind='logits'))
  scale_U = _param(module, 'dynamic_scale', nn.initializers.constant(SCALE), 2)
  z_BLUU = jnp.tanh(layers.einsum(
      'BLUD,DI->BLUI', norm(c, 'norm')(x.x_BLUD), w_DU, c.compute_dtype,
      jnp.float32) / c.widening)
  return Weights(w.read_BLU + scale_U[0] * z_BLUU[..., 0],
                 w.write_BLU + scale_U[1] * z_BLUU[..., 1],
                 w.mix_BLUU + scale_U[0] * z_BLUU[..., 2:])


def _mhc(module: nn.Module, x: Streams) -> Weights:
  c: Any = module.config  # type: ignore[attr-defined]
  B, L, count, _ = x.x_BLUD.shape
  apart = lambda key, shape, dtype: OFF * (1 - jnp.eye(count, dtype=dtype))
  streams = c.part(StreamsConfig)
  first_U = 0 if streams.learned_end else fresh(count, x.branch)
  biases = (_param(module, 'read', nn.initializers.zeros, count) + first_U,
            _param(module, 'write', nn.initializers.zeros, count),
            _param(module, 'mix', apart, count, count).reshape(-1))
  z_BLU = _of_all(module, x.x_BLUD, count * (count + 2))
  scale_U = _param(module, 'dynamic_scale', nn.initializers.constant(SCALE), 3)
  read_BLU, write_BLU, mix_BLU = (
      scale_U[i] * part_BLU + biases[i][None, None]
      for i, part_BLU in enumerate(jnp.split(z_BLU, (count, 2 * count), -1)))
  mix_BLUU = recomputed(lambda z: sinkhorn(z, streams.iterations))(
      mix_BLU.reshape(B, L, count, count))
  return Weights(jax.nn.sigmoid(read_BLU) + FLOOR,
                 2 * jax.nn.sigmoid(write_BLU), mix_BLUU)


def _of_all(module: nn.Module, x_BLUD: jax.Array, size: int) -> jax.Array:
  """Returns so many logits of each token, made of all its streams."""
  c: Any = module.config  # type: ignore[attr-defined]
  *rows, count, D = x_BLUD.shape
  streams = c.part(StreamsConfig)
  init = (nn.initializers.normal(c.init_stddev) if streams.learned_end else
          nn.initializers.zeros)
  w_UDO = declare(module, 'dynamic', init, (count, D, size),
                  Role((None, 'embed', None), inputs=(0, 1), kind='logits'))
  return recomputed(lambda x_BLI, w_IO: layers.einsum(
      '...I,IO->...O', rmsnorm(x_BLI, None, c.norm_eps), w_IO, c.compute_dtype,
      jnp.float32))(x_BLUD.reshape(*rows, -1),
                    w_UDO.reshape(count * D, -1)) / c.widening


def fresh(count: int, branch: jax.Array) -> jax.Array:
  """Returns the logits, [count], of what a branch of a new mhc reads."""
  logit = lambda p: math.log(p / (1 - p))
  turn_U = jax.nn.one_hot(branch % count, count)
  return jnp.where(turn_U > 0, logit(READ_WEIGHT),
                   logit((1 - READ_WEIGHT) / (count - 1)))


def sinkhorn(logits_BLUU: jax.Array, iterations: int) -> jax.Array:
  """Returns exp(logits) after so many rounds, each of which divides the rows
  and then the columns by their sums. As in DeepSeek-V4, the first rows are a
  softmax, and FLOOR is added to it and to later sums, none of which is 0."""
  first_BLUU = _divided(jax.nn.softmax(logits_BLUU) + FLOOR, -2)
  return layers.counted(_rounds, 0)(first_BLUU, jnp.arange(1, iterations))


def _divided(m_BLUU: jax.Array, axis: int) -> jax.Array:
  return m_BLUU / (m_BLUU.sum(axis, keepdims=True) + FLOOR)


def _rounds(m_BLUU: jax.Array, rounds: jax.Array) -> jax.Array:
  """Returns the matrices after a round of Sinkhorn's for each of `rounds`."""
  return jax.lax.scan(
      lambda m_BLUU, _: (_divided(_divided(m_BLUU, -1), -2), None),
      m_BLUU, rounds)[0]


def _gated(module: nn.Module, x: Streams) -> Read:
  c: Any = module.config  # type: ignore[attr-defined]
  read_BLD, n_BLUD = _gated_mean(module, x)
  count, D = n_BLUD.shape[2:]
  w_UDU = layers.weight(module, 'write', (count, D, count),
                        (None, 'embed', None), in_axes=(0, 1), output=True)
  z_BLU = layers.einsum('BLUD,UDV->BLV', n_BLUD, w_UDU, c.compute_dtype,
                        jnp.float32)
  return read_BLD, _adder(x, Weights(None, 2 * jax.nn.sigmoid(
      z_BLU / (count * c.widening))), 2)


def _gated_mean(module: nn.Module, x: Streams) -> tuple[jax.Array, jax.Array]:
  """Returns what is read, and the normalised streams; there may be an axis of
  layers in front."""
  c: Any = module.config  # type: ignore[attr-defined]
  n_BLUD = layers.norms(c, 'norm')(x.x_BLUD)
  (count, D), rank = n_BLUD.shape[-2:], c.part(StreamsConfig).rank
  down_UDR = layers.weight(module, 'down', (count, D, rank),
                           (None, 'embed', None), in_axes=(0, 1), output=True)
  up_RUD = layers.weight(module, 'up', (rank, count, D), (None, None, 'embed'))
  z_BLR = jax.nn.silu(layers.einsum(
      '...UD,UDR->...R', n_BLUD, down_UDR, c.compute_dtype, jnp.float32
  ) / (count * c.widening))
  gate_BLUD = layers.einsum('...R,RUD->...UD', z_BLR, up_RUD, c.compute_dtype)
  return recomputed(layers.counted(_opened, 2 * count))(
      gate_BLUD, n_BLUD), n_BLUD


def _opened(gate_BLUD: jax.Array, n_BLUD: jax.Array) -> jax.Array:
  gate32_BLUD = jax.nn.sigmoid(gate_BLUD.astype(jnp.float32))
  return (gate32_BLUD * n_BLUD.astype(jnp.float32)).mean(-2).astype(
      n_BLUD.dtype)


def _mean(module: nn.Module, x: Streams) -> jax.Array:
  del module
  return x.x_BLUD.astype(jnp.float32).mean(-2).astype(x.x_BLUD.dtype)


def _ended(module: nn.Module, x: Streams) -> jax.Array:
  c: Any = module.config  # type: ignore[attr-defined]
  if not c.part(StreamsConfig).learned_end:
    return _mean(module, x)
  count = x.x_BLUD.shape[-2]
  z_BLU = _of_all(module, x.x_BLUD, count)
  scale_U, read_U = (_param(module, name, init, size) for name, init, size in (
      ('dynamic_scale', nn.initializers.constant(SCALE), 1),
      ('read', nn.initializers.zeros, count)))
  z_BLU = scale_U[0] * z_BLU + read_U.reshape((1,) * (z_BLU.ndim - 1) + (-1,))
  return recomputed(layers.counted(_weighed, 2 * count))(
      x.x_BLUD, jax.nn.sigmoid(z_BLU) + FLOOR)


# Attention to the branches before.


def _sources(c: ModelConfig, branch: Any) -> Any:
  """Returns how many slots a branch attends to; its index may be traced."""
  size = c.part(StreamsConfig).block_size
  return 1 + branch // size + (branch % size > 0)


def _attended(module: nn.Module, x: Streams, part: int, whole: int
              ) -> jax.Array:
  """Returns what the module's query reads of the slots. It counts as
  part / whole FLOPs for each feature."""
  c: Any = module.config  # type: ignore[attr-defined]
  D = x.x_BLUD.shape[-1]
  query_D1 = declare(module, 'query', nn.initializers.zeros, (D, 1),
                     Role(('embed', None), inputs=(0,), kind='logits'))
  scale_D = declare(module, 'scale', nn.initializers.ones, (D,),
                    Role(('embed',)))
  return recomputed(layers.counted(_over_slots, part, whole))(
      x.x_BLUD, query_D1[:, 0] / c.widening, scale_D,
      _sources(c, x.branch), jnp.float32(c.norm_eps))


def _over_slots(x_BLUD: jax.Array, query_D: jax.Array, scale_D: jax.Array,
                sources: jax.Array, eps: jax.Array) -> jax.Array:
  """Softmax attention to the first `sources` slots, in float32; there may be an
  axis of layers in front."""
  x32_BLUD = x_BLUD.astype(jnp.float32)
  keys_BLUD = rmsnorm(x32_BLUD, scale_D, eps)
  logits_BLU = jnp.einsum('...D,D->...', keys_BLUD, query_D.astype(jnp.float32))
  place_U = jnp.arange(x_BLUD.shape[-2]).reshape(
      (1,) * (logits_BLU.ndim - 1) + (-1,))
  seen_BLU = place_U < sources.reshape(*sources.shape, 1, 1, 1)
  p_BLU = jax.nn.softmax(jnp.where(seen_BLU, logits_BLU, -jnp.inf))
  return (p_BLU[..., None] * x32_BLUD).sum(-2).astype(x_BLUD.dtype)


def _attention(module: nn.Module, x: Streams) -> Read:
  c: Any = module.config  # type: ignore[attr-defined]
  # 2 FLOPs in the score and 2 in the sum, for each feature of each slot that is
  # attended to: the mean over all branches.
  seen = sum(_sources(c, k) for k in range(x.branches))
  read_BLD = _attended(module, x, 4 * seen, x.branches)
  slot = 1 + x.branch // c.part(StreamsConfig).block_size

  def add(y_BLD: jax.Array) -> Streams:
    into_U = (jnp.arange(x.x_BLUD.shape[2]) == slot)[None, None, :, None]
    x_BLUD = jnp.where(into_U, x.x_BLUD + y_BLD[:, :, None], x.x_BLUD)
    return x.replace(x_BLUD=x_BLUD, branch=x.branch + 1)

  return read_BLD, add


def _attended_at_the_end(module: nn.Module, x: Streams) -> jax.Array:
  return _attended(module, x, 4 * x.x_BLUD.shape[-2], 1)


class Residual(NamedTuple):
  """A form of the residual sum, as an entry of RESIDUALS.

  Attributes:
    read: (module, Streams) -> (what a branch reads, what adds its result).
      None: there is one stream.
    slots: (config, branches of a stack) -> arrays that go from layer to layer.
    begin: (the embedding [B, L, 1, D], slots) -> Streams.x_BLUD.
    end: (module, Streams) -> what the final norm reads.
    settings: the group of fields of config.model that it reads.
    fields: of config.model, those that this form reads and others may not.
  """
  read: Optional[Callable[[nn.Module, Streams], Read]] = None
  slots: Callable[[ModelConfig, int], int] = lambda c, branches: 1
  begin: Optional[Callable[[jax.Array, int], jax.Array]] = None
  end: Callable[[nn.Module, Any], jax.Array] = lambda module, x: x
  settings: Optional[type] = None
  fields: tuple[str, ...] = ()


_COPIED: dict[str, Any] = dict(
    slots=lambda c, branches: c.part(StreamsConfig).count, end=_mean,
    begin=lambda x_BL1D, slots: jnp.repeat(x_BL1D, slots, 2),
    settings=StreamsConfig)
_first = lambda x_BL1D, slots: jnp.pad(
    x_BL1D, ((0, 0), (0, 0), (0, slots - 1), (0, 0)))
RESIDUALS = {
    'plain': Residual(fields=('residual_scale',)),
    'hyper': Residual(_mixed(_hyper), **_COPIED,
                      fields=('streams.count', 'streams.dynamic')),
    'mhc': Residual(_mixed(_mhc), **_COPIED | dict(end=_ended), fields=(
        'streams.count', 'streams.iterations', 'streams.learned_end',
        'norm_eps')),
    'gated': Residual(_gated, **_COPIED | dict(
        end=lambda module, x: _gated_mean(module, x)[0]),
                      fields=('streams.count', 'streams.rank')),
    'attention': Residual(_attention, _sources, _first, _attended_at_the_end,
                          StreamsConfig, ('streams.block_size', 'norm_eps')),
}


# Block wirings, side by side: (x, context, cache) -> (x, cache, report).
#
# The docstring of each begins with its equation and those who have it. A is
# self-attention and, in a decoder with a memory, C follows it wired alike. With
# model.ffn 'none' a block ends before F, as Mamba-2's do: x + A(n(x)).
#
# To add one, write a class with `around`, or with `wired`, and its entry in
# BLOCKS. What else it can do than self-attention and F on one stream it says by
# the attributes of Block; what it does not say is refused.


class Block(nn.Module):
  """What the wirings share: their parts by name.

  FINAL_NORM: whether a norm follows the last block.
  CROSS: whether it has C too, where its kind of layer asks for it.
  WITHOUT_FFN: whether it ends before F, where its kind of layer has none.
  STREAMS: whether x may be several streams (see RESIDUALS): everything that the
    block adds to x is then added by `branch`, as often as `branches` says.
  """
  FINAL_NORM = True
  CROSS = False
  WITHOUT_FFN = False
  STREAMS = False
  config: ModelConfig
  kind: LayerKind

  @nn.compact
  def __call__(self, x: X, ctx: Context, cache: Optional[LayerCache]
               ) -> tuple[X, Optional[LayerCache], Report]:
    """Returns x, the cache, and the report of the layer. A layer that reads a
    memory adds what it reads to its input, or to its result. With
    model.layer_scale the result is multiplied by a number of the layer."""
    c, memory = self.config, lookup.MEMORIES[self.config.memory]
    if memory and not memory.after:
      x, cache = self._read_tables(memory, x, ctx, cache)
    x, cache, report = self.wired(x, ctx, cache)
    if memory and memory.after:
      x = residual(x + memory.module(c, name='memory')(x, ctx))
    if c.layer_scale:
      scale_1 = declare(self, 'layer_scale', nn.initializers.ones, (1,),
                        Role((None,)))
      x = residual(
          (x.astype(jnp.float32) * scale_1[None, None]).astype(x.dtype))
    return x, cache, report

  def wired(self, x: X, ctx: Context, cache: Optional[LayerCache]
            ) -> tuple[X, Optional[LayerCache], Report]:
    """Does the same without a memory and without the layer's factor."""
    raise NotImplementedError

  def _read_tables(self, memory: lookup.Memory, x: X, ctx: Context,
                   cache: Optional[LayerCache]
                   ) -> tuple[X, Optional[LayerCache]]:
    """Returns x with what the layer reads of its tables added to it, and the
    cache with the last tokens."""
    state = None if cache is None else cache.memory
    read = memory.module(self.config, name='memory')
    if isinstance(x, Streams):
      y, state = read(x.x_BLUD, ctx, state)
      x = x.replace(x_BLUD=x.x_BLUD + y)
    else:
      y, state = read(x, ctx, state)
      x = x + y
    if cache is not None:
      cache = cache.replace(memory=state)
    return residual(x), cache

  def norm(self, name: str) -> Callable[[jax.Array], jax.Array]:
    return norm(self.config, name)

  def attention(self, x_BLD: jax.Array, ctx: Context,
                cache: Optional[LayerCache]
                ) -> tuple[jax.Array, Optional[LayerCache], Report]:
    """Returns A(x_BLD), the cache, and the report."""
    mixer = mixer_of(self.config).module(
        self.config, self.kind, name='attention')
    y_BLD, kept, report = mixer(x_BLD, ctx, cache and cache.mixer)
    y_BLD, cache = self._convolved(
        'attention', y_BLD, ctx, cache and cache.replace(mixer=kept))
    return y_BLD, cache, report

  def cross_attention(self, x_BLD: jax.Array, ctx: Context,
                      cache: Optional[LayerCache]
                      ) -> tuple[jax.Array, Optional[LayerCache], Report]:
    """Returns C(x_BLD), the cache, and the report."""
    module = multi_head.Attention(self.config, self.kind, cross=True,
                                  name='cross_attention')
    y_BLD, mixer, report = module(x_BLD, ctx, cache and cache.mixer)
    return y_BLD, cache and cache.replace(mixer=mixer), report

  def ffn(self, x_BLD: jax.Array, ctx: Context, cache: Optional[LayerCache]
          ) -> tuple[jax.Array, Optional[LayerCache], Report]:
    """Returns F(x_BLD), the cache, and the report."""
    if self.kind.ffn == 'moe':
      network = MoE(self.config, name='ffn')
    else:
      network = FFN(self.config, self.kind.ffn, name='ffn')
    y_BLD, figures = network(x_BLD, ctx)
    y_BLD, cache = self._convolved('ffn', y_BLD, ctx, cache)
    return y_BLD, cache, Report(**figures)

  def _convolved(self, name: str, y_BLD: jax.Array, ctx: Context,
                 cache: Optional[LayerCache]
                 ) -> tuple[jax.Array, Optional[LayerCache]]:
    """Returns the result of a branch and, with model.branch_conv, a convolution
    of it, which is 0 at first (Inkling, whose keys and values have one too);
    and the cache."""
    c, cached = self.config, cache is not None
    if not c.branch_conv:
      return y_BLD, cache
    w_WD = declare(self, f'{name}_conv', nn.initializers.zeros,
                   (c.branch_conv, c.d_model), Role((None, 'embed')))
    z_BLD, last_BWD = features.convolve(
        y_BLD, w_WD, before_BWHK=cache.inputs[name] if cached else None,
        segment_ids_BL=ctx.segment_ids_BL,
        valid_BL=ctx.valid_BL if cached else None)
    if cached:
      cache = cache.replace(inputs=cache.inputs | {name: last_BWD})
    return y_BLD + z_BLD, cache

  def branch(self, name: str, x: X) -> Read:
    """Returns what a branch reads of x, and a function that adds its result to
    x."""
    return branch(self.config, name, x)

  @staticmethod
  def branches(kind: LayerKind) -> int:
    """Returns how often a layer of this wiring adds to x."""
    return 1 + kind.cross + (kind.ffn != NO_FFN)

  def drop(self, x: jax.Array, ctx: Context) -> jax.Array:
    return layers.Dropout(self.config.dropout)(
        x, deterministic=ctx.deterministic)


def residual(x: X) -> X:
  """Pins the residual stream, so that XLA never reshards it in between."""
  if isinstance(x, Streams):
    return x.replace(x_BLUD=pin(x.x_BLUD))
  return sharding.constrain_stream(x, 'embed')


class Sequential(Block):
  """Attention, attention to a memory where there is one, and the network, one
  after another. A wiring says in `around` what stands around each."""
  CROSS = WITHOUT_FFN = STREAMS = True

  def around(self, part: str, x: X, ctx: Context) -> Read:
    """Returns what a part reads of x, and a function that joins its result to
    x."""
    raise NotImplementedError

  def wired(self, x: X, ctx: Context, cache: Optional[LayerCache]):
    x_BLD, join = self.around('attention', x, ctx)
    y_BLD, cache, report = self.attention(x_BLD, ctx, cache)
    x = join(y_BLD)
    if self.kind.cross:
      x_BLD, join = self.around('cross', x, ctx)
      y_BLD, cache, more = self.cross_attention(x_BLD, ctx, cache)
      x, report = join(y_BLD), report.joined(more)
    if self.kind.ffn == NO_FFN:
      return residual(x), cache, report
    x_BLD, join = self.around('ffn', x, ctx)
    y_BLD, cache, more = self.ffn(x_BLD, ctx, cache)
    return residual(join(y_BLD)), cache, report.joined(more)


class PreNorm(Sequential):
  """x + A(n(x)); x + F(n(x)) (GPT-2, LLaMA)."""

  def around(self, part: str, x: X, ctx: Context) -> Read:
    x_BLD, add = self.branch(part, x)
    return (self.norm(f'{part}_norm')(x_BLD),
            lambda y_BLD: add(self.drop(y_BLD, ctx)))


class NoNorm(PreNorm):
  """x + A(x); x + F(x) (Qwen4-Exp, where the streams of residual gated are
  normalised as they are read)."""
  FINAL_NORM = False

  def norm(self, name: str) -> Callable[[jax.Array], jax.Array]:
    return lambda x_BLD: x_BLD


class FfnNorm(PreNorm):
  """x + A(x); x + F(n(x)) (the first layer of ModernBERT, whose input is
  normalised already)."""
  WITHOUT_FFN = False  # it would have no norm

  def norm(self, name: str) -> Callable[[jax.Array], jax.Array]:
    return super().norm(name) if name == 'ffn_norm' else lambda x_BLD: x_BLD


class PostNorm(Sequential):
  """n(x + A(x)); n(x + F(x)) (the Transformer, BERT).

  The papers of several streams have no equation for a sum that is normalised
  itself."""
  FINAL_NORM = STREAMS = False

  def around(self, part: str, x: X, ctx: Context) -> Read:
    return x, lambda y_BLD: self.norm(f'{part}_norm')(x + self.drop(y_BLD, ctx))


class Sandwich(Sequential):
  """x + n(A(n(x))); x + n(F(n(x))) (CogView, Gemma 2)."""

  def around(self, part: str, x: X, ctx: Context) -> Read:
    x_BLD, add = self.branch(part, x)
    return self.norm(f'{part}_norm')(x_BLD), lambda y_BLD: add(
        self.drop(self.norm(f'{part}_out_norm')(y_BLD), ctx))


class OutNorm(Sequential):
  """x + n(A(x)); x + n(F(x)) (OLMo 2: arXiv 2501.00656, 3.1)."""

  def around(self, part: str, x: X, ctx: Context) -> Read:
    x_BLD, add = self.branch(part, x)
    return x_BLD, lambda y_BLD: add(
        self.drop(self.norm(f'{part}_out_norm')(y_BLD), ctx))


class Parallel(Block):
  """x + A(n1(x)) + F(n2(x)) (GPT-NeoX)."""
  CROSS = STREAMS = True  # without F it would be pre_norm

  @staticmethod
  def branches(kind: LayerKind) -> int:
    return 1

  def normed(self, x_BLD: jax.Array) -> Callable[[str], jax.Array]:
    """Returns what each part is given, by its name."""
    return lambda part: self.norm(f'{part}_norm')(x_BLD)

  def wired(self, x: X, ctx: Context, cache: Any):
    x_BLD, add = self.branch('attention', x)
    normed = self.normed(x_BLD)
    y_BLD, cache, report = self.attention(normed('attention'), ctx, cache)
    if self.kind.cross:
      z_BLD, cache, more = self.cross_attention(normed('cross'), ctx, cache)
      y_BLD, report = y_BLD + z_BLD, report.joined(more)
    z_BLD, cache, more = self.ffn(normed('ffn'), ctx, cache)
    x = residual(add(self.drop(y_BLD + z_BLD, ctx)))
    return x, cache, report.joined(more)


class SharedNorm(Parallel):
  """x + A(n(x)) + F(n(x)) (GPT-J, PaLM, Falcon-7B)."""

  def normed(self, x_BLD: jax.Array) -> Callable[[str], jax.Array]:
    n_BLD = self.norm('attention_norm')(x_BLD)
    return lambda part: n_BLD


BLOCKS = {
    'pre_norm': PreNorm,
    'post_norm': PostNorm,
    'parallel': Parallel,
    'shared_norm': SharedNorm,
    'sandwich': Sandwich,
    'out_norm': OutNorm,
    'ffn_norm': FfnNorm,
    'no_norm': NoNorm,
}


def branches(c: ModelConfig, kinds: tuple[LayerKind, ...]) -> int:
  """Returns how often layers of these kinds, one after another, add to x."""
  return sum(BLOCKS[c.of_kind(kind.name).block].branches(kind)
             for kind in kinds)
