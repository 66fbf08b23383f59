"""Grouped feed-forward: rows sorted by expert, each through its own network.

On TPU and GPU its products are those of parts/grouped_kernels.py. XLA on CPU
expands `ragged_dot` to every expert for every row, so there a loop goes over
blocks of rows instead. A block belongs to one expert and passes through the
whole network while it is in cache; its weight gradient is added in place. Block
sizes are static and the number of blocks of each size is not: the work follows
the rows.
"""

import functools
from typing import Any, Callable, Optional

import jax
import jax.numpy as jnp

from architectures.parts.ffn import Hidden
from architectures.parts.moe.grouped_kernels import product

# Sizes of blocks, relative to the rows an even load gives an expert: dense
# around it, since a block that its rows do not fill wastes the rest.
SIZES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1, 17 / 16, 9 / 8, 5 / 4, 3 / 2, 2)
LARGEST = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ffn(rows_PD: jax.Array, count_E: jax.Array, w: Any,
        mask_PF: Optional[jax.Array], kind: Hidden, even: int, kernel: str
        ) -> jax.Array:
  """FFN_e of each row; rows past the counts are unspecified, but finite.

  Args:
    rows_PD: expert 0's rows, then expert 1's, ...; sum(count_E) <= P.
    count_E: int32, the rows of each expert.
    w: experts.Weights, in the dtype of the rows.
    mask_PF: multiplies the hidden units, for dropout; or None.
    kind: of the network.
    even: the rows an expert has in even load: the blocks are sized for it.
    kernel: of the products, a name of grouped_kernels; on CPU xla is blocks.
  """
  return _forward(rows_PD, count_E, w, mask_PF, kind, even, kernel)[0]


def _ffn_fwd(rows_PD: jax.Array, count_E: jax.Array, w: Any,
             mask_PF: Optional[jax.Array], kind: Hidden, even: int,
             kernel: str):
  y_PD, hidden = _forward(rows_PD, count_E, w, mask_PF, kind, even, kernel)
  return y_PD, (rows_PD, count_E, w, mask_PF, hidden)


def _ffn_bwd(kind: Hidden, even: int, kernel: str, saved: tuple,
             dy_PD: jax.Array):
  dx_PD, dw = _on_platform(
      kernel, functools.partial(_blocks_backward, kind, even),
      functools.partial(_whole_backward, product(kernel, even), kind),
      *saved, dy_PD)
  return dx_PD, None, dw, None


ffn.defvjp(_ffn_fwd, _ffn_bwd)


def _forward(rows_PD: jax.Array, count_E: jax.Array, w: Any,
             mask_PF: Optional[jax.Array], kind: Hidden, even: int,
             kernel: str):
  """Returns (y_PD, what goes into the activation: (up,) or (up, gate))."""
  return _on_platform(
      kernel, functools.partial(_blocks_forward, kind, even),
      functools.partial(_whole_forward, product(kernel, even), kind),
      rows_PD, count_E, w, mask_PF)


def _on_platform(kernel: str, blocks: Callable, whole: Callable, *args):
  """XLA's product is not for CPU; another was chosen by its platform."""
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
  if b_EO is None:
    return y_PO
  expert_P = jnp.searchsorted(jnp.cumsum(count_E), jnp.arange(x_PI.shape[0]),
                              side='right')
  return y_PO + b_EO.at[expert_P].get(mode='fill', fill_value=0)


def _whole_forward(times: Callable, kind: Hidden, rows_PD: jax.Array,
                   count_E: jax.Array, w: Any, mask_PF: Optional[jax.Array]):
  affine = functools.partial(_whole_affine, times, count_E)
  pre = tuple(affine(rows_PD, *pair) for pair in _into(w))
  h_PF = _activation(kind, mask_PF)(pre)
  return affine(h_PF, w.down_EFD, w.down_bias_ED), pre


def _whole_backward(times: Callable, kind: Hidden, rows_PD: jax.Array,
                    count_E: jax.Array, w: Any, mask_PF: Optional[jax.Array],
                    pre: tuple[jax.Array, ...], dy_PD: jax.Array):
  h_PF, act_vjp = jax.vjp(_activation(kind, mask_PF), pre)
  inside_P = jnp.arange(rows_PD.shape[0]) < count_E.sum()
  dy_PD = jnp.where(inside_P[:, None], dy_PD, 0)
  affine = functools.partial(_whole_affine, times, count_E)
  def vjp(x, pair, dy):  # of a product; its forward half is dead code
    return jax.vjp(affine, x, *pair)[1](dy)
  dh_PF, *out = vjp(h_PF, (w.down_EFD, w.down_bias_ED), dy_PD)
  dx_PD, into = jnp.zeros_like(rows_PD), []
  for pair, d_PF in zip(_into(w), act_vjp(dh_PF)[0]):
    more_PD, *grads = vjp(rows_PD, pair, d_PF)
    dx_PD, into = dx_PD + more_PD, into + [tuple(grads)]
  return dx_PD, _like(w, into, tuple(out))


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


