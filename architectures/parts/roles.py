"""What a parameter is, declared where it is made.

Every parameter is made by `declare` (linear.weight and linear.bias call it),
which keeps its role beside its logical axes. The optimisers read nothing else:
muP's learning rates, the matrices of Muon and Adafactor, and weight decay
(training/optim/). No pattern over names has to know a new parameter.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import jax.typing

from architectures.parts import sharding
from configs.errors import require


class Axes(NamedTuple):
  """An array's axes by role."""
  batch: tuple[int, ...]  # each index holds a parameter of its own
  inputs: tuple[int, ...]  # what a product sums over; none: a vector
  outputs: tuple[int, ...]

  def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and the columns of one matrix."""
    return (math.prod(shape[i] for i in self.inputs),
            math.prod(shape[i] for i in self.outputs))


@dataclasses.dataclass(frozen=True)
class Role:
  """What a parameter is; its axes are numbered as its module makes it.

  Attributes:
    axes: its logical axes.
    inputs: which of them a product sums over, or, of an embedding, look up.
      None: a vector, or a table of biases, which is no matrix.
    batch: which of them hold a matrix or a vector each: experts.
    kind: 'hidden'; 'logits', whose product is as many numbers at every width
      and is divided by config.widening (the head's, a router's); 'embedding',
      a table whose rows are looked up.
    tuned: whether it is trained beside low-rank adapters (model.lora), which
      leave all else as it was: it is one of them, or new to the task.
  """
  axes: tuple[str | None, ...]
  inputs: tuple[int, ...] = ()
  batch: tuple[int, ...] = ()
  kind: str = 'hidden'
  tuned: bool = False

  @property
  def matrix(self) -> bool:
    return bool(self.inputs)

  def split(self, ndim: int) -> Axes:
    """Returns the roles of the axes of an array that holds the parameter.

    Axes in front of the declared ones, such as the one over layers that the
    scan adds, are a batch.
    """
    first = ndim - len(self.axes)
    shift = lambda axes: tuple(first + i for i in axes)
    rest = (i for i in range(len(self.axes))
            if i not in self.inputs and i not in self.batch)
    return Axes((*range(first), *shift(self.batch)), shift(self.inputs),
                shift(rest))


class Declared(nn.LogicallyPartitioned, eq=False):
  """The box that a parameter is born in: its logical axes and its role."""
  role: Role | None = struct.field(default=None, pytree_node=False)


def read(boxed):
  """Returns the Role of each parameter of a tree of boxes.

  Raises:
    RequestError: for a parameter that declares none.
  """
  def role(path, box) -> Role:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    require(isinstance(box, Declared),
            f'the parameter {name!r} declares no role: make it by weight, bias '
            'or embedding of architectures/parts/linear.py, or by declare of '
            'roles.py')
    return box.role

  return jax.tree_util.tree_map_with_path(
      role, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def declare(module: nn.Module, name: str, init: Callable,
            shape: tuple[int, ...], role: Role,
            dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
  """Makes a parameter of `module`.

  Args:
    module: the module, with a `config`.
    name: the parameter's name.
    init: its initializer, of (key, shape, dtype); it draws in float32, since
      JAX's bfloat16 normals have 128 values, whose mean is not 0.
    shape: its shape.
    role: what it is.
    dtype: its type; None: the config's param_dtype.

  Raises:
    ValueError: for a logical axis that the legend lacks.
  """
  axes = sharding.known_axes(role.axes)
  dtype = dtype or module.config.param_dtype
  drawn = lambda key, shape: init(key, shape, jnp.float32).astype(dtype)
  return module.param(
      name, lambda *args: Declared(drawn(*args), axes, role=role), shape)


# The parameters of a module, of which nothing is computed.


@functools.lru_cache(maxsize=64)  # a program asks for the same ones often
def abstract_params(module: nn.Module):
  """Returns the boxed parameters' shapes; nothing is computed."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(module.init, jax.random.key(0), tokens)['params']


def parameter_shapes(module: nn.Module):
  """Returns the parameters' shapes alone, out of their boxes; in a run's
  context `nn.meta.unbox` would constrain them to its mesh."""
  return jax.tree.map(
      lambda box: box.value if nn.meta.is_axis_metadata(box) else box,
      abstract_params(module), is_leaf=nn.meta.is_axis_metadata)
