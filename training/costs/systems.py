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
from common.errors import RequestError, one_of
from training.runs import resolve_model_without_tokenizer
from training.workdir import run_config

# The fields that stay as they are where a model becomes another system: its
# sizes, how it is trained and computed, and what is read off it.
KEPT = frozenset(
    name for name, leaf in flat.FIELDS.items()
    if leaf.rule.about in (declared.SIZE, declared.RUN))
LAYERS = 'prefix', 'pattern', 'suffix'  # These name the kinds of the layers.


class Difference(NamedTuple):
  """A part of a model that is not as in the system that it is named after."""
  field: str
  value: Any
  published: Any


def unlike(model: ModelConfig) -> list[Difference]:
  """Returns the parts in which a resolved model is not the system that
  `model.arch` names, as that is at the size that is the nearest. A part that
  one of the two does not read is left out: what decides on it differs."""
  fields = *_parts(model.arch), 'kinds'
  # The size with the fewest differences.
  nearest: list[Difference] | None = None
  seen = set()
  for size in _sizes(model.arch).values():
    parts = str([size[field] for field in fields])
    if parts in seen:
      continue  # most sizes are alike in their parts
    seen.add(parts)
    differences = _unlike(model, _with_parts(model, size))
    if nearest is None or len(differences) < len(nearest):
      nearest = differences
  assert nearest is not None, 'a system has a size'
  return nearest


def line(model: ModelConfig) -> str:
  """Returns `unlike` in words; '' where there is nothing to say."""
  parts = []
  for field, value, published in unlike(model):
    parts.append(f'{field}={_shown(value)} in place of {_shown(published)}')
  if not parts:
    return ''
  return f'not as published: {model.arch} with {", ".join(parts)}'


def _shown(value: Any) -> str:
  """Returns a value of a field as `line` shows it."""
  if isinstance(value, float):
    return f'{value:g}'
  return str(value) or "''"


def changes(config: ml_collections.ConfigDict, arch: str, size: str = 'tiny'
            ) -> dict[str, Any]:
  """Returns the changes, by dotted key, that make the model of a config another
  system: the fields of config.model that differ in configs/ARCH.py at `size`,
  without those of KEPT and those that the system does not read.

  Raises:
    RequestError: where the system cannot have the sizes of this model, or is
      of another kind.
  """
  one_of('model.arch', arch, architectures.systems())
  sizes = _sizes(arch)
  one_of(f'size of {arch}', size, sizes)
  _check_stack(resolve_model_without_tokenizer(config), arch)
  system = sizes[size]

  # The model of the config with the parts of the system.
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

  # Its differences from the model as it was.
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
  """Raises RequestError where a system stacks something else than a model, a
  decoder for an encoder say, so that the two are not trained alike."""
  systems = architectures.systems()
  ours = architectures.stack(model)
  theirs = systems[arch].STACK
  if ours == theirs:
    return
  alike = [name for name, system in systems.items() if system.STACK == ours]
  raise RequestError(
      f'model.arch {arch!r} stacks {_with_article(theirs)} and '
      f'{model.arch!r}, that of the base, {_with_article(ours)}, which are not '
      f'trained alike: choose from {", ".join(alike)}')


def _with_article(stack: str) -> str:
  """Returns 'a decoder', 'an encoder' or 'an encoder-decoder'."""
  return f'a {stack}' if stack == 'decoder' else f'an {stack}'


def _fields_of_a_system(model: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields of config.model that tell a system, by dotted name, but
  for its kinds of layer."""
  fields = {}
  for name, value in flat.flatten_groups(model).items():
    if not name.startswith('kinds.') and name not in KEPT:
      fields[name] = value
  return fields


@functools.cache
def _sizes(arch: str) -> Mapping[str, ml_collections.ConfigDict]:
  """Returns config.model of each size of a system; for a system without a file
  in configs/, the parts that its page names."""
  name = f'configs.{architectures.file_name(arch)}'
  if importlib.util.find_spec(name) is None:
    config = ml_collections.ConfigDict(flat.default_tree())
    config.update(architectures.systems()[arch].PARTS, arch=arch)
    return {'tiny': config}
  module = importlib.import_module(name)
  sizes = getattr(module, 'SIZES', ('tiny',))
  return {size: module.get_config(size).model for size in sizes}


@functools.cache
def _parts(arch: str) -> tuple[str, ...]:
  """Returns the dotted names of the fields that tell a system, but for those of
  kinds of layer: those that its page names, every other choice or switch of a
  part, and the factors and bounds of scores and logits."""
  named = flat.flatten_groups(architectures.system(arch).PARTS)
  names = []
  for name, leaf in flat.FIELDS.items():
    is_choice = isinstance(leaf.default, str | bool)
    is_factor = name.endswith(('_scale', '_softcap'))
    is_part = leaf.rule.about == declared.PART and name != 'arch'
    if name in named or is_part and (is_choice or is_factor):
      names.append(name)
  return tuple(names)


def _with_parts(model: ModelConfig, system: ml_collections.ConfigDict
                ) -> ModelConfig:
  """Returns the model with the parts of a system, and sizes of its own."""
  fields = flat.to_dict(model)
  for field in _parts(model.arch):
    group, _, name = field.rpartition('.')
    group_fields = fields
    if group:
      group_fields = fields.setdefault(group, {})
    group_fields[name] = system[field]
  return flat.make_model(fields | {'kinds': system.kinds.to_dict()})


def _unlike(model: ModelConfig, system: ModelConfig) -> list[Difference]:
  """Returns the fields in which two models differ that both of them read.

  Args:
    model: the model.
    system: the published model that it is compared with.

  Returns:
    A Difference for each field: the model's value, and the published one. The
    kinds of layer are compared only where the patterns of layers agree.
  """
  rows = []
  read = flat.fields_that_are_read(model) & flat.fields_that_are_read(system)
  for field in _parts(model.arch):
    ours = flat.get_field(model, field)
    theirs = flat.get_field(system, field)
    if ours != theirs and field in read:
      rows.append(Difference(field=field, value=ours, published=theirs))
  if any(row.field in LAYERS for row in rows):
    return rows  # so their kinds of layer are not the same ones

  for kind in model.kinds_used:
    if not kind:
      continue  # layers that are as the model says
    fields = {**run_config.flatten(model.kinds[kind].overrides),
              **run_config.flatten(system.kinds[kind].overrides)}
    for field in fields:
      ours, theirs = (_of_kind(c, kind, field) for c in (model, system))
      if ours != theirs:
        rows.append(Difference(field=f'kinds.{kind}.{field}', value=ours,
                               published=theirs))
  return rows


def _of_kind(c: ModelConfig, kind: str, field: str) -> Any:
  """Returns the value that the layers of a kind have for a field of kinds; for
  a size or a number that goes with sizes, whether there is one."""
  name, _, inner = field.partition('.')
  fields = run_config.flatten(c.kinds[kind].overrides)
  # A kind says the field itself, or has the model's.
  if field in fields:
    value = fields[field]
  else:
    of_model = flat.FIELDS_OF_LAYER_KINDS[name]
    if inner:
      of_model += f'.{inner}'
    value = flat.get_field(c.of_kind(kind), of_model)
  if isinstance(value, str | bool) or inner:
    return value
  return bool(value)
