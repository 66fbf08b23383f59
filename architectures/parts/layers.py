"""The parts that every layer is made of: weights, biases and the one matrix
product that all parts use; dropout; norms; the dense feed-forward network; and
which results of a layer the backward pass computes again.

An entry of NORMS, of FFNS or of REMAT is all that there is of one.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple, Optional

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from architectures.parts import sharding
from architectures.parts.config import ModelConfig, MOST_FEATURES
from architectures.parts.context import Context, Report
from architectures.parts.loops import LoopsConfig
from architectures.parts.sharding import Role, Scale, declare
from common.fields import AT_START, field, FUNCTION, RUN, SHAPES

# The distributions of new weights, values of model.init: see _initializer.
WEIGHT_DISTRIBUTIONS = ('normal', 'scaled_normal', 'fan_in')
# The name of a product's result, which remat 'dots' keeps.
NAME_OF_PRODUCT = 'product'


def weight(module: nn.Module, name: str, shape: tuple[int, ...],
           axes: tuple[str | None, ...], *, in_axes: tuple[int, ...] = (0,),
           batch_axes: tuple[int, ...] = (), residual: bool = False,
           output: bool = False, gain: float = 1.0, tuned: bool = False,
           scale: Scale = Scale()) -> jax.Array:
  """Declares the weight of a matrix product as a parameter of a module. It is
  initialised by the rule that model.init names.

  Args:
    module: the Flax module, which must have a `config`.
    name: the parameter's name.
    shape: its shape.
    axes: its logical axes, one for each dimension, by which it is sharded.
    in_axes: the dimensions that a product sums over (the fan-in).
    batch_axes: dimensions along which there are separate matrices, such as
      experts.
    residual: whether the product is added to the residual stream.
    output: whether the product makes logits or the like, whose number does not
      grow with the width of the model. muP treats these differently.
    gain: a factor of the initial standard deviation, with the rule fan_in.
    tuned: whether the weight stays trained when low-rank adapters are tuned,
      because it is new to the task.
    scale: how the weight differs from that of muP's base beyond the width.

  Returns:
    The value of the parameter.
  """
  kind = 'logits' if output else 'hidden'
  role = Role(axes=axes, inputs=in_axes, batch=batch_axes, kind=kind,
              tuned=tuned, scale=scale)
  init = _initializer(module.config, role=role, residual=residual, gain=gain)
  return declare(module, name, init=init, shape=shape, role=role)


def _initializer(config: ModelConfig, role: Role, residual: bool,
                 gain: float) -> Callable:
  """Returns the initialiser of a weight, by the rule that config.init names:

    normal         N(0, stddev^2)
    scaled_normal  the same, but stddev / sqrt(2N) for products that are added
                   to the residual stream, with N layers (GPT-2, section 2.3)
    fan_in         a truncated normal distribution of the variance
                   init_scale / fan_in (Switch Transformer, section 2.4)

  Under muP, the variance of a hidden weight falls as 1 / fan_in relative to the
  base model, and that of an output weight is the base model's (Yang et al.
  2022, table 8). `widening` is the ratio of the model's width to the base
  model's, and 1 without muP. No variance depends on the depth where muP has a
  base of it, of which N is the depth (Dey et al. 2025, table 1).

  Args:
    config: the model.
    role: the role of the weight: which of its axes are inputs, and whether it
      makes logits.
    residual: whether its product is added to the residual stream.
    gain: a factor of the standard deviation, with the rule fan_in.
  """
  is_output = role.kind == 'logits'
  gain *= role.scale.stddev
  # The rule fan_in.
  if config.init == 'fan_in':
    if is_output:
      gain *= config.widening ** 0.5
    axes = role.split(len(role.axes))
    return nn.initializers.variance_scaling(
        config.init_scale * gain ** 2, mode='fan_in',
        distribution='truncated_normal', in_axis=axes.inputs,
        out_axis=axes.outputs, batch_axis=axes.batch)
  # The rules with a standard deviation.
  stddev = config.init_stddev * role.scale.stddev
  if config.init == 'scaled_normal' and residual:
    loops = config.find_part(LoopsConfig)
    depth = config.base_depth if loops is None else loops.depth
    stddev /= (2 * depth) ** 0.5
  # Inputs without a logical axis, such as those of a small rank, do not become
  # more in a wider model.
  axes_of_inputs = [role.axes[i] for i in role.inputs]
  widening = config.widening
  if 'mlp' in axes_of_inputs and role.scale.mlp is not None:
    widening = role.scale.mlp
  if any(axes_of_inputs) and not is_output:
    stddev /= widening ** 0.5
  return nn.initializers.normal(stddev)


def bias(module: nn.Module, name: str, shape: tuple[int, ...],
         axes: tuple[str | None, ...], *, batch_axes: tuple[int, ...] = (),
         output: bool = False, tuned: bool = False, scale: Scale = Scale()
         ) -> jax.Array:
  """Declares a bias of `module`, which is 0 at first, and returns it. Its
  arguments are those of `weight`."""
  kind = 'logits' if output else 'hidden'
  role = Role(axes=axes, batch=batch_axes, kind=kind, tuned=tuned, scale=scale)
  return declare(module, name, init=nn.initializers.zeros, shape=shape,
                 role=role)


def embedding(module: nn.Module, name: str, rows: int,
              axis: str | None = None) -> jax.Array:
  """Declares a table of embeddings as a parameter of a module.

  Args:
    module: the Flax module, which must have a `config`.
    name: the parameter's name.
    rows: the number of rows, such as that of the vocabulary.
    axis: the logical axis of the rows, by which they are sharded; None: they
      are not sharded.

  Returns:
    The table, [rows, d_model].
  """
  config = module.config
  init = nn.initializers.normal(config.init_stddev)
  role = Role(axes=(axis, 'embed'), inputs=(0,), kind='embedding')
  return declare(module, name, init=init, shape=(rows, config.d_model),
                 role=role)


def einsum(spec: str, x: jax.Array, w: jax.Array, dtype: jax.typing.DTypeLike,
           out_dtype: jax.typing.DTypeLike | None = None,
           axes: tuple[str | None, ...] | None = None, keep: bool = True,
           kept_as: str = '') -> jax.Array:
  """Multiplies two arrays in the compute dtype, as jnp.einsum does, with sums
  in float32. A weight that is sharded over data parallelism is gathered first.

  Args:
    spec: the letters of the axes, such as 'BLD,DF->BLF'.
    x: activations.
    w: a weight, or other activations.
    dtype: the dtype to which both are rounded before the product.
    out_dtype: the dtype of the result; None: `dtype`.
    axes: the logical axes of w if it is a weight, by which it is sharded.
    keep: whether a gathered weight may be kept for the gradient.
    kept_as: a name for the gathered weight, by which a remat policy can choose
      to keep it longer; '': it has none.

  Returns:
    The product.
  """
  out_dtype = jnp.dtype(out_dtype or dtype)
  operands, y_letters = spec.split('->')
  x_letters, w_letters = operands.split(',')
  # Letters that all three arrays have stand for a batch of separate products,
  # such as those of attention's scores. They do not get the name at the end, by
  # which a remat policy keeps the results of products with weights.
  shared_letters = set(x_letters) & set(w_letters) & set(y_letters)
  is_batched = bool(shared_letters - {'.'})
  if '...' in spec:  # the leading axes of x get letters of their own
    num_leading_axes = x.ndim - (len(x_letters) - len('...'))
    spec = spec.replace('...', 'ZYXW'[:num_leading_axes])
  # The product. A weight that is sharded over data parallelism is gathered.
  x, w = x.astype(dtype), w.astype(dtype)
  multiply = functools.partial(_product, spec, out_dtype)
  product_sharding = sharding.sharding_of_product(spec, x, w, axes=axes)
  if product_sharding is None:
    y = multiply(x, w)
  else:
    y = sharding.multiply_by_gathered_weight(
        multiply, x, w, product_sharding=product_sharding, keep=keep,
        name=kept_as)
  if is_batched:
    return y
  return checkpoint_name(y, NAME_OF_PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: str, out_dtype: jax.typing.DTypeLike, x: jax.Array,
             w: jax.Array) -> jax.Array:
  """Multiplies two arrays of one dtype by an einsum, with a result in another
  dtype, in the way that is fastest on the platform.

  On CPU, XLA multiplies two bfloat16 arrays fast only with a float32 result,
  which is rounded afterwards. On other platforms a float32 result would only be
  more to send between devices. The gradient is defined below.

  Args:
    spec: the letters of the axes, such as 'BLD,DF->BLF'.
    out_dtype: the dtype of the result.
    x: activations.
    w: a weight, or other activations.

  Returns:
    The product.
  """
  def multiply_in_result_dtype(x: jax.Array, w: jax.Array) -> jax.Array:
    """Lets the einsum return the dtype of the result."""
    return jnp.einsum(spec, x, w, preferred_element_type=out_dtype)

  def multiply_in_float32(x: jax.Array, w: jax.Array) -> jax.Array:
    """Lets the einsum return float32, and rounds it."""
    y = jnp.einsum(spec, x, w, preferred_element_type=jnp.float32)
    return y.astype(out_dtype)

  if x.dtype == w.dtype == out_dtype == jnp.float32:
    return multiply_in_result_dtype(x, w)
  return jax.lax.platform_dependent(
      x, w, cpu=multiply_in_float32, default=multiply_in_result_dtype)


def _product_fwd(spec: str, out_dtype: jax.typing.DTypeLike, x: jax.Array,
                 w: jax.Array):
  """Returns the product, and both factors for the gradient."""
  return _product(spec, out_dtype, x, w), (x, w)


def _product_bwd(spec: str, out_dtype: jax.typing.DTypeLike,
                 operands: tuple[jax.Array, jax.Array], dy: jax.Array):
  """Computes the gradients of a product y = x w (`_product`):

    dx = dy w^T,   dw = x^T dy

  Args:
    spec: the letters of the axes of the product, such as 'BLD,DF->BLF'.
    out_dtype: the dtype of y, which is not read.
    operands: x and w.
    dy: the gradient of y.

  Returns:
    dx and dw, in the dtypes of x and w.
  """
  del out_dtype
  # dy is rounded to the dtype of x, so that both products are fast on CPU.
  x, w = operands
  x_letters, w_letters, y_letters = spec.replace('->', ',').split(',')
  dy = dy.astype(x.dtype)
  dx = _product(f'{y_letters},{w_letters}->{x_letters}', x.dtype, dy, w)
  dw = _gradient_of_weight(x_letters, y_letters=y_letters, w_letters=w_letters,
                           dtype=w.dtype, x=x, dy=dy)
  return dx, dw


_product.defvjp(_product_fwd, _product_bwd)


def gradient_of_weight(x_RI: jax.Array, dy_RO: jax.Array) -> jax.Array:
  """Computes the gradient of a weight w in y = x w, which is x^T dy, in
  float32.

  The letters name axes: R rows, I inputs, O outputs.

  Args:
    x_RI: the inputs x.
    dy_RO: the gradients of the outputs y.

  Returns:
    The gradient, [I, O].
  """
  # In bfloat16, XLA's CPU backend computes this product fast only if the rows
  # are two axes. An even number of rows can be split into two without a copy.
  if x_RI.dtype == jnp.float32 or len(x_RI) % 2:
    return jnp.matmul(x_RI.T, dy_RO, preferred_element_type=jnp.float32)
  x_BLI = x_RI.reshape(2, -1, x_RI.shape[1])
  dy_BLO = dy_RO.reshape(2, -1, dy_RO.shape[1])
  return _gradient_of_weight('BLI', y_letters='BLO', w_letters='IO',
                             dtype=jnp.float32, x=x_BLI, dy=dy_BLO)


def _gradient_of_weight(x_letters: str, y_letters: str, w_letters: str,
                        dtype: jax.typing.DTypeLike, x: jax.Array,
                        dy: jax.Array) -> jax.Array:
  """Computes the gradient of a weight w in y = x w, which is x^T dy.

  On CPU, XLA transposes the first operand of such a product. So if dy is
  smaller than x, it is computed there as (dy^T x)^T.

  Args:
    x_letters: the letters of x's axes, such as 'BLD'.
    y_letters: the letters of y's axes, such as 'BLF'.
    w_letters: the letters of w's axes, its inputs first, such as 'DF'.
    dtype: the dtype of the gradient.
    x: the input of the product.
    dy: the gradient of its result.

  Returns:
    The gradient, of the shape of w.
  """
  num_inputs = sum(letter in x_letters for letter in w_letters)
  ins, outs = w_letters[:num_inputs], w_letters[num_inputs:]
  has_no_batch = set(ins) <= set(x_letters) - set(y_letters)
  if dy.size >= x.size or not has_no_batch or not sharding.is_single_cpu():
    return _product(f'{x_letters},{y_letters}->{w_letters}', dtype, x, dy)
  # The transpose of the gradient, [outputs, inputs]. The barrier keeps XLA from
  # exchanging the operands again.
  transposed = _product(
      f'{y_letters},{x_letters}->{outs}{ins}', dtype, dy, x)
  transposed = jax.lax.optimization_barrier(transposed)
  return jnp.moveaxis(
      transposed, range(len(outs)),
      range(num_inputs, num_inputs + len(outs)))


# The products of a layer that may have a low-rank adapter.
NAMES_OF_PRODUCTS = (
    'query', 'key', 'value', 'value_before', 'output_gate', 'in', 'out', 'up',
    'gate', 'down', 'query_down', 'query_up', 'kv_down', 'kv_up')
ALL_PRODUCTS = 'all-linear'  # the value that names all of them
# The names of an adapter's parameters are the name of the weight, and these.
SUFFIX_OF_LORA_A, SUFFIX_OF_LORA_B = '_lora_a', '_lora_b'


def product(module: nn.Module, name: str, spec: str, x: jax.Array,
            w: jax.Array, axes: tuple[str | None, ...], *,
            deterministic: bool = True) -> jax.Array:
  """Multiplies activations by a weight, x W, in the compute dtype. If the
  config gives W a low-rank adapter (LoRA: Hu et al. 2021, equation 3), the
  result is

    x W + (alpha / rank) dropout(x) A B

  Args:
    module: the module that holds W.
    name: the name of W.
    spec: the letters of the axes, such as 'BLD,DF->BLF'. The inputs of W must
      come before its outputs.
    x: the activations.
    w: W.
    axes: its logical axes.
    deterministic: whether there is no dropout, as outside of training.

  Returns:
    The product.
  """
  config = module.config
  # The product with W. A gathered W may be kept for the gradient if the config
  # says so, or if remat keeps it for a short time only.
  stays_gathered = keeps_weight_gathered(config, name)
  y = einsum(spec, x, w, dtype=config.compute_dtype, axes=axes,
             keep=stays_gathered or config.remat != 'none',
             kept_as=sharding.NAME_OF_KEPT_WEIGHT if stays_gathered else '')
  if not has_adapter(config, name):
    return y
  # The parameters of the adapter, and dropout before it.
  x_letters, w_letters, y_letters = spec.replace('->', ',').split(',')
  num_inputs = sum(letter not in y_letters for letter in w_letters)
  ins, outs = w_letters[:num_inputs], w_letters[num_inputs:]
  a, b = _declare_adapter(module, name, shape=w.shape, axes=axes,
                          num_inputs=num_inputs)
  if config.lora.dropout:
    dropout = Dropout(config.lora.dropout, name=f'{name}_lora_dropout')
    x = dropout(x, deterministic=deterministic)
  # The products with A and B. Z is the letter of the rank.
  z_letters = y_letters.removesuffix(outs) + 'Z'
  z = einsum(f'{x_letters},{ins}Z->{z_letters}', x, a,
             dtype=config.compute_dtype)
  z = einsum(f'{z_letters},Z{outs}->{y_letters}', z, b,
             dtype=config.compute_dtype)
  return y + jnp.asarray(config.lora.scale, y.dtype) * z


def dense(module: nn.Module, name: str, spec: str, x: jax.Array,
          shape: tuple[int, ...], axes: tuple[str | None, ...], *,
          with_bias: bool, deterministic: bool, **weight_options: Any
          ) -> jax.Array:
  """Declares the parameters of a dense layer, W and b, and applies the layer:
  x W + b.

  Args:
    module: the Flax module that declares the parameters.
    name: the name of W. That of b is `{name}_bias`.
    spec: the letters of the axes of x W, such as 'BLD,DF->BLF'.
    x: the activations.
    shape: the shape of W.
    axes: its logical axes, by which it is sharded.
    with_bias: whether there is a bias.
    deterministic: whether there is no dropout, as outside of training. Only an
      adapter (LoRA) has dropout here.
    **weight_options: further arguments of `weight`.

  Returns:
    The result, with the axes that `spec` names.
  """
  matrix = weight(module, name, shape=shape, axes=axes, **weight_options)
  y = product(module, name, spec=spec, x=x, w=matrix, axes=axes,
              deterministic=deterministic)
  if not with_bias:
    return y

  # The bias has the axes of W that are outputs. They come after the inputs, of
  # which there is one unless in_axes says otherwise.
  num_inputs = len(weight_options.get('in_axes', (0,)))
  vector = bias(module, f'{name}_bias', shape=shape[num_inputs:],
                axes=axes[num_inputs:])
  return add_bias(y, vector)


def adapted_weight(module: nn.Module, name: str, w: jax.Array,
                   axes: tuple[str | None, ...]) -> jax.Array:
  """Adds to a weight its low-rank adapter, W + (alpha / rank) A B (LoRA), for
  callers that need the weight itself and not its product.

  Args:
    module: the Flax module that holds W.
    name: the name of W.
    w: W. Its first axis must be its only input.
    axes: its logical axes.

  Returns:
    The sum; W itself if it has no adapter.
  """
  config = module.config
  if not has_adapter(config, name):
    return w
  a, b = _declare_adapter(module, name, shape=w.shape, axes=axes, num_inputs=1)
  return w + config.lora.scale * jnp.tensordot(a, b, 1)


def has_adapter(config: ModelConfig, name: str) -> bool:
  """Returns whether the product `name` has a low-rank adapter."""
  if config.lora.rank <= 0:
    return False
  targets = config.lora.targets.split(',')
  if ALL_PRODUCTS in targets:
    return name in NAMES_OF_PRODUCTS
  return name in targets


def keeps_weight_gathered(config: ModelConfig, name: str = '') -> bool:
  """Returns whether the sharded weight of the product `name`, or of any product
  (''), stays gathered from the forward to the backward pass."""
  if config.keep_gathered == 'none':
    return False
  if not name:
    return True
  names = config.keep_gathered.split(',')
  return ALL_PRODUCTS in names or name in names


def _declare_adapter(module: nn.Module, name: str, shape: tuple[int, ...],
                     axes: tuple[str | None, ...], num_inputs: int
                     ) -> tuple[jax.Array, jax.Array]:
  """Declares the matrices A and B of a weight's low-rank adapter (LoRA: Hu et
  al. 2022, arXiv 2106.09685). B is 0 at first, so that a new adapter changes
  nothing.

  Args:
    module: the module that holds the weight.
    name: the name of the weight.
    shape: its shape.
    axes: its logical axes.
    num_inputs: how many of its axes are inputs. They stand first.

  Returns:
    A, [inputs, rank], and B, [rank, outputs], where inputs and outputs are the
    axes of the weight.
  """
  # A is drawn uniformly between -1 and 1 over the root of the fan-in, as in the
  # authors' program. That is a variance of 1 / (3 fan-in). Both matrices are
  # marked as `tuned`, which says that they are trained.
  rank = module.config.lora.rank
  inputs = tuple(range(num_inputs))
  init = nn.initializers.variance_scaling(
      1 / 3, mode='fan_in', distribution='uniform', in_axis=inputs)
  a_role = Role(axes=(*axes[:num_inputs], None), inputs=inputs, tuned=True)
  b_role = Role(axes=(None, *axes[num_inputs:]), inputs=(0,), tuned=True)
  a = declare(module, name + SUFFIX_OF_LORA_A, init=init,
              shape=(*shape[:num_inputs], rank), role=a_role)
  b = declare(module, name + SUFFIX_OF_LORA_B, init=nn.initializers.zeros,
              shape=(rank, *shape[num_inputs:]), role=b_role)
  return a, b


# The name of the scope of products that count in part: see below.
SCOPE_OF_USEFUL_FLOPS = 'useful_{}_of_{}_{}_in_a_prompt'


def count_flops_as_useful_part(part: int, whole: int,
                               part_of_prompt: int | None = None):
  """Returns a scope, for a `with` statement, in which matrix products count as
  only a part of their FLOPs. A mask hides the rest of what they compute, and
  reports of FLOPs count useful ones only (training/costs/flops.py).

  Args:
    part: how many of the numbers that the products compute are used.
    whole: how many they compute.
    part_of_prompt: the part if all tokens of a row are a prompt; None: the
      same.

  Returns:
    The scope. It changes the names of operations, and not what is computed.
  """
  if part_of_prompt is None:
    part_of_prompt = part
  return jax.named_scope(
      SCOPE_OF_USEFUL_FLOPS.format(part, whole, part_of_prompt))


# The name of a function that says what it counts as: see below.
NAME_OF_COUNTED_FUNCTION = 'counted_{}_of_{}'


@functools.lru_cache(maxsize=1024)
def count_flops_by_result(f: Callable[..., jax.Array], flops: int,
                          divisor: int = 1) -> Callable[..., jax.Array]:
  """Wraps a function so that reports of a model's FLOPs count it as
  flops / divisor FLOPs for each number of its result. This is for functions
  whose own operations do not say what a model must multiply.

  Args:
    f: a function of arrays. It must be defined at the top of a file, so that
      JAX traces it only once.
    flops: the FLOPs of a number of its result, times `divisor`.
    divisor: the number that divides them.

  Returns:
    A function that computes the same.
  """
  def counted(*args: Any) -> jax.Array:
    """Calls f. Its name, which is set below, tells the report what to count."""
    return f(*args)
  counted.__name__ = NAME_OF_COUNTED_FUNCTION.format(flops, divisor)
  return jax.jit(counted)


def add_bias(x: jax.Array, b: jax.Array) -> jax.Array:
  """Returns x[..., *b.shape] + b, in x's dtype.

  The sum is computed in float32, so that the bias's gradient, a sum over all
  tokens, adds up in float32: in bfloat16 it loses digits, and XLA's CPU backend
  takes 50 times as long for it.
  """
  b = b.reshape((1,) * (x.ndim - b.ndim) + b.shape)
  y = x.astype(jnp.float32) + b.astype(jnp.float32)
  return y.astype(x.dtype)


def multiply_exactly(x: jax.Array, factor: float) -> jax.Array:
  """Returns x * factor, in x's dtype, without rounding the factor.

  Where x's dtype does not have the factor, the product is computed in float32:
  rounded to bfloat16, the factor would be off by up to 0.4 %, and with it all
  numbers in the same direction.
  """
  if float(np.asarray(factor).astype(x.dtype)) == factor:
    return x * factor
  return (x.astype(jnp.float32) * factor).astype(x.dtype)


# Dropout (Srivastava et al. 2014), by random bits that cost little.
#
# On CPU, jax.random.bernoulli takes longer for attention's weights than the
# products with them: every element has 20 rounds of its own, and every fourth
# goes through memory. Here a row, the last axis, has two random words of
# jax.random's, and an element a hash of them and of its place: 11 operations,
# which fuse into what the mask is for. A mask depends on its key and shape
# alone: it is the same on any mesh, and when it is drawn again for a gradient.


# 2^32 over the golden ratio: multiples of it lie far apart
# 2^32 over the golden ratio: its multiples, modulo 2^32, lie far apart.
STEP_BETWEEN_COLUMNS = 0x9E3779B9


class Dropout(nn.Module):
  """Dropout of a share `rate` of the numbers: see `apply_dropout`. It draws
  from the stream of random numbers 'dropout'."""
  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
    if deterministic or not self.rate:
      return x
    return apply_dropout(x, self.rate, self.make_rng('dropout'))


def apply_dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Applies dropout: a random share of the numbers becomes 0, and the others
  are divided by the share that is kept, so that the mean stays the same.

  Args:
    x: an array of any shape.
    rate: the share that is dropped, in [0, 1).
    key: the key of random numbers.

  Returns:
    An array of the shape of x.
  """
  # A uniform number of 32 bits is below the threshold with probability `rate`.
  threshold = jnp.uint32(int(rate * 2**32))
  is_kept = random_bits(key, x.shape) >= threshold
  return jnp.where(is_kept, x * (1 / (1 - rate)), 0)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws 32 random bits for each element of an array, by a hash of its index.

  Each row (along the last axis) draws two random words a and b. Its column c
  gets hash(a + c * STEP_BETWEEN_COLUMNS) + b, as SplitMix counts and scatters
  (Steele et al. 2014). Adding b keeps rows apart whose words a are close by
  chance.

  Args:
    key: the key of random numbers.
    shape: the shape of the array.

  Returns:
    The bits, uint32 of this shape.
  """
  *rows, columns = shape or (1,)
  words = jax.random.bits(key, (2, *rows, 1))
  column = jax.lax.broadcasted_iota(jnp.uint32, (*rows, columns), len(rows))
  count = words[0] + column * jnp.uint32(STEP_BETWEEN_COLUMNS)
  return (hash_uint32(count) + words[1]).reshape(shape)


def hash_uint32(x: jax.Array) -> jax.Array:
  """Returns each uint32 as another one, such that all results are equally
  frequent and close numbers lie far apart (the finaliser of murmur3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)


