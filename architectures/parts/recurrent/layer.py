"""The base of the layers of all recurrences: linear_attention.py and mamba2.py
have what is particular to each.

  q, k, v = W_q x, W_k x, W_v x       each through silu(conv(.)), if it has one
  o       = recurrence(q, k, v, decays, rates)
  y       = W_o (RMSNorm(o) * gate(x))             a head by itself

The cache is the state, in float32, and what the convolutions look back on: it
does not grow with the row. Wherever the segment id changes, a document begins,
with a state of zero: so a mask has no 0 between two 1s. With a cache, padding
changes no state.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar, Optional

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from architectures.parts import layers, mixer, sharding
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context, Report
from architectures.parts.recurrent import recurrence, features
from architectures.parts.sharding import Role, declare
from common.errors import RequestError

VALUE_AXES = 'heads', 'head'
# The fields of a recurrence that the mesh axis tensor must divide.
HEADS = 'key_heads', 'value_heads', 'heads', 'groups'
LARGEST_FIRST_DECAY_SCALE = 16.0  # of exp(A), when training begins


@struct.dataclass
class State:
  """The cache of a layer, however long a row is: the state after its last
  token, and the last inputs of the convolutions, if it has convolutions. With a
  preconditioner it also has the decayed sum of squares of keys."""
  state_BHKU: jax.Array
  curvature_BJ1K: Optional[jax.Array] = None
  query_BWJK: Optional[jax.Array] = None
  key_BWJK: Optional[jax.Array] = None
  value_BWHU: Optional[jax.Array] = None


class Layer(nn.Module):
  """(x_BLD, context, cache) -> (y_BLD, cache, report), over x itself, in the
  order of the row.

  A recurrence is a subclass, which defines `inputs` and may define `gate` or
  `normalise_and_gate`; Recurrence makes its entry. Its `settings` are the class
  of its fields, which has

    key_heads, value_heads   the numbers of heads of keys, and of values
    key_dim, value_dim       the features of a key, and of a value
    conv                     how many tokens a convolution sees; 0: none
    householders             how many keys, values and rates a token has, one
                             after another in its head

  and may have `norm_eps` (of the norm of what is read of the state) and `gate`
  (the name of its activation in jax.nn).
  """
  settings: ClassVar[Any] = None
  # Whether queries, keys and values go through a SiLU where no convolution is.
  silu_without_conv: ClassVar[bool] = False
  convolved: ClassVar[tuple[str, ...]] = 'query', 'key', 'value'
  config: ModelConfig
  kind: LayerKind

  def inputs(self, x_BLD: jax.Array, q_BLJK: jax.Array, k_BLJK: jax.Array,
             v_BLHU: jax.Array, ctx: Context) -> recurrence.Inputs:
    """Makes the inputs of the layer's linear recurrence, whose state S goes
    from token to token t. Each kind of recurrence defines this method.

      S_t = a_t S_t-1 + b_t k_t v_t^T,   o_t = S_t^T q_t

    is the plainest such recurrence, with queries q, keys k, values v, decays a
    and rates b (recurrence.py has the others).

    A row of the batch is treated as one document. The caller makes the state
    begin anew with each document afterwards.

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
    features of a key, H heads of values, U features of a value.

    Args:
      x_BLD: the layer's input.
      q_BLJK: queries after their convolution.
      k_BLJK: keys after their convolution.
      v_BLHU: values after their convolution.
      ctx: the context of the layer.

    Returns:
      Queries, keys, values, logarithms of decays, and rates.
    """
    raise NotImplementedError(f'{type(self).__name__} has no inputs')

  def gate(self, x_BLD: jax.Array, ctx: Context) -> jax.Array:
    """Returns what the normalised outputs are multiplied by, [B, L, H, U]: the
    SiLU, or the sigmoid, of a product with the input."""
    activation = getattr(jax.nn, getattr(self.sizes, 'gate', 'silu'))
    shape = self.sizes.value_heads, self.sizes.value_dim
    z_BLHU = self.project(
        'output_gate', x_BLD, axes=VALUE_AXES, shape=shape, ctx=ctx)
    return activation(z_BLHU.astype(jnp.float32))

  def normalise_and_gate(self, o_BLHU: jax.Array, x_BLD: jax.Array,
                         v_BLHU: jax.Array, ctx: Context) -> jax.Array:
    """Normalises the results of the recurrence and multiplies them by a gate,
    RMSNorm(o) * gate(x). The layer's output is a product W_o of the result. A
    subclass without a gate, or with another norm, defines this method anew.

    The suffixes name axes: B batch, L length, D d_model, H heads, U features of
    a head.

    Args:
      o_BLHU: the results of the recurrence.
      x_BLD: the layer's input, of which the gate is made.
      v_BLHU: the values. They are not read here, but in subclasses that add
        them to o.
      ctx: the context of the layer.

    Returns:
      The gated results, [B, L, H, U].
    """
    del v_BLHU
    # The epsilon of the norm is the model's, unless this kind of layer has a
    # field `norm_eps` of its own.
    norm_eps = getattr(self.sizes, 'norm_eps', self.config.norm_eps)
    norm_config = dataclasses.replace(self.config, norm_eps=norm_eps)
    norm = features.RMSNorm(norm_config, name='out_norm')
    return norm(o_BLHU) * self.gate(x_BLD, ctx)

  def run(self, inputs: recurrence.Inputs, x_BLD: jax.Array, ctx: Context,
          cache: Optional[State]) -> tuple[jax.Array, State]:
    """Runs the layer's recurrence, whose state begins at zero with each
    document.

    The suffixes name axes: B batch, L length, D d_model, H heads of values, U
    features of a value.

    Args:
      inputs: queries, keys, values, decays and rates, as if a row were one
        document.
      x_BLD: the layer's input. It is not read here, but in subclasses that
        make further inputs of it.
      ctx: the context of the layer.
      cache: the states of the tokens before; None: there are none.

    Returns:
      What is read of the state, [B, L, H, U], and a cache with the states after
      these tokens, but without the inputs of convolutions.
    """
    del x_BLD
    inputs = reset_at_documents(inputs, ctx, keeps_state=cache is not None)
    previous_BHKU = None
    if cache is not None:
      previous_BHKU = cache.state_BHKU
    o_BLHU, state_BHKU = recurrence.run_recurrence(inputs, previous_BHKU)
    return o_BLHU, State(state_BHKU)

  @property
  def sizes(self):
    return self.config.part(self.settings)

  @property
  def base_key_dim(self) -> float:
    """The key_dim of muP's base."""
    return self.sizes.key_dim / self.config.head_widening

  @property
  def key_axes(self) -> tuple[str | None, str | None]:
    """The logical axes of the heads of queries and keys, and of their features.
    If that of the features is None, neither grows with the width."""
    return 'kv_heads', 'head'

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context, cache: Optional[State]):
    """Applies the layer: it makes queries, keys and values by products and
    short convolutions, runs a linear recurrence over them, and applies a norm,
    a gate and a last product to what the recurrence returns.

    The suffixes name axes: B batch, L length, D d_model, J heads of keys, K
    features of a key, H heads of values, U features of a value, W the last
    inputs of a convolution.

    Args:
      x_BLD: the layer's input.
      ctx: the context of the call: positions, documents, padding.
      cache: what the layer keeps of earlier tokens; None: there is none.

    Returns:
      The output [B, L, D], the cache after these tokens (None where there was
      none), and an empty report.
    """
    config, sizes, steps = self.config, self.sizes, self.sizes.householders
    mixer.check_context_of_recurrence(config.mixer, ctx)
    # Padding stands at the end of a row, so it matters only to the state that a
    # cache keeps.
    valid_BL = None if cache is None else ctx.valid_BL

    # Queries, keys and values, and the last inputs of their convolutions. A
    # token has a key and a value for each of its steps, and one query.
    q_BLJK, query_BWJK = self._project_and_convolve(
        'query', x_BLD, shape=(sizes.key_heads, sizes.key_dim), ctx=ctx,
        valid_BL=valid_BL, before_BWHK=cache and cache.query_BWJK)
    k_BLJK, key_BWJK = self._project_and_convolve(
        'key', x_BLD, shape=(sizes.key_heads * steps, sizes.key_dim), ctx=ctx,
        valid_BL=valid_BL, before_BWHK=cache and cache.key_BWJK)
    v_BLHU, value_BWHU = self._project_and_convolve(
        'value', x_BLD, shape=(sizes.value_heads * steps, sizes.value_dim),
        ctx=ctx, valid_BL=valid_BL, before_BWHK=cache and cache.value_BWHU)

    # The recurrence, from the cached state or zeros.
    inputs = self.inputs(x_BLD, q_BLJK, k_BLJK, v_BLHU, ctx)
    o_BLHU, states = self.run(inputs, x_BLD, ctx=ctx, cache=cache)
    if cache is not None:
      cache = states.replace(query_BWJK=query_BWJK, key_BWJK=key_BWJK,
                             value_BWHU=value_BWHU)

    # The norm, the gate and the output's product.
    o_BLHU = self.normalise_and_gate(o_BLHU, x_BLD, v_BLHU, ctx)
    return self.project_output(o_BLHU, ctx), cache, Report()

  def project_output(self, o_BLHU: jax.Array, ctx: Context) -> jax.Array:
    """Returns the last product, W_o o of all heads, [B, L, D]."""
    config = self.config
    o_BLHU = sharding.constrain(o_BLHU.astype(config.compute_dtype), 'batch',
                                'length', 'heads', 'head')
    return layers.dense(self, 'out', 'BLHU,HUD->BLD', o_BLHU,
                        shape=(*o_BLHU.shape[2:], config.d_model),
                        axes=('heads', 'head', 'embed'), in_axes=(0, 1),
                        residual=True, with_bias=False,
                        deterministic=ctx.deterministic)

  def _project_and_convolve(
      self, name: str, x_BLD: jax.Array, shape: tuple[int, ...], ctx: Context,
      valid_BL: Optional[jax.Array], before_BWHK: Optional[jax.Array]
      ) -> tuple[jax.Array, Optional[jax.Array]]:
    """Makes queries, keys or values of the layer's input by a product and, if
    the layer has convolutions, a short convolution over tokens and a SiLU.
    Some kinds of layer have the SiLU without a convolution, too.

    The suffixes name axes: B batch, L length, D d_model, H heads, K features of
    a head, W the last inputs of the convolution.

    Args:
      name: 'query', 'key' or 'value', the name of the weight.
      x_BLD: the layer's input.
      shape: (number of heads, features of a head).
      ctx: the context of the layer.
      valid_BL: 0 on padding; None: there is no padding.
      before_BWHK: the convolution's inputs of the tokens before; None: zeros.

    Returns:
      The result, [B, L, H, K]; and the last inputs of the convolution, which
      the next tokens need, or None without a convolution.
    """
    axes = self.key_axes
    if name == 'value':
      axes = VALUE_AXES
    x_BLHK = self.project(name, x_BLD, axes=axes, shape=shape, ctx=ctx)
    if name not in self.convolved:
      return x_BLHK, None

    # A convolution over 0 tokens is none. The SiLU may be there without it, and
    # is computed in float32.
    if not self.sizes.conv:
      if self.silu_without_conv:
        x_BLHK = jax.nn.silu(x_BLHK.astype(jnp.float32)).astype(x_BLHK.dtype)
      return x_BLHK, None

    # Not all layers with a convolution have a field for its bias.
    return features.declare_and_convolve(
        self, f'{name}_conv', x_BLHK, width=self.sizes.conv, axes=axes,
        with_bias=getattr(self.sizes, 'conv_bias', False),
        before_BWHK=before_BWHK, segment_ids_BL=ctx.segment_ids_BL,
        valid_BL=valid_BL, silu=True)

  def project(self, name: str, x_BLD: jax.Array,
              axes: tuple[str | None, str | None], shape: tuple[int, ...],
              ctx: Context) -> jax.Array:
    """Multiplies the layer's input by a weight, which is declared here.

    The suffixes name axes: B batch, L length, D d_model, H heads, K features of
    a head.

    Args:
      name: the name of the weight.
      x_BLD: the layer's input.
      axes: the logical axes of the heads and of their features, by which the
        weight is split over devices. None for the features says that their
        number does not grow with the width of the model.
      shape: (number of heads, features of a head).
      ctx: the context of the layer.

    Returns:
      The product, [B, L, H, K].
    """
    config, has_fixed_size = self.config, axes[1] is None
    y_BLHK = layers.dense(
        self, name, 'BLD,DHK->BLHK', x_BLD, shape=(config.d_model, *shape),
        axes=('embed', *axes), output=has_fixed_size, with_bias=False,
        deterministic=ctx.deterministic)
    # To muP, outputs whose number does not grow with the width are like logits.
    # They are divided by `widening`, the ratio of the model's width to that of
    # its base model, which is 1 without muP.
    if has_fixed_size:
      y_BLHK /= config.widening
    return sharding.constrain(y_BLHK, 'batch', 'length', *axes)

  def project_to_heads(self, name: str, x_BLD: jax.Array, each: int = 1, *,
                       of_keys: bool = False) -> jax.Array:
    """Makes one or more numbers for each head of values, such as a decay, as
    the product W x. The weight W is declared here.

    A wider model may have the same number of heads. So muP treats these numbers
    as logits: they are divided by `widening`, the ratio of the model's width to
    that of its base model, which is 1 without muP.

    The suffixes name axes: B batch, L length, D d_model, H heads.

    Args:
      name: the name of the weight.
      x_BLD: the layer's input.
      each: how many numbers a head gets. They are neighbours in the result.
      of_keys: whether heads of keys get numbers, and not those of values.

    Returns:
      float32 [B, L, H * each].
    """
    # How many heads there are, and the logical axis that splits them.
    config = self.config
    if of_keys:
      heads = self.sizes.key_heads
      axis, _ = self.key_axes
    else:
      heads = self.sizes.value_heads
      axis, _ = VALUE_AXES

    # Weights of logits are marked as such, by `output`.
    w_DH = layers.weight(self, name, shape=(config.d_model, heads * each),
                         axes=('embed', axis), output=True)
    y_BLH = layers.einsum('BLD,DH->BLH', x_BLD, w_DH,
                          dtype=config.compute_dtype)
    return y_BLH.astype(jnp.float32) / config.widening

  def project_low_rank(
      self, name: str, x_BLD: jax.Array, features: int, rank: int = 0,
      through: Callable[[jax.Array], jax.Array] = lambda y: y) -> jax.Array:
    """Makes numbers for each head of values by a product of low rank,
    through(x W_down) W_up. Both weights are declared here.

    The suffixes name axes: B batch, L length, D d_model, U features between the
    two products (the rank), H heads, K numbers of a head.

    Args:
      name: the weights are called `name`_down and `name`_up.
      x_BLD: the layer's input.
      features: K, how many numbers a head gets.
      rank: U; 0: the rank of the layer's settings.
      through: the function that is applied between the products.

    Returns:
      float32 [B, L, H, K].
    """
    config, sizes = self.config, self.sizes
    rank = rank or sizes.rank
    down_DU = layers.weight(self, f'{name}_down', shape=(config.d_model, rank),
                            axes=('embed', None), output=True)
    up_axes = 'latent', 'heads', 'head'
    up_UHK = layers.weight(
        self, f'{name}_up', shape=(rank, sizes.value_heads, features),
        axes=up_axes)

    # The rank does not grow with the width, so muP divides the first product by
    # `widening`, as it does logits.
    y_BLU = layers.einsum('BLD,DU->BLU', x_BLD, down_DU,
                          dtype=config.compute_dtype)
    hidden_BLU = through(y_BLU / config.widening)
    y_BLHK = layers.einsum('BLU,UHK->BLHK', hidden_BLU, up_UHK,
                           dtype=config.compute_dtype, axes=up_axes)
    y_BLHK = sharding.constrain(y_BLHK, 'batch', 'length', 'heads', 'head')
    return y_BLHK.astype(jnp.float32)

  def rate(self, x_BLD: jax.Array) -> jax.Array:
    """Returns b of the delta rule, float32 [B, L, H], or [B, L, H x n]."""
    rate_BLH = jax.nn.sigmoid(self.project_to_heads(
        'rate', x_BLD, self.sizes.householders))
    return 2 * rate_BLH if self.sizes.negative else rate_BLH

  def softplus_decay(self, x_BLHK: jax.Array, least: float,
                     name: str = 'decay', axis: str = 'heads') -> jax.Array:
    """Computes the logarithms of decays as Mamba-2 does (Dao and Gu 2024, arXiv
    2405.21060):

      log decay = -exp(A) softplus(x + bias)

    A, one number for each head, and the bias, one for each number of a token,
    are parameters, which are declared here. Both factors are positive, so that
    each decay is between 0 and 1.

    The suffixes name axes: B batch, L length, H heads, K features of a head.

    Args:
      x_BLHK: the numbers x, one for each head, [B, L, H], or one for each
        feature of a head, [B, L, H, K].
      least: the least initial value of exp(A). It is drawn uniformly between
        `least` and 16 for each head.
      name: the parameters are called `name`_scale and `name`_bias.
      axis: the logical axis of the heads.

    Returns:
      Negative numbers, float32, of the shape of x.
    """
    # The parameters: A of the shape [H], and the bias of [H] or [H, K].
    shape_of_token = x_BLHK.shape[2:]
    H = shape_of_token[0]
    log_scale_H = declare(self, f'{name}_scale', shape=(H,),
                          init=log_uniform_initializer(least),
                          role=Role((axis,))).astype(jnp.float32)
    axes_of_token = (axis, 'head')[:len(shape_of_token)]
    bias_HK = declare(
        self, f'{name}_bias', init=step_bias, shape=shape_of_token,
        role=Role(axes_of_token)).astype(jnp.float32)

    # Each head has one scale, whatever axes its numbers have.
    axes_of_head = (1,) * (len(shape_of_token) - 1)
    scale_11HK = -jnp.exp(log_scale_H).reshape(1, 1, H, *axes_of_head)
    return scale_11HK * jax.nn.softplus(x_BLHK + bias_HK[None, None])


