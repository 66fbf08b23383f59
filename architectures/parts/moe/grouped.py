"""Grouped feed-forward: rows sorted by expert, each through its own network.

On TPU and GPU its products are those of a kernel:

xla       jax.lax.ragged_dot, as the compiler makes of it; anywhere
megablox  Pallas' gmm and tgmm on TPU (MegaBlocks: Gale et al. 2022): a grid
          over the tiles of rows that an expert has, so the work follows them
tokamax   tokamax's on Hopper, by name alone: it was never run

`auto` takes megablox on TPU and xla elsewhere. XLA's own is at times every
expert for every row: on GPU, and on a TPU by the compiler's release. As in
parts/attention/kernels.py the platform is that of the mesh.

XLA on CPU expands `ragged_dot` to every expert for every row, so there a loop
goes over blocks of rows instead. A block belongs to one expert and passes
through the whole network while it is in cache; its weight gradient is added in
place. Block sizes are static and the number of blocks of each size is not: the
work follows the rows.

The gradient is written by hand. With the gate g of a row x, the inputs of the
activation a = x W_in + b_in (up, and in a gated network gate), the hidden units
h = act(a) and the output's weights W_out and b_out, the forward pass is

  y = g (h W_out + b_out)

and from the gradient dy of the result, with u = dy W_out^T, follow

  dg     = u . h + dy . b_out        dW_out = (g h)^T dy
  db_out = sum over rows of g dy     da     = act'(a) applied to g u
  dW_in  = x^T da                    dx     = da W_in^T
  db_in  = sum over rows of da

so that neither y nor h has to be kept.

Beside the legend, P counts rows, sorted by expert, and a product maps I inputs
to O outputs.
"""

import functools
import math
import operator
from typing import Any, Callable, NamedTuple, Optional

import jax
import jax.numpy as jnp

from architectures.parts import layers, sharding, tokamax_kernels
from architectures.parts.layers import HiddenUnits
from architectures.parts.moe.routing import MoEConfig
from common.errors import require

# The sizes of blocks, each relative to the rows that an even load gives an
# expert. They are dense around it, since a block that its rows do not fill
# wastes the rest.
BLOCK_SIZES_OVER_EVEN_LOAD = (
    1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1, 17 / 16, 9 / 8, 5 / 4, 3 / 2, 2)
MOST_ROWS_OF_A_BLOCK = 1024  # so that it stays in a CPU's cache
# All sizes of blocks are multiples of this number of rows.
UNIT_OF_BLOCK_SIZES = 16
GROUPED_KERNELS = ('auto', 'xla', 'megablox', 'tokamax')
# The platform of each kernel that runs on one alone.
PLATFORM_OF_KERNEL = {'megablox': 'tpu', 'tokamax': 'gpu'}
# The rows of a tile of megablox, in order of choice. A tile that two experts
# share is computed for both, so an expert should fill two: fewer rows a tile
# waste less of the matrix units, more read the weights less often.
ROWS_OF_A_TILE = (512, 256, 128)
# The longest side of a matrix' tile, by what VMEM has.
LONGEST_SIDE_OF_A_TILE = {'bfloat16': 1024, 'float32': 512}
# The fields of dispatch.ExpertWeights whose last axis are the hidden units.
WEIGHTS_ENDING_IN_HIDDEN_UNITS = (
    'up_EDF', 'gate_EDF', 'up_bias_EF', 'gate_bias_EF')


class GroupedSettings(NamedTuple):
  """The settings by which a grouped network is computed.

  Attributes:
    activation: the function that makes the hidden units.
    even_rows: the rows that an even load gives an expert. The blocks are sized
      for it.
    kernel: the kernel of the products, one of GROUPED_KERNELS; on CPU xla
      means a loop over blocks.
    recompute: whether nothing is kept for the backward pass, which then
      computes the hidden units again, one slice of them after another. This is
      for layers that are computed again anyway: then the result need not be.
  """
  activation: HiddenUnits
  even_rows: int
  kernel: str
  recompute: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_ffn(rows_PD: jax.Array, count_E: jax.Array, gate_P: jax.Array,
                w: Any, mask_PF: Optional[jax.Array], settings: GroupedSettings
                ) -> jax.Array:
  """Applies to each row the feed-forward network of its expert, and multiplies
  the result by a gate. The gradient is written by hand below.

  The suffixes name axes: P rows, D features of a row, E experts, F hidden
  units.

  Args:
    rows_PD: the rows, sorted by expert: those of expert 0, then those of expert
      1, and so on. There may be more rows than sum(count_E).
    count_E: int32, the number of rows of each expert.
    gate_P: float32, the factor that multiplies a row's result.
    w: the experts' weights, dispatch.ExpertWeights, in the dtype of the rows.
    mask_PF: the factors of the hidden units, for dropout; None: there is no
      dropout.
    settings: how the products are computed.

  Returns:
    The results, [P, D]. Those of rows past the counts are unspecified, but
    finite.
  """
  y_PD, _ = _grouped_ffn_forward(rows_PD, count_E=count_E, gate_P=gate_P, w=w,
                                 mask_PF=mask_PF, settings=settings)
  return y_PD


def _grouped_ffn_forward(
    rows_PD: jax.Array, count_E: jax.Array, gate_P: jax.Array, w: Any,
    mask_PF: Optional[jax.Array], settings: GroupedSettings
    ) -> tuple[jax.Array, tuple]:
  """Computes the forward pass of `grouped_ffn`: each row goes through the
  network of its expert, and the result is multiplied by a gate.

  The suffixes name axes: P rows, D features of a row, E experts, F hidden
  units.

  Args:
    rows_PD: the rows, sorted by expert.
    count_E: the number of rows of each expert.
    gate_P: the factor that multiplies a row's result.
    w: the experts' weights, dispatch.ExpertWeights.
    mask_PF: the factors of the hidden units, for dropout; None: there is no
      dropout.
    settings: how the products are computed.

  Returns:
    The results, [P, D]; and what the backward pass reads: the arguments, and
    the inputs of the activation, (up,) or in a gated network (up, gate),
    [P, F] each. With settings.recompute the latter are None.
  """
  # There are two ways to compute it. CPU goes through blocks of rows; other
  # platforms compute all rows at once, by the products of a kernel. The two are
  # branches of one program, so their results must have the same structure, and
  # each drops the inputs of the activation itself.
  by_blocks = functools.partial(
      _forward_by_blocks, settings.activation, settings.even_rows,
      settings.recompute)
  grouped_product = grouped_product_of_kernel(
      settings.kernel, settings.even_rows)
  at_once = functools.partial(
      _forward_at_once, grouped_product, settings.activation,
      settings.recompute)

  # Compute it in the platform's way, and apply the gates.
  y_PD, activation_inputs = _compute_for_platform(
      settings.kernel, by_blocks, at_once, rows_PD, count_E, w, mask_PF)
  y_PD = y_PD * gate_P[:, None].astype(y_PD.dtype)
  return y_PD, (rows_PD, count_E, gate_P, w, mask_PF, activation_inputs)


