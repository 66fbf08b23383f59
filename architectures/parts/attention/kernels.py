"""Fused attention: kernels that never write the scores [B, H, L, M] to memory.

xla     xla.attend, as the compiler makes of it; anywhere, any mask
splash  Pallas' splash attention on TPU: skips the blocks that a mask hides
cudnn   cuDNN's flash attention on GPU (Dao et al. 2022)

`auto` takes splash on TPU and cudnn on GPU where they compute the same
function, and xla elsewhere. The platform is that of the mesh, so that a
program compiled ahead of time for a TPU has the TPU's kernel. One that is
asked for by name and cannot do it is refused. An entry of KERNELS, at the end
of this file, is all that there is of one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from flax import struct
import jax
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp

from architectures.parts import layers
from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from configs.errors import require

TILE = 128  # lanes of a TPU: the lengths that splash takes are multiples
BLOCKS = (512, 256, 128)  # of queries, and of keys, by what divides


@struct.dataclass
class Mask:
  """Which keys a query sees, in a kernel's terms.

  Attributes:
    q_ids_BL: with k_ids_BM, segment ids: a query sees its own alone.
    k_ids_BM: those of the keys.
    causal: a query sees no later key, by their places in the array.
    window: a query sees keys less than this away; 0: any.
    rule: whether a rule of its own hides keys besides.
    in_order: whether places in the array are the tokens' order.
    prefix: whether keys at the start are seen by all.
    bias: whether the scores have a bias.
    dropout: whether weights are dropped.
  """
  q_ids_BL: Optional[jax.Array] = None
  k_ids_BM: Optional[jax.Array] = None
  causal: bool = struct.field(pytree_node=False, default=False)
  window: int = struct.field(pytree_node=False, default=0)
  rule: bool = struct.field(pytree_node=False, default=False)
  in_order: bool = struct.field(pytree_node=False, default=True)
  prefix: bool = struct.field(pytree_node=False, default=False)
  bias: bool = struct.field(pytree_node=False, default=False)
  dropout: bool = struct.field(pytree_node=False, default=False)


class Kernel(NamedTuple):
  """A fused kernel.

  Attributes:
    platform: that it runs on.
    refuse: (config, mask, queries, keys) -> why it cannot compute this, as
      'which ...'; '': it can.
    run: (q_BLHK, k_BMJK, v_BMJK, mask, seen_BLM, scale, softcap, sink_H) ->
      [B, L, H, K], with the last five as of xla.attend.
  """
  platform: str
  refuse: Callable[[ModelConfig, Mask, int, int], str]
  run: Callable[..., jax.Array]


def choose(c: ModelConfig, mask: Mask, q_length: int, k_length: int, *,
           strict: bool = True) -> str:
  """Returns xla, splash or cudnn.

  Raises:
    ValueError: where config.attention_kernel names one that cannot do it, and
      `strict` asks for no other.
  """
  name, device = c.attention_kernel, sharding.platform()
  why = {kernel: refusal(kernel, c, mask, q_length, k_length, device)
         for kernel in (KERNELS if name == 'auto' else [name])}
  if strict and name != 'auto':
    _require(name, why[name])
  return next((kernel for kernel in why if not why[kernel]), 'xla')


def check_kernel(c: ModelConfig, device: str) -> None:
  """Raises ValueError where a named kernel does not run on the platform."""
  _require(c.attention_kernel, _elsewhere(c.attention_kernel, device))


def _require(name: str, why: str) -> None:
  require(not why, f'model.attention_kernel is {name}, {why}: choose from '
          f'{", ".join(x for x in ("auto", "xla", *KERNELS) if x != name)}')


def _elsewhere(name: str, device: str) -> str:
  home = KERNELS[name].platform if name in KERNELS else device
  return '' if home == device else (
      f'which runs on {home}, and this program is for {device}')


def refusal(name: str, c: ModelConfig, mask: Mask, q_length: int,
            k_length: int, device: str) -> str:
  """Why the kernel cannot compute this; '': it can."""
  if name == 'xla':
    return ''
  if mask.bias or mask.dropout:
    return ('which adds no bias to the scores and drops no weights, as '
            f'model.position {c.position} and model.attention_dropout '
            f'{c.attention_dropout} do')
  return _elsewhere(name, device) or KERNELS[name].refuse(
      c, mask, q_length, k_length)


def _refuse_splash(c: ModelConfig, mask: Mask, q_length: int, k_length: int
                   ) -> str:
  shards = sharding.shards('length', q_length)
  if mask.prefix or mask.rule or not mask.in_order and (
      mask.causal or mask.window):
    return ('which has masks neither for a prefix that all tokens see, nor for '
            'positions without segment ids, nor for rules of attention but '
            'windows')
  is_padded = mask.causal and shards == 1 and q_length == k_length > TILE
  if (q_length % (TILE * shards) or k_length % TILE) and not is_padded:
    return (f'which takes lengths in multiples of {TILE * shards}, and '
            f'{q_length} queries meet {k_length} keys')
  return ''


def _whole(L: int) -> int:
  """Returns the length that so many tokens under a causal mask are padded to:
  tiles, or whole blocks that are an eighth of it at most."""
  block = next(b for b in BLOCKS if b <= max(TILE, L // 8))
  return L if L % TILE == 0 else -(-L // block) * block


def _refuse_cudnn(c: ModelConfig, mask: Mask, q_length: int, k_length: int
                  ) -> str:
  if c.compute_dtype != jnp.bfloat16:
    return f'which computes in bfloat16, and model.dtype is {c.dtype}'
  if c.attention_softcap or c.attention_sinks:
    return 'which has neither model.attention_softcap nor attention_sinks'
  if c.head_dim % 8 or c.head_dim > 128:
    return ('which takes heads of a multiple of 8 features up to 128, and '
            f'model.head_dim is {c.head_dim}')
  if q_length % 2 or k_length % 2:
    return (f'which takes even lengths, and {q_length} queries meet '
            f'{k_length} keys')
  return '' if _cudnn_is_here() else (
      'whose library must be there to compile for it, and it is not')


def _cudnn_is_here() -> bool:
  return (jax.default_backend() == 'gpu'
          and 'cuda' in jax.devices()[0].client.platform_version)


class _Places:
  """How queries and keys lie on the mesh: rows and heads of both are split,
  the length of the queries alone."""

  def __init__(self, q_BLHK: jax.Array, k_BMJK: jax.Array):
    def names(axis: str, size: int):
      return (sharding.mesh_axes(axis)
              if sharding.shards(axis, size) > 1 else ())
    B, L, H, _ = q_BLHK.shape
    self.rows, self.length = names('batch', B), names('length', L)
    self.heads = (names('heads', H) if names('kv_heads', k_BMJK.shape[2])
                  else ())
    self.queries = self.spec(self.rows, self.length, self.heads)
    self.keys = self.spec(self.rows, (), self.heads)

  def spec(self, *names: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*(n or None for n in names))

  def map(self, local: Callable[..., jax.Array],
          in_specs: tuple[Optional[PartitionSpec], ...]
          ) -> Callable[..., jax.Array]:
    """Returns `local`, applied on each device to its share."""
    if not self.rows + self.length + self.heads:
      return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=self.queries,
                         check_vma=False)


def splash(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array, mask: Mask,
           *, scale: float, softcap: float = 0.0,
           sink_H: Optional[jax.Array] = None, interpret: bool = False
           ) -> jax.Array:
  """xla.attend by Pallas' splash attention; `interpret`: on CPU."""
  B, L, H, _ = q_BLHK.shape
  M, at = k_BMJK.shape[1], _Places(q_BLHK, k_BMJK)
  if more := _whole(L) - L:
    # The mask, which is causal, hides the padding from the tokens.
    pad = lambda x: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
    ids_BL = mask.q_ids_BL
    mask = mask if ids_BL is None else mask.replace(
        q_ids_BL=pad(ids_BL), k_ids_BM=pad(mask.k_ids_BM))
    return splash(pad(q_BLHK), pad(k_BMJK), pad(v_BMJK), mask, scale=scale,
                  softcap=softcap, sink_H=sink_H, interpret=interpret)[:, :L]
  # A mask that differs from query to query is cut up with them.
  cut = at.length if mask.causal or mask.window else ()
  kernel = _splash_kernel(
      mask, H // sharding.size(at.heads),
      L if cut else L // sharding.size(at.length), M, sharding.size(cut),
      softcap, interpret)
  q_ids_BL, k_ids_BM = mask.q_ids_BL, mask.k_ids_BM
  if q_ids_BL is not None:
    q_ids_BL = jnp.broadcast_to(q_ids_BL, (B, L))
    k_ids_BM = jnp.broadcast_to(k_ids_BM, (B, M))

  def local(kernel: Any, q_BLHK: jax.Array, k_BMJK: jax.Array,
            v_BMJK: jax.Array, q_ids_BL: Optional[jax.Array],
            k_ids_BM: Optional[jax.Array], sink_H: Optional[jax.Array]):
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas
    ids = None if q_ids_BL is None else pallas.SegmentIds(q_ids_BL, k_ids_BM)
    o_BHLK = _by_splash(kernel, ids, *(
        jnp.swapaxes(x, 1, 2) for x in (
            layers.times(q_BLHK, scale), k_BMJK, v_BMJK)), sink_H)
    return jnp.swapaxes(o_BHLK, 1, 2)

  mesh = jax.sharding.get_abstract_mesh()
  of_kernel = None if mesh.empty else kernel.manual_sharding_spec(
      NamedSharding(mesh, at.spec((), cut)))
  on_each_device = at.map(local, (
      of_kernel, at.queries, at.keys, at.keys, at.spec(at.rows, at.length),
      at.spec(at.rows), at.spec(at.heads)))
  return on_each_device(kernel, q_BLHK, k_BMJK, v_BMJK, q_ids_BL, k_ids_BM,
                        sink_H)


