"""Which fields make a model the system that `model.arch` names.

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
from common.errors import RequestError, one_of, require
from training.runs import resolve_alone
from training.workdir import run_config

# What a model keeps that becomes another system: its sizes, how it is trained
# and computed, and what is read off it.
KEPT = frozenset(
    name for name, leaf in flat.FIELDS.items()
    if leaf.rule.about in (declared.SIZE, declared.RUN))
LAYERS = 'prefix', 'pattern', 'suffix'  # which name the kinds of the layers


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
  distinct = {str([size[field] for field in fields]): size
              for size in _sizes(model.arch).values()}  # most are alike
  return min((_unlike(model, _with_parts(model, size))
              for size in distinct.values()), key=len)


def line(model: ModelConfig) -> str:
  """Returns `unlike` in words; '' where there is nothing to say."""
  shown = lambda x: f'{x:g}' if isinstance(x, float) else str(x) or "''"
  parts = ', '.join(f'{field}={shown(value)} in place of {shown(published)}'
                    for field, value, published in unlike(model))
  return f'not as published: {model.arch} with {parts}' if parts else ''


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
  ours, theirs = resolve_alone(config), architectures.systems()[arch].STACK
  stack = architectures.stack(ours)
  alike = ', '.join(name for name, system in architectures.systems().items()
                    if system.STACK == stack)
  require(stack == theirs, f'model.arch {arch!r} stacks an {theirs} and '
          f'{ours.arch!r}, that of the base, an {stack}, which are not trained '
          f'alike: choose from {alike}'.replace('an decoder', 'a decoder'))
  before, wanted = (
      {name: x for name, x in flat.flatten(model).items()
       if not name.startswith('kinds.') and name not in KEPT}
      for model in (config.model, sizes[size]))
  target = config.copy_and_resolve_references()
  with target.unlocked():
    target.model.update_from_flattened_dict(wanted | {'arch': arch})
    target.model.kinds = sizes[size].kinds.copy_and_resolve_references()
  try:
    silent = flat.unread(resolve_alone(target))
  except RequestError as error:
    raise RequestError(f'model.arch {arch!r} cannot have the sizes of the '
                       f'base: {error}') from error
  differ = {'model.arch': arch} | {
      f'model.{name}': value for name, value in wanted.items()
      if value != before[name] and name not in silent}
  if target.model.kinds.to_dict() != config.model.kinds.to_dict():
    differ['model.kinds'] = target.model.kinds.to_dict()
  return differ


@functools.cache
def _sizes(arch: str) -> Mapping[str, ml_collections.ConfigDict]:
  """Returns config.model of each size of a system; of a system without a file
  in configs/, what its page says."""
  name = f'configs.{architectures.file_name(arch)}'
  if importlib.util.find_spec(name) is None:
    config = ml_collections.ConfigDict(flat.defaults())
    config.update(architectures.systems()[arch].PARTS, arch=arch)
    return {'tiny': config}
  module = importlib.import_module(name)
  return {size: module.get_config(size).model
          for size in getattr(module, 'SIZES', ('tiny',))}


@functools.cache
def _parts(arch: str) -> tuple[str, ...]:
  """Returns the dotted names of the fields that tell a system, but for those of
  kinds of layer: what its page names, every other choice or switch of a part,
  and the factors and bounds of scores and logits."""
  named = flat.flatten(architectures.system(arch).PARTS)
  return tuple([
      name for name, leaf in flat.FIELDS.items() if name in named or (
          leaf.rule.about == declared.PART and name != 'arch' and (
              isinstance(leaf.default, str | bool)
              or name.endswith(('_scale', '_softcap'))))])


def _with_parts(model: ModelConfig, system: ml_collections.ConfigDict
                ) -> ModelConfig:
  """Returns the model with the parts of a system, and sizes of its own."""
  fields = flat.as_dict(model)
  for field in _parts(model.arch):
    group, _, name = field.rpartition('.')
    at = fields.setdefault(group, {}) if group else fields
    at[name] = system[field]
  return flat.make(fields | {'kinds': system.kinds.to_dict()})


def _unlike(model: ModelConfig, system: ModelConfig) -> list[Difference]:
  rows = [Difference(field, flat.get(model, field), flat.get(system, field))
          for field in _parts(model.arch)]
  read = flat.reads(model) & flat.reads(system)
  rows = [row for row in rows
          if row.value != row.published and row.field in read]
  if any(row.field in LAYERS for row in rows):
    return rows  # so their kinds of layer are not the same ones
  for kind in filter(None, model.kinds_used):
    for field in dict.fromkeys(field for c in (model, system) for field in
                               run_config.flatten(c.kinds[kind].said)):
      ours, theirs = (_of_kind(c, kind, field) for c in (model, system))
      if ours != theirs:
        rows.append(Difference(f'kinds.{kind}.{field}', ours, theirs))
  return rows


def _of_kind(c: ModelConfig, kind: str, field: str) -> Any:
  """Returns what the layers of a kind have for a field of kinds; of a size or a
  number that goes with sizes, whether there is one."""
  name, _, inner = field.partition('.')
  fields = run_config.flatten(c.kinds[kind].said)
  value = fields[field] if field in fields else flat.get(
      c.of_kind(kind), flat.OF_LAYERS[name] + (f'.{inner}' if inner else ''))
  return value if isinstance(value, str | bool) or inner else bool(value)