# Normalisation over the feature axis, computed in float32.


def layernorm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None,
              eps: float) -> jax.Array:
  """Returns (x - mean) / sqrt(var + eps) * scale + bias, [..., D] (LayerNorm:
  Ba et al. 2016)."""
  x32 = x.astype(jnp.float32)
  mean = x32.mean(-1, keepdims=True)
  centred = x32 - mean
  var = jnp.square(centred).mean(-1, keepdims=True)
  y = centred * jax.lax.rsqrt(var + eps)
  return _scale_and_shift(y, scale_D=scale_D, bias_D=bias_D, dtype=x.dtype)


def rmsnorm(x: jax.Array, scale_D: Optional[jax.Array],
            eps: float) -> jax.Array:
  """Returns x / sqrt(mean(x^2) + eps) * scale, [..., D] (RMSNorm: Zhang and
  Sennrich 2019). It agrees with LayerNorm on centred input."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.square(x32).mean(-1, keepdims=True)
  y = x32 * jax.lax.rsqrt(mean_square + eps)
  return _scale_and_shift(y, scale_D=scale_D, bias_D=None, dtype=x.dtype)


def _scale_and_shift(y: jax.Array, scale_D: Optional[jax.Array],
                     bias_D: Optional[jax.Array], dtype: jax.typing.DTypeLike
                     ) -> jax.Array:
  """Returns y * scale + bias, [..., D], in a dtype; None: there is no scale, or
  no bias."""
  leading_ones = (1,) * (y.ndim - 1)
  if scale_D is not None:
    y = y * scale_D.astype(jnp.float32).reshape(*leading_ones, -1)
  if bias_D is not None:
    y = y + bias_D.astype(jnp.float32).reshape(*leading_ones, -1)
  return y.astype(dtype)


# The backward pass computes such a function again, a norm or an activation:
# that is cheaper than to keep what the function computes on its way.
recompute_in_backward = functools.partial(jax.checkpoint, prevent_cse=False)


class Norm(nn.Module):
  """The base of norms over the last axis, [..., D] -> [..., D].

  Attributes:
    fields: the fields of config.model that not every norm reads.
    config: the model.
    axis: the logical axis of the norm's parameters.
  """
  fields: ClassVar[tuple[str, ...]] = ('norm_eps',)
  config: ModelConfig
  axis: str = 'embed'

  def declare_per_feature(self, name: str, init: Callable, x: jax.Array
                          ) -> jax.Array:
    """Declares a parameter with a number for each feature of x, and returns it,
    [D]."""
    return declare(self, name, init=init, shape=x.shape[-1:],
                   role=Role((self.axis,)))


class LayerNorm(Norm):
  """LayerNorm with a scale and a bias."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.declare_per_feature('scale', nn.initializers.ones, x)
    bias_D = self.declare_per_feature('bias', nn.initializers.zeros, x)
    return recompute_in_backward(layernorm)(
        x, scale_D, bias_D, self.config.norm_eps)