def steps_to_places(n: int, x_BLH: jax.Array) -> jax.Array:
  """Moves the n steps that a recurrence takes for each token from the axis of
  heads to that of the length, where they follow one another as n tokens would.
  The recurrence then goes along the length alone, step by step.

  The suffixes name axes: B batch, L length, H heads, n steps of a token.

  Args:
    n: how many steps of the recurrence a token has.
    x_BLH: an array [B, L, H * n, ...], in which the steps of a head are
      neighbours.

  Returns:
    The same numbers as [B, L * n, H, ...].
  """
  if n == 1:
    return x_BLH
  # Split the axis of heads in two, and swap these two axes.
  B, L, _, *feature_shape = x_BLH.shape
  x_BLHn = x_BLH.reshape(B, L, -1, n, *feature_shape)
  x_BLnH = jnp.swapaxes(x_BLHn, 2, 3)
  return x_BLnH.reshape(B, L * n, -1, *feature_shape)


def reset_at_documents(x: recurrence.Inputs, ctx: Context, keeps_state: bool
                       ) -> recurrence.Inputs:
  """Changes the inputs of a linear recurrence so that its state begins at zero
  with each document, and so that padding leaves the state as it is.

  The suffixes name axes: B batch, L length, H heads of values, J heads of keys,
  K features of a key, U features of a value.

  Args:
    x: the inputs (queries, keys, values, decays and rates) of rows, as if a row
      were one document.
    ctx: the context of the layer, with the number of each token's document and
      0 on padding.
    keeps_state: whether the state after the row is kept in a cache. Only then
      does padding matter, which stands at the end of a row.

  Returns:
    The changed inputs.
  """
  if keeps_state and ctx.valid_BL is not None:
    x = _keep_state_on_padding(x, ctx.valid_BL)
  if ctx.segment_ids_BL is not None:
    x = _forget_state_at_documents(x, ctx.segment_ids_BL)
  return x