def _grouped_ffn_backward(settings: GroupedSettings, saved: tuple,
                          dy_PD: jax.Array) -> tuple:
  """Computes the gradients of `grouped_ffn`, y = g FFN_e(x) for each row x,
  with its gate g and expert e. From the gradient dy of the results follow dx,
  dg and the gradients of the experts' weights. The head of this file has the
  equations.

  The suffixes name axes: P rows, D features of a row.

  Args:
    settings: how the products are computed.
    saved: what the forward pass kept: the rows, the counts, the gates, the
      weights, the dropout mask, and the inputs of the activation, or None if
      they are computed again.
    dy_PD: the gradient of the result.

  Returns:
    A gradient for each array that `grouped_ffn` was given, in their order: the
    rows, the counts (None), the gates, the weights, and the dropout mask
    (None).
  """
  # CPU goes through blocks of rows, and other platforms compute all rows at
  # once, like in the forward pass.
  by_blocks = functools.partial(
      _backward_by_blocks, settings.activation, settings.even_rows)
  grouped_product = grouped_product_of_kernel(
      settings.kernel, settings.even_rows)
  at_once = functools.partial(
      _backward_at_once, grouped_product, settings.activation)
  dx_PD, dgate_P, dw = _compute_for_platform(
      settings.kernel, by_blocks, at_once, *saved, dy_PD)
  return dx_PD, None, dgate_P, dw, None


grouped_ffn.defvjp(_grouped_ffn_forward, _grouped_ffn_backward)


def _compute_for_platform(kernel: str, by_blocks: Callable, at_once: Callable,
                          *args):
  """Returns by_blocks(*args) on CPU, where XLA's product is slow, and
  at_once(*args) elsewhere. A kernel other than xla was chosen for its platform,
  so with it at_once(*args) is returned anywhere."""
  if kernel != 'xla':
    return at_once(*args)
  return jax.lax.platform_dependent(*args, cpu=by_blocks, default=at_once)


def _activation_with_dropout(activation: HiddenUnits,
                             mask_PF: Optional[jax.Array]) -> Callable:
  """Adds dropout to the activation of a feed-forward network.

  The suffixes name axes: P rows, F hidden units.

  Args:
    activation: the function that makes the hidden units, such as SwiGLU's.
    mask_PF: the factors of the hidden units: 0 where dropout drops one; None:
      there is no dropout.

  Returns:
    A function of the inputs of the activation, the tuple (up,) or in a gated
    network (up, gate), that returns the hidden units, [P, F].
  """
  def compute_hidden_units(activation_inputs: tuple[jax.Array, ...]
                           ) -> jax.Array:
    """Returns the hidden units, with those that dropout drops set to 0."""
    h_PF = activation(*activation_inputs)
    if mask_PF is None:
      return h_PF
    return h_PF * mask_PF.astype(h_PF.dtype)
  return compute_hidden_units


def _input_weights_and_biases(w: Any) -> tuple:
  """Returns the (weight, bias) pairs whose products are the inputs of the
  activation: that of `up` and, in a gated network, that of `gate`."""
  up = (w.up_EDF, w.up_bias_EF)
  if w.gate_EDF is None:
    return (up,)
  return up, (w.gate_EDF, w.gate_bias_EF)


def _pack_weight_gradients(w: Any, d_inputs: list, d_output: tuple) -> Any:
  """Collects the gradients of the experts' weights in a record with the fields
  of the weights, dispatch.ExpertWeights.

  Args:
    w: the weights.
    d_inputs: the gradients of the products before the activation, as pairs
      (weight, bias): that of `up` and, in a gated network, that of `gate`.
    d_output: the gradients of the product after the activation, as a pair
      (weight, bias).

  Returns:
    The record of gradients; None for a weight that the network does not have.
  """
  d_up, d_up_bias = d_inputs[0]
  d_gate, d_gate_bias = None, None
  if len(d_inputs) > 1:
    d_gate, d_gate_bias = d_inputs[1]
  d_down, d_down_bias = d_output
  return w.replace(
      up_EDF=d_up, up_bias_EF=d_up_bias, gate_EDF=d_gate,
      gate_bias_EF=d_gate_bias, down_EFD=d_down, down_bias_ED=d_down_bias)


# The whole array at once, on TPU and GPU.


def _apply_experts_affine(
    grouped_product: Callable, count_E: jax.Array, x_PI: jax.Array,
    m_EIO: jax.Array, b_EO: Optional[jax.Array]) -> jax.Array:
  """Returns x m_e + b_e for each row x, with e the row's expert, [P, O]."""
  y_PO = grouped_product(x_PI, m_EIO, count_E)
  if b_EO is None:
    return y_PO
  return y_PO + _bias_of_each_row(b_EO, count_E, num_rows=len(x_PI))


def _inputs_of_activation(affine: Callable, rows_P: jax.Array, w: Any
                          ) -> tuple[jax.Array, ...]:
  """Returns the inputs of the activation for each row x, [P, F] each: x up +
  bias and, in a gated network, x gate + bias.

  Args:
    affine: the function (rows, matrix, bias or None) -> rows.
    rows_P: the rows, sorted by expert.
    w: the weights, dispatch.ExpertWeights.
  """
  return tuple(affine(rows_P, weight, bias)
               for weight, bias in _input_weights_and_biases(w))


def _bias_of_each_row(b_EO: jax.Array, count_E: jax.Array, num_rows: int
                      ) -> jax.Array:
  """Returns the bias of each row's expert, [P, O]; 0 past the counts."""
  expert_P = jnp.searchsorted(jnp.cumsum(count_E), jnp.arange(num_rows),
                              side='right')
  return b_EO.at[expert_P].get(mode='fill', fill_value=0)