class LayerNormNoBias(Norm):
  """LayerNorm with a scale alone (MPT, ModernBERT)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.declare_per_feature('scale', nn.initializers.ones, x)
    return recompute_in_backward(layernorm)(
        x, scale_D, None, self.config.norm_eps)


class RMSNorm(Norm):
  """RMSNorm with a scale."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.declare_per_feature('scale', nn.initializers.ones, x)
    return recompute_in_backward(rmsnorm)(x, scale_D, self.config.norm_eps)


class RMSNorm1P(Norm):
  """RMSNorm with the scale 1 + offset, where offset is 0 at first: decay, or
  rounding, draws the factor to 1 (Gemma)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    offset_D = self.declare_per_feature('offset', nn.initializers.zeros, x)
    scale_D = 1.0 + offset_D.astype(jnp.float32)
    return recompute_in_backward(rmsnorm)(x, scale_D, self.config.norm_eps)


class PlainRMSNorm(Norm):
  """RMSNorm without parameters."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def normalise(x: jax.Array) -> jax.Array:
      return rmsnorm(x, None, self.config.norm_eps)

    return recompute_in_backward(normalise)(x)


@dataclasses.dataclass(frozen=True)
class GatedNormConfig:
  """The fields of the norm rmsnorm_gated."""
  GROUP = 'gated_norm'
  rank: int = field(16, 'The hidden units of the gate.', above=0,
                    most=MOST_FEATURES, resume=SHAPES)
  norms: str = field(
      'all', 'The norms of d_model features that have a gate: all, or those '
      'before attention, before networks, before experts alone (experts), and '
      'the final one.', several=True,
      choices=('all', 'attention', 'ffn', 'experts', 'final'))