def _read(x_P: jax.Array, start: jax.Array, size: int):
  """`size` rows from `start`, in float32: bfloat16 is slow on CPU."""
  x = jax.lax.dynamic_slice_in_dim(x_P, start, size)
  return x.astype(jnp.float32)


def _write(x_P: jax.Array, new: jax.Array, start: jax.Array, inside: jax.Array):
  """Puts the rows that are `inside` a block where they belong."""
  old = jax.lax.dynamic_slice_in_dim(x_P, start, new.shape[0])
  new = jnp.where(inside[:, None], new.astype(x_P.dtype), old)
  return jax.lax.dynamic_update_slice_in_dim(x_P, new, start, 0)


def _inside(size: int, start: jax.Array, first: jax.Array, stop: jax.Array):
  row = start + jnp.arange(size)
  return (row >= first) & (row < stop)


def _weights(w: Any, e: jax.Array):
  """Expert e's own, in float32."""
  return jax.tree.map(lambda x: x[e].astype(jnp.float32), w)


def _affine(x: jax.Array, m: jax.Array, b: Optional[jax.Array]):
  return x @ m if b is None else x @ m + b[None]


def _blocks_forward(kind: Hidden, even: int, rows_PD: jax.Array,
                    count_E: jax.Array, w: Any, mask_PF: Optional[jax.Array]):
  P, F = rows_PD.shape[0], w.up_EDF.shape[2]

  def body(carry: Any, size: int, e: jax.Array, start: jax.Array,
           first: jax.Array, stop: jax.Array):
    y_PD, pre_PF = carry
    x, own = _read(rows_PD, start, size), _weights(w, e)
    mask = None if mask_PF is None else _read(mask_PF, start, size)
    pre = [_affine(x, *pair) for pair in _into(own)]
    y = _affine(_activation(kind, mask)(pre), own.down_EFD, own.down_bias_ED)
    inside = _inside(size, start, first, stop)
    return (_write(y_PD, y, start, inside),
            tuple(_write(p_PF, p, start, inside)
                  for p_PF, p in zip(pre_PF, pre)))

  zeros = tuple(jnp.zeros((P, F), rows_PD.dtype) for _ in _into(w))
  return _for_blocks(P, even, count_E, body, (jnp.zeros_like(rows_PD), zeros))


def _blocks_backward(kind: Hidden, even: int, rows_PD: jax.Array,
                     count_E: jax.Array, w: Any, mask_PF: Optional[jax.Array],
                     pre_PF: jax.Array, dy_PD: jax.Array):

  def body(carry: Any, size: int, e: jax.Array, start: jax.Array,
           first: jax.Array, stop: jax.Array):
    dx_PD, dw = carry
    x, own = _read(rows_PD, start, size), _weights(w, e)
    inside = _inside(size, start, first, stop)
    dy = jnp.where(inside[:, None], _read(dy_PD, start, size), 0)
    mask = None if mask_PF is None else _read(mask_PF, start, size)
    h, act_vjp = jax.vjp(_activation(kind, mask),
                         tuple(_read(p_PF, start, size) for p_PF in pre_PF))
    d_pre = act_vjp(dy @ own.down_EFD.T)[0]
    grads = lambda x, dy, b: (x.T @ dy, None if b is None else dy.sum(0))
    new = _like(w, [grads(x, d, b) for d, (_, b) in zip(d_pre, _into(own))],
                grads(h, dy, own.down_bias_ED))
    dx = sum(d @ m.T for d, (m, _) in zip(d_pre, _into(own)))
    return (_write(dx_PD, dx, start, inside),
            jax.tree.map(lambda a, b: a.at[e].add(b), dw, new))

  zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), w)
  dx_PD, dw = _for_blocks(rows_PD.shape[0], even, count_E, body,
                          (jnp.zeros_like(rows_PD), zeros))
  return dx_PD, jax.tree.map(lambda d, m: d.astype(m.dtype), dw, w)