def _forward_at_once(grouped_product: Callable, activation: HiddenUnits,
                     recompute: bool, rows_PD: jax.Array, count_E: jax.Array,
                     w: Any, mask_PF: Optional[jax.Array]
                     ) -> tuple[jax.Array, Optional[tuple[jax.Array, ...]]]:
  """Applies the experts to all rows at once, by grouped products.

  Args:
    grouped_product: (rows [P, I], matrices [E, I, O], counts [E]) -> [P, O],
      each row times the matrix of its expert.
    activation: the function that makes the hidden units.
    recompute: whether the inputs of the activation are not kept. Then slices of
      the hidden units are computed one after another, so that only one slice's
      inputs are in memory.
    rows_PD: the rows, sorted by expert.
    count_E: the number of rows of each expert.
    w: the experts' weights, dispatch.ExpertWeights.
    mask_PF: the factors of the hidden units, for dropout; or None.

  Returns:
    The results, [P, D]; and the inputs of the activation, (up,) or (up, gate),
    [P, F] each, or None with `recompute`.
  """
  affine = functools.partial(_apply_experts_affine, grouped_product, count_E)

  # All hidden units together.
  D, F = w.up_EDF.shape[1:]
  num_slices = 1
  if recompute:
    num_slices = _num_slices_of_hidden_units(D, F)
  if num_slices == 1:
    activation_inputs = _inputs_of_activation(affine, rows_PD, w)
    compute_activation = _activation_with_dropout(activation, mask_PF)
    h_PF = compute_activation(activation_inputs)
    y_PD = affine(h_PF, w.down_EFD, w.down_bias_ED)
    if recompute:
      return y_PD, None
    return y_PD, activation_inputs

  # One slice of the hidden units after another, written into all of them.
  h_PF = jnp.zeros((len(rows_PD), F), rows_PD.dtype)
  slices = zip(_split_hidden_units(w, num_slices),
               _split_along_axis(mask_PF, num_slices))
  for i, (slice_weights, slice_mask) in enumerate(slices):
    # The barrier keeps XLA from computing several slices at once.
    rows_PD, h_PF = jax.lax.optimization_barrier((rows_PD, h_PF))
    slice_inputs = _inputs_of_activation(affine, rows_PD, slice_weights)
    compute_activation = _activation_with_dropout(activation, slice_mask)
    h_PF = jax.lax.dynamic_update_slice_in_dim(
        h_PF, compute_activation(slice_inputs),
        start_index=i * F // num_slices, axis=1)
  return affine(h_PF, w.down_EFD, w.down_bias_ED), None


class RowGradients(NamedTuple):
  """The gradients of rows that go through experts, summed over the slices of
  the hidden units so far.

  Attributes:
    dx_PD: the gradients of the rows.
    dgate_P: the gradients of the gates.
    dw_of_slices: the gradients of the weights of each slice, in order
      (dispatch.ExpertWeights).
  """
  dx_PD: jax.Array
  dgate_P: jax.Array
  dw_of_slices: list


def _backward_at_once(
    grouped_product: Callable, activation: HiddenUnits, rows_PD: jax.Array,
    count_E: jax.Array, gate_P: jax.Array, w: Any,
    mask_PF: Optional[jax.Array],
    activation_inputs: Optional[tuple[jax.Array, ...]], dy_PD: jax.Array):
  """Returns the gradients of the rows, the gates and the weights.

  The equations stand at the head of this file. The gradients are summed over
  slices of the hidden units (`ExpertGradients.add_slice`). After the slices
  follows what the bias b_out of the output adds:

    dg += dy . b_out,   db_out = sum over rows of g dy

  Args:
    grouped_product: (rows [P, I], matrices [E, I, O], counts [E]) -> [P, O],
      each row times the matrix of its expert.
    activation: the function that makes the hidden units.
    rows_PD: the rows x, sorted by expert.
    count_E: the number of rows of each expert.
    gate_P: the gates g.
    w: the experts' weights, dispatch.ExpertWeights.
    mask_PF: the factors of the hidden units, for dropout; or None.
    activation_inputs: a, as the forward pass returned them; None: they are
      computed again, slice by slice.
    dy_PD: the gradient of the result.
  """
  # Rows past the counts have no gradient, whatever stands there.
  is_experts_row_P = jnp.arange(rows_PD.shape[0]) < count_E.sum()
  dy_PD = jnp.where(is_experts_row_P[:, None], dy_PD, 0)

  # One slice of the hidden units after another.
  num_slices = 1
  if activation_inputs is None:
    D, F = w.up_EDF.shape[1:]
    num_slices = _num_slices_of_hidden_units(D, F)
  experts = ExpertGradients(
      affine=functools.partial(
          _apply_experts_affine, grouped_product, count_E),
      activation=activation, gate_P=gate_P)
  total = RowGradients(dx_PD=jnp.zeros_like(rows_PD),
                       dgate_P=jnp.zeros_like(gate_P), dw_of_slices=[])
  slices = zip(_split_hidden_units(w, num_slices),
               _split_along_axis(mask_PF, num_slices))
  for slice_weights, slice_mask in slices:
    # Without the barrier XLA joins work of this slice with the next one's.
    if total.dw_of_slices:
      rows_PD, dy_PD, total = jax.lax.optimization_barrier(
          (rows_PD, dy_PD, total))
    total = experts.add_slice(
        total, rows_PD=rows_PD, w=slice_weights, mask_PF=slice_mask,
        activation_inputs=activation_inputs, dy_PD=dy_PD)
  dx_PD, dgate_P = total.dx_PD, total.dgate_P
  dw = _join_hidden_units(total.dw_of_slices)

  # The output's bias, which the gates multiply too.
  if w.down_bias_ED is not None:
    expand_bias = functools.partial(
        _bias_of_each_row, count_E=count_E, num_rows=len(rows_PD))
    bias_PD, expand_bias_vjp = jax.vjp(expand_bias, w.down_bias_ED)
    dgate_P += _dot_rows(dy_PD, bias_PD)
    (d_bias_ED,) = expand_bias_vjp(experts.multiply_by_gates(dy_PD))
    dw = dw.replace(down_bias_ED=d_bias_ED)
  # The barrier lets the rows, and what the weights' gradients need of them, go
  # before the layers below are computed: XLA may compute the weights' gradients
  # of several layers late.
  return jax.lax.optimization_barrier((dx_PD, dgate_P, dw))


class ExpertGradients(NamedTuple):
  """Computes the gradients of experts for all rows at once.

  Attributes:
    affine: the function (rows, matrix of each expert, bias or None) -> rows,
      which takes each row times the matrix of its expert.
    activation: the function that makes the hidden units.
    gate_P: the gate of each row.
  """
  affine: Callable
  activation: HiddenUnits
  gate_P: jax.Array

  def multiply_by_gates(self, x_P: jax.Array) -> jax.Array:
    """Returns rows, each multiplied by its gate g."""
    return x_P * self.gate_P[:, None].astype(x_P.dtype)

  def affine_gradients(self, x_PI: jax.Array, m_EIO: jax.Array,
                       b_EO: Optional[jax.Array], dy_PO: jax.Array) -> tuple:
    """Returns the gradients of x, m and b in x m + b. The forward half is dead
    code, which XLA removes."""
    _, vjp = jax.vjp(self.affine, x_PI, m_EIO, b_EO)
    return vjp(dy_PO)

  def add_slice(self, total: RowGradients, rows_PD: jax.Array, w: Any,
                mask_PF: Optional[jax.Array],
                activation_inputs: Optional[tuple[jax.Array, ...]],
                dy_PD: jax.Array) -> RowGradients:
    """Adds the gradients of one slice of the hidden units h = act(a), where
    a = x W_in + b_in. With u = dy W_out^T,

      dg += u . h      dW_out = (g h)^T dy      da = act'(a) applied to g u
      dW_in = x^T da   db_in = sum of da        dx += da W_in^T

    Args:
      total: the gradients of the slices before.
      rows_PD: the rows x, sorted by expert.
      w: the weights of the slice, without the bias of the output.
      mask_PF: the factors of its hidden units, for dropout; or None.
      activation_inputs: a, if the forward pass kept it; None: it is computed
        again.
      dy_PD: the gradient of the result.

    Returns:
      The gradients with those of this slice.
    """
    # The hidden units h, and the gradients of the gates and of W_out.
    if activation_inputs is None:
      activation_inputs = _inputs_of_activation(self.affine, rows_PD, w)
    compute_activation = _activation_with_dropout(self.activation, mask_PF)
    h_PF = compute_activation(activation_inputs)
    u_PF, _, _ = self.affine_gradients(
        h_PF, w.down_EFD, b_EO=None, dy_PO=dy_PD)
    dgate_P = total.dgate_P + _dot_rows(u_PF, h_PF)
    # The gates multiply h, because it is narrower than dy.
    _, d_down, _ = self.affine_gradients(
        self.multiply_by_gates(h_PF), w.down_EFD, b_EO=None, dy_PO=dy_PD)
    if self.activation.gated:
      # The barrier lets the hidden units go first, and has computed again what
      # of the activation its gradient needs too: XLA would keep both, the
      # latter in float32. Of a network without gates it keeps less by itself.
      activation_inputs, u_PF, dgate_P, d_down = jax.lax.optimization_barrier(
          (activation_inputs, u_PF, dgate_P, d_down))

    # The gradients of the rows, and of W_in and b_in.
    _, activation_vjp = jax.vjp(compute_activation, activation_inputs)
    (d_activation_inputs,) = activation_vjp(self.multiply_by_gates(u_PF))
    dx_PD = total.dx_PD
    d_input_pairs = []
    for (weight, bias), da_PF in zip(_input_weights_and_biases(w),
                                     d_activation_inputs):
      added_dx_PD, d_weight, d_bias = self.affine_gradients(
          rows_PD, weight, b_EO=bias, dy_PO=da_PF)
      dx_PD = dx_PD + added_dx_PD
      d_input_pairs.append((d_weight, d_bias))
    dw = _pack_weight_gradients(w, d_input_pairs, (d_down, None))
    return RowGradients(dx_PD=dx_PD, dgate_P=dgate_P,
                        dw_of_slices=[*total.dw_of_slices, dw])


def _dot_rows(x_PI: jax.Array, y_PI: jax.Array) -> jax.Array:
  """Returns the product x . y of each row, [P] in float32."""
  return (x_PI.astype(jnp.float32) * y_PI.astype(jnp.float32)).sum(1)


def _num_slices_of_hidden_units(D: int, F: int) -> int:
  """Returns into how many slices the F hidden units are cut: the fewest that
  are no wider than a row of D features and whose width is a multiple of 128,
  the lanes of a TPU; 1 where no number of slices fits."""
  fewest_slices, most_slices = -(-F // D), F // 128
  for num_slices in range(fewest_slices, most_slices + 1):
    if F % (num_slices * 128) == 0:
      return num_slices
  return 1


def _split_along_axis(x: Optional[jax.Array], num_slices: int, axis: int = -1
                      ) -> list:
  """Returns the slices of an array along an axis; for None, as many None."""
  if x is None:
    return [None] * num_slices
  return jnp.split(x, num_slices, axis)


def _split_hidden_units(w: Any, num_slices: int) -> list:
  """Cuts the experts' weights into slices, each with the weights of some of the
  hidden units.

  The suffixes name axes: E experts, D features, F hidden units.

  Args:
    w: the weights, dispatch.ExpertWeights.
    num_slices: into how many slices they are cut. It must divide the number of
      hidden units.

  Returns:
    A list of the weights of each slice, of the same type. None of them has the
    output's bias, which belongs to no hidden unit and must be added once.
  """
  # Cut each weight along its hidden units: axis 1 of the output's weight, and
  # the last axis of the others. A weight that the network does not have stays
  # None in each slice.
  slices_of_field = {
      'down_EFD': _split_along_axis(w.down_EFD, num_slices, axis=1)}
  for name in WEIGHTS_ENDING_IN_HIDDEN_UNITS:
    slices_of_field[name] = _split_along_axis(getattr(w, name), num_slices)

  # Collect the weights of each slice.
  weights_of_slices = []
  for i in range(num_slices):
    fields = {name: slices[i] for name, slices in slices_of_field.items()}
    weights_of_slices.append(w.replace(down_bias_ED=None, **fields))
  return weights_of_slices


def _join_hidden_units(weights_of_slices: list) -> Any:
  """Joins slices of the experts' weights, or of their gradients, that have some
  of the hidden units each. This is the inverse of `_split_hidden_units`.

  The suffixes name axes: E experts, D features, F hidden units.

  Args:
    weights_of_slices: the dispatch.ExpertWeights of each slice, in order.

  Returns:
    The weights of all hidden units. The output's bias, which no slice has, is
    None.
  """

  def join_field(name: str, axis: int) -> Optional[jax.Array]:
    """Returns an array of all hidden units; None where the network lacks it."""
    arrays = [getattr(weights, name) for weights in weights_of_slices]
    if arrays[0] is None:
      return None
    return jnp.concatenate(arrays, axis)

  joined_fields = {'down_EFD': join_field('down_EFD', 1)}
  for name in WEIGHTS_ENDING_IN_HIDDEN_UNITS:
    joined_fields[name] = join_field(name, -1)
  return weights_of_slices[0].replace(**joined_fields)


# Block by block, on CPU.


def block_sizes(num_rows: int, even_rows: int) -> tuple[int, ...]:
  """Returns the sizes that a block of rows may have on CPU, where the rows of
  each expert are computed block by block. The sizes are fixed when the program
  is compiled; how many blocks of each size there are depends on the data.

  The sizes are fixed ratios of `even_rows`, rounded up to multiples of 16. Only
  `num_rows`, which no size exceeds, need not be one.

  Args:
    num_rows: how many rows there are in all.
    even_rows: how many rows each expert has if all have the same number.

  Returns:
    The sizes in ascending order.
  """
  # Bound the largest size, that of the last ratio, by MOST_ROWS_OF_A_BLOCK.
  largest_ratio = BLOCK_SIZES_OVER_EVEN_LOAD[-1]
  bounded_rows = min(even_rows, MOST_ROWS_OF_A_BLOCK / largest_ratio)
  sizes = set()
  for ratio in BLOCK_SIZES_OVER_EVEN_LOAD:
    num_units = math.ceil(bounded_rows * ratio / UNIT_OF_BLOCK_SIZES)
    sizes.add(min(num_rows, num_units * UNIT_OF_BLOCK_SIZES))
  return tuple(sorted(sizes))


class RowBlock(NamedTuple):
  """A block of rows that one expert computes on CPU.

  A block covers the rows from `start` to before start + size, but only those
  from `first` to before `stop` are its own, which may be written. The others
  belong to other blocks:

    start <= first < stop <= start + size

  Attributes:
    size: how many rows it covers, which is fixed when the program is compiled.
    expert: the number of its expert.
    start: its first row.
    first: the first row that is its own.
    stop: the row after the last one that is its own.
  """
  size: int
  expert: jax.Array
  start: jax.Array
  first: jax.Array
  stop: jax.Array

  def which_are_own(self) -> jax.Array:
    """Returns which of the rows that it covers are its own, bool [size]."""
    row_index = self.start + jnp.arange(self.size)
    return (row_index >= self.first) & (row_index < self.stop)

  def take(self, x_P: jax.Array) -> jax.Array:
    """Returns the rows that it covers of an array of all rows."""
    return jax.lax.dynamic_slice_in_dim(x_P, self.start, self.size)

  def take_as_float32(self, x_P: jax.Array) -> jax.Array:
    """Returns the rows that it covers of an array of all rows, in float32."""
    return self.take(x_P).astype(jnp.float32)

  def take_weights(self, w: Any) -> Any:
    """Returns the weights of its expert, from those of all experts."""
    return jax.tree.map(operator.itemgetter(self.expert), w)

  def write(self, x_P: jax.Array, new_rows: jax.Array, is_own: jax.Array
            ) -> jax.Array:
    """Writes new rows of the block into the array of all rows. Only its own
    rows are changed, as other blocks write the others.

    Args:
      x_P: all P rows.
      new_rows: the new rows of the block, [size, ...].
      is_own: which of these are its own (`which_are_own`).

    Returns:
      x_P with the new rows.
    """
    # A slice of fixed size must be written as a whole, so the rows of other
    # blocks are written back as they were.
    old_rows = self.take(x_P)
    written_rows = jnp.where(
        is_own[:, None], new_rows.astype(x_P.dtype), old_rows)
    return jax.lax.dynamic_update_slice_in_dim(
        x_P, written_rows, start_index=self.start, axis=0)


def _fold_over_blocks(
    num_rows: int, even_rows: int, count_E: jax.Array, update: Callable,
    carry: Any) -> Any:
  """Calls a function for every block of rows, one after another, each time with
  the result of the call before (the carry):

    carry = update(carry, block)

  An expert has as many blocks of the largest size as it fills, and one of the
  smallest size that holds the rest.

  Args:
    num_rows: P, how many rows there are.
    even_rows: the rows that an even load gives an expert.
    count_E: the number of rows of each of E experts.
    update: the function of a RowBlock, which returns the new carry.
    carry: the carry before the first block.

  Returns:
    The carry after the last block.
  """
  sizes = block_sizes(num_rows, even_rows)
  largest = sizes[-1]
  # The largest blocks that an expert fills, and the size that holds the rest.
  offset_E = jnp.cumsum(count_E) - count_E
  full_blocks_E = count_E // largest
  remaining_rows_E = count_E - full_blocks_E * largest
  has_remaining_E = remaining_rows_E > 0
  size_index_E = jnp.searchsorted(
      jnp.array(sizes), remaining_rows_E).astype(jnp.int32)
  # An expert without a rest has the number of no size.
  size_index_E = jnp.where(has_remaining_E, size_index_E, len(sizes))

  # The blocks of one size after those of another, since a size is static.
  for i, size in enumerate(sizes):
    # The block that holds the rest, behind the expert's full blocks.
    blocks_E = (size_index_E == i).astype(jnp.int32)
    first_E = offset_E + full_blocks_E * largest
    # The full blocks, and a rest that needs the largest size as well.
    if size == largest:
      blocks_E, first_E = blocks_E + full_blocks_E, offset_E
    stop_E = offset_E + count_E
    blocks = BlocksOfOneSize(
        size=size, num_rows=num_rows, ends_E=jnp.cumsum(blocks_E),
        blocks_E=blocks_E, first_E=first_E, stop_E=stop_E)
    carry = _fold_over_blocks_of_one_size(blocks, update, carry)
  return carry


class BlocksOfOneSize(NamedTuple):
  """The blocks of one size that the experts have, numbered from 0, expert by
  expert.

  Attributes:
    size: how many rows a block covers.
    num_rows: how many rows there are in all.
    ends_E: the number of the block after the last one of each expert.
    blocks_E: how many blocks of this size each expert has. They follow one
      another in its rows.
    first_E: the first own row of the first of them, for each expert.
    stop_E: the row after the last row of each expert.
  """
  size: int
  num_rows: int
  ends_E: jax.Array
  blocks_E: jax.Array
  first_E: jax.Array
  stop_E: jax.Array

  def find_block(self, j: jax.Array) -> RowBlock:
    """Returns the block with the number j."""
    # The block belongs to the first expert whose blocks end after j. It is the
    # block `index_of_block` of this expert, counted from 0.
    expert = jnp.searchsorted(self.ends_E, j, side='right').astype(jnp.int32)
    first_of_expert = self.first_E[expert]
    index_of_block = j - self.ends_E[expert] + self.blocks_E[expert]
    # Its own rows: `size` rows, or those that the expert has left.
    first = first_of_expert + index_of_block * self.size
    stop = jnp.minimum(first + self.size, self.stop_E[expert])
    # A block that would end past the last row begins earlier. The rows before
    # `first` belong to other blocks.
    start = jnp.minimum(first, self.num_rows - self.size)
    return RowBlock(size=self.size, expert=expert, start=start, first=first,
                    stop=stop)


def _fold_over_blocks_of_one_size(blocks: BlocksOfOneSize, update: Callable,
                                  carry: Any) -> Any:
  """Calls `update` for each block of rows that has the given size. Each call is
  given the result of the one before, the carry:

    carry = update(carry, block)

  Args:
    blocks: the blocks.
    update: the function that is called with each RowBlock.
    carry: the carry of the first call.

  Returns:
    The result of the last call.
  """
  def update_by_block(j: jax.Array, carry: Any) -> Any:
    """Returns the carry after the block with the number j."""
    return update(carry, blocks.find_block(j))

  num_blocks = blocks.ends_E[-1]
  return jax.lax.fori_loop(
      0, num_blocks, body_fun=update_by_block, init_val=carry)


def _matmul_in_float32(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Returns x times a matrix in float32: a bfloat16 result is slow on CPU."""
  return jnp.matmul(x, matrix, preferred_element_type=jnp.float32)


def _affine_in_float32(x: jax.Array, matrix: jax.Array,
                       b: Optional[jax.Array]) -> jax.Array:
  """Returns x times a matrix, plus b, in float32."""
  y = _matmul_in_float32(x, matrix)
  if b is None:
    return y
  return y + b[None]


def _forward_by_blocks(activation: HiddenUnits, even_rows: int,
                       recompute: bool, rows_PD: jax.Array, count_E: jax.Array,
                       w: Any, mask_PF: Optional[jax.Array]
                       ) -> tuple[jax.Array, Optional[tuple[jax.Array, ...]]]:
  """Applies the experts to rows block by block, so that a block goes through
  the whole network while it is in a CPU's cache.

  Args:
    activation: the function that makes the hidden units.
    even_rows: the rows that an even load gives an expert.
    recompute: whether the inputs of the activation are not returned, because
      the backward pass computes them again.
    rows_PD: the rows, sorted by expert.
    count_E: the number of rows of each expert.
    w: the experts' weights, dispatch.ExpertWeights.
    mask_PF: the factors of the hidden units, for dropout; or None.

  Returns:
    The results, [P, D]; and the inputs of the activation, (up,) or (up, gate),
    [P, F] each, or None with `recompute`.
  """
  P, F = rows_PD.shape[0], w.up_EDF.shape[2]
  zero_inputs = tuple(jnp.zeros((P, F), rows_PD.dtype)
                      for _ in _input_weights_and_biases(w))
  y_PD = jnp.zeros_like(rows_PD)
  compute_block = functools.partial(
      _compute_block, activation=activation, rows_PD=rows_PD, w=w,
      mask_PF=mask_PF)
  y_PD, activation_inputs = _fold_over_blocks(
      P, even_rows=even_rows, count_E=count_E, update=compute_block,
      carry=(y_PD, zero_inputs))
  if recompute:
    return y_PD, None
  return y_PD, activation_inputs


def _compute_block(carry: tuple[jax.Array, tuple[jax.Array, ...]],
                   block: RowBlock, activation: HiddenUnits, rows_PD: jax.Array,
                   w: Any, mask_PF: Optional[jax.Array]
                   ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Applies an expert to a block of its rows.

  Args:
    carry: the results of all rows, [P, D], and the inputs of the activation of
      all rows, [P, F] each. Those of the block are written into them.
    block: the block.
    activation: the function that makes the hidden units.
    rows_PD: all rows.
    w: the weights of all experts, dispatch.ExpertWeights.
    mask_PF: the factors of the hidden units, for dropout; or None.

  Returns:
    The carry with the results and the inputs of the block.
  """
  y_PD, activation_inputs = carry
  # Take the block through the network of its expert.
  x = block.take(rows_PD)
  expert = block.take_weights(w)
  mask = None
  if mask_PF is not None:
    mask = block.take_as_float32(mask_PF)
  block_inputs = _inputs_of_activation(_affine_in_float32, x, expert)
  compute_activation = _activation_with_dropout(activation, mask)
  h = compute_activation(block_inputs).astype(x.dtype)
  y = _affine_in_float32(h, expert.down_EFD, expert.down_bias_ED)

  # Write the block's own rows into the arrays of all rows.
  is_own = block.which_are_own()
  y_PD = block.write(y_PD, y, is_own)
  written_inputs = []
  for all_PF, inputs_of_block in zip(activation_inputs, block_inputs):
    written_inputs.append(block.write(all_PF, inputs_of_block, is_own))
  return y_PD, tuple(written_inputs)


def _backward_by_blocks(
    activation: HiddenUnits, even_rows: int, rows_PD: jax.Array,
    count_E: jax.Array, gate_P: jax.Array, w: Any,
    mask_PF: Optional[jax.Array],
    activation_inputs: Optional[tuple[jax.Array, ...]], dy_PD: jax.Array):
  """Returns the gradients of the rows, the gates and the weights, block by
  block (`BlockGradients.add_block`).

  The suffixes name axes: P rows, E experts, D features, F hidden units.

  Args:
    activation: the function that makes the hidden units.
    even_rows: the rows that an even load gives an expert.
    rows_PD: the rows x, sorted by expert.
    count_E: the number of rows of each expert.
    gate_P: the gates g.
    w: the experts' weights, dispatch.ExpertWeights.
    mask_PF: the factors of the hidden units, for dropout; or None.
    activation_inputs: the inputs a of the activation, as the forward pass
      returned them; None: they are computed again.
    dy_PD: the gradient of the result.
  """
  gradients = BlockGradients(
      activation=activation, rows_PD=rows_PD, gate_P=gate_P, w=w,
      mask_PF=mask_PF, activation_inputs=activation_inputs, dy_PD=dy_PD)
  # Sums in float32, which are rounded once.
  dw = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), w)
  zeros = (jnp.zeros_like(rows_PD), jnp.zeros_like(gate_P[:, None]), dw)
  dx_PD, dgate_P1, dw = _fold_over_blocks(
      rows_PD.shape[0], even_rows=even_rows, count_E=count_E,
      update=gradients.add_block, carry=zeros)
  dw = jax.tree.map(lambda d, m: d.astype(m.dtype), dw, w)
  return dx_PD, dgate_P1[:, 0], dw


class BlockGradients(NamedTuple):
  """Computes the gradients of experts for one block of rows after another.

  Attributes:
    activation: the function that makes the hidden units.
    rows_PD: all rows x, sorted by expert.
    gate_P: their gates g.
    w: the experts' weights, dispatch.ExpertWeights.
    mask_PF: the factors of the hidden units, for dropout; or None.
    activation_inputs: the inputs a of the activation of all rows; None: they
      are computed again.
    dy_PD: the gradient of the results.
  """
  activation: HiddenUnits
  rows_PD: jax.Array
  gate_P: jax.Array
  w: Any
  mask_PF: Optional[jax.Array]
  activation_inputs: Optional[tuple[jax.Array, ...]]
  dy_PD: jax.Array

  def add_block(self, carry: tuple[jax.Array, jax.Array, Any], block: RowBlock
                ) -> tuple[jax.Array, jax.Array, Any]:
    """Adds the gradients of one block, whose expert has the hidden units
    h = act(a) with a = x W_in + b_in, and the output g (h W_out + b_out):

      u = dy W_out^T        dg = u . h + dy . b_out     da = act'(a) to g u
      dW_out = h^T (g dy)   db_out = sum of g dy        dx = da W_in^T
      dW_in = x^T da        db_in = sum of da

    Args:
      carry: the gradients of all rows, [P, D], of all gates, [P, 1], and of the
        weights of all experts.
      block: the block.

    Returns:
      The carry: the gradients of the block's own rows are written into it, and
      those of the weights are added to the sums over the blocks.
    """
    dx_PD, dgate_P, dw = carry
    # The rows of the block. Those that are not its own get a gradient dy of 0,
    # and so add nothing to the weights'.
    x = block.take(self.rows_PD)
    expert = block.take_weights(self.w)
    input_pairs = _input_weights_and_biases(expert)
    is_own = block.which_are_own()
    dy = jnp.where(is_own[:, None], block.take(self.dy_PD), 0)
    gate = block.take_as_float32(self.gate_P)[:, None]
    mask = None
    if self.mask_PF is not None:
      mask = block.take_as_float32(self.mask_PF)

    # The hidden units h, and the gradients u (without the gate), dg and da.
    block_inputs = self._inputs_of_block(block, x, expert)
    h, activation_vjp = jax.vjp(
        _activation_with_dropout(self.activation, mask), block_inputs)
    u = _matmul_in_float32(dy, expert.down_EFD.T)
    dgate = (u * h).sum(1)
    if expert.down_bias_ED is not None:
      dgate += _matmul_in_float32(dy, expert.down_bias_ED)
    (da_float32,) = activation_vjp(gate * u)
    d_block_inputs = [da.astype(dy.dtype) for da in da_float32]

    # The gradients of this expert's weights and of the rows.
    d_input_pairs = []
    for da, (_, bias) in zip(d_block_inputs, input_pairs):
      d_input_pairs.append(_gradients_of_affine(x, da, bias))
    d_output = _gradients_of_affine(
        h.astype(dy.dtype), (gate * dy).astype(dy.dtype), expert.down_bias_ED)
    d_expert = _pack_weight_gradients(self.w, d_input_pairs, d_output)
    dx = sum(_matmul_in_float32(da, weight.T)
             for da, (weight, _) in zip(d_block_inputs, input_pairs))

    # The rows' gradients are written, the weights' are summed over the blocks.
    dx_PD = block.write(dx_PD, dx, is_own)
    dgate_P = block.write(dgate_P, dgate[:, None], is_own)
    dw = jax.tree.map(
        lambda total, d: total.at[block.expert].add(d), dw, d_expert)
    return dx_PD, dgate_P, dw

  def _inputs_of_block(self, block: RowBlock, x: jax.Array, expert: Any
                       ) -> tuple[jax.Array, ...]:
    """Returns the inputs a of the activation for the rows x of a block, in
    float32: those that the forward pass kept, or else computed again from the
    weights of the expert."""
    if self.activation_inputs is None:
      return _inputs_of_activation(_affine_in_float32, x, expert)
    return tuple(block.take_as_float32(all_PF)
                 for all_PF in self.activation_inputs)


def _gradients_of_affine(x: jax.Array, dy: jax.Array, b: Optional[jax.Array]
                         ) -> tuple[jax.Array, Optional[jax.Array]]:
  """Returns the gradients of the matrix m and the bias b in y = x m + b; None
  for a bias that there is not."""
  dm = layers.gradient_of_weight(x, dy)
  if b is None:
    return dm, None
  return dm, dy.astype(jnp.float32).sum(0)


# Kernels.


def choose_grouped_kernel(moe: MoEConfig) -> str:
  """Chooses the kernel that multiplies each row by the matrix of its expert:
  'megablox', 'tokamax' or 'xla'.

  megablox is a Pallas kernel for TPU, whose work follows the rows that each
  expert has, and tokamax one for Hopper. xla is the compiler's own product,
  which is at times that of every expert with every row, but runs anywhere.

  Args:
    moe: the config of the mixture of experts. Its grouped_kernel names one, or
      is 'auto': then megablox is taken on TPU, and xla elsewhere.

  Returns:
    The kernel's name.

  Raises:
    RequestError: if the config names a kernel that does not run on the
      platform, or that is not installed.
  """
  platform = sharding.traced_platform()
  check_grouped_kernel(moe, platform)
  if moe.grouped_kernel == 'tokamax':
    reason = tokamax_kernels.reason_of_refusal(generations=(9,))
    require(not reason, f'model.moe.grouped_kernel is tokamax, {reason}: '
                        'choose from auto, xla')
  if moe.grouped_kernel != 'auto':
    return moe.grouped_kernel
  if platform == 'tpu':
    return 'megablox'
  return 'xla'


def check_grouped_kernel(moe: MoEConfig, device: str) -> None:
  """Raises RequestError where the kernel of the grouped products that the
  config names does not run on the platform `device`."""
  name = moe.grouped_kernel
  platform = PLATFORM_OF_KERNEL.get(name, device)
  require(platform == device,
          f'model.moe.grouped_kernel is {name}, which runs on {platform}, and '
          f'this program is for {device}: choose from auto, xla')


def grouped_product_of_kernel(name: str, even_rows: int) -> Callable:
  """Returns a grouped product, (rows_PI, m_EIO, count_E) -> [P, O], with
  gradients of the first two; rows past the counts are unspecified, but finite.

  Args:
    name: the kernel.
    even_rows: the rows that an even load gives an expert.
  """
  if name == 'xla':
    return jax.lax.ragged_dot
  if name == 'tokamax':
    return tokamax_kernels.grouped_product
  return functools.partial(megablox_product, even_rows, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def megablox_product(even_rows: int, interpret: bool, x_PI: jax.Array,
                     m_EIO: jax.Array, count_E: jax.Array) -> jax.Array:
  """Multiplies each row by the matrix of its expert, y_p = x_p m_e for each row
  p of expert e, by Pallas' kernel megablox for TPU (MegaBlocks: Gale et al.
  2022). The gradient is defined below.

  The suffixes name axes: P rows, I input features, O output features, E
  experts.

  Args:
    even_rows: how many rows each expert has if all have the same number. The
      kernel's tiles are sized for it.
    interpret: whether the kernel is emulated, so that it runs on CPU.
    x_PI: the rows, sorted by expert.
    m_EIO: the matrices of the experts.
    count_E: the number of rows of each expert.

  Returns:
    The products, [P, O], 0 for rows past the counts.
  """
  return _multiply_rows_by_experts(
      even_rows, x_PI, m_EIO=m_EIO, count_E=count_E, interpret=interpret)


def _megablox_forward(even_rows: int, interpret: bool, x_PI: jax.Array,
                      m_EIO: jax.Array, count_E: jax.Array):
  """Returns `megablox_product`, and what its gradient reads."""
  y_PO = megablox_product(
      even_rows, interpret, x_PI=x_PI, m_EIO=m_EIO, count_E=count_E)
  return y_PO, (x_PI, m_EIO, count_E)


def _megablox_backward(even_rows: int, interpret: bool, saved: tuple,
                       dy_PO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  """Computes the gradients of `megablox_product`, y = x m_e for each row x of
  expert e:

    dx = dy m_e^T,   dm_e = x^T dy, summed over the rows of expert e

  The gradient that megablox defines itself is not used, because it computes
  these products in the tiles of the forward product, whose sides do not suit
  them.

  The suffixes name axes: P rows, I input features, O output features, E
  experts.

  Args:
    even_rows: how many rows each expert has if all have the same number. The
      kernels' tiles are sized for it.
    interpret: whether the kernels are emulated, so that they run on CPU.
    saved: what the forward pass kept: the rows, the matrices and the counts.
    dy_PO: the gradient of the result.

  Returns:
    dx [P, I], dm [E, I, O], and None for the counts.
  """
  # Each row by the transposed matrix of its expert, and then, for each expert,
  # the sum over its rows.
  x_PI, m_EIO, count_E = saved
  dx_PI = _multiply_rows_by_experts(
      even_rows, dy_PO, m_EIO=m_EIO, count_E=count_E, interpret=interpret,
      transpose=True)
  dm_EIO = _gradient_of_experts_matrices(
      even_rows, x_PI, dy_PO=dy_PO, dtype=m_EIO.dtype, count_E=count_E,
      interpret=interpret)
  return dx_PI, dm_EIO, None


megablox_product.defvjp(_megablox_forward, _megablox_backward)


def _multiply_rows_by_experts(
    even_rows: int, x_PI: jax.Array, m_EIO: jax.Array, count_E: jax.Array,
    interpret: bool, transpose: bool = False) -> jax.Array:
  """Multiplies each row by the matrix of its expert, by the kernel gmm (grouped
  matrix multiplication) of Pallas' megablox.

  The suffixes name axes: P rows, I input features, O output features, E
  experts.

  Args:
    even_rows: how many rows each expert has if all have the same number. The
      kernel's tiles are sized for it.
    x_PI: the rows, sorted by expert. With `transpose` they have O features.
    m_EIO: the matrices of the experts.
    count_E: the number of rows of each expert.
    interpret: whether the kernel is emulated, so that it runs on CPU.
    transpose: whether rows are multiplied by the transposed matrices.

  Returns:
    The products, [P, O], or [P, I] with `transpose`; 0 for rows past the
    counts.
  """
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
  # Choose the tiles, and pad the rows to whole ones.
  P, inputs = x_PI.shape
  outputs = m_EIO.shape[2]
  if transpose:
    outputs = m_EIO.shape[1]
  tile_sides = _tile_sides(
      even_rows, P, inputs=inputs, outputs=outputs, dtype=x_PI.dtype)
  padded_PI = _pad_rows_to_tiles(x_PI, tile_sides[0])
  y_PO = gmm(padded_PI, m_EIO, group_sizes=count_E,
             preferred_element_type=x_PI.dtype, tiling=tile_sides,
             transpose_rhs=transpose, interpret=interpret)[:P]
  # The kernel does not write rows that no expert has. They hold whatever the
  # memory contained, even NaN, so they are replaced and not multiplied by 0.
  is_experts_row_P = jnp.arange(P) < count_E.sum()
  return jnp.where(is_experts_row_P[:, None], y_PO, 0)


def _gradient_of_experts_matrices(
    even_rows: int, x_PI: jax.Array, dy_PO: jax.Array,
    dtype: jax.typing.DTypeLike, count_E: jax.Array, interpret: bool
    ) -> jax.Array:
  """Computes the gradient of each expert's matrix m in y = x m, which is x^T dy
  summed over the expert's rows, by the kernel tgmm of Pallas' megablox.

  The suffixes name axes: P rows, I input features, O output features, E
  experts.

  Args:
    even_rows: how many rows each expert has if all have the same number. The
      kernel's tiles are sized for it.
    x_PI: the rows, sorted by expert.
    dy_PO: the gradients of the products.
    dtype: the dtype of the result.
    count_E: the number of rows of each expert.
    interpret: whether the kernel is emulated, so that it runs on CPU.

  Returns:
    The gradients, [E, I, O]; 0 for an expert without rows.
  """
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
  # The rows are padded to whole tiles. Padding lies past the counts, so it adds
  # nothing to the sums.
  P, inputs = x_PI.shape
  tile_sides = _tile_sides(even_rows, P, inputs=inputs, outputs=dy_PO.shape[1],
                           dtype=x_PI.dtype)
  x_PI = _pad_rows_to_tiles(x_PI, tile_sides[0])
  dy_PO = _pad_rows_to_tiles(dy_PO, tile_sides[0])
  return tgmm(x_PI.swapaxes(0, 1), dy_PO, group_sizes=count_E,
              preferred_element_type=dtype, tiling=tile_sides,
              interpret=interpret)


def _tile_sides(even_rows: int, P: int, inputs: int, outputs: int,
                dtype: jax.typing.DTypeLike) -> tuple[int, int, int]:
  """Chooses the sides of the tiles in which Pallas' megablox kernels multiply
  rows by the matrices of experts.

  Args:
    even_rows: how many rows each expert has if all have the same number.
    P: the number of rows.
    inputs: how many features a row has.
    outputs: how many features its product has.
    dtype: the dtype of the rows. A smaller one lets longer sides fit into the
      fast memory of a core.

  Returns:
    The sides along the rows, the inputs and the outputs.
  """
  # The longest tile of which each expert fills two if the load is even. The
  # choices are in descending order, and the last one is the shortest allowed.
  rows_of_tile = ROWS_OF_A_TILE[-1]
  for choice in ROWS_OF_A_TILE:
    if 2 * choice <= even_rows and P % choice == 0:
      rows_of_tile = choice
      break
  longest_side = LONGEST_SIDE_OF_A_TILE[jnp.dtype(dtype).name]
  input_side = _tile_side(inputs, longest_side)
  output_side = _tile_side(outputs, longest_side)
  return rows_of_tile, input_side, output_side


def _tile_side(size: int, longest_side: int) -> int:
  """Returns the side of the tiles of an axis of `size` features: as few tiles
  as `longest_side` allows, all alike, each a multiple of 128 lanes."""
  if size <= longest_side:
    return size
  num_tiles = -(-size // longest_side)
  return -(-size // num_tiles // 128) * 128


def _pad_rows_to_tiles(x_P: jax.Array, rows_of_tile: int) -> jax.Array:
  """Returns x with zeros after its rows, up to a multiple of `rows_of_tile`."""
  return jnp.pad(x_P, ((0, -x_P.shape[0] % rows_of_tile), (0, 0)))