class GatedRMSNorm(RMSNorm):
  """RMSNorm with a gate of low rank that reads its result (GatedNorm: arXiv
  2601.22966; as in A.X K2),

    y = rmsnorm(x),   y' = y * sigmoid(W_up silu(W_down y))

  W_down has `gated_norm.rank` outputs. The gate can shrink a feature in a few
  tokens, which otherwise only outliers of other features could do. The norms
  that `gated_norm.norms` leaves out are plain RMSNorms.
  """
  settings = GatedNormConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes y * sigmoid(W_up silu(W_down y)) with y = rmsnorm(x); only y
    where this norm has no gate.

    Args:
      x: the vectors to be normed, [..., D]. Each is normed by itself.

    Returns:
      The normed vectors, of the shape and dtype of x.
    """
    scale_D = self.declare_per_feature('scale', nn.initializers.ones, x)
    y = recompute_in_backward(rmsnorm)(x, scale_D, self.config.norm_eps)

    # Norms of heads and of other small vectors have no gate.
    if self.axis != 'embed' or not self._is_among_gated_norms():
      return y

    # The two products of the gate, from D features to U = rank, and back. A
    # wider model has as many of these U, so that in muP they are logits.
    config = self.config
    D, U = x.shape[-1], config.part(GatedNormConfig).rank
    down_axes, up_axes = ('embed', None), (None, 'embed')
    down_DU = weight(self, 'gate_down', shape=(D, U), axes=down_axes,
                     output=True)
    up_UD = weight(self, 'gate_up', shape=(U, D), axes=up_axes)
    z = einsum('...D,DU->...U', y, down_DU, dtype=y.dtype, axes=down_axes)
    hidden = jax.nn.silu(z / config.widening)
    logits = einsum('...U,UD->...D', hidden, up_UD, dtype=y.dtype, axes=up_axes)
    gate = jax.nn.sigmoid(logits.astype(jnp.float32))
    return (y * gate).astype(y.dtype)

  def _is_among_gated_norms(self) -> bool:
    """Returns whether gated_norm.norms has this norm, whose name is 'ffn_norm'
    where the field says 'ffn'."""
    gated = self.config.part(GatedNormConfig).norms.split(',')
    if self.name == 'ffn_norm' and self.config.ffn == 'moe':
      gated = [name.replace('experts', 'ffn') for name in gated]
    return 'all' in gated or self.name.removesuffix('_norm') in gated


@dataclasses.dataclass(frozen=True)
class DynamicTanhConfig:
  """The fields of the norm dynamic_tanh."""
  GROUP = 'dynamic_tanh'
  alpha: float = field(0.5, 'The slope of the tanh at first.', above=0,
                       resume=AT_START, about=RUN)


class DynamicTanh(Norm):
  """Dynamic tanh in a norm's place (DyT: Zhu et al. 2025, arXiv 2503.10622,
  equation 1),

    y = scale * tanh(alpha x) + bias,

  where alpha is one learned number. It bounds large features as a norm does,
  and computes no statistic of a token.
  """
  fields = ()
  settings = DynamicTanhConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes scale * tanh(alpha x) + bias.

    Args:
      x: the vectors to be bounded, [..., D].

    Returns:
      The bounded vectors, of the shape and dtype of x.
    """
    # The learned slope, which all features share.
    first_slope = self.config.part(DynamicTanhConfig).alpha
    alpha = declare(self, 'alpha', init=nn.initializers.constant(first_slope),
                    shape=(), role=Role(()))
    scale_D = self.declare_per_feature('scale', nn.initializers.ones, x)
    bias_D = self.declare_per_feature('bias', nn.initializers.zeros, x)

    # The result alone is rounded, as in the norms.
    y = jnp.tanh(alpha.astype(jnp.float32) * x.astype(jnp.float32))
    return _scale_and_shift(y, scale_D=scale_D, bias_D=bias_D, dtype=x.dtype)


