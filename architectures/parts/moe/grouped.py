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
"""

import functools
from typing import Any, Callable, NamedTuple, Optional

import jax
import jax.numpy as jnp

from architectures.parts import layers, sharding
from architectures.parts.layers import Hidden
from architectures.parts.moe.routing import MoEConfig
from common.errors import require

# Sizes of blocks, relative to the rows an even load gives an expert: dense
# around it, since a block that its rows do not fill wastes the rest.
SIZES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1, 17 / 16, 9 / 8, 5 / 4, 3 / 2, 2)
LARGEST = 1024
GROUPED_KERNELS = ('auto', 'xla', 'megablox')
# Of megablox, in order of choice. A tile that two experts share is computed
# for both, so an expert should fill two: fewer rows a tile waste less of the
# matrix units, more read the weights less often.
ROWS = (512, 256, 128)
SIDE = {'bfloat16': 1024, 'float32': 512}  # of a matrix' tile, by what VMEM has


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
  """gate * FFN_e of each row; rows past the counts are unspecified, but finite.

  Args:
    rows_PD: expert 0's rows, then expert 1's, ...; sum(count_E) <= P.
    count_E: int32, the rows of each expert.
    gate_P: float32, what a row's result is multiplied by.
    w: dispatch.Weights, in the dtype of the rows.
    mask_PF: multiplies the hidden units, for dropout; or None.
    how: how it is computed.
  """
  return _ffn_fwd(rows_PD, count_E, gate_P, w, mask_PF, how)[0]


def _ffn_fwd(rows_PD: jax.Array, count_E: jax.Array, gate_P: jax.Array, w: Any,
             mask_PF: Optional[jax.Array], how: How):
  """Returns the result and what is kept: the arguments, and the inputs of the
  activation, (up,) or (up, gate), or None."""
  def keeps(forward: Callable):
    def run(*args):
      y_PD, pre = forward(*args)
      return y_PD, None if how.again else pre
    return run
  y_PD, pre = _on_platform(
      how.kernel,
      keeps(functools.partial(_blocks_forward, how.kind, how.even)),
      keeps(functools.partial(_whole_forward, product(how.kernel, how.even),
                              how.kind, how.again)),
      rows_PD, count_E, w, mask_PF)
  y_PD = y_PD * gate_P[:, None].astype(y_PD.dtype)
  return y_PD, (rows_PD, count_E, gate_P, w, mask_PF, pre)


def _ffn_bwd(how: How, saved: tuple, dy_PD: jax.Array):
  dx_PD, dgate_P, dw = _on_platform(
      how.kernel, functools.partial(_blocks_backward, how.kind, how.even),
      functools.partial(_whole_backward, product(how.kernel, how.even),
                        how.kind), *saved, dy_PD)
  return dx_PD, None, dgate_P, dw, None


ffn.defvjp(_ffn_fwd, _ffn_bwd)


def _on_platform(kernel: str, blocks: Callable, whole: Callable, *args):
  """Runs `blocks` on CPU, where XLA's product is slow, and else `whole`.
  Another kernel than xla was chosen for its platform."""
  if kernel != 'xla':
    return whole(*args)
  return jax.lax.platform_dependent(*args, cpu=blocks, default=whole)


def _activation(kind: Hidden, mask_PF: Optional[jax.Array]):
  """(up,) or (up, gate) -> the hidden units."""
  def hidden(pre: tuple[jax.Array, ...]):
    h_PF = kind(*pre)
    return h_PF if mask_PF is None else h_PF * mask_PF.astype(h_PF.dtype)
  return hidden


def _into(w: Any) -> tuple:
  """The (weight, bias) pairs that lead to the hidden units."""
  pairs = ((w.up_EDF, w.up_bias_EF), (w.gate_EDF, w.gate_bias_EF))
  return pairs if w.gate_EDF is not None else pairs[:1]


def _like(w: Any, into: list, out: tuple):
  """Gradients of `_into(w)` and of (down, its bias), as Weights."""
  (up, up_bias), (gate, gate_bias) = (into + [(None, None)])[:2]
  return w.replace(up_EDF=up, up_bias_EF=up_bias, gate_EDF=gate,
                   gate_bias_EF=gate_bias, down_EFD=out[0],
                   down_bias_ED=out[1])


# The whole array at once, on TPU and GPU.


def _whole_affine(times: Callable, count_E: jax.Array, x_PI: jax.Array,
                  m_EIO: jax.Array, b_EO: Optional[jax.Array]):
  y_PO = times(x_PI, m_EIO, count_E)
  return y_PO if b_EO is None else y_PO + _of_rows(b_EO, count_E, len(x_PI))


def _of_rows(b_EO: jax.Array, count_E: jax.Array, rows: int) -> jax.Array:
  """Each row's bias, [P, O]; 0 past the counts."""
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
    pre = tuple(affine(rows_PD, *pair) for pair in _into(w))
    return _activation(kind, mask_PF)(pre), pre
  parts = _parts(*w.up_EDF.shape[1:]) if again else 1
  if parts == 1:
    h_PF, pre = hidden(w, mask_PF)
  else:
    F = w.up_EDF.shape[2]
    h_PF, pre = jnp.zeros((len(rows_PD), F), rows_PD.dtype), ()
    for i, part in enumerate(zip(_split(w, parts), _cut(mask_PF, parts))):
      rows_PD, h_PF = jax.lax.optimization_barrier((rows_PD, h_PF))
      h_PF = jax.lax.dynamic_update_slice_in_dim(
          h_PF, hidden(*part)[0], i * F // parts, 1)
  return affine(h_PF, w.down_EFD, w.down_bias_ED), pre


def _whole_backward(times: Callable, kind: Hidden, rows_PD: jax.Array,
                    count_E: jax.Array, gate_P: jax.Array, w: Any,
                    mask_PF: Optional[jax.Array],
                    pre: Optional[tuple[jax.Array, ...]], dy_PD: jax.Array):
  """With u = dy W_down^T, the gate's gradient is u . h, so y is not needed.
  Without `pre`, the parts of the hidden units are computed one after another.
  """
  inside_P = jnp.arange(rows_PD.shape[0]) < count_E.sum()
  dy_PD = jnp.where(inside_P[:, None], dy_PD, 0)
  gated = lambda x: x * gate_P[:, None].astype(x.dtype)
  wide = lambda x: x.astype(jnp.float32)
  affine = functools.partial(_whole_affine, times, count_E)
  def vjp(x, pair, dy):  # of a product; its forward half is dead code
    return jax.vjp(affine, x, *pair)[1](dy)
  dx_PD, dgate_P, dws = jnp.zeros_like(rows_PD), jnp.zeros_like(gate_P), []
  parts = 1 if pre is not None else _parts(*w.up_EDF.shape[1:])
  for part, part_mask in zip(_split(w, parts), _cut(mask_PF, parts)):
    if dws:  # else XLA joins what belongs to this part with the next one's
      rows_PD, dy_PD, dx_PD, dgate_P, dws = jax.lax.optimization_barrier(
          (rows_PD, dy_PD, dx_PD, dgate_P, dws))
    into = _into(part)
    act = _activation(kind, part_mask)
    ins = pre or tuple(affine(rows_PD, *pair) for pair in into)
    h_PF = act(ins)
    u_PF = vjp(h_PF, (part.down_EFD, None), dy_PD)[0]
    dgate_P += (wide(u_PF) * wide(h_PF)).sum(1)
    # The gates multiply h, because it is narrower than dy.
    ddown, dinto = vjp(gated(h_PF), (part.down_EFD, None), dy_PD)[1], []
    if len(into) > 1:
      # The hidden units go first, and what of the activation its gradient needs
      # too is computed again: XLA would keep both, the latter in float32. Of a
      # network without gates it keeps less by itself.
      ins, u_PF, dgate_P, ddown = jax.lax.optimization_barrier(
          (ins, u_PF, dgate_P, ddown))
    act_vjp = jax.vjp(act, ins)[1]
    for pair, d_PF in zip(into, act_vjp(gated(u_PF))[0]):
      more_PD, *grads = vjp(rows_PD, pair, d_PF)
      dx_PD, dinto = dx_PD + more_PD, dinto + [tuple(grads)]
    dws.append(_like(part, dinto, (ddown, None)))
  dw = _joined(dws)
  if w.down_bias_ED is not None:
    bias_PD, of_rows_vjp = jax.vjp(
        lambda b_ED: _of_rows(b_ED, count_E, len(rows_PD)), w.down_bias_ED)
    dgate_P += (wide(dy_PD) * wide(bias_PD)).sum(1)
    dw = dw.replace(down_bias_ED=of_rows_vjp(gated(dy_PD))[0])
  # The rows and what the weights' gradients need of them may then go before the
  # layers below: XLA may compute the weights' gradients of several layers late.
  return jax.lax.optimization_barrier((dx_PD, dgate_P, dw))


def _parts(D: int, F: int) -> int:
  """Returns in how many parts hidden units are computed: the fewest that are no
  wider than a row and whose width is a multiple of 128; else 1."""
  return next((n for n in range(-(-F // D), 1 + F // 128)
               if F % (n * 128) == 0), 1)


def _cut(x: Optional[jax.Array], parts: int, axis: int = -1) -> list:
  return [None] * parts if x is None else jnp.split(x, parts, axis)


def _split(w: Any, parts: int) -> list:
  """The Weights of each part of the hidden units, without the last bias."""
  cut = dict(down_EFD=_cut(w.down_EFD, parts, 1), down_bias_ED=[None] * parts)
  cut |= {name: _cut(getattr(w, name), parts) for name in _OF_HIDDEN}
  return [w.replace(**{name: x[i] for name, x in cut.items()})
          for i in range(parts)]


def _joined(parts: list) -> Any:
  """The gradients of parts of the hidden units, as those of all."""
  join = lambda name, axis: (
      None if getattr(parts[0], name) is None else jnp.concatenate(
          [getattr(part, name) for part in parts], axis))
  return parts[0].replace(down_EFD=join('down_EFD', 1), **{
      name: join(name, -1) for name in _OF_HIDDEN})


# The weights whose last axis are the hidden units.
_OF_HIDDEN = 'up_EDF', 'gate_EDF', 'up_bias_EF', 'gate_bias_EF'


# Block by block, on CPU.


def sizes(rows: int, even: int) -> tuple[int, ...]:
  """The static sizes of blocks, ascending: multiples of 16, at most `rows`."""
  even = min(even, LARGEST / SIZES[-1])
  return tuple(sorted({min(rows, -int(-even * s // 16) * 16) for s in SIZES}))


def _for_blocks(rows: int, even: int, count_E: jax.Array, body: Callable,
                carry: Any) -> Any:
  """carry = body(carry, size, expert, start, first, stop) for every block.

  Block: the `size` rows from `start`, of which `first` to `stop` are the
  expert's. An expert has as many blocks of the largest size as it fills, and
  one of the smallest size that holds the rest.
  """
  choice = sizes(rows, even)
  largest = choice[-1]
  offset_E = jnp.cumsum(count_E) - count_E
  full_E = count_E // largest
  rest_E = count_E - full_E * largest
  fits_E = jnp.where(rest_E > 0, jnp.searchsorted(
      jnp.array(choice), rest_E).astype(jnp.int32), len(choice))
  for i, size in enumerate(choice):
    blocks_E = (fits_E == i).astype(jnp.int32)
    first_E = offset_E + full_E * largest
    if size == largest:
      blocks_E, first_E = blocks_E + full_E, offset_E
    carry = _for_blocks_of(size, rows, blocks_E, first_E, offset_E + count_E,
                           body, carry)
  return carry


def _for_blocks_of(size: int, rows: int, blocks_E: jax.Array,
                   first_E: jax.Array, stop_E: jax.Array, body: Callable,
                   carry: Any) -> Any:
  """`_for_blocks` of one size: each expert has blocks_E of them, from row
  first_E on, and its rows end before row stop_E."""
  ends_E = jnp.cumsum(blocks_E)

  def step(j: jax.Array, carry: Any):
    e = jnp.searchsorted(ends_E, j, side='right').astype(jnp.int32)
    first = first_E[e] + (j - ends_E[e] + blocks_E[e]) * size
    stop = jnp.minimum(first + size, stop_E[e])
    return body(carry, size, e, jnp.minimum(first, rows - size), first, stop)

  return jax.lax.fori_loop(0, ends_E[-1], step, carry)


def _rows(x_P: jax.Array, start: jax.Array, size: int):
  return jax.lax.dynamic_slice_in_dim(x_P, start, size)


def _read(x_P: jax.Array, start: jax.Array, size: int):
  """`size` rows from `start`, in float32."""
  return _rows(x_P, start, size).astype(jnp.float32)


def _write(x_P: jax.Array, new: jax.Array, start: jax.Array, inside: jax.Array):
  """Puts the rows that are `inside` a block where they belong."""
  old = jax.lax.dynamic_slice_in_dim(x_P, start, new.shape[0])
  new = jnp.where(inside[:, None], new.astype(x_P.dtype), old)
  return jax.lax.dynamic_update_slice_in_dim(x_P, new, start, 0)


def _inside(size: int, start: jax.Array, first: jax.Array, stop: jax.Array):
  row = start + jnp.arange(size)
  return (row >= first) & (row < stop)


def _times(x: jax.Array, m: jax.Array):
  """x m, in float32: a bfloat16 result is slow on CPU."""
  return jnp.matmul(x, m, preferred_element_type=jnp.float32)


def _affine(x: jax.Array, m: jax.Array, b: Optional[jax.Array]):
  return _times(x, m) if b is None else _times(x, m) + b[None]


def _blocks_forward(kind: Hidden, even: int, rows_PD: jax.Array,
                    count_E: jax.Array, w: Any, mask_PF: Optional[jax.Array]):
  P, F = rows_PD.shape[0], w.up_EDF.shape[2]

  def body(carry: Any, size: int, e: jax.Array, start: jax.Array,
           first: jax.Array, stop: jax.Array):
    y_PD, pre_PF = carry
    x, expert = _rows(rows_PD, start, size), jax.tree.map(lambda m: m[e], w)
    mask = None if mask_PF is None else _read(mask_PF, start, size)
    pre = [_affine(x, *pair) for pair in _into(expert)]
    h = _activation(kind, mask)(pre).astype(x.dtype)
    y = _affine(h, expert.down_EFD, expert.down_bias_ED)
    inside = _inside(size, start, first, stop)
    return (_write(y_PD, y, start, inside),
            tuple(_write(p_PF, p, start, inside)
                  for p_PF, p in zip(pre_PF, pre)))

  zeros = tuple(jnp.zeros((P, F), rows_PD.dtype) for _ in _into(w))
  return _for_blocks(P, even, count_E, body, (jnp.zeros_like(rows_PD), zeros))


def _blocks_backward(kind: Hidden, even: int, rows_PD: jax.Array,
                     count_E: jax.Array, gate_P: jax.Array, w: Any,
                     mask_PF: Optional[jax.Array],
                     pre_PF: Optional[tuple[jax.Array, ...]],
                     dy_PD: jax.Array):

  def body(carry: Any, size: int, e: jax.Array, start: jax.Array,
           first: jax.Array, stop: jax.Array):
    dx_PD, dgate_P, dw = carry
    x, expert = _rows(rows_PD, start, size), jax.tree.map(lambda m: m[e], w)
    inside = _inside(size, start, first, stop)
    dy = jnp.where(inside[:, None], _rows(dy_PD, start, size), 0)
    gate = _read(gate_P, start, size)[:, None]
    mask = None if mask_PF is None else _read(mask_PF, start, size)
    pre = (tuple(_affine(x, *pair) for pair in _into(expert)) if pre_PF is None
           else tuple(_read(p_PF, start, size) for p_PF in pre_PF))
    h, act_vjp = jax.vjp(_activation(kind, mask), pre)
    u = _times(dy, expert.down_EFD.T)
    dgate = (u * h).sum(1)
    if expert.down_bias_ED is not None:
      dgate += _times(dy, expert.down_bias_ED)
    narrow = lambda x: x.astype(dy.dtype)
    d_pre = [narrow(d) for d in act_vjp(gate * u)[0]]
    def grads(x: jax.Array, d: jax.Array, b: Optional[jax.Array]):
      return layers.of_weight(x, d), (
          None if b is None else d.astype(jnp.float32).sum(0))
    new = _like(w, [grads(x, d, b) for d, (_, b) in zip(d_pre, _into(expert))],
                grads(narrow(h), narrow(gate * dy), expert.down_bias_ED))
    dx = sum(_times(d, m.T) for d, (m, _) in zip(d_pre, _into(expert)))
    return (_write(dx_PD, dx, start, inside),
            _write(dgate_P, dgate[:, None], start, inside),
            jax.tree.map(lambda a, b: a.at[e].add(b), dw, new))

  zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), w)
  dx_PD, dgate_P1, dw = _for_blocks(
      rows_PD.shape[0], even, count_E, body,
      (jnp.zeros_like(rows_PD), jnp.zeros_like(gate_P[:, None]), zeros))
  return dx_PD, dgate_P1[:, 0], jax.tree.map(
      lambda d, m: d.astype(m.dtype), dw, w)


# Kernels.


def choose(m: MoEConfig) -> str:
  """Returns xla or megablox.

  Raises:
    ValueError: where config.moe.grouped_kernel names one that cannot do it.
  """
  device = sharding.platform()
  check_grouped_kernel(m, device)
  return m.grouped_kernel if m.grouped_kernel != 'auto' else (
      'megablox' if device == 'tpu' else 'xla')


def check_grouped_kernel(m: MoEConfig, device: str) -> None:
  """Raises ValueError where a named kernel does not run on the platform."""
  require(m.grouped_kernel != 'megablox' or device == 'tpu',
          'model.moe.grouped_kernel is megablox, which runs on tpu, and this '
          f'program is for {device}: choose from auto, xla')


def product(name: str, even: int) -> Callable:
  """(rows_PI, m_EIO, count_E) -> [P, O], with gradients of the first two; rows
  past the counts are unspecified, but finite. `even`: an expert's rows."""
  if name == 'xla':
    return jax.lax.ragged_dot
  return functools.partial(megablox, even, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def megablox(even: int, interpret: bool, x_PI: jax.Array, m_EIO: jax.Array,
             count_E: jax.Array) -> jax.Array:
  """Pallas' product; `interpret`: on CPU."""
  return _gmm(even, x_PI, m_EIO, count_E, interpret)


def _megablox_bwd(even: int, interpret: bool, saved: tuple, dy_PO: jax.Array):
  """Not megablox' own: it tiles both of these as it did the product, though
  their sides are others."""
  x_PI, m_EIO, count_E = saved
  dx_PI = _gmm(even, dy_PO, m_EIO, count_E, interpret, transpose=True)
  return dx_PI, _tgmm(even, x_PI, dy_PO, m_EIO.dtype, count_E, interpret), None


megablox.defvjp(
    lambda even, interpret, *args: (megablox(even, interpret, *args), args),
    _megablox_bwd)


def _gmm(even: int, x_PI: jax.Array, m_EIO: jax.Array, count_E: jax.Array,
         interpret: bool, transpose: bool = False):
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
  (P, inputs), outputs = x_PI.shape, m_EIO.shape[1 if transpose else 2]
  tiles = _tiles(even, P, inputs, outputs, x_PI.dtype)
  y_PO = gmm(_fill(x_PI, tiles[0]), m_EIO, count_E, x_PI.dtype, tiles,
             transpose_rhs=transpose, interpret=interpret)[:P]
  # Rows that no expert has are not written: whatever the memory held.
  inside_P = jnp.arange(P) < count_E.sum()
  return jnp.where(inside_P[:, None], y_PO, 0)


def _tgmm(even: int, x_PI: jax.Array, dy_PO: jax.Array,
          dtype: jax.typing.DTypeLike, count_E: jax.Array, interpret: bool):
  """x^T dy of each expert's rows; zero where it has none."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
  tiles = _tiles(even, *x_PI.shape, dy_PO.shape[1], x_PI.dtype)
  x_PI, dy_PO = _fill(x_PI, tiles[0]), _fill(dy_PO, tiles[0])
  return tgmm(x_PI.swapaxes(0, 1), dy_PO, count_E, dtype, tiles,
              interpret=interpret)


def _tiles(even: int, P: int, inputs: int, outputs: int,
           dtype: jax.typing.DTypeLike) -> tuple[int, int, int]:
  """Sides of the tiles of rows, inputs and outputs."""
  rows = next((t for t in ROWS if 2 * t <= even and P % t == 0), ROWS[-1])
  most = SIDE[jnp.dtype(dtype).name]
  return rows, _side(inputs, most), _side(outputs, most)


def _side(size: int, most: int) -> int:
  """As few tiles as `most` allows, all alike, of whole lanes."""
  if size <= most:
    return size
  return -(-size // -(-size // most) // 128) * 128


def _fill(x_P: jax.Array, rows: int):
  """Adds rows, to whole tiles."""
  return jnp.pad(x_P, ((0, -x_P.shape[0] % rows), (0, 0)))
