"""Grouped feed-forward: rows sorted by expert, each through its own network.

On TPU and GPU its products are those of a kernel:

xla       jax.lax.ragged_dot, as the compiler makes of it; anywhere
megablox  Pallas' gmm and tgmm on TPU (MegaBlocks: Gale et al. 2022): a grid
          over the tiles of rows that an expert has, so the work follows them

`auto` takes megablox on TPU and xla elsewhere. XLA's own is at times every
expert for every row: on GPU, and on a TPU by the compiler's release. As in
parts/attention/kernels.py the platform is that of the mesh.

XLA on CPU expands `ragged_dot` to every expert for every row, so there a loop
goes over blocks of rows instead. A block belongs to one expert and passes
through the whole network while it is in cache; its weight gradient is added in
place. Block sizes are static and the number of blocks of each size is not: the
work follows the rows.

Beside the legend, P counts rows, sorted by expert, and a product maps I inputs
to O outputs.
"""

import functools
from typing import Any, Callable, NamedTuple, Optional

import jax
import jax.numpy as jnp

from architectures.parts import layers, sharding
from architectures.parts.layers import Hidden
from architectures.parts.moe.routing import MoEConfig
from common.errors import RequestError

# Sizes of blocks, relative to the rows an even load gives an expert: dense
# around it, since a block that its rows do not fill wastes the rest.
SIZES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1, 17 / 16, 9 / 8, 5 / 4, 3 / 2, 2)
LARGEST = 1024
GROUPED_KERNELS = ('auto', 'xla', 'megablox')
# The rows of a tile of megablox, in order of choice. A tile that two experts
# share is computed for both, so an expert should fill two: fewer rows a tile
# waste less of the matrix units, more read the weights less often.
ROWS = (512, 256, 128)
# The longest side of a matrix' tile, by what VMEM has.
SIDE = {'bfloat16': 1024, 'float32': 512}


class How(NamedTuple):
  """How a grouped network is computed.

  Attributes:
    kind: the network's kind.
    even: the rows an expert has in even load: the blocks are sized for it.
    kernel: the kernel of the products, one of GROUPED_KERNELS; on CPU xla
      means blocks.
    again: whether nothing is kept for the backward pass, which then computes
      the hidden units again, one part of them after another. This is for layers
      that are computed again anyway: then the result need not be.
  """
  kind: Hidden
  even: int
  kernel: str
  again: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def ffn(rows_PD: jax.Array, count_E: jax.Array, gate_P: jax.Array, w: Any,
        mask_PF: Optional[jax.Array], how: How) -> jax.Array:
  """Returns gate * FFN_e(row) of each row, [P, D]; those of rows past the
  counts are unspecified, but finite.

  Args:
    rows_PD: the rows of expert 0, then those of expert 1, ...; there may be
      more rows than sum(count_E).
    count_E: int32, the rows of each expert.
    gate_P: float32, what a row's result is multiplied by.
    w: dispatch.Weights, in the dtype of the rows.
    mask_PF: multiplies the hidden units, for dropout; or None.
    how: how it is computed.
  """
  y_PD, _ = _ffn_fwd(rows_PD, count_E, gate_P=gate_P, w=w, mask_PF=mask_PF,
                     how=how)
  return y_PD


def _ffn_fwd(rows_PD: jax.Array, count_E: jax.Array, gate_P: jax.Array, w: Any,
             mask_PF: Optional[jax.Array], how: How):
  """Returns the result and what is kept: the arguments, and the inputs of the
  activation, (up,) or (up, gate); None instead of these with how.again."""

  def keeps(forward: Callable) -> Callable:
    """Returns a forward pass that gives up what is computed again."""
    def run(*args: Any):
      """Returns the result and what is kept of the forward pass."""
      y_PD, pre = forward(*args)
      if how.again:
        pre = None
      return y_PD, pre
    return run

  blocks = functools.partial(_blocks_forward, how.kind, how.even)
  whole = functools.partial(
      _whole_forward, product(how.kernel, how.even), how.kind, how.again)
  y_PD, pre = _on_platform(
      how.kernel, keeps(blocks), keeps(whole), rows_PD, count_E, w, mask_PF)
  y_PD = y_PD * gate_P[:, None].astype(y_PD.dtype)
  return y_PD, (rows_PD, count_E, gate_P, w, mask_PF, pre)