# A norm is a module. It may have `settings`, the group of fields of
# config.model, a dataclass, that it alone reads.
NORMS = {
    'layernorm': LayerNorm,
    'layernorm_no_bias': LayerNormNoBias,
    'rmsnorm': RMSNorm,
    'rmsnorm_1p': RMSNorm1P,
    'rmsnorm_plain': PlainRMSNorm,
    'rmsnorm_gated': GatedRMSNorm,
    'dynamic_tanh': DynamicTanh,
}


def norm(config: ModelConfig, name: str, axis: str = 'embed') -> nn.Module:
  """Returns the norm that model.norm chooses, as a module.

  Args:
    config: the model.
    name: the name of the module, under which its parameters stand.
    axis: the logical axis of the features that it normalises.
  """
  return NORMS[config.norm](config, axis, name=name)


def norm_of_streams(config: ModelConfig, name: str) -> nn.Module:
  """Returns the norm that model.norm chooses for several streams, [..., U, D],
  each of which has parameters of its own."""
  module = nn.vmap(
      NORMS[config.norm], in_axes=-2, out_axes=-2, split_rngs={'params': True},
      variable_axes={'params': 0}, metadata_params={nn.PARTITION_NAME: None})
  return module(config, name=name)


# The feed-forward network, dense. Experts are made of the same.
#
# FFN(x) = act(x W_up) W_down (Vaswani et al. 2017, section 3.3), and gated:
# FFN(x) = (act(x W_gate) * x W_up) W_down (Shazeer 2020; SwiGLU: act = SiLU).
#
# reglu is Shazeer's equation 5.


gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


NO_FFN = 'none'  # model.ffn of layers without such a network


@dataclasses.dataclass(frozen=True)
class ClampConfig:
  """The fields of the network swiglu_clamped: see `clamped_swiglu`. gpt-oss has
  the defaults, and DeepSeek-V4 alpha 1 and offset 0."""
  GROUP = 'clamp'
  alpha: float = field(1.702, 'the factor on the gate in its sigmoid', above=0,
                       resume=FUNCTION)
  limit: float = field(
      7.0, 'the most that the gate and the other factor may be', above=0,
      resume=FUNCTION)
  offset: float = field(1.0, 'a number that is added to the other factor',
                        resume=FUNCTION)


class Network(NamedTuple):
  """One feed-forward network.

  Attributes:
    act: the activation, of x and of its learned numbers, if it has some.
    gated: whether the activation is of x W_gate and multiplies x W_up.
    join: (x W_gate, x W_up, config.clamp) -> the hidden units of a gated
      network, where they are not act(x W_gate) * x W_up.
    settings: the group of fields of config.model that it reads.
    learned: the names of the activation's learned numbers, and their values in
      a new layer.
  """
  act: Callable[..., jax.Array]
  gated: bool = False
  join: Optional[Callable[[jax.Array, jax.Array, ClampConfig], jax.Array]] = (
      None)
  settings: Optional[type] = None
  learned: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class HiddenUnits:
  """The function that makes the hidden units; it is hashable, so a program can
  be keyed on it.

  Attributes:
    kind: a name of FFNS.
    clamp: config.model.clamp.
  """
  kind: str
  clamp: Optional[ClampConfig] = None

  @property
  def gated(self) -> bool:
    return FFNS[self.kind].gated

  def __call__(self, up: jax.Array, gate: Optional[jax.Array] = None,
               learned: Sequence[jax.Array] = ()) -> jax.Array:
    """Computes the hidden units of a feed-forward network: act(up), or
    act(gate) * up if the network is gated.

    Args:
      up: the product x W_up, [..., d_ff].
      gate: the product x W_gate, of the same shape; None: there is no gate.
      learned: the learned numbers of the activation, scalars in float32.

    Returns:
      The hidden units, of the same shape and dtype.
    """
    # The units are computed in float32 and rounded once. Rounded to bfloat16
    # after each operation they would lose digits, and a GELU with its gradient
    # would take three times as long on CPU.
    network, dtype = FFNS[self.kind], up.dtype
    up = up.astype(jnp.float32)
    if gate is None:
      return network.act(up, *learned).astype(dtype)
    gate = gate.astype(jnp.float32)
    # Some networks join the two in another way than by a product.
    if network.join:
      hidden = network.join(gate, up, self.clamp)
    else:
      hidden = network.act(gate, *learned) * up
    return hidden.astype(dtype)


