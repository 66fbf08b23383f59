"""The fields that make a model the system that `model.arch` names.

`model.arch` is a name: what is built is decided by the other fields of
config.model. A system is the values that its file of configs/ gives to its
parts, at one of its sizes; its parts are what is chosen by name, some numbers,
and its kinds of layer. Only its own page is imported.
"""

from collections.abc import Mapping
import functools
import importlib.util
from typing import Any, NamedTuple

import ml_collections

import architectures
from architectures.parts import flat
from architectures.parts.config import ModelConfig
from common import fields as declared
from common.errors import RequestError, check_choice
from training.runs import resolve_model_without_tokenizer
from training.workdir import run_config

# The fields that stay as they are if a model is changed to another system: its
# sizes, how it is trained and computed, and what is read from it.
FIELDS_THAT_STAY = frozenset(
    name for name, leaf in flat.FIELDS.items()
    if leaf.rule.about in (declared.SIZE, declared.RUN))
# These fields say of which kind each layer is.
FIELDS_OF_LAYER_ORDER = 'prefix', 'pattern', 'suffix'


class Difference(NamedTuple):
  """A field of a model that differs from the system that it is named after.

  Attributes:
    field: the dotted name of the field of config.model.
    value: the model's value.
    published: the value of the published system.
  """
  field: str
  value: Any
  published: Any


def differences_from_system(model: ModelConfig) -> list[Difference]:
  """Returns the fields in which a model differs from the system that it is
  named after (`model.arch`).

  A system has several published sizes, whose fields may differ. The model is
  compared with the one that gives the fewest differences. A field that one of
  the two does not read is left out, because the field that decides whether it
  is read differs too.

  Args:
    model: the model, resolved.
  """
  fields = *_distinguishing_fields(model.arch), 'kinds'
  nearest: list[Difference] | None = None
  seen = set()
  for size in _configs_by_size(model.arch).values():
    # Most sizes have the same values in these fields: each set of values is
    # compared once.
    values = str([size[field] for field in fields])
    if values in seen:
      continue
    seen.add(values)
    differences = _differences_of_models(model, _with_parts(model, size))
    if nearest is None or len(differences) < len(nearest):
      nearest = differences
  assert nearest is not None, 'a system has a size'
  return nearest


def describe_differences(model: ModelConfig) -> str:
  """Returns a line of text that says how a model differs from the system that
  it is named after; '' if it does not."""
  parts = []
  for field, value, published in differences_from_system(model):
    in_place = f'in place of {_format_value(published)}'
    parts.append(f'{field}={_format_value(value)} {in_place}')
  if not parts:
    return ''
  return f'not as published: {model.arch} with {", ".join(parts)}'


def _format_value(value: Any) -> str:
  """Returns a value of a field as text, short and never empty."""
  if isinstance(value, float):
    return f'{value:g}'
  return str(value) or "''"


def changes_to_system(config: ml_collections.ConfigDict, arch: str,
                      size: str = 'tiny') -> dict[str, Any]:
  """Returns the changes of a config that make its model another system.

  These are the fields of config.model that have another value in the system's
  own config, configs/ARCH.py, without FIELDS_THAT_STAY and without fields that
  the system does not read.

  Args:
    config: the config of a run.
    arch: the name of the other system, as model.arch.
    size: the size of the system's config whose values are taken.

  Returns:
    The new values, by dotted key.

  Raises:
    RequestError: if the system cannot have the sizes of this model, or stacks
      something else than it, such as an encoder in place of a decoder.
  """
  check_choice('model.arch', arch, architectures.systems())
  sizes = _configs_by_size(arch)
  check_choice(f'size of {arch}', size, sizes)
  _check_stack(resolve_model_without_tokenizer(config), arch)
  system = sizes[size]

  # Put the fields of the system into a copy of the config, and resolve it, so
  # that what the system cannot have is refused.
  wanted = _fields_of_a_system(system)
  target = config.copy_and_resolve_references()
  with target.unlocked():
    target.model.update_from_flattened_dict(wanted | {'arch': arch})
    target.model.kinds = system.kinds.copy_and_resolve_references()
  try:
    unread = flat.fields_that_are_unread(
        resolve_model_without_tokenizer(target))
  except RequestError as error:
    raise RequestError(f'model.arch {arch!r} cannot have the sizes of the '
                       f'base: {error}') from error

  # Collect the fields whose values differ from those before.
  before = _fields_of_a_system(config.model)
  differ: dict[str, Any] = {'model.arch': arch}
  for name, value in wanted.items():
    if value != before[name] and name not in unread:
      differ[f'model.{name}'] = value
  kinds = target.model.kinds.to_dict()
  if kinds != config.model.kinds.to_dict():
    differ['model.kinds'] = kinds
  return differ


def _check_stack(model: ModelConfig, arch: str) -> None:
  """Raises RequestError if a system stacks something else than a model, such as
  a decoder in place of an encoder. The two would be trained differently.

  Args:
    model: the model, resolved.
    arch: the name of the system.
  """
  systems = architectures.systems()
  model_stack = architectures.stack(model)
  system_stack = systems[arch].STACK
  if model_stack == system_stack:
    return
  same_stack = []
  for name, system in systems.items():
    if system.STACK == model_stack:
      same_stack.append(name)
  raise RequestError(
      f'model.arch {arch!r} stacks {_with_article(system_stack)} and '
      f'{model.arch!r}, that of the base, {_with_article(model_stack)}, which '
      f'are not trained alike: choose from {", ".join(same_stack)}')