def _ffn_bwd(how: How, saved: tuple, dy_PD: jax.Array):
  blocks = functools.partial(_blocks_backward, how.kind, how.even)
  whole = functools.partial(
      _whole_backward, product(how.kernel, how.even), how.kind)
  dx_PD, dgate_P, dw = _on_platform(how.kernel, blocks, whole, *saved, dy_PD)
  return dx_PD, None, dgate_P, dw, None


ffn.defvjp(_ffn_fwd, _ffn_bwd)


def _on_platform(kernel: str, blocks: Callable, whole: Callable, *args):
  """Returns what `blocks` does on CPU, where XLA's product is slow, and what
  `whole` does elsewhere. Another kernel than xla was chosen for its platform.
  """
  if kernel != 'xla':
    return whole(*args)
  return jax.lax.platform_dependent(*args, cpu=blocks, default=whole)


def _activation(kind: Hidden, mask_PF: Optional[jax.Array]) -> Callable:
  """Returns the function from (up,) or (up, gate) to the hidden units."""
  def hidden(pre: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the hidden units, those that dropout drops as 0."""
    h_PF = kind(*pre)
    if mask_PF is None:
      return h_PF
    return h_PF * mask_PF.astype(h_PF.dtype)
  return hidden


def _into(w: Any) -> tuple:
  """Returns the (weight, bias) pairs that lead to the hidden units."""
  up = (w.up_EDF, w.up_bias_EF)
  if w.gate_EDF is None:
    return (up,)
  return up, (w.gate_EDF, w.gate_bias_EF)


def _like(w: Any, into: list, out: tuple) -> Any:
  """Returns gradients as dispatch.Weights.

  Args:
    w: the weights.
    into: the gradients of `_into(w)`.
    out: the gradients of down and its bias.
  """
  up, up_bias = into[0]
  gate, gate_bias = None, None
  if len(into) > 1:
    gate, gate_bias = into[1]
  down, down_bias = out
  return w.replace(
      up_EDF=up, up_bias_EF=up_bias, gate_EDF=gate, gate_bias_EF=gate_bias,
      down_EFD=down, down_bias_ED=down_bias)


# The whole array at once, on TPU and GPU.


def _whole_affine(times: Callable, count_E: jax.Array, x_PI: jax.Array,
                  m_EIO: jax.Array, b_EO: Optional[jax.Array]) -> jax.Array:
  """Returns x m + b of each row's expert, [P, O]."""
  y_PO = times(x_PI, m_EIO, count_E)
  if b_EO is None:
    return y_PO
  return y_PO + _of_rows(b_EO, count_E, rows=len(x_PI))


def _of_rows(b_EO: jax.Array, count_E: jax.Array, rows: int) -> jax.Array:
  """Returns the bias of each row's expert, [P, O]; 0 past the counts."""
  expert_P = jnp.searchsorted(jnp.cumsum(count_E), jnp.arange(rows),
                              side='right')
  return b_EO.at[expert_P].get(mode='fill', fill_value=0)


def _whole_forward(times: Callable, kind: Hidden, again: bool,
                   rows_PD: jax.Array, count_E: jax.Array, w: Any,
                   mask_PF: Optional[jax.Array]):
  """Returns the result and the inputs of the activation. With `again` these are
  not kept, and the parts of the hidden units are computed one after another."""
  affine = functools.partial(_whole_affine, times, count_E)

  def hidden(w: Any, mask_PF: Optional[jax.Array]):
    """Returns hidden units, and the inputs of the activation."""
    pre = tuple(affine(rows_PD, weight, bias) for weight, bias in _into(w))
    return _activation(kind, mask_PF)(pre), pre

  D, F = w.up_EDF.shape[1:]
  parts = 1
  if again:
    parts = _parts(D, F)
  if parts == 1:
    h_PF, pre = hidden(w, mask_PF)
    return affine(h_PF, w.down_EFD, w.down_bias_ED), pre

  h_PF = jnp.zeros((len(rows_PD), F), rows_PD.dtype)
  cuts = zip(_split(w, parts), _cut(mask_PF, parts))
  for i, (part, part_mask) in enumerate(cuts):
    # The barrier keeps XLA from computing several parts at once.
    rows_PD, h_PF = jax.lax.optimization_barrier((rows_PD, h_PF))
    part_PF, _ = hidden(part, part_mask)
    h_PF = jax.lax.dynamic_update_slice_in_dim(
        h_PF, part_PF, start_index=i * F // parts, axis=1)
  return affine(h_PF, w.down_EFD, w.down_bias_ED), ()


def _whole_backward(times: Callable, kind: Hidden, rows_PD: jax.Array,
                    count_E: jax.Array, gate_P: jax.Array, w: Any,
                    mask_PF: Optional[jax.Array],
                    pre: Optional[tuple[jax.Array, ...]], dy_PD: jax.Array):
  """Returns the gradients of the rows, the gates and the weights.

  With u = dy W_down^T, the gate's gradient is u . h, so y is not needed.
  Without `pre`, the parts of the hidden units are computed one after another.
  """
  inside_P = jnp.arange(rows_PD.shape[0]) < count_E.sum()
  dy_PD = jnp.where(inside_P[:, None], dy_PD, 0)
  affine = functools.partial(_whole_affine, times, count_E)

  def gated(x_P: jax.Array) -> jax.Array:
    """Returns rows, each multiplied by its gate."""
    return x_P * gate_P[:, None].astype(x_P.dtype)

  def dots(x_PI: jax.Array, y_PI: jax.Array) -> jax.Array:
    """Returns the products x . y of each row, in float32."""
    return (x_PI.astype(jnp.float32) * y_PI.astype(jnp.float32)).sum(1)

  def gradients(x_PI: jax.Array, m_EIO: jax.Array, b_EO: Optional[jax.Array],
                dy_PO: jax.Array) -> tuple:
    """Returns the gradients of a product: of x, m and b. Its forward half is
    dead code."""
    _, vjp = jax.vjp(affine, x_PI, m_EIO, b_EO)
    return vjp(dy_PO)

  dx_PD, dgate_P = jnp.zeros_like(rows_PD), jnp.zeros_like(gate_P)
  dws: list = []
  parts = 1
  if pre is None:
    D, F = w.up_EDF.shape[1:]
    parts = _parts(D, F)
  for part, part_mask in zip(_split(w, parts), _cut(mask_PF, parts)):
    if dws:  # else XLA joins what belongs to this part with the next one's
      rows_PD, dy_PD, dx_PD, dgate_P, dws = jax.lax.optimization_barrier(
          (rows_PD, dy_PD, dx_PD, dgate_P, dws))

    # The hidden units of this part, and the gradients of the gates and of down.
    into = _into(part)
    act = _activation(kind, part_mask)
    inputs = pre
    if not pre:
      inputs = tuple(affine(rows_PD, weight, bias) for weight, bias in into)
    h_PF = act(inputs)
    u_PF, _, _ = gradients(h_PF, part.down_EFD, b_EO=None, dy_PO=dy_PD)
    dgate_P += dots(u_PF, h_PF)
    # The gates multiply h, because it is narrower than dy.
    _, ddown, _ = gradients(
        gated(h_PF), part.down_EFD, b_EO=None, dy_PO=dy_PD)
    if len(into) > 1:
      # The hidden units go first, and what of the activation its gradient needs
      # too is computed again: XLA would keep both, the latter in float32. Of a
      # network without gates it keeps less by itself.
      inputs, u_PF, dgate_P, ddown = jax.lax.optimization_barrier(
          (inputs, u_PF, dgate_P, ddown))

    # The gradients of the rows, and of what leads to the hidden units.
    _, act_vjp = jax.vjp(act, inputs)
    (d_inputs,) = act_vjp(gated(u_PF))
    dinto = []
    for (weight, bias), d_PF in zip(into, d_inputs):
      more_PD, dweight, dbias = gradients(
          rows_PD, weight, b_EO=bias, dy_PO=d_PF)
      dx_PD = dx_PD + more_PD
      dinto.append((dweight, dbias))
    dws.append(_like(part, dinto, (ddown, None)))
  dw = _joined(dws)

  # The last bias, which the gates multiply too.
  if w.down_bias_ED is not None:
    of_rows = functools.partial(
        _of_rows, count_E=count_E, rows=len(rows_PD))
    bias_PD, of_rows_vjp = jax.vjp(of_rows, w.down_bias_ED)
    dgate_P += dots(dy_PD, bias_PD)
    (dbias_ED,) = of_rows_vjp(gated(dy_PD))
    dw = dw.replace(down_bias_ED=dbias_ED)
  # The rows and what the weights' gradients need of them may then go before the
  # layers below: XLA may compute the weights' gradients of several layers late.
  return jax.lax.optimization_barrier((dx_PD, dgate_P, dw))


def _parts(D: int, F: int) -> int:
  """Returns in how many parts hidden units are computed: the fewest that are no
  wider than a row and whose width is a multiple of 128; else 1."""
  fewest, most = -(-F // D), F // 128
  for parts in range(fewest, most + 1):
    if F % (parts * 128) == 0:
      return parts
  return 1


def _cut(x: Optional[jax.Array], parts: int, axis: int = -1) -> list:
  """Returns the parts of an array along an axis; of None, each is None."""
  if x is None:
    return [None] * parts
  return jnp.split(x, parts, axis)


def _split(w: Any, parts: int) -> list:
  """Returns the Weights of each part of the hidden units, without the last
  bias."""
  cuts = {'down_EFD': _cut(w.down_EFD, parts, axis=1)}
  for name in _OF_HIDDEN:
    cuts[name] = _cut(getattr(w, name), parts)
  split = []
  for i in range(parts):
    part = {name: cut[i] for name, cut in cuts.items()}
    split.append(w.replace(down_bias_ED=None, **part))
  return split


def _joined(parts: list) -> Any:
  """Returns the gradients of parts of the hidden units, as those of all."""

  def join(name: str, axis: int) -> Optional[jax.Array]:
    """Returns a gradient, whole; None where the network lacks the weight."""
    arrays = [getattr(part, name) for part in parts]
    if arrays[0] is None:
      return None
    return jnp.concatenate(arrays, axis)

  whole = {'down_EFD': join('down_EFD', 1)}
  for name in _OF_HIDDEN:
    whole[name] = join(name, -1)
  return parts[0].replace(**whole)


# The weights whose last axis are the hidden units.
_OF_HIDDEN = 'up_EDF', 'gate_EDF', 'up_bias_EF', 'gate_bias_EF'


# Block by block, on CPU.


def sizes(rows: int, even: int) -> tuple[int, ...]:
  """Returns the static sizes of blocks, ascending: multiples of 16, at most
  `rows`; `even` is the rows an expert has in even load."""
  even = min(even, LARGEST / SIZES[-1])
  choices = set()
  for size in SIZES:
    whole_sixteens = -int(-even * size // 16) * 16
    choices.add(min(rows, whole_sixteens))
  return tuple(sorted(choices))


def _for_blocks(rows: int, even: int, count_E: jax.Array, body: Callable,
                carry: Any) -> Any:
  """Returns carry = body(carry, size, expert, start, first, stop) after every
  block.

  A block is the `size` rows from `start`, of which `first` to `stop` are the
  expert's. An expert has as many blocks of the largest size as it fills, and
  one of the smallest size that holds the rest.

  Args:
    rows: P.
    even: the rows an expert has in even load.
    count_E: the rows of each expert.
    body: what is done with a block.
    carry: what it starts with.
  """
  choice = sizes(rows, even)
  largest = choice[-1]
  # The blocks that an expert fills, and the size that holds the rest.
  offset_E = jnp.cumsum(count_E) - count_E
  full_E = count_E // largest
  rest_E = count_E - full_E * largest
  has_rest_E = rest_E > 0
  size_E = jnp.searchsorted(jnp.array(choice), rest_E).astype(jnp.int32)
  size_E = jnp.where(has_rest_E, size_E, len(choice))

  for i, size in enumerate(choice):
    blocks_E = (size_E == i).astype(jnp.int32)
    first_E = offset_E + full_E * largest
    if size == largest:
      blocks_E, first_E = blocks_E + full_E, offset_E
    carry = _for_blocks_of(
        size, rows, blocks_E=blocks_E, first_E=first_E,
        stop_E=offset_E + count_E, body=body, carry=carry)
  return carry


def _for_blocks_of(size: int, rows: int, blocks_E: jax.Array,
                   first_E: jax.Array, stop_E: jax.Array, body: Callable,
                   carry: Any) -> Any:
  """Returns what `_for_blocks` does after the blocks of one size: each expert
  has blocks_E of them, from row first_E on, and its rows end before row stop_E.
  """
  ends_E = jnp.cumsum(blocks_E)

  def step(j: jax.Array, carry: Any) -> Any:
    """Does block j, which is the expert's whose blocks end after j."""
    e = jnp.searchsorted(ends_E, j, side='right').astype(jnp.int32)
    first = first_E[e] + (j - ends_E[e] + blocks_E[e]) * size
    stop = jnp.minimum(first + size, stop_E[e])
    start = jnp.minimum(first, rows - size)
    return body(carry, size, e, start, first, stop)

  return jax.lax.fori_loop(0, ends_E[-1], body_fun=step, init_val=carry)


def _rows(x_P: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """Returns `size` rows from `start`."""
  return jax.lax.dynamic_slice_in_dim(x_P, start, size)


def _read(x_P: jax.Array, start: jax.Array, size: int) -> jax.Array:
  """Returns `size` rows from `start`, in float32."""
  return _rows(x_P, start, size).astype(jnp.float32)


def _write(x_P: jax.Array, new: jax.Array, start: jax.Array, inside: jax.Array
           ) -> jax.Array:
  """Returns x_P with the new rows from `start`, those `inside` a block."""
  old = _rows(x_P, start, new.shape[0])
  new = jnp.where(inside[:, None], new.astype(x_P.dtype), old)
  return jax.lax.dynamic_update_slice_in_dim(
      x_P, new, start_index=start, axis=0)


def _inside(size: int, start: jax.Array, first: jax.Array, stop: jax.Array
            ) -> jax.Array:
  """Returns which of `size` rows from `start` are `first` to `stop`."""
  row = start + jnp.arange(size)
  return (row >= first) & (row < stop)


def _times(x: jax.Array, m: jax.Array) -> jax.Array:
  """Returns x m in float32: a bfloat16 result is slow on CPU."""
  return jnp.matmul(x, m, preferred_element_type=jnp.float32)


def _affine(x: jax.Array, m: jax.Array, b: Optional[jax.Array]) -> jax.Array:
  """Returns x m + b in float32."""
  y = _times(x, m)
  if b is None:
    return y
  return y + b[None]


def _blocks_forward(kind: Hidden, even: int, rows_PD: jax.Array,
                    count_E: jax.Array, w: Any, mask_PF: Optional[jax.Array]):
  """Returns the result and the inputs of the activation, block by block."""
  P, F = rows_PD.shape[0], w.up_EDF.shape[2]

  def body(carry: Any, size: int, e: jax.Array, start: jax.Array,
           first: jax.Array, stop: jax.Array):
    """Returns the results, with those of one block written into them."""
    y_PD, pre_PF = carry
    # One block through the network of its expert.
    x = _rows(rows_PD, start, size)
    expert = jax.tree.map(lambda m: m[e], w)
    mask = None if mask_PF is None else _read(mask_PF, start, size)
    pre = [_affine(x, weight, bias) for weight, bias in _into(expert)]
    h = _activation(kind, mask)(pre).astype(x.dtype)
    y = _affine(h, expert.down_EFD, expert.down_bias_ED)

    # Its rows go where they belong.
    inside = _inside(size, start, first=first, stop=stop)
    y_PD = _write(y_PD, y, start=start, inside=inside)
    written = []
    for whole_PF, block in zip(pre_PF, pre):
      written.append(_write(whole_PF, block, start=start, inside=inside))
    return y_PD, tuple(written)

  pre_PF = tuple(jnp.zeros((P, F), rows_PD.dtype) for _ in _into(w))
  y_PD = jnp.zeros_like(rows_PD)
  return _for_blocks(P, even, count_E=count_E, body=body, carry=(y_PD, pre_PF))


def _blocks_backward(kind: Hidden, even: int, rows_PD: jax.Array,
                     count_E: jax.Array, gate_P: jax.Array, w: Any,
                     mask_PF: Optional[jax.Array],
                     pre_PF: Optional[tuple[jax.Array, ...]],
                     dy_PD: jax.Array):
  """Returns the gradients of the rows, the gates and the weights, block by
  block. Without `pre_PF`, the inputs of the activation are computed again."""

  def affine_gradients(x: jax.Array, d: jax.Array, b: Optional[jax.Array]
                       ) -> tuple[jax.Array, Optional[jax.Array]]:
    """Returns the gradients of m and b in d = gradient of (x m + b)."""
    dm = layers.of_weight(x, d)
    if b is None:
      return dm, None
    return dm, d.astype(jnp.float32).sum(0)

  def body(carry: Any, size: int, e: jax.Array, start: jax.Array,
           first: jax.Array, stop: jax.Array):
    """Returns the gradients, with those of one block added to them."""
    dx_PD, dgate_P, dw = carry
    # The rows of the block, and the inputs of its activation.
    x = _rows(rows_PD, start, size)
    expert = jax.tree.map(lambda m: m[e], w)
    into = _into(expert)
    inside = _inside(size, start, first=first, stop=stop)
    dy = jnp.where(inside[:, None], _rows(dy_PD, start, size), 0)
    gate = _read(gate_P, start, size)[:, None]
    mask = None if mask_PF is None else _read(mask_PF, start, size)
    if pre_PF is None:
      pre = tuple(_affine(x, weight, bias) for weight, bias in into)
    else:
      pre = tuple(_read(whole_PF, start, size) for whole_PF in pre_PF)

    # The hidden units and their gradients, u without the gate.
    h, act_vjp = jax.vjp(_activation(kind, mask), pre)
    u = _times(dy, expert.down_EFD.T)
    dgate = (u * h).sum(1)
    if expert.down_bias_ED is not None:
      dgate += _times(dy, expert.down_bias_ED)
    (d_wide,) = act_vjp(gate * u)
    d_pre = [d.astype(dy.dtype) for d in d_wide]

    # The gradients of this expert's weights and of the rows.
    dinto = []
    for d, (_, bias) in zip(d_pre, into):
      dinto.append(affine_gradients(x, d, bias))
    dout = affine_gradients(h.astype(dy.dtype), (gate * dy).astype(dy.dtype),
                            expert.down_bias_ED)
    dexpert = _like(w, dinto, dout)
    dx = sum(_times(d, weight.T) for d, (weight, _) in zip(d_pre, into))
    dx_PD = _write(dx_PD, dx, start=start, inside=inside)
    dgate_P = _write(dgate_P, dgate[:, None], start=start, inside=inside)
    dw = jax.tree.map(lambda total, d: total.at[e].add(d), dw, dexpert)
    return dx_PD, dgate_P, dw

  dw = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), w)
  zeros = (jnp.zeros_like(rows_PD), jnp.zeros_like(gate_P[:, None]), dw)
  dx_PD, dgate_P1, dw = _for_blocks(
      rows_PD.shape[0], even, count_E=count_E, body=body, carry=zeros)
  dw = jax.tree.map(lambda d, m: d.astype(m.dtype), dw, w)
  return dx_PD, dgate_P1[:, 0], dw


# Kernels.


def choose(m: MoEConfig) -> str:
  """Returns the kernel of the products, xla or megablox.

  Raises:
    RequestError: where config.moe.grouped_kernel names one that cannot do it.
  """
  device = sharding.platform()
  check_grouped_kernel(m, device)
  if m.grouped_kernel != 'auto':
    return m.grouped_kernel
  if device == 'tpu':
    return 'megablox'
  return 'xla'


def check_grouped_kernel(m: MoEConfig, device: str) -> None:
  """Raises RequestError where a named kernel does not run on the platform."""
  if m.grouped_kernel == 'megablox' and device != 'tpu':
    raise RequestError(
        'model.moe.grouped_kernel is megablox, which runs on tpu, and this '
        f'program is for {device}: choose from auto, xla')


def product(name: str, even: int) -> Callable:
  """Returns a grouped product, (rows_PI, m_EIO, count_E) -> [P, O], with
  gradients of the first two; rows past the counts are unspecified, but finite.

  Args:
    name: the kernel.
    even: the rows an expert has in even load.
  """
  if name == 'xla':
    return jax.lax.ragged_dot
  return functools.partial(megablox, even, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def megablox(even: int, interpret: bool, x_PI: jax.Array, m_EIO: jax.Array,
             count_E: jax.Array) -> jax.Array:
  """Returns the grouped product by Pallas' kernel (MegaBlocks: Gale et al.
  2022); with `interpret`, on CPU."""
  return _gmm(even, x_PI, m_EIO=m_EIO, count_E=count_E, interpret=interpret)


def _megablox_fwd(even: int, interpret: bool, x_PI: jax.Array,
                  m_EIO: jax.Array, count_E: jax.Array):
  y_PO = megablox(even, interpret, x_PI=x_PI, m_EIO=m_EIO, count_E=count_E)
  return y_PO, (x_PI, m_EIO, count_E)


def _megablox_bwd(even: int, interpret: bool, saved: tuple, dy_PO: jax.Array):
  """Returns the gradients. They are not those of megablox itself, which tiles
  both as it did the product, though their sides are others."""
  x_PI, m_EIO, count_E = saved
  dx_PI = _gmm(even, dy_PO, m_EIO=m_EIO, count_E=count_E, interpret=interpret,
               transpose=True)
  dm_EIO = _tgmm(even, x_PI, dy_PO=dy_PO, dtype=m_EIO.dtype, count_E=count_E,
                 interpret=interpret)
  return dx_PI, dm_EIO, None


megablox.defvjp(_megablox_fwd, _megablox_bwd)


def _gmm(even: int, x_PI: jax.Array, m_EIO: jax.Array, count_E: jax.Array,
         interpret: bool, transpose: bool = False) -> jax.Array:
  """Returns x m of each row's expert, [P, O]; with `transpose`, x m^T."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
  P, inputs = x_PI.shape
  outputs = m_EIO.shape[2]
  if transpose:
    outputs = m_EIO.shape[1]
  tiles = _tiles(even, P, inputs=inputs, outputs=outputs, dtype=x_PI.dtype)
  filled_PI = _fill(x_PI, tiles[0])
  y_PO = gmm(filled_PI, m_EIO, group_sizes=count_E,
             preferred_element_type=x_PI.dtype, tiling=tiles,
             transpose_rhs=transpose, interpret=interpret)[:P]
  # Rows that no expert has are not written: whatever the memory held.
  inside_P = jnp.arange(P) < count_E.sum()
  return jnp.where(inside_P[:, None], y_PO, 0)


def _tgmm(even: int, x_PI: jax.Array, dy_PO: jax.Array,
          dtype: jax.typing.DTypeLike, count_E: jax.Array, interpret: bool
          ) -> jax.Array:
  """Returns x^T dy of each expert's rows, [E, I, O]; zero where it has none."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
  P, inputs = x_PI.shape
  tiles = _tiles(even, P, inputs=inputs, outputs=dy_PO.shape[1],
                 dtype=x_PI.dtype)
  x_PI, dy_PO = _fill(x_PI, tiles[0]), _fill(dy_PO, tiles[0])
  return tgmm(x_PI.swapaxes(0, 1), dy_PO, group_sizes=count_E,
              preferred_element_type=dtype, tiling=tiles, interpret=interpret)


def _tiles(even: int, P: int, inputs: int, outputs: int,
           dtype: jax.typing.DTypeLike) -> tuple[int, int, int]:
  """Returns the sides of the tiles of rows, inputs and outputs."""
  rows = ROWS[-1]
  for choice in ROWS:
    if 2 * choice <= even and P % choice == 0:
      rows = choice
      break
  most = SIDE[jnp.dtype(dtype).name]
  return rows, _side(inputs, most), _side(outputs, most)


def _side(size: int, most: int) -> int:
  """Returns the side of a tile: as few tiles as `most` allows, all alike, of
  whole lanes."""
  if size <= most:
    return size
  tiles = -(-size // most)
  return -(-size // tiles // 128) * 128


def _fill(x_P: jax.Array, rows: int) -> jax.Array:
  """Returns x with zeros after its rows, up to whole tiles of `rows`."""
  return jnp.pad(x_P, ((0, -x_P.shape[0] % rows), (0, 0)))
