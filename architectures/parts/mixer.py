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

# The fields of config.model that every form of attention reads for its scores,
# and those that most forms of attention read.
FIELDS_OF_SCORES = ('attention_softcap', 'attention_sinks', 'attention_dropout')
FIELDS_OF_ATTENTION = (
    'attention_gate', 'attention_kernel', *FIELDS_OF_SCORES, 'attention_bias',
    'attention_out_bias')
# Pairs of a mesh axis and the field of config.model that it must divide.
AxesAndFields = Sequence[tuple[str, str]]
# The logical axes of parameters that lie over the mesh axis tensor.
AXES_SHARDED_OVER_TENSOR = ('heads', 'kv_heads', 'groups', 'joined', 'mlp')


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
    may_be_one: those fields of `fields_to_divide` that a mesh axis need not
      divide where they are 1, since all devices then have the same.
    positional: whether it rotates heads or adds biases by positions. If not,
      its layers read model.position only for what it adds to the embedding.
    turns_heads: whether positions rotate heads of head_dim features. If other
      features are rotated, `check` says what they may be.
    has_scores: whether each token has a score of each other one,
      [B, H, L, M]; FUSED of its module says whether a kernel may avoid to
      hold all scores at once.
  """
  module: Any
  fields: tuple[str, ...] = ()
  sources: tuple[str, ...] = ()
  may_be_one: tuple[str, ...] = ()
  positional = False
  turns_heads = False
  has_scores = False

  @property
  def settings(self) -> Optional[type]:
    """The class of the fields that the module has of its own."""
    return getattr(self.module, 'settings', None)

  def cache(self, config: ModelConfig, shape: tuple[int, ...]) -> Any:
    """Returns the cache of rows without a token, a pytree of arrays.

    Args:
      config: the config of the layer.
      shape: [..., B, M], of B rows with room for M tokens.
    """
    raise NotImplementedError(
        f'{type(self).__name__} defines no `cache`: what is kept of B rows '
        'with room for M tokens')

  def keeps_state(self, config: ModelConfig) -> bool:
    """Returns whether the cache holds a state: an array whose size does not
    depend on the number of tokens that there is room for.

    A token that was read cannot be removed from a state, padding must not be
    read into it, and a row stays on one device.
    """
    return has_array_of_fixed_size(functools.partial(self.cache, config))

  def products(self, config: ModelConfig) -> set[str]:
    """Returns which of layers.NAMES_OF_PRODUCTS the module has: the products
    that may have a low-rank adapter, or a weight that stays gathered."""
    # Each product declares the parameters of an adapter where all get one.
    adapters = LoraConfig(rank=1, targets=layers.ALL_PRODUCTS)
    names = set()
    for path in self._parameters(dataclasses.replace(config, lora=adapters)):
      if path.endswith(layers.SUFFIX_OF_LORA_A):
        names.add(path.removesuffix(layers.SUFFIX_OF_LORA_A))
    return names

  def fields_to_divide(self, config: ModelConfig) -> AxesAndFields:
    """Returns mesh axes, each with a field of config.model that it must
    divide."""
    del config
    return ()

  def sizes_over_tensor(self, config: ModelConfig, tensor: int
                        ) -> dict[str, int]:
    """Returns the sizes of a layer's parameters that the number of devices for
    tensor parallelism must divide.

    Args:
      config: the config of the layer.
      tensor: the number of devices along the mesh axis 'tensor'.

    Returns:
      {path of a parameter that is split over these devices: the size that they
      must divide}. It is {} for a single device, and if `fields_to_divide`
      names fields of the config in its place.
    """
    sizes: dict[str, int] = {}
    if tensor == 1 or self.fields_to_divide(config):
      return sizes
    for path, box in self._parameters(config).items():
      logical_axes = getattr(box, 'names', ())
      for size, axis in zip(jnp.shape(nn.meta.unbox(box)), logical_axes):
        if axis in AXES_SHARDED_OVER_TENSOR:
          sizes[path] = size
    return sizes

  def widest_step_of_token(self, config: ModelConfig, length: int) -> int:
    """Returns the size of the largest array that a recurrence computes, as
    numbers for each token. The program is only traced for shapes, and not run.

    Args:
      config: the config of the layer.
      length: the number of tokens of a row.
    """
    module, *inputs = self._arguments_of_call(config, length)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    program = jax.make_jaxpr(module.apply)(nn.meta.unbox(variables), *inputs)
    return -(-_size_of_largest_array(program.jaxpr) // length)  # rounded up

  def check(self, config: ModelConfig, stack: str) -> None:
    """Checks that a layer of this mixer (attention or a recurrence) fits the
    rest of the model. Unless a subclass overrides it, only layers that keep a
    state are checked.

    Args:
      config: the config of the layer.
      stack: the kind of stack: 'encoder', 'decoder' or 'encoder-decoder'.

    Raises:
      RequestError: if it does not fit.
    """
    if self.keeps_state(config):
      check_layer_of_recurrence(config, stack)

  def _arguments_of_call(self, config: ModelConfig, length: int) -> tuple:
    """Returns the module, and the shapes of the arguments with which it is
    called for one row of `length` tokens: x, the context, and no cache."""
    module = self.module(config,
                         LayerKind(attention=config.attention, ffn=config.ffn))
    x_BLD = jax.ShapeDtypeStruct((1, length, config.d_model),
                                 config.compute_dtype)
    positions_BL: Any = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return module, x_BLD, Context(positions_BL=positions_BL), None

  def _parameters(self, config: ModelConfig) -> dict[str, Any]:
    """Returns the shapes of the module's parameters by their paths, each in the
    box that has its logical axes."""
    module, *inputs = self._arguments_of_call(config, length=1)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        variables['params'], is_leaf=nn.meta.is_axis_metadata)
    return {paths.path_to_string(path): box for path, box in leaves}


def has_array_of_fixed_size(cache: Callable[[tuple[int, ...]], Any]) -> bool:
  """Returns whether a layer's cache holds a state, which is an array whose size
  does not depend on the number of tokens.

  Args:
    cache: a function that makes an empty cache, given (rows, tokens).
  """
  # Compare caches for two numbers of tokens. eval_shape makes no arrays.
  cache_of_1024 = jax.eval_shape(functools.partial(cache, (1, 1024)))
  cache_of_2048 = jax.eval_shape(functools.partial(cache, (1, 2048)))
  pairs = zip(jax.tree.leaves(cache_of_1024), jax.tree.leaves(cache_of_2048),
              strict=True)
  return any(shorter.shape == longer.shape for shorter, longer in pairs)


def _size_of_largest_array(program: Any) -> int:
  """Returns how many numbers the largest array has that a JAX program computes.
  Programs inside of it, such as those of loops, are searched too.

  Args:
    program: the program, a jaxpr.
  """
  largest = 0
  for equation in program.eqns:
    for result in equation.outvars:
      size = math.prod(getattr(result.aval, 'shape', ()))
      largest = max(largest, size)
    for inner in jaxprs_in_params(equation.params):
      size = _size_of_largest_array(getattr(inner, 'jaxpr', inner))
      largest = max(largest, size)
  return largest


def check_context_of_recurrence(name: str, ctx: Context) -> None:
  """Checks that a call of the model asks for nothing that a recurrence cannot
  do. A recurrence reads a row from left to right, and has no attention weights.

  Args:
    name: which recurrence it is, the value of model.mixer.
    ctx: the context of the call.

  Raises:
    RequestError: if the call has a prefix whose tokens see each other, or asks
      for the attention weights.
  """
  mixer = f'model.mixer is {name!r}, which reads a row from left to right'
  if ctx.prefix_B is not None:
    raise RequestError(
        f'{mixer}: it has no prefix whose tokens see each other')
  if ctx.keep_attention:
    raise RequestError(
        f'{mixer} into a state: it has no attention weights to show')


def check_layer_of_recurrence(config: ModelConfig, stack: str) -> None:
  """Checks that a layer with a recurrence, or with another mixer that keeps a
  state from token to token, fits the rest of the model.

  Args:
    config: the config of the layer.
    stack: the kind of stack: 'encoder', 'decoder' or 'encoder-decoder'.

  Raises:
    RequestError: if the stack is no decoder, the layer has a rule of which keys
      are seen, or the position encoding is a bias on attention's scores.
  """
  mixer = f'model.mixer is {config.mixer!r}'
  if stack != 'decoder':
    raise RequestError(
        f'{mixer}, which reads a row in one direction and has no attention to '
        f'a memory; model.arch {config.arch!r} is an {stack}: choose attention')
  if config.attention != 'global':
    raise RequestError(
        f'{mixer}, which keeps no keys and has no window, and model.attention '
        f'is {config.attention!r}: set it to global, or window to 0 in a kind '
        'of layer')
  if positions.position_of(config).stack_bias:
    raise RequestError(
        f'{mixer}, which has no scores for the bias of model.position '
        f'{config.position!r}: set it to none, at least in the kinds of layer '
        'that have this mixer')
