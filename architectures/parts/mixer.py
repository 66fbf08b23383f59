"""A mixer: what moves information between the tokens of a row, in one layer.

blocks.py has the table MIXERS, from each value of model.mixer to its Mixer. To
write one, make a module and a subclass of Mixer:

    class Mine(Mixer):
      module = Average                     # (x_BLD, context, cache) -> ...

      def cache(self, c, shape):           # what the module starts from
        return State(jnp.zeros((*shape[:-1], c.d_model)))

    MIXERS = {'mine': Mine()}

It may override `check`, for what it refuses. All else has a default, most of
which is derived: from its cache, and from its module as it is traced where
another program asks.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, Optional

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from architectures.parts import layers, paths, positions
from architectures.parts.config import LayerKind, ModelConfig
from architectures.parts.context import Context
from architectures.parts.lora import LoraConfig
from common.errors import RequestError

# The fields that every form of attention reads for its scores, and those that
# most forms read.
SCORES = ('attention_softcap', 'attention_sinks', 'attention_dropout')
ATTENTION = ('attention_gate', 'attention_kernel', *SCORES, 'attention_bias',
             'attention_out_bias')
Divided = Sequence[tuple[str, str]]
# The logical axes of parameters that lie over the mesh axis tensor.
OVER_TENSOR = ('heads', 'kv_heads', 'groups', 'joined', 'mlp')


class Mixer:
  """One way of mixing the tokens of a layer.

  Attributes:
    module: a module of (config, kind): (x_BLD, context, cache) -> (y_BLD,
      cache, report). The block names it, so that its parameters stand under
      `attention` whatever it is. Its class attribute `settings`, if it has one,
      is a dataclass of the fields of config.model that it reads.
    fields: further fields of config.model that it reads, of those that not
      every model has.
    sources: fields of config.model that it reads only to derive sizes which
      are left open.
    whole: fields of `divided` that a mesh need not divide where they are 1,
      since all devices have the same.
    positional: whether it turns or biases by positions. If not, model.position
      is not read in its layers, but for what it adds to the embedding.
    turns_heads: whether positions turn heads of head_dim features. If other
      features are turned, `check` says what they may be.
    scores: whether a token is weighed against each other one, by scores
      [B, H, L, M]; FUSED of its module says whether a kernel may do without.
  """
  module: Any
  fields: tuple[str, ...] = ()
  sources: tuple[str, ...] = ()
  whole: tuple[str, ...] = ()
  positional = False
  turns_heads = False
  scores = False

  @property
  def settings(self) -> Optional[type]:
    """The class of the fields that the module has of its own."""
    return getattr(self.module, 'settings', None)

  def cache(self, c: ModelConfig, shape: tuple[int, ...]) -> Any:
    """Returns the cache of rows without a token, a pytree of arrays.

    Args:
      c: the config of the layer.
      shape: [..., B, M], of B rows with room for M tokens.
    """
    raise NotImplementedError(
        f'{type(self).__name__} defines no `cache`: what is kept of B rows '
        'with room for M tokens')

  def keeps_state(self, c: ModelConfig) -> bool:
    """Whether the cache holds a state: an array of one size, however many
    tokens there is room for. What has been read cannot be taken back from a
    state, padding must be told apart, and a row stays on one device."""
    return is_state(functools.partial(self.cache, c))

  def products(self, c: ModelConfig) -> set[str]:
    """Returns which of layers.PRODUCTS the module has: the products that may
    have an adapter of low rank, or a weight that stays gathered."""
    adapters = LoraConfig(rank=1, targets=layers.ALL)
    names = set()
    for path in self._parameters(dataclasses.replace(c, lora=adapters)):
      if path.endswith(layers.LORA_A):
        names.add(path.removesuffix(layers.LORA_A))
    return names

  def divided(self, c: ModelConfig) -> Divided:
    """Returns mesh axes, each with a field of config.model that it must
    divide."""
    del c
    return ()

  def cut(self, c: ModelConfig, tensor: int) -> dict[str, int]:
    """Returns the sizes that the mesh axis tensor, of this size, must divide in
    a mixer that names no fields in `divided`: those of the axes that lie over
    it, by the parameters that have them."""
    sizes: dict[str, int] = {}
    if tensor == 1 or self.divided(c):
      return sizes
    for path, box in self._parameters(c).items():
      names = getattr(box, 'names', ())
      for size, axis in zip(jnp.shape(nn.meta.unbox(box)), names):
        if axis in OVER_TENSOR:
          sizes[path] = size
    return sizes

  def at_once(self, c: ModelConfig, length: int) -> int:
    """Returns how many numbers of a token the widest step of a mixer without
    scores holds: those of the largest array of its program.

    Args:
      c: the config of the layer.
      length: the number of tokens of a row.
    """
    module, *inputs = self._call(c, length)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    program = jax.make_jaxpr(module.apply)(nn.meta.unbox(variables), *inputs)
    return -(-_largest(program.jaxpr) // length)

  def check(self, c: ModelConfig, stack: str) -> None:
    """Refuses what a layer of this mixer cannot be; without an override, what a
    layer with a state cannot.

    Args:
      c: the config of the layer.
      stack: 'encoder', 'decoder' or 'encoder-decoder'.

    Raises:
      RequestError: for such a layer.
    """
    if self.keeps_state(c):
      check_state(c, stack)

  def _call(self, c: ModelConfig, length: int) -> tuple:
    """Returns the module, and shapes of what it is called with for one row: x,
    the context and no cache."""
    module = self.module(c, LayerKind(attention=c.attention, ffn=c.ffn))
    x_BLD = jax.ShapeDtypeStruct((1, length, c.d_model), c.compute_dtype)
    positions_BL: Any = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return module, x_BLD, Context(positions_BL=positions_BL), None

  def _parameters(self, c: ModelConfig) -> dict[str, Any]:
    """Returns the module's parameters in their boxes, by their paths."""
    module, *inputs = self._call(c, length=1)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        variables['params'], is_leaf=nn.meta.is_axis_metadata)
    return {paths.join(path): box for path, box in leaves}