@jax.custom_vjp
def _by_splash(kernel: Any, ids: Any, q_BHLK: jax.Array, k_BJMK: jax.Array,
               v_BJMK: jax.Array, sink_H: Optional[jax.Array]) -> jax.Array:
  """The kernel, of each row.

  It writes the sums of a row's scores 128 times, [B, H, L, 128] in float32, and
  its gradient reads them once. Left to itself, XLA takes the one of 128 where
  the gradient needs it, and keeps all of them until then.
  """
  return jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
      q_BHLK, k_BJMK, v_BJMK, ids, sink_H)


def _by_splash_fwd(kernel: Any, ids: Any, *arrays: Optional[jax.Array]):
  of_rows = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
  return jax.lax.optimization_barrier(jax.vjp(
      lambda q, k, v, sink: of_rows(q, k, v, ids, sink), *arrays))


def _by_splash_bwd(pull: Any, d_BHLK: jax.Array):
  return None, None, *pull(d_BHLK)


_by_splash.defvjp(_by_splash_fwd, _by_splash_bwd)


def _splash_kernel(mask: Mask, heads: int, L: int, M: int, shards: int,
                   softcap: float, interpret: bool):
  """The kernel for `heads` heads; its mask is laid out for `shards` of L."""
  from jax.experimental.pallas.ops.tpu import splash_attention as pallas
  if mask.window:
    side = mask.window - 1
    seen = pallas.LocalMask((L, M), (side, 0 if mask.causal else side), 0)
  elif mask.causal:
    seen = pallas.CausalMask((L, M))
  else:
    seen = pallas.FullMask((L, M))
  q = next(b for b in BLOCKS if L // shards % b == 0)
  k = next(b for b in BLOCKS if M % b == 0)
  return pallas.make_splash_mha(
      pallas.MultiHeadMask([seen] * heads), head_shards=1, q_seq_shards=shards,
      block_sizes=pallas.BlockSizes(
          block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q,
          block_kv_dkv=k, block_kv_dkv_compute=k, block_q_dq=q, block_kv_dq=k),
      attn_logits_soft_cap=softcap or None, interpret=interpret,
      # Where remat keeps products, it keeps what the gradient needs of these.
      residual_checkpoint_name=layers.PRODUCT)


def cudnn(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
          mask: Mask, seen_BLM: Optional[jax.Array], *,
          scale: float) -> jax.Array:
  """xla.attend by cuDNN, in bfloat16; `seen_BLM`: the mask, written
  out, for what is not a causal, banded or whole one of cuDNN's own."""
  (B, L), M, at = q_BLHK.shape[:2], k_BMJK.shape[1], _Places(q_BLHK, k_BMJK)
  own = (mask.in_order and not (mask.prefix or mask.rule)
         and mask.q_ids_BL is None and not at.length
         and (mask.causal or not mask.window))
  window = (mask.window - 1, 0) if own and mask.window else None
  if own:
    seen_BLM = None
  elif seen_BLM is not None:
    seen_BLM = jnp.broadcast_to(seen_BLM, (B, L, M))

  def local(q_BLHK: jax.Array, k_BMJK: jax.Array, v_BMJK: jax.Array,
            seen_BLM: Optional[jax.Array]):
    return jax.nn.dot_product_attention(
        q_BLHK, k_BMJK, v_BMJK, scale=scale, implementation='cudnn',
        mask=None if seen_BLM is None else seen_BLM[:, None],
        is_causal=own and mask.causal, local_window_size=window)

  on_each_device = at.map(
      local, (at.queries, at.keys, at.keys, at.spec(at.rows, at.length)))
  return on_each_device(q_BLHK, k_BMJK, v_BMJK, seen_BLM)


KERNELS = {
    'splash': Kernel(
        'tpu', _refuse_splash,
        lambda q, k, v, mask, seen, **how: splash(q, k, v, mask, **how)),
    'cudnn': Kernel(  # with neither softcap nor sinks, as it refuses them
        'gpu', _refuse_cudnn,
        lambda q, k, v, mask, seen, *, scale, **_: cudnn(
            q, k, v, mask, seen, scale=scale)),
}
