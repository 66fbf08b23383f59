"""What every layer is made of: weights, biases and the one matrix product that
all parts use; dropout; norms; the dense feed-forward network; and what of a
layer the backward pass computes again.

An entry of NORMS, of FFNS or of REMAT is all that there is of one.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, Optional

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from architectures.parts import sharding
from architectures.parts.config import ModelConfig
from architectures.parts.context import Context
from architectures.parts.loops import LoopsConfig
from architectures.parts.report import Report
from architectures.parts.sharding import Role, declare
from common.fields import field, FUNCTION

INITS = ('normal', 'scaled_normal', 'fan_in')  # see _initializer
PRODUCT = 'product'  # the name of a product's result that remat 'dots' keeps


def weight(module: nn.Module, name: str, shape: tuple[int, ...],
           axes: tuple[str | None, ...], *, in_axes: tuple[int, ...] = (0,),
           batch_axes: tuple[int, ...] = (), residual: bool = False,
           output: bool = False, gain: float = 1.0, tuned: bool = False
           ) -> jax.Array:
  """Declares a weight of `module` by the config's initialisation.

  Args:
    module: the module, with a `config`.
    name: the parameter's name.
    shape: its shape.
    axes: its logical axes, one a dimension.
    in_axes: the dimensions that a product sums over (the fan-in).
    batch_axes: dimensions that hold separate matrices (experts).
    residual: whether the product is added to the residual stream.
    output: whether the product's size is no width: logits, a router's too.
    gain: of the standard deviation, with fan_in.
    tuned: whether low-rank adapters leave it trained: it is new to the task.
  """
  role = Role(axes, in_axes, batch_axes, 'logits' if output else 'hidden',
              tuned)
  return declare(module, name,
                 _initializer(module.config, role, residual, gain), shape, role)


def _initializer(config: ModelConfig, role: Role, residual: bool, gain: float):
  """normal: N(0, stddev); scaled_normal: and residual products by
  1 / sqrt(2N) (GPT-2, section 2.3); fan_in: truncated, variance
  init_scale / fan_in (Switch, section 2.4). In muP the variance of a hidden
  weight falls as 1 / fan_in from the base on, that of an output's is the
  base's (Yang et al. 2022, table 8); at the base, `widening` is 1."""
  output = role.kind == 'logits'
  if config.init == 'fan_in':
    gain *= config.widening ** 0.5 if output else 1.0
    axes = role.split(len(role.axes))
    return nn.initializers.variance_scaling(
        config.init_scale * gain ** 2, 'fan_in', 'truncated_normal',
        in_axis=axes.inputs, out_axis=axes.outputs, batch_axis=axes.batch)
  stddev = config.init_stddev
  if config.init == 'scaled_normal' and residual:
    loops = config.find(LoopsConfig)
    depth = config.num_layers if loops is None else loops.depth
    stddev /= (2 * depth) ** 0.5
  # The number of inputs without a logical axis does not grow with the width.
  if not output and any(role.axes[i] for i in role.inputs):
    stddev /= config.widening ** 0.5
  return nn.initializers.normal(stddev)


def bias(module: nn.Module, name: str, shape: tuple[int, ...],
         axes: tuple[str | None, ...], *, batch_axes: tuple[int, ...] = (),
         output: bool = False, tuned: bool = False) -> jax.Array:
  """Declares a bias of `module`, born zero; arguments are those of `weight`.
  """
  role = Role(axes, batch=batch_axes, kind='logits' if output else 'hidden',
              tuned=tuned)
  return declare(module, name, nn.initializers.zeros, shape, role)


def embedding(module: nn.Module, name: str, rows: int,
              axis: str | None = None) -> jax.Array:
  """Declares a table of `module`, [rows, D], whose rows are looked up; `axis`
  is the logical axis of its rows."""
  config = module.config
  return declare(module, name, nn.initializers.normal(config.init_stddev),
                 (rows, config.d_model),
                 Role((axis, 'embed'), inputs=(0,), kind='embedding'))