def is_state(cache: Callable[[tuple[int, ...]], Any]) -> bool:
  """Whether a cache holds an array of one size, however many tokens there is
  room for.

  Args:
    cache: a function from the shape of a cache, [B, M], to the cache.
  """
  short = jax.eval_shape(lambda: cache((1, 1024)))
  long = jax.eval_shape(lambda: cache((1, 2048)))
  pairs = zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True)
  return any(one.shape == other.shape for one, other in pairs)


def _largest(program: Any) -> int:
  """Returns the numbers of the largest array that a jaxpr computes."""
  largest = 0
  for equation in program.eqns:
    for result in equation.outvars:
      largest = max(largest, math.prod(getattr(result.aval, 'shape', ())))
    for inner in jaxprs_in_params(equation.params):
      largest = max(largest, _largest(getattr(inner, 'jaxpr', inner)))
  return largest


def check_context(name: str, ctx: Context) -> None:
  """Raises RequestError for what a state cannot do with a row.

  Args:
    name: the value of model.mixer.
    ctx: the context of the call.
  """
  who = f'model.mixer is {name!r}, which reads a row from left to right'
  if ctx.prefix_B is not None:
    raise RequestError(
        f'{who}: it has no prefix whose tokens see each other')
  if ctx.keep_attention:
    raise RequestError(
        f'{who} into a state: it has no attention weights to show')


def check_state(c: ModelConfig, stack: str) -> None:
  """Raises RequestError for what a layer with a state cannot be.

  Args:
    c: the config of the layer.
    stack: 'encoder', 'decoder' or 'encoder-decoder'.
  """
  who = f'model.mixer is {c.mixer!r}'
  if stack != 'decoder':
    raise RequestError(
        f'{who}, which reads a row in one direction and has no attention to a '
        f'memory; model.arch {c.arch!r} is an {stack}: choose attention')
  if c.attention != 'global':
    raise RequestError(
        f'{who}, which keeps no keys and has no window, and model.attention is '
        f'{c.attention!r}: set it to global, or window to 0 in a kind of layer')
  if positions.of(c).stack_bias:
    raise RequestError(
        f'{who}, which has no scores for the bias of model.position '
        f'{c.position!r}: set it to none, at least in the kinds of layer that '
        'have this mixer')
