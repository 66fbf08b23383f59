"""Logical axis names on parameters and activations.

Axis names stand beside the array; the table in configs/sharding.py says which
mesh axis each goes to. An unknown name raises: Linen alone would take a
misspelt one for 'not sharded'.
"""

from collections.abc import Mapping
import contextlib
import math

from configs import sharding as tables
import flax.linen as nn
import jax

from configs.errors import one_of


AXES = 'axes'  # the scope that names a constraint's logical axes


def known_axes(axes) -> tuple[str | None, ...]:
  """Returns `axes`; raises ValueError for one that the legend lacks."""
  for axis in {*axes} - {None, *tables.LOGICAL_AXES}:
    one_of('logical axis', axis, tables.LOGICAL_AXES)
  return tuple(axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains `x` to the mesh axes of its logical ones; no mesh, no effect.

  The logical axes are part of the operation's name, for explain_sharding.
  """
  names = ','.join(str(axis) for axis in known_axes(axes))
  with jax.named_scope(f'{AXES}({names})'):
    return nn.with_logical_constraint(x, axes)


def lies_on(*axes: str | None) -> tuple[tuple[str, ...], ...]:
  """The mesh axes, of more than one device, that each logical axis of an array
  lies on."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not nn.get_logical_axis_rules():
    return ((),) * len(axes)
  found = []
  for names in nn.logical_to_mesh_axes(known_axes(axes)):
    names = (names,) if isinstance(names, str) else names or ()
    found.append(tuple(name for name in names if mesh.shape[name] > 1))
  return tuple(found)


def mesh_axes(axis: str) -> tuple[str, ...]:
  """`lies_on` of an array that has this axis alone."""
  return lies_on(axis)[0]


def that_divide(names: tuple[str, ...], places: int,
                shape: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes that a weight's dimension of size `places` is sharded
  over: as many of `names`, from the first one on, as together divide it."""
  while places % math.prod(shape[name] for name in names):
    names = names[:-1]
  return names


def weight_places(shape: tuple[int, ...], axes: tuple[str | None, ...]
                  ) -> tuple[tuple[str, ...], ...]:
  """Returns the mesh axes that each axis of a weight lies on."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(that_divide(names, size, sizes)
               for size, names in zip(shape, lies_on(*axes)))


def size(names: tuple[str, ...]) -> int:
  """How many devices lie along mesh axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in names)


def shards(axis: str, places: int) -> int:
  """Returns how many shards the mesh cuts `places` of a logical axis into; 1
  without a mesh, or where it does not divide them."""
  count = size(mesh_axes(axis))
  return count if places % count == 0 else 1


def constrain_if(x: jax.Array, *axes: str | None) -> jax.Array:
  """`constrain`, leaving out each axis that the mesh does not divide."""
  return constrain(x, *(axis if axis and shards(axis, size) > 1 else None
                        for axis, size in zip(axes, x.shape)))


def constrain_stream(x: jax.Array, *axes: str | None) -> jax.Array:
  """`constrain` of what goes from layer to layer, [B, L, ...], whose length is
  sharded as `stream` is or, if that does not divide it, as `length`. `axes` are
  the others."""
  length = 'stream' if shards('stream', x.shape[1]) > 1 else 'length'
  return constrain(x, 'batch', length, *axes)


def platform() -> str:
  """Returns what the program is traced for: cpu, gpu or tpu."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.abstract_device is None:
    return jax.default_backend()
  return mesh.abstract_device.platform


def devices() -> int:
  """Returns how many devices the mesh has; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.size


def one_cpu() -> bool:
  """Whether the program is traced for a CPU that is not part of a mesh."""
  return platform() == 'cpu' and devices() == 1


@contextlib.contextmanager
def rules(name: str):
  """Installs the table configs.sharding.RULES[name] for what is traced."""
  one_of('mesh.rules', name, tables.RULES)
  with nn.logical_axis_rules(tables.RULES[name]):
    yield