def _keep_state_on_padding(x: recurrence.Inputs, valid_BL: jax.Array
                           ) -> recurrence.Inputs:
  """Changes the inputs of a linear recurrence so that padding leaves the state
  as it is: there the decay becomes 1, and nothing is written to the state.

  The suffixes name axes: B batch, L length, J heads of keys, H heads of values,
  K features of a key.

  Args:
    x: the inputs: queries, keys, values, decays and rates.
    valid_BL: 0 on padding, [batch, length].

  Returns:
    The changed inputs.
  """
  # The logarithm of a decay of 1 is 0.
  is_valid_BL1 = valid_BL[..., None] != 0
  if x.log_decay_BLHK is not None:
    x = x._replace(log_decay_BLHK=jnp.where(
        is_valid_BL1[..., None], x.log_decay_BLHK, 0))

  # A token may take several steps of the recurrence. Keys and rates have an
  # entry for each step, decays one for each token.
  is_valid_step_BL1 = is_valid_BL1
  if x.steps > 1:
    is_valid_step_BL1 = jnp.repeat(is_valid_BL1, x.steps, 1)

  # The rate multiplies what is written. Without a rate, the key does.
  if x.rate_BLH is None:
    return x._replace(
        k_BLJK=jnp.where(is_valid_step_BL1[..., None], x.k_BLJK, 0))
  return x._replace(rate_BLH=jnp.where(is_valid_step_BL1, x.rate_BLH, 0))


