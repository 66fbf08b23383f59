"""Kinds of layer: what the dicts of config.model.kinds may say.

`model.pattern` names the kinds of one period of layers, `model.prefix` those of
the first layers and `model.suffix` those of the last. What a kind does not say
is the model's.

Earlier versions had `model.attention='global,banded'` for layers that differ in
what they attend to, and `model.moe.every` for layers of experts that have dense
ones between them. `modern` says the same by a pattern, wherever a config comes
from: a file, a run's config.json, a flag.
"""

from collections.abc import Mapping
import math
import re
from typing import Any

import ml_collections

from configs.errors import require

# The fields of a kind, and of the model what each stands for.
FIELDS: dict[str, str] = {name: name for name in (
    'attention', 'mixer', 'attention_softcap', 'attention_scale',
    'attention_bias', 'attention_out_bias', 'attention_sinks', 'attention_gate',
    'attention_conv', 'value_embedding', 'kv_sharing', 'qk_norm',
    'qk_norm_over', 'num_heads', 'num_kv_heads', 'head_dim',
    'mup_base_head_dim', 'position', 'rope', 'ffn', 'ffn_bias', 'd_ff', 'block'
)} | {'window': 'sliding_window'}
EVERY = 'model.moe.every'  # a field of earlier versions
DENSE = 'dense'  # of ffn: the network of the model's dense layers
# The parts of a stack, in their order, as its parameters are named.
SECTIONS = 'prefix', 'layers', 'suffix'


def split(names: str) -> tuple[str, ...]:
  """Returns the kinds that a pattern, a prefix or a suffix names."""
  return tuple(names.split(',')) if names else ()


def fewest_layers(model: Mapping[str, Any], least: int = 1) -> int:
  """Returns how many layers a model of these kinds has at least, and no fewer
  than `least`."""
  period = len(split(model['pattern'])) or 1
  apart = sum(len(split(model.get(x, ''))) for x in ('prefix', 'suffix'))
  return apart + period * max(1, math.ceil((least - apart) / period))


def check_names(kinds: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
  """Raises RequestError for a kind, or a field of one, that has no meaning.

  Args:
    kinds: config.model.kinds.
    rope: config.model.rope.
  """
  for name, kind in kinds.items():
    who = f'model.kinds.{name}'
    require(isinstance(name, str)
            and re.fullmatch(r'[A-Za-z]\w*', name) is not None,
            f'model.kinds has a kind called {name!r}: call it by letters, '
            'digits and _')
    require(hasattr(kind, 'items'), f'{who} is {kind!r}: it must be a group of '
            'fields')
    for field, value in kind.items():
      require(field in FIELDS, f'{who}.{field} is no field that a kind may '
              f'change: choose from {", ".join(FIELDS)}')
      if field == 'rope':
        require(hasattr(value, 'items'), f'{who}.rope is {value!r}: it must be '
                'a group of fields')
        for inner in value:
          require(inner in rope, f'{who}.rope.{inner} is no field of '
                  f'model.rope: choose from {", ".join(rope)}')


def like(model: Mapping[str, Any], field: str) -> Any:
  """Returns the value that the model has for a field of a kind, which says of
  which type it is. `field` is dotted below the kind, and there is one."""
  name, _, inner = field.partition('.')
  value = model[FIELDS[name]]
  return value[inner] if inner else value


def declare(model: ml_collections.ConfigDict, name: str, field: str) -> None:
  """Gives a kind a field, with the model's value, where it has none: to be set.

  Args:
    model: config.model.
    name: of the kind, which may be new.
    field: of it, dotted below it.

  Raises:
    RequestError: for a field that a kind does not have.
  """
  head, _, inner = field.partition('.')
  tree = {head: {inner: 0} if inner else {} if head == 'rope' else 0}
  check_names({name: tree}, model.rope)
  require(bool(inner) == (head == 'rope'), f'model.kinds.{name}.{field} is '
          + ('a group of fields: set one of them, ' + ', '.join(
              f'model.kinds.{name}.rope.{x}' for x in model.rope)
             if head == 'rope' else 'one value and has no fields'))
  with model.unlocked():
    at = model.kinds
    for group in (name, *([head] if inner else ())):
      if group not in at:
        at[group] = ml_collections.ConfigDict()
      at = at[group]
    if (inner or head) not in at:
      at[inner or head] = like(model, field)


def declare_every(model: ml_collections.ConfigDict, value: int = 1) -> None:
  """Gives a config the field that earlier versions had, for `modernise`."""
  with model.unlocked():
    model.moe.every = value


def with_experts(model: Mapping[str, Any], every: int) -> dict[str, Any]:
  """Returns {'pattern', 'kinds'} in which the last of every so many layers has
  experts and the others the dense network between them, as in GShard and
  Switch (every other layer, the second first)."""
  names = split(model.get('pattern', ''))
  kinds = dict(model.get('kinds', {}))
  if every == 1:
    return dict(pattern=','.join(names), kinds=kinds)
  found, made = [], {}
  for i in range(math.lcm(len(names) or 1, every)):
    own = names[i % len(names)] if names else ''
    moe = i % every == every - 1
    found.append(f'{own}_' * bool(own) + ('moe' if moe else DENSE))
    made[found[-1]] = kinds.get(own, {}) | ({} if moe else {'ffn': DENSE})
  apart = {name: kinds[name] for field in ('prefix', 'suffix')
           for name in split(model.get(field, '')) if name in kinds}
  return dict(pattern=','.join(found), kinds=apart | made)


def modern(model: Mapping[str, Any]) -> dict[str, Any]:
  """Returns config.model, a dict of dicts, with a pattern for what earlier
  versions said otherwise."""
  model = dict(model)
  attention, moe = model.get('attention', ''), model.get('moe', {})
  if not isinstance(moe, Mapping):
    return model  # refused where types are checked
  several = isinstance(attention, str) and ',' in attention
  every = moe.get('every', 1)
  require(type(every) is int and every > 0,
          f'model.moe.every is {every!r}: it must be an integer > 0')
  if model.get('pattern') and (several or 'every' in moe):
    said = {name: model.get(name) for name in ('pattern', 'kinds')}
    apart = model.get('prefix') or model.get('suffix')
    require(not several and not apart and said == with_experts(
        {}, len(split(model['pattern']))),
            f'model.attention {attention!r} and model.moe.every {every} are of '
            f'before there was model.pattern, which is {model["pattern"]!r}: '
            'say it by the pattern alone')
    model |= dict(pattern='', kinds={})
  if 'every' in moe:
    model['moe'] = {name: moe[name] for name in moe if name != 'every'}
  if several:
    model |= _of_attention(model)
  if every > 1 and model.get('ffn') == 'moe':
    model |= with_experts(model, every)
  return model


def modernise(model: ml_collections.ConfigDict) -> None:
  """The same in place."""
  old = model.to_dict()
  new = modern(old)
  if new != old:
    with model.unlocked():
      for name in new:
        if new[name] != old.get(name):
          model[name] = (ml_collections.ConfigDict(new[name])
                         if isinstance(new[name], dict) else new[name])


def _of_attention(model: Mapping[str, Any]) -> dict[str, Any]:
  window = model.get('sliding_window', 0)
  kinds = {}
  for name in split(model['attention']):
    kinds[name] = ({'window': 0} if name == 'global' else
                   {'window': window} if name == 'banded' and window else
                   {'attention': name})
  return dict(pattern=model['attention'], kinds=kinds, attention='global',
              sliding_window=0)