def relu2(x: jax.Array) -> jax.Array:
  """Returns relu(x)^2 (Primer: So et al. 2021, section 4.1)."""
  return jnp.square(jax.nn.relu(x))


def leaky_relu2(x: jax.Array) -> jax.Array:
  """Returns the square of x where x > 0, and of x / 2 elsewhere (parameter-golf
  of OpenAI 2026): unlike relu(x)^2 it has a gradient below 0."""
  return jnp.square(jax.nn.leaky_relu(x, negative_slope=0.5))


# The share beta of x itself in xielu; and the least distance from 0 of the x
# whose e^x it takes, as in transformers.
SLOPE_OF_XIELU = 0.5
LEAST_DISTANCE_OF_XIELU = 1e-6


def xielu(x: jax.Array, alpha_p: jax.Array, alpha_n: jax.Array) -> jax.Array:
  """Computes xIELU, the integral of an ELU with two learned slopes (Huang and
  Schlag 2024, arXiv 2411.13010; as in Apertus), with beta = 1/2:

    a x^2 + beta x,              a = softplus(alpha_p),         for x > 0
    b (e^x - 1 - x) + beta x,    b = beta + softplus(alpha_n),  elsewhere

  Args:
    x: an array of any shape, in float32.
    alpha_p: the learned number of the curve above 0.
    alpha_n: that of the curve below 0.

  Returns:
    The result, of the shape of x.
  """
  # The factors of both curves, which are above 0.
  a = jax.nn.softplus(alpha_p)
  b = SLOPE_OF_XIELU + jax.nn.softplus(alpha_n)

  # Both curves are computed for all x, and the right one is chosen. For x > 0
  # the bound keeps e^x, which is not used there, from an overflow.
  exponent = jnp.minimum(x, -LEAST_DISTANCE_OF_XIELU)
  below = jnp.expm1(exponent) - x
  curve = jnp.where(x > 0, a * jnp.square(x), b * below)
  return curve + SLOPE_OF_XIELU * x


def _invert_softplus(y: float) -> float:
  """Returns the x whose softplus, log(1 + e^x), is y."""
  return math.log(math.expm1(y))


def clamped_swiglu(gate: jax.Array, up: jax.Array, clamp: ClampConfig
                   ) -> jax.Array:
  """Computes the hidden units of a SwiGLU network whose inputs are bounded
  (gpt-oss: OpenAI 2025, section 2.2):

    h = g sigmoid(alpha g) (u + offset)
    g = min(gate, limit),   u = clip(up, -limit, limit)

  Args:
    gate: x W_gate, of any shape.
    up: x W_up, of the same shape.
    clamp: alpha, limit and offset.

  Returns:
    h, of the same shape.
  """
  gate = jnp.minimum(gate, clamp.limit)
  up = jnp.clip(up, -clamp.limit, clamp.limit)
  swish = gate * jax.nn.sigmoid(clamp.alpha * gate)
  return swish * (up + clamp.offset)


class FFN(nn.Module):
  """The dense feed-forward network.

  Attributes:
    config: the model.
    kind: a name of FFNS.
    width: the number of hidden units; 0: d_ff.
  """
  config: ModelConfig
  kind: str
  width: int = 0

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context
               ) -> tuple[jax.Array, Report]:
    """Applies a dense feed-forward network to each token.

    The suffixes name axes: B batch, L length, D d_model, F hidden units.

    Args:
      x_BLD: the input.
      ctx: the context of the call, which says whether there is dropout.

    Returns:
      The result, [B, L, D], and an empty Report. A mixture of experts, which
      takes the place of this network, reports its losses there.
    """
    config = self.config
    D, F = config.d_model, self.width or config.d_ff
    clamp = config.find_part(ClampConfig)
    compute_hidden = HiddenUnits(kind=self.kind, clamp=clamp)
    learned = self._declare_learned_numbers()
    multiply = functools.partial(product, self,
                                 deterministic=ctx.deterministic)
    in_axes, out_axes = ('embed', 'mlp'), ('mlp', 'embed')
    up_DF = weight(self, 'up', shape=(D, F), axes=in_axes)
    down_FD = weight(self, 'down', shape=(F, D), axes=out_axes, residual=True)
    # The hidden units.
    h_BLF = multiply('up', 'BLD,DF->BLF', x_BLD, up_DF, in_axes)
    h_BLF = self._add_bias_of_product('up', h_BLF, 'mlp')
    if compute_hidden.gated:
      gate_DF = weight(self, 'gate', shape=(D, F), axes=in_axes)
      g_BLF = multiply('gate', 'BLD,DF->BLF', x_BLD, gate_DF, in_axes)
      g_BLF = self._add_bias_of_product('gate', g_BLF, 'mlp')
      h_BLF = recompute_in_backward(compute_hidden)(h_BLF, g_BLF, learned)
    else:
      h_BLF = recompute_in_backward(compute_hidden)(h_BLF, None, learned)
    h_BLF = Dropout(config.ffn_dropout)(h_BLF, deterministic=ctx.deterministic)
    h_BLF = sharding.constrain(h_BLF, 'batch', 'length', 'mlp')
    # Back to the width of the model.
    y_BLD = multiply('down', 'BLF,FD->BLD', h_BLF, down_FD, out_axes)
    return self._add_bias_of_product('down', y_BLD, 'embed'), Report()

  def _declare_learned_numbers(self) -> list[jax.Array]:
    """Declares the learned numbers of the activation, if it has some, and
    returns them as scalars in float32."""
    numbers = []
    for name, first_value in FFNS[self.kind].learned:
      number_1 = declare(self, name, init=nn.initializers.constant(first_value),
                         shape=(1,), role=Role((None,)))
      numbers.append(number_1[0].astype(jnp.float32))
    return numbers

  def _add_bias_of_product(self, name: str, y: jax.Array, axis: str
                           ) -> jax.Array:
    """Adds the bias of a product, which is declared here. Without
    model.ffn_bias the product is returned as it is.

    Args:
      name: the name of the product. The bias is called `{name}_bias`.
      y: its result.
      axis: the logical axis of the features of y, by which the bias is sharded.
    """
    if not self.config.ffn_bias:
      return y
    return add_bias(
        y, bias(self, f'{name}_bias', shape=y.shape[-1:], axes=(axis,)))