def _forget_state_at_documents(x: recurrence.Inputs, ids_BL: jax.Array
                               ) -> recurrence.Inputs:
  """Changes the inputs of a linear recurrence so that its state is zero where a
  document begins: at its first token the decay becomes 0.

  The suffixes name axes: B batch, L length, J heads of keys, H heads of values,
  K features of a key, U features of a value.

  Args:
    x: the inputs: queries, keys, values, decays and rates.
    ids_BL: the number of each token's document, [batch, length].

  Returns:
    The changed inputs, which have decays even if x has none.
  """
  log_decay_BLHK = x.log_decay_BLHK
  if log_decay_BLHK is None:
    B, L = x.q_BLJK.shape[:2]
    H = x.v_BLHU.shape[2]
    log_decay_BLHK = jnp.zeros((B, L, H, 1))

  # The logarithm of a decay of 0 is -inf.
  begins_BL = features.begins_document(ids_BL)
  x = x._replace(log_decay_BLHK=jnp.where(
      begins_BL[..., None, None], -jnp.inf, log_decay_BLHK))
  # A correction that reads the state as it was before its decay would read the
  # document before, so there it reads zero.
  if x.undecayed_BL1 is None:
    return x
  return x._replace(undecayed_BL1=jnp.where(
      begins_BL[..., None], 0, x.undecayed_BL1))