def _with_article(stack: str) -> str:
  """Returns 'a decoder', 'an encoder' or 'an encoder-decoder'."""
  return f'a {stack}' if stack == 'decoder' else f'an {stack}'


def _fields_of_a_system(model: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields of config.model that distinguish systems, by dotted
  name, without those of the kinds of layer (model.kinds)."""
  fields = {}
  for name, value in flat.flatten_groups(model).items():
    if not name.startswith('kinds.') and name not in FIELDS_THAT_STAY:
      fields[name] = value
  return fields


@functools.cache
def _configs_by_size(arch: str) -> Mapping[str, ml_collections.ConfigDict]:
  """Returns config.model of each published size of a system, by the size's
  name.

  A system without a file in configs/ has one size, 'tiny', with the values that
  its page in architectures/ gives (PARTS).

  Args:
    arch: the name of the system, as model.arch.
  """
  name = f'configs.{architectures.file_name(arch)}'
  if importlib.util.find_spec(name) is None:
    config = ml_collections.ConfigDict(flat.default_tree())
    config.update(architectures.systems()[arch].PARTS, arch=arch)
    return {'tiny': config}
  module = importlib.import_module(name)
  sizes = getattr(module, 'SIZES', ('tiny',))
  return {size: module.get_config(size).model for size in sizes}


@functools.cache
def _distinguishing_fields(arch: str) -> tuple[str, ...]:
  """Returns the dotted names of the fields that distinguish a system, without
  those of the kinds of layer (model.kinds).

  These are the fields that its page in architectures/ sets (PARTS), every other
  field that chooses a part or switches one on, and the factors and bounds of
  scores and logits.

  Args:
    arch: the name of the system, as model.arch.
  """
  named = flat.flatten_groups(architectures.system(arch).PARTS)
  names = []
  for name, leaf in flat.FIELDS.items():
    is_choice = isinstance(leaf.default, str | bool)
    is_factor = name.endswith(('_scale', '_softcap'))
    is_part = leaf.rule.about == declared.PART and name != 'arch'
    distinguishes = is_part and (is_choice or is_factor)
    if name in named or distinguishes:
      names.append(name)
  return tuple(names)


def _with_parts(model: ModelConfig, system: ml_collections.ConfigDict
                ) -> ModelConfig:
  """Returns a model with its own sizes, and the parts and kinds of layer of a
  system.

  Args:
    model: the model.
    system: config.model of the system.
  """
  # A dotted name has a group, such as `moe`, and a field in it.
  fields = flat.to_dict(model)
  for dotted_name in _distinguishing_fields(model.arch):
    group, _, name = dotted_name.rpartition('.')
    group_fields = fields
    if group:
      group_fields = fields.setdefault(group, {})
    group_fields[name] = system[dotted_name]
  return flat.make_model(fields | {'kinds': system.kinds.to_dict()})


def _differences_of_models(model: ModelConfig, system: ModelConfig
                           ) -> list[Difference]:
  """Returns the fields in which two models differ that both of them read.

  Args:
    model: the model.
    system: the published model that it is compared with.

  Returns:
    A Difference for each field: the model's value, and the published one. The
    kinds of layer are compared only if the order of the layers agrees.
  """
  # The fields of the model itself.
  differences = []
  read = flat.fields_that_are_read(model) & flat.fields_that_are_read(system)
  for field in _distinguishing_fields(model.arch):
    value = flat.get_field(model, field)
    published = flat.get_field(system, field)
    if value != published and field in read:
      differences.append(
          Difference(field=field, value=value, published=published))

  # If the order of the layers differs, their kinds are not the same ones.
  if any(row.field in FIELDS_OF_LAYER_ORDER for row in differences):
    return differences

  # The fields of each kind of layer. Layers of the kind '' have the fields of
  # the model itself.
  for kind in model.kinds_used:
    if not kind:
      continue
    fields = {**run_config.flatten(model.kinds[kind].overrides),
              **run_config.flatten(system.kinds[kind].overrides)}
    for field in fields:
      value = _value_in_layer_kind(model, kind=kind, field=field)
      published = _value_in_layer_kind(system, kind=kind, field=field)
      if value != published:
        differences.append(
            Difference(field=f'kinds.{kind}.{field}', value=value,
                       published=published))
  return differences


def _value_in_layer_kind(model: ModelConfig, kind: str, field: str) -> Any:
  """Returns the value of a field in the layers of one kind.

  A size, such as a window, differs between sizes of one system. So of a number
  that stands by itself only whether it is there (not 0) is returned.

  Args:
    model: the model.
    kind: the name of the kind of layer, a key of model.kinds.
    field: the name of the field in model.kinds.KIND, dotted if it is in a
      group.
  """
  name, _, inner = field.partition('.')
  fields = run_config.flatten(model.kinds[kind].overrides)
  # The kind sets the field itself, or has the model's value of it.
  if field in fields:
    value = fields[field]
  else:
    model_field = flat.FIELDS_OF_LAYER_KINDS[name]
    if inner:
      model_field += f'.{inner}'
    value = flat.get_field(model.layer_config(kind), model_field)
  if isinstance(value, str | bool) or inner:
    return value
  return bool(value)