FFNS = {
    'relu': Network(jax.nn.relu),
    'relu2': Network(relu2),
    'leaky_relu2': Network(leaky_relu2),
    # In a new layer both curves have the factor 0.8.
    'xielu': Network(xielu, learned=(
        ('alpha_p', _invert_softplus(0.8)),
        ('alpha_n', _invert_softplus(0.8 - SLOPE_OF_XIELU)))),
    'gelu': Network(gelu),
    'gelu_tanh': Network(gelu_tanh),
    'silu': Network(jax.nn.silu),
    'reglu': Network(jax.nn.relu, gated=True),
    'geglu': Network(gelu, gated=True),
    'geglu_tanh': Network(gelu_tanh, gated=True),
    'swiglu': Network(jax.nn.silu, gated=True),
    'swiglu_clamped': Network(jax.nn.silu, gated=True, join=clamped_swiglu,
                              settings=ClampConfig),
}


def networks_without_learned_numbers() -> list[str]:
  """Returns the names of the networks whose activation learns nothing, which
  experts and the heads of encoders may have."""
  return [name for name, network in FFNS.items() if not network.learned]


# Rematerialisation: the results of a layer that the backward pass computes
# again, and those that are kept for it. They have names (JAX's
# `checkpoint_name`), by which an entry of REMAT keeps them.


NAME_OF_BLOCK_INPUT = 'block_input'
MEMORY_OF_HOST = 'pinned_host'  # JAX's name of the host's memory


class Remat(NamedTuple):
  """An entry of REMAT: which results of a layer are kept for its gradient.

  Attributes:
    kept_names: the names of the results that a layer keeps on its device,
      beside its input.
    keeps_input_on_host: whether the input of each layer waits in the host's
      memory.
    recomputes_products: whether the products of a layer are computed again.
  """
  kept_names: tuple[str, ...] = ()
  keeps_input_on_host: bool = False
  recomputes_products: bool = True


REMAT = {
    # Each layer keeps all that its gradient needs.
    'none': Remat(recomputes_products=False),
    'dots': Remat(kept_names=(NAME_OF_PRODUCT,), recomputes_products=False),
    'full': Remat(),
    'offload': Remat(keeps_input_on_host=True),
}


def remat_of_model(config: ModelConfig) -> Remat:
  """Returns which results of a layer are kept, by model.remat."""
  return REMAT[config.remat]


def apply_remat(block: type[nn.Module], config: ModelConfig, prevent_cse: bool
                ) -> type[nn.Module]:
  """Wraps the class of a layer so that it keeps fewer results for the backward
  pass and computes the others again (rematerialisation), as model.remat says.

  Args:
    block: the Flax class of a layer, called with (x, *args).
    config: the model.
    prevent_cse: whether to keep XLA from merging what is computed twice, which
      would undo the rematerialisation; see jax.checkpoint.

  Returns:
    The wrapped class; `block` itself if nothing is computed again.
  """
  if config.remat == 'none':
    return block
  if remat_of_model(config).keeps_input_on_host:
    block = _name_input_of_block(block)
  return nn.remat(block, policy=remat_policy(config), prevent_cse=prevent_cse)


def remat_policy(config: ModelConfig) -> Optional[Callable[..., object]]:
  """Returns the policy of rematerialisation that model.remat names. It decides
  which results of a layer are kept for the backward pass; the others are
  computed again.

  Args:
    config: the model.

  Returns:
    A policy of jax.checkpoint_policies; None: only the input of each layer is
    kept.
  """
  # The policies go by names that results are given where they are computed. A
  # gathered weight that is to be kept has a name too.
  kept_names = remat_of_model(config).kept_names
  if keeps_weight_gathered(config):
    kept_names += (sharding.NAME_OF_KEPT_WEIGHT,)
  policies = jax.checkpoint_policies
  if remat_of_model(config).keeps_input_on_host:
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept_names,
        names_which_can_be_offloaded=[NAME_OF_BLOCK_INPUT],
        offload_src='device', offload_dst=MEMORY_OF_HOST)
  if kept_names:
    return policies.save_only_these_names(*kept_names)
  return None


def count_gathers_of_weight(config: ModelConfig, path: str,
                            axes: tuple[str | None, ...]) -> int:
  """Counts how often a training step gathers a sharded parameter from the other
  devices: for each product, and again for the gradient of the product unless it
  stays gathered.

  Args:
    config: the model.
    path: the path of the parameter, such as 'decoder/layers/block_0/ffn/up'.
    axes: its logical axes. Experts' weights never stay gathered.
  """
  name = path.split('/')[-1]
  forward_reads = count_reads_of_weight(config, path)
  if keeps_weight_gathered(config, name) and 'experts' not in axes:
    return forward_reads
  return forward_reads + count_reads_of_weight(config, path, back=True)


def count_reads_of_weight(config: ModelConfig, path: str, back: bool = False
                          ) -> int:
  """Counts how often a training step reads a parameter in one direction: once,
  or once in each pass if its layer is run several times (model.loop).

  Args:
    config: the model.
    path: the path of the parameter.
    back: whether to count the reads of the backward pass. If false, those of
      the forward pass are counted.
  """
  loops = config.find_part(LoopsConfig)
  is_in_loop = '/layers/' in path or '/loop/' in path
  if loops is None or not is_in_loop:
    return 1
  if loops.low_cycles:  # the mean of a lower and of an upper layer
    return loops.count_rows_of_pass(2 * loops.passes) // 2
  if back and loops.gradient_passes:
    return loops.gradient_passes
  return loops.passes


def _name_input_of_block(block: type[nn.Module]) -> type[nn.Module]:
  """Wraps the class of a layer so that the layer gives its input a name. By
  this name a policy of rematerialisation moves the input to the memory of the
  host.

  The layer has to do so itself, because a policy can only move what is computed
  inside of jax.checkpoint, and an argument is not.

  Args:
    block: the Flax class of a layer, called with (x, *args).

  Returns:
    The wrapped class.
  """

  def name_array(leaf: jax.Array) -> jax.Array:
    """Returns an array under the name that the policy knows."""
    return checkpoint_name(leaf, NAME_OF_BLOCK_INPUT)

  class Named(block):
    """The layer, whose input has a name."""

    def __call__(self, x: Any, *args: Any) -> Any:
      """Names each array of x, and applies the layer."""
      return super().__call__(jax.tree.map(name_array, x), *args)

  return Named