def einsum(spec: str, x: jax.Array, w: jax.Array, dtype: jax.typing.DTypeLike,
           out_dtype: jax.typing.DTypeLike | None = None,
           axes: tuple[str | None, ...] | None = None, keep: bool = True,
           kept_as: str = '') -> jax.Array:
  """A product in the compute dtype, which adds up in float32.

  Args:
    spec: as of jnp.einsum, for two operands.
    x: activations.
    w: a weight, or activations.
    dtype: what both are rounded to before the product.
    out_dtype: of the result; default: dtype.
    axes: the logical axes of a weight, which is gathered as sharding.py says if
      it is sharded.
    keep: whether the whole weight may be kept for the gradient.
    kept_as: the name of the whole weight, as of sharding.gathered_product.
  """
  out_dtype = jnp.dtype(out_dtype or dtype)
  ins, out = spec.split('->')
  shared = set.intersection(*map(set, (*ins.split(','), out))) - {'.'}
  if '...' in spec:  # x's leading axes, which get letters of their own
    named = ins.index(',') - len('...')
    spec = spec.replace('...', 'ZYXW'[:x.ndim - named])
  x, w = x.astype(dtype), w.astype(dtype)
  local = functools.partial(_product, spec, out_dtype)
  at = sharding.product_places(spec, x, w, axes)
  y = (sharding.gathered_product(local, x, w, at, keep, kept_as) if at else
       local(x, w))
  return y if shared else checkpoint_name(y, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(spec: str, out_dtype: jax.typing.DTypeLike, x: jax.Array,
             w: jax.Array):
  """On CPU, XLA is slow at a bfloat16 product with a bfloat16 result, and at
  one of a bfloat16 and a float32 array; with a float32 result, of two
  bfloat16 arrays, it is twice as fast as all in float32. Hence this, and that
  the gradient of the result is rounded before it is multiplied. Elsewhere a
  float32 result would only be more to send between devices."""
  def narrow(x: jax.Array, w: jax.Array):
    return jnp.einsum(spec, x, w, preferred_element_type=out_dtype)

  def wide(x: jax.Array, w: jax.Array):
    return jnp.einsum(spec, x, w, preferred_element_type=jnp.float32
                      ).astype(out_dtype)

  float32 = x.dtype == w.dtype == out_dtype == jnp.float32
  return narrow(x, w) if float32 else jax.lax.platform_dependent(
      x, w, cpu=wide, default=narrow)


def _product_bwd(spec: str, out_dtype: jax.typing.DTypeLike,
                 operands: tuple[jax.Array, jax.Array], d: jax.Array):
  del out_dtype
  x, w = operands
  of_x, of_w, of_y = spec.replace('->', ',').split(',')
  d = d.astype(x.dtype)
  return (_product(f'{of_y},{of_w}->{of_x}', x.dtype, d, w),
          _of_weight(of_x, of_y, of_w, w.dtype, x, d))


def of_weight(x_RI: jax.Array, d_RO: jax.Array) -> jax.Array:
  """Returns x^T dy of R rows in float32, [I, O]: the gradient of a weight. In
  bfloat16 XLA's CPU backend is fast at it only where the rows are two axes."""
  if x_RI.dtype == jnp.float32 or len(x_RI) % 2:
    return jnp.matmul(x_RI.T, d_RO, preferred_element_type=jnp.float32)
  x, d = (a.reshape(2, -1, a.shape[1]) for a in (x_RI, d_RO))
  return _of_weight('BLI', 'BLO', 'IO', jnp.float32, x, d)


def _of_weight(of_x: str, of_y: str, of_w: str, dtype: jax.typing.DTypeLike,
               x: jax.Array, d: jax.Array) -> jax.Array:
  """The gradient of w, x^T dy. XLA's CPU backend transposes the first operand
  of such a product, so there it is (dy^T x)^T where dy is the smaller one. The
  barrier keeps XLA from turning the product around."""
  n = sum(letter in of_x for letter in of_w)
  ins, outs = of_w[:n], of_w[n:]
  if (d.size < x.size and set(ins) <= set(of_x) - set(of_y)
      and sharding.one_cpu()):
    dw = jax.lax.optimization_barrier(
        _product(f'{of_y},{of_x}->{outs}{ins}', dtype, d, x))
    return jnp.moveaxis(dw, range(len(outs)), range(n, n + len(outs)))
  return _product(f'{of_x},{of_y}->{of_w}', dtype, x, d)


_product.defvjp(
    lambda spec, out_dtype, x, w: (_product(spec, out_dtype, x, w), (x, w)),
    _product_bwd)


# The products of a layer that may have a low-rank adapter, and all of them.
PRODUCTS = ('query', 'key', 'value', 'output_gate', 'in', 'out', 'up',
            'gate', 'down', 'query_down', 'query_up', 'kv_down', 'kv_up')
ALL = 'all-linear'
LORA_A, LORA_B = '_lora_a', '_lora_b'  # after the name of the weight


def product(module: nn.Module, name: str, spec: str, x: jax.Array,
            w: jax.Array, axes: tuple[str | None, ...], *,
            deterministic: bool = True) -> jax.Array:
  """Returns x W in the compute dtype; where model.lora gives W an adapter,
  x W + (alpha / rank) x A B (Hu et al. 2021, equation 3).

  A, [inputs, rank], is drawn as in the authors' program, uniformly between
  -1 and 1 over the root of the fan-in, and B, [rank, outputs], begins at zero:
  a new adapter changes nothing. The dropout is of what A is given.

  Args:
    module: the module that holds W.
    name: the name of W.
    spec: as of `einsum`; the inputs of W come before its outputs.
    x: what goes in.
    w: W.
    axes: its logical axes.
    deterministic: whether nothing is dropped.
  """
  c = module.config
  longer = keeps_gathered(c, name)
  y = einsum(spec, x, w, c.compute_dtype, axes=axes,
             keep=longer or c.remat != 'none',
             kept_as=sharding.KEPT if longer else '')
  if not adapted(c, name):
    return y
  of_x, of_w, of_y = spec.replace('->', ',').split(',')
  n = sum(letter not in of_y for letter in of_w)  # of the inputs
  a, b = _adapter(module, name, w.shape, axes, n)
  if c.lora.dropout:
    x = Dropout(c.lora.dropout, name=f'{name}_lora_dropout')(
        x, deterministic=deterministic)
  of_z = of_y.removesuffix(of_w[n:]) + 'Z'
  z = einsum(f'{of_x},{of_w[:n]}Z->{of_z}', x, a, c.compute_dtype)
  z = einsum(f'{of_z},Z{of_w[n:]}->{of_y}', z, b, c.compute_dtype)
  return y + jnp.asarray(c.lora.scale, y.dtype) * z


def dense(module: nn.Module, name: str, spec: str, x: jax.Array,
          shape: tuple[int, ...], axes: tuple[str | None, ...], *,
          with_bias: bool, deterministic: bool, **how: Any) -> jax.Array:
  """Declares a weight and multiplies by it: `weight`, whose further arguments
  `how` are, `product`, and a `bias` if there is one."""
  w = weight(module, name, shape, axes, **how)
  y = product(module, name, spec, x, w, axes, deterministic=deterministic)
  if not with_bias:
    return y
  n = len(how.get('in_axes', (0,)))
  return add_bias(y, bias(module, f'{name}_bias', shape[n:], axes[n:]))


def adapted_weight(module: nn.Module, name: str, w: jax.Array,
                   axes: tuple[str | None, ...]) -> jax.Array:
  """Returns W + (alpha / rank) A B, what `product` multiplies by where nothing
  is dropped, of a W whose first axis alone is an input."""
  c = module.config
  if not adapted(c, name):
    return w
  a, b = _adapter(module, name, w.shape, axes, 1)
  return w + c.lora.scale * jnp.tensordot(a, b, 1)


def adapted(c: ModelConfig, name: str) -> bool:
  """Whether the product `name` has a low-rank adapter."""
  targets = c.lora.targets.split(',')
  return c.lora.rank > 0 and name in (
      PRODUCTS if ALL in targets else targets)


def keeps_gathered(c: ModelConfig, name: str = '') -> bool:
  """Whether the weight of the product `name`, or of any product (''), stays
  gathered from the forward to the backward pass."""
  names = [] if c.keep_gathered == 'none' else c.keep_gathered.split(',')
  return bool(names) if not name else ALL in names or name in names


def _adapter(module: nn.Module, name: str, shape: tuple[int, ...],
             axes: tuple[str | None, ...], n: int
             ) -> tuple[jax.Array, jax.Array]:
  """Declares A and B of a weight whose first `n` axes are inputs."""
  rank, inputs = module.config.lora.rank, tuple(range(n))
  a = declare(module, name + LORA_A, nn.initializers.variance_scaling(
      1 / 3, 'fan_in', 'uniform', in_axis=inputs), (*shape[:n], rank),
      Role((*axes[:n], None), inputs, tuned=True))
  b = declare(module, name + LORA_B, nn.initializers.zeros, (rank, *shape[n:]),
              Role((None, *axes[n:]), (0,), tuned=True))
  return a, b


USEFUL = 'useful_{}_of_{}_{}_in_a_prompt'


def useful(part: int, whole: int, prompt: int | None = None):
  """A scope whose products count as part / whole of themselves where a model's
  FLOPs are counted (training/costs/flops.py): a mask hides the rest. `prompt`:
  the part where all tokens are a prompt, if that is another."""
  return jax.named_scope(USEFUL.format(
      part, whole, part if prompt is None else prompt))


COUNTED = 'counted_{}_of_{}'


@functools.lru_cache(maxsize=1024)
def counted(f: Callable[..., jax.Array], part: int, whole: int = 1
            ) -> Callable[..., jax.Array]:
  """Returns f, which counts as part / whole FLOPs for each number of its
  result where a model's FLOPs are counted: its own products do not say what a
  model must multiply.

  Args:
    f: of arrays, defined at the top of a file, so that it is traced once.
    part: of a number of its result.
    whole: which divides them.
  """
  def named(*args: Any) -> jax.Array:
    return f(*args)
  named.__name__ = COUNTED.format(part, whole)
  return jax.jit(named)


def add_bias(x: jax.Array, b: jax.Array) -> jax.Array:
  """x[..., *b.shape] + b, in x's dtype.

  In float32 until the result, so that the bias's gradient, a sum over all
  tokens, adds up in float32: in bfloat16 it loses digits, and XLA's CPU
  backend takes 50 times as long for it.
  """
  b = b.reshape((1,) * (x.ndim - b.ndim) + b.shape)
  return (x.astype(jnp.float32) + b.astype(jnp.float32)).astype(x.dtype)


def times(x: jax.Array, factor: float) -> jax.Array:
  """x * factor, in x's dtype. In float32 until the result, unless x's dtype has
  the factor: rounded to bfloat16 it would be off by up to 0.4 %, of everything
  alike."""
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


_STEP = 0x9E3779B9  # 2^32 over the golden ratio: multiples of it lie far apart


class Dropout(nn.Module):
  """x -> x, with the share `rate` at 0 and the others divided by what is kept;
  the key is of the stream 'dropout'."""
  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
    if deterministic or not self.rate:
      return x
    return drop(x, self.rate, self.make_rng('dropout'))


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Returns x with the share `rate`, in [0, 1), at 0, and the others divided by
  what is kept."""
  kept = bits(key, x.shape) >= jnp.uint32(int(rate * 2**32))
  return jnp.where(kept, x * (1 / (1 - rate)), 0)


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns 32 random bits for each element, as uint32.

  Of a row with the words a and b, column c has mix(a + c * _STEP) + b, as
  SplitMix (Steele et al. 2014) counts and scatters. Rows of which the words a
  are close, which happens by chance, are told apart by b.
  """
  *rows, columns = shape or (1,)
  words = jax.random.bits(key, (2, *rows, 1))
  column = jax.lax.broadcasted_iota(jnp.uint32, (*rows, columns), len(rows))
  return (mix(words[0] + column * jnp.uint32(_STEP)) + words[1]).reshape(shape)


def mix(x: jax.Array) -> jax.Array:
  """Scatters uint32 evenly over uint32 (the finaliser of murmur3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)


# Normalisation over the feature axis, computed in float32.
#
# LayerNorm (Ba et al. 2016): y = (x - mean) / sqrt(var + eps) * scale + bias.
# Without the bias it is layernorm_no_bias (MPT, ModernBERT).
# RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * scale.
# The last two agree on centred input. Two more forms of RMSNorm:
# rmsnorm_1p     x / sqrt(mean(x^2) + eps) * (1 + offset), offset 0 at first:
#                what decays it, or rounds it, draws the factor to 1 (Gemma)
# rmsnorm_plain  x / sqrt(mean(x^2) + eps), without parameters


def layernorm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None,
              eps: float) -> jax.Array:
  """[..., D] -> [..., D], with zero mean and unit variance before scale."""
  x32 = x.astype(jnp.float32)
  mean = x32.mean(-1, keepdims=True)
  centred = x32 - mean
  var = jnp.square(centred).mean(-1, keepdims=True)
  return _affine(centred * jax.lax.rsqrt(var + eps), scale_D, bias_D, x.dtype)


def rmsnorm(x: jax.Array, scale_D: Optional[jax.Array],
            eps: float) -> jax.Array:
  """[..., D] -> [..., D], with unit mean square before scale."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.square(x32).mean(-1, keepdims=True)
  return _affine(x32 * jax.lax.rsqrt(mean_square + eps), scale_D, None, x.dtype)


def _affine(y: jax.Array, scale_D: Optional[jax.Array],
            bias_D: Optional[jax.Array], dtype: jax.typing.DTypeLike):
  ones = (1,) * (y.ndim - 1)
  if scale_D is not None:
    y = y * scale_D.astype(jnp.float32).reshape(*ones, -1)
  if bias_D is not None:
    y = y + bias_D.astype(jnp.float32).reshape(*ones, -1)
  return y.astype(dtype)


# The gradient computes a norm, or an activation, again: cheaper than to keep
# what it computes on its way.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


class Norm(nn.Module):
  """[..., D] -> [..., D]; `axis` is the logical axis of its parameters."""
  fields = ('norm_eps',)
  config: ModelConfig
  axis: str = 'embed'

  def vector(self, name: str, init: Callable, x: jax.Array) -> jax.Array:
    """Declares a parameter for each feature."""
    return declare(self, name, init, x.shape[-1:], Role((self.axis,)))


class LayerNorm(Norm):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.vector('scale', nn.initializers.ones, x)
    bias_D = self.vector('bias', nn.initializers.zeros, x)
    return recomputed(layernorm)(x, scale_D, bias_D, self.config.norm_eps)


class LayerNormNoBias(Norm):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.vector('scale', nn.initializers.ones, x)
    return recomputed(layernorm)(x, scale_D, None, self.config.norm_eps)


class RMSNorm(Norm):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = self.vector('scale', nn.initializers.ones, x)
    return recomputed(rmsnorm)(x, scale_D, self.config.norm_eps)


class RMSNorm1P(Norm):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    offset_D = self.vector('offset', nn.initializers.zeros, x)
    return recomputed(rmsnorm)(x, 1.0 + offset_D.astype(jnp.float32),
                               self.config.norm_eps)


class PlainRMSNorm(Norm):

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return recomputed(lambda x: rmsnorm(x, None, self.config.norm_eps))(x)


# A norm is a module. `settings`: the group of fields of config.model, a
# dataclass, that it alone reads; `fields`: others that not every norm reads.
NORMS = {
    'layernorm': LayerNorm,
    'layernorm_no_bias': LayerNormNoBias,
    'rmsnorm': RMSNorm,
    'rmsnorm_1p': RMSNorm1P,
    'rmsnorm_plain': PlainRMSNorm,
}


def norm(config: ModelConfig, name: str, axis: str = 'embed') -> nn.Module:
  """The config's norm, as a module whose parameters stand under `name`."""
  return NORMS[config.norm](config, axis, name=name)


def norms(config: ModelConfig, name: str) -> nn.Module:
  """The same of streams, [..., U, D]: each has parameters of its own."""
  return nn.vmap(
      NORMS[config.norm], in_axes=-2, out_axes=-2, split_rngs={'params': True},
      variable_axes={'params': 0},
      metadata_params={nn.PARTITION_NAME: None})(config, name=name)


# The feed-forward network, dense. Experts are made of the same.
#
# FFN(x) = act(x W_up) W_down (Vaswani et al. 2017, section 3.3), and gated:
# FFN(x) = (act(x W_gate) * x W_up) W_down (Shazeer 2020; SwiGLU: act = SiLU).
#
# relu2: relu(x)^2 (Primer: So et al. 2021, section 4.1). reglu: Shazeer's
# equation 5. swiglu_clamped: `clamped` (gpt-oss: OpenAI 2025, section 2.2).


gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


NO_FFN = 'none'  # model.ffn of layers without such a network


@dataclasses.dataclass(frozen=True)
class ClampConfig:
  """Of the network swiglu_clamped: see `clamped`. gpt-oss has the defaults, and
  DeepSeek-V4 alpha 1 and offset 0."""
  GROUP = 'clamp'
  alpha: float = field(1.702, 'multiplies the gate in its sigmoid', above=0,
                       resume=FUNCTION)
  limit: float = field(
      7.0, 'the most that the gate and the other factor may be', above=0,
      resume=FUNCTION)
  offset: float = field(1.0, 'added to the other factor', resume=FUNCTION)


class Network(NamedTuple):
  """One feed-forward network.

  Attributes:
    act: the activation.
    gated: whether it multiplies x W_up, of a second product with x.
    join: (x W_gate, x W_up, config.clamp) -> the hidden units, of a gated
      network that is no act(x W_gate) * x W_up.
    settings: the group of fields of config.model that it reads.
  """
  act: Callable[[jax.Array], jax.Array]
  gated: bool = False
  join: Optional[Callable[[jax.Array, jax.Array, ClampConfig], jax.Array]] = (
      None)
  settings: Optional[type] = None


@dataclasses.dataclass(frozen=True)
class Hidden:
  """What leads to the hidden units; hashable, so a program can be keyed on it.

  Attributes:
    kind: a name of FFNS.
    clamp: config.model.clamp.
  """
  kind: str
  clamp: Optional[ClampConfig] = None

  @property
  def gated(self) -> bool:
    return FFNS[self.kind].gated

  def __call__(self, up: jax.Array, gate: Optional[jax.Array] = None
               ) -> jax.Array:
    """Returns the hidden units, of x W_up and, where it is gated, x W_gate.

    They are computed in float32 and rounded once: rounded to bfloat16 after
    each operation they lose digits, and XLA's CPU backend takes three times as
    long for a GELU and its gradient.
    """
    row, dtype = FFNS[self.kind], up.dtype
    up, gate = jax.tree.map(lambda x: x.astype(jnp.float32), (up, gate))
    if row.join:
      hidden = row.join(gate, up, self.clamp)
    else:
      hidden = row.act(gate) * up if row.gated else row.act(up)
    return hidden.astype(dtype)


def relu2(x: jax.Array) -> jax.Array:
  return jnp.square(jax.nn.relu(x))


def clamped(gate: jax.Array, up: jax.Array, clamp: ClampConfig) -> jax.Array:
  """g sigmoid(alpha g) (u + offset), with g = min(gate, limit) and u = up,
  bounded by limit on both sides."""
  gate = jnp.minimum(gate, clamp.limit)
  up = jnp.clip(up, -clamp.limit, clamp.limit)
  return gate * jax.nn.sigmoid(clamp.alpha * gate) * (
      up + clamp.offset)


class FFN(nn.Module):
  """A dense network: (x_BLD, context) -> (y_BLD, report); it has nothing to
  report."""
  config: ModelConfig
  kind: str
  width: int = 0  # 0: d_ff

  @nn.compact
  def __call__(self, x_BLD: jax.Array, ctx: Context
               ) -> tuple[jax.Array, Report]:
    c, F = self.config, self.width or self.config.d_ff
    hidden = Hidden(self.kind, c.find(ClampConfig))
    multiply = functools.partial(product, self,
                                 deterministic=ctx.deterministic)
    into, out = ('embed', 'mlp'), ('mlp', 'embed')
    up_DF = weight(self, 'up', (c.d_model, F), into)
    down_FD = weight(self, 'down', (F, c.d_model), out, residual=True)
    h_BLF = multiply('up', 'BLD,DF->BLF', x_BLD, up_DF, into)
    if c.ffn_bias:
      h_BLF = add_bias(
          h_BLF, bias(self, 'up_bias', (F,), ('mlp',)))
    if hidden.gated:
      gate_DF = weight(self, 'gate', (c.d_model, F), into)
      g_BLF = multiply('gate', 'BLD,DF->BLF', x_BLD, gate_DF, into)
      if c.ffn_bias:
        g_BLF = add_bias(
            g_BLF, bias(self, 'gate_bias', (F,), ('mlp',)))
    h_BLF = recomputed(hidden)(h_BLF, *([g_BLF] if hidden.gated else []))
    h_BLF = Dropout(c.ffn_dropout)(
        h_BLF, deterministic=ctx.deterministic)
    h_BLF = sharding.constrain(h_BLF, 'batch', 'length', 'mlp')
    y_BLD = multiply('down', 'BLF,FD->BLD', h_BLF, down_FD, out)
    if c.ffn_bias:
      y_BLD = add_bias(
          y_BLD, bias(self, 'down_bias', (c.d_model,), ('embed',)))
    return y_BLD, Report()


FFNS = {
    'relu': Network(jax.nn.relu),
    'relu2': Network(relu2),
    'gelu': Network(gelu),
    'gelu_tanh': Network(gelu_tanh),
    'silu': Network(jax.nn.silu),
    'reglu': Network(jax.nn.relu, gated=True),
    'geglu': Network(gelu, gated=True),
    'geglu_tanh': Network(gelu_tanh, gated=True),
    'swiglu': Network(jax.nn.silu, gated=True),
    'swiglu_clamped': Network(jax.nn.silu, gated=True, join=clamped,
                              settings=ClampConfig),
}


# What the backward pass computes again, and what is kept for it.
#
# What a layer computes has names (JAX's `checkpoint_name`), by which an entry
# of REMAT keeps it.


INPUT = 'block_input'
HOST = 'pinned_host'  # the kind of memory


class Remat(NamedTuple):
  """A policy.

  Attributes:
    keeps: the names of what a layer keeps on its device, beside its input.
    to_host: whether the input of each layer waits in the host's memory.
    again: whether the products of a layer are computed again.
  """
  keeps: tuple[str, ...] = ()
  to_host: bool = False
  again: bool = True


REMAT = {
    'none': Remat(again=False),  # each layer keeps all that its gradient needs
    'dots': Remat(keeps=(PRODUCT,), again=False),
    'full': Remat(),
    'offload': Remat(to_host=True),
}


def remat(c: ModelConfig) -> Remat:
  """Returns the config's policy."""
  return REMAT[c.remat]


def with_remat(kind: type[nn.Module], c: ModelConfig, prevent_cse: bool
          ) -> type[nn.Module]:
  """Returns a kind of block whose backward pass computes again what the config
  says.

  Args:
    kind: its module, called with (x, *args).
    c: the config.
    prevent_cse: as of jax.checkpoint.
  """
  if c.remat == 'none':
    return kind
  if remat(c).to_host:
    kind = _named(kind)
  return nn.remat(kind, policy=remat_policy(c), prevent_cse=prevent_cse)


def remat_policy(c: ModelConfig) -> Optional[Callable[..., object]]:
  """Returns the config's policy as jax.checkpoint takes it."""
  keeps = remat(c).keeps
  if keeps_gathered(c):
    keeps += (sharding.KEPT,)
  policies = jax.checkpoint_policies
  if remat(c).to_host:
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=keeps, names_which_can_be_offloaded=[INPUT],
        offload_src='device', offload_dst=HOST)
  return policies.save_only_these_names(*keeps) if keeps else None


def gathers(c: ModelConfig, path: str, axes: tuple[str | None, ...]) -> int:
  """Returns how often a step gathers a sharded parameter: for the product and
  again for its gradient, or once.

  Args:
    c: the config.
    path: of the parameter, as 'decoder/layers/block_0/ffn/up'.
    axes: its logical axes.
  """
  once = keeps_gathered(c, path.split('/')[-1]) and 'experts' not in axes
  return passes(c, path) + (not once) * passes(c, path, back=True)


def passes(c: ModelConfig, path: str, back: bool = False) -> int:
  """Returns how often a forward pass, or a backward one, reads a parameter."""
  loops = c.find(LoopsConfig)
  if loops is None or not ('/layers/' in path or '/loop/' in path):
    return 1
  if back and loops.gradient_passes:
    return loops.gradient_passes
  return loops.passes


def _named(kind: type[nn.Module]) -> type[nn.Module]:
  """Returns the kind of block with a name for what goes in. Only what is
  computed inside of jax.checkpoint can go to the host: not an argument."""

  class Named(kind):

    def __call__(self, x, *args):
      name = lambda leaf: checkpoint_name(leaf, INPUT)
      return super().__call__(jax.tree.map(name, x), *args)

  return Named