def log_uniform_initializer(least: float):
  """Returns an initializer: the logarithm of a uniform number between `least`
  and 16 (Dao and Gu's Mamba-2, and the authors' programs)."""
  def draw_log_uniform(key: jax.Array, shape: tuple[int, ...],
                       dtype: jnp.dtype) -> jax.Array:
    """Draws the initial values."""
    return jnp.log(jax.random.uniform(
        key, shape, dtype, minval=least, maxval=LARGEST_FIRST_DECAY_SCALE))
  return draw_log_uniform


def step_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype):
  """Initialises the bias of a step dt = softplus(x + bias), so that dt without
  x is between 0.001 and 0.1, with a uniform logarithm (Mamba)."""
  # log(exp(dt) - 1) is the inverse of the softplus.
  initial_step = jnp.exp(jax.random.uniform(
      key, shape, jnp.float32, jnp.log(0.001), jnp.log(0.1)))
  return jnp.log(jnp.expm1(initial_step)).astype(dtype)


def has_preconditioner(sizes: Any) -> bool:
  """Returns whether a recurrence, of which `sizes` has the fields, multiplies
  the keys that it writes by a preconditioner."""
  return getattr(sizes, 'precondition', 1) > 1


class Recurrence(mixer.Mixer):
  """The entry of a recurrence in the table of mixers."""
  fields = ('norm_eps',)
  sources = 'num_heads', 'head_dim', 'mup_base_head_dim'

  def __init__(self, module: type[Layer]):
    self.module = module

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> Any:
    """Returns an empty cache for a layer of linear recurrence: the state of the
    recurrence and the last inputs of its convolutions, all 0.

    The suffixes name axes: B batch, H heads of values, J heads of keys, K
    features of a key, U features of a value, W last inputs of a convolution.

    Args:
      config: the config of the layer.
      shape: (..., rows, tokens). The cache does not grow with the tokens.
    """
    # The state, and the sum of squares of keys that a preconditioner has.
    sizes, rows = config.part(self.module.settings), shape[:-1]
    state = State(state_BHKU=jnp.zeros(
        (*rows, sizes.value_heads, sizes.key_dim, sizes.value_dim)))
    if has_preconditioner(sizes):
      state = state.replace(curvature_BJ1K=jnp.zeros(
          (*rows, sizes.key_heads, 1, sizes.key_dim)))
    if not sizes.conv:
      return state

    # A convolution over `conv` tokens keeps the inputs of all of them but the
    # last. A token may take several steps of the recurrence: it has a key and a
    # value for each of them, but one query.
    rows_and_tokens = *rows, sizes.conv - 1
    heads_of_keys = sizes.key_heads * sizes.householders
    heads_of_values = sizes.value_heads * sizes.householders
    dtype = config.compute_dtype
    state = state.replace(
        query_BWJK=jnp.zeros(
            (*rows_and_tokens, sizes.key_heads, sizes.key_dim), dtype),
        key_BWJK=jnp.zeros(
            (*rows_and_tokens, heads_of_keys, sizes.key_dim), dtype))
    if 'value' not in self.module.convolved:
      return state
    return state.replace(value_BWHU=jnp.zeros(
        (*rows_and_tokens, heads_of_values, sizes.value_dim), dtype))

  def fields_to_divide(self, config: ModelConfig) -> mixer.AxesAndFields:
    names = {field.name for field in dataclasses.fields(self.module.settings)}
    heads = [name for name in HEADS if name in names]
    return [('tensor', f'{config.mixer}.{name}') for name in heads]

  def widest_step_of_token(self, config: ModelConfig, length: int) -> int:
    """Returns how many numbers of a token the pieces of a row hold at once: a
    piece's weights, its triangular system, and the inverse of that."""
    sizes = config.part(self.module.settings)
    places = recurrence.default_places(sizes.key_dim)
    return 3 * sizes.householders * sizes.value_heads * places

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that the sizes of a delta rule fit each other.

    Raises:
      RequestError: if heads of values cannot share the heads of keys evenly; if
        a preconditioner is asked for where a token writes several keys; or for
        what no recurrence goes with.
    """
    super().check(config, stack)
    sizes = config.part(self.module.settings)
    if sizes.value_heads % sizes.key_heads:
      raise RequestError(
          f'model.{config.mixer}.key_heads is {sizes.key_heads}, which does '
          f'not divide model.{config.mixer}.value_heads {sizes.value_heads}')
    if has_preconditioner(sizes) and sizes.householders > 1:
      raise RequestError(
          f'model.{config.mixer}.precondition is {sizes.precondition:g}, which '
          'is for one key a token, and '
          f'model.{config.mixer}.householders is {sizes.householders}: choose '
          '1 for one of the two')
