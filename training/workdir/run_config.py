"""The config of a run on disk, and the effect of changing it half-way.

WORKDIR/config.json is the config tree as it is, plus more keys: `format`, the
version of this file; `derived`, the value that each field left at 0 or '' was
resolved to, by its dotted name; `starts`, the code, command and data of each
start (provenance.py); and `files`, the text of each file from outside the tree
that the run needs (plugins.py), where there is one.
"""

from collections.abc import Mapping
import importlib
import json
import os
import shlex
from typing import Any, NamedTuple

from etils import epath
import jax
import ml_collections

import architectures
from architectures.parts import flat
from architectures.parts.config import ModelConfig
from common.errors import RequestError, require, short
from common.fields import INCOMPATIBLE, OPTIMISATION, SAFE
from configs import base
from training import plugins
from training.workdir import checkpoints, provenance, storage

FORMAT_VERSION = 1  # the version of config.json
_FORMAT_KEY = 'format'
_DERIVED_KEY = storage.DERIVED_KEY
_STARTS_KEY = 'starts'
_FILES_KEY = 'files'
MISSING_VALUE = '(none)'


class FieldChange(NamedTuple):
  """One field that differs.

  Attributes:
    name: the dotted name of the field.
    old, new: its values; MISSING on a side that lacks it.
    kind: the class of the change: INCOMPATIBLE, OPTIMISATION or SAFE.
    why: the reason for the class.
  """
  name: str
  old: Any
  new: Any
  kind: str
  why: str


def save_config(workdir: epath.Path, config: ml_collections.ConfigDict,
                derived: Mapping[str, Any] | None = None,
                data: Mapping[str, str] | None = None,
                model: ModelConfig | None = None):
  """Writes config.json, from process 0, whole or not at all.

  Args:
    workdir: a folder, which is made if it isn't there.
    config: the config of the run.
    derived: the resolved value of fields left at 0 or '', by dotted name.
    data: the hashes of the sources and the tokenizer; see
      provenance.describe_this_start.
    model: the resolved config.model, whose unread fields are left out.
  """
  if jax.process_index() != 0:
    return
  if model is None:
    fields = config.to_dict()
  else:
    fields = without_unread_fields(config, model)
  # A start like the one before it, with the same code and data, is not noted.
  every_start = load_starts(workdir)
  now = provenance.describe_this_start(data)
  if not every_start or every_start[-1] != now:
    every_start.append(now)
  tree = {_FORMAT_KEY: FORMAT_VERSION, **fields,
          _DERIVED_KEY: dict(derived or {}),
          _STARTS_KEY: every_start}
  if plugins.text_of_loaded_file:
    tree[_FILES_KEY] = plugins.text_of_loaded_file
  text = json.dumps(tree, indent=2, allow_nan=False)
  storage.write_file(config_file(workdir), text + '\n')


def load_config(workdir: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config that `save` wrote; see from_json."""
  return config_from_json(_config_fields(_load_config_json(workdir)))


def _config_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config tree of what config.json holds."""
  others = _FORMAT_KEY, _DERIVED_KEY, _STARTS_KEY, _FILES_KEY
  return {name: value for name, value in tree.items() if name not in others}


def load_derived_fields(workdir: epath.Path) -> dict[str, Any]:
  """Returns the values of the fields that were derived, by dotted name."""
  return _load_config_json(workdir)[_DERIVED_KEY]


def load_labels(workdir: epath.Path) -> tuple[str, ...]:
  """Returns the labels that the outputs of a run's model stand for:
  data.labels."""
  fields = flatten(load_config(workdir)) | load_derived_fields(workdir)
  return tuple(fields.get('data.labels', ()))


def load_starts(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns what is remembered of each start of a run that has begun, the last
  start last; a start that equals the one before it counts once."""
  if not config_file(workdir).exists() or not has_begun(workdir):
    return []
  return list(_load_config_json(workdir)[_STARTS_KEY])


def config_file(workdir: epath.Path):
  """Returns where the config of a run lies."""
  return storage.checked_path(workdir) / storage.CONFIG_FILE


def has_begun(workdir: epath.Path) -> bool:
  """Whether there is a checkpoint to go on from; its config ought to be."""
  folder = checkpoints.checkpoint_folder(workdir)
  if not folder.exists():
    return False
  return any(path.name.isdecimal() for path in folder.iterdir())


def _load_config_json(workdir: epath.Path) -> dict[str, Any]:
  """Returns the whole of config.json, checked; RequestError where it cannot be
  used."""
  path = config_file(workdir)
  begun = has_begun(workdir)
  # Without it there is no run, or one that cannot be known.
  if not path.exists():
    way_on = 'no run was started in this workdir'
    if begun:
      way_on = 'put it back, or take another --workdir'
    raise RequestError(f'{path} is missing: {way_on}')
  if not begun and storage.is_hugging_face(workdir):
    raise RequestError(
        f'{workdir} is a folder in the Hugging Face format, which python -m '
        'tools.chat takes as its --folder, and not that of a run, which '
        'python -m tools.convert import makes of it')
  # The file was written by this version of the code.
  tree = lists_to_tuples(storage.read_json(path,
                                           {_DERIVED_KEY: dict,
                                            _STARTS_KEY: list}))
  require(tree.get(_FORMAT_KEY) == FORMAT_VERSION, f'{path} is of format '
          f'{short(tree.get(_FORMAT_KEY))}, and this version of the code reads '
          f'{FORMAT_VERSION}: go on with the version that wrote it, or train '
          'anew')
  # Fields of parts from outside the tree are known only after these are read.
  plugins.restore_declared_parts(tree.get(_FILES_KEY, {}))
  base.check(_config_fields(tree), f'{path} is damaged: ')
  base.check(tree[_DERIVED_KEY], f'{path} is damaged: ')
  return tree


def lists_to_tuples(value: Any):
  """Returns a value out of JSON with tuples for its lists, since configs have
  tuples."""
  if isinstance(value, (list, tuple)):
    return tuple(lists_to_tuples(item) for item in value)
  if isinstance(value, dict):
    return {name: lists_to_tuples(item) for name, item in value.items()}
  return value


def config_from_json(tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Returns the config, locked, as that of a command line is. What is not there
  has its default."""
  tree = lists_to_tuples(tree)
  kinds = tree.get('model', {}).get('kinds', {})
  config = base.base()
  config.model.kinds = ml_collections.ConfigDict(kinds)
  for name, value in flat.flatten_groups(tree).items():
    if not name.startswith('model.kinds.'):
      config.update_from_flattened_dict({name: value})
  return config.lock()


def without_unread_fields(config: ml_collections.ConfigDict, model: ModelConfig,
                          resolved: bool = False) -> dict[str, Any]:
  """Returns a run's config as a dict, without the fields of config.model that
  the model does not read; `resolved`: with those filled in that are derived.
  """
  tree = config.to_dict()
  if resolved:
    tree['model'] = flat.to_dict(model)
  for name in flat.fields_that_are_unread(model):
    if name == 'position':
      # By default positions are learned, which is read under every mixer.
      tree['model'][name] = 'none'
      continue
    # The dicts that the field lies in, from the outermost one.
    *groups, last = name.split('.')
    nested = [tree['model']]
    for group in groups:
      nested.append(nested[-1].get(group, {}))
    nested[-1].pop(last, None)
    if not nested[-1] and groups[-1] in flat.GROUPS:
      nested[-2].pop(groups[-1], None)
  return tree


def flatten(tree: Mapping[str, Any] | ml_collections.ConfigDict
            ) -> dict[str, Any]:
  """Returns {'model.d_model': 128, ...} for a config or for nested dicts."""
  return flat.flatten_groups(tree)


# Changes of a config half-way.


def list_changes(workdir: epath.Path, config: ml_collections.ConfigDict,
                 derived: Mapping[str, Any]) -> list[FieldChange]:
  """Returns what differs from the run that has begun in a workdir, if any."""
  if not has_begun(workdir):
    return []
  old = load_config(workdir)
  old_derived = load_derived_fields(workdir)
  # A file that somebody changed by hand may hold a field that cannot be.
  try:
    before = fields_that_run_reads(old, old_derived)
  except RequestError as error:
    raise RequestError(f'{config_file(workdir)} is damaged: {error}') from error
  return compare_fields(before, fields_that_run_reads(config, derived))


def fields_that_run_reads(config: ml_collections.ConfigDict,
                          derived: Mapping[str, Any]
                          ) -> dict[str, Any]:
  """Returns the fields that a run reads, by dotted name; those that are left at
  0 or '' have their values in `derived`.

  Raises:
    RequestError: for a model that cannot be.
  """
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(derived)
  return flatten(without_unread_fields(config,
                                       architectures.resolve(config.model)))


def compare_fields(old: Mapping[str, Any],
                   new: Mapping[str, Any]) -> list[FieldChange]:
  """Returns the fields that differ, worst class first.

  Args:
    old: the fields that a run has read so far; see `read_fields`. There 0 is
      the same as the value that it stands for, and a derived value that changes
      with another field is a change too.
    new: the fields that it would read from now on.
  """
  changes = []
  for name in old | new:
    before = old.get(name, MISSING_VALUE)
    after = new.get(name, MISSING_VALUE)
    if type(before) is type(after) and before == after:
      continue
    kind, why = base.resume(name, old, new)
    changes.append(FieldChange(
        name=name, old=before, new=after, kind=kind, why=why))
  # A change that forbids to go on is read first.
  order = (INCOMPATIBLE, OPTIMISATION, SAFE)
  return sorted(changes, key=lambda change: order.index(change.kind))


def refuse_changes(changes: list[FieldChange],
                   allow_config_change: bool) -> None:
  """Raises RequestError where changes need --allow_config_change and lack it.

  Args:
    changes: the changes from the run's config.
    allow_config_change: whether the flag is there.
  """
  names = ', '.join(change.name for change in changes if change.kind != SAFE)
  way = advise_on_incompatible(changes) or ('Take another --workdir, or pass '
                                            '--allow_config_change to go on')
  # A sweep keeps the first line where one of its runs has failed.
  require(allow_config_change or not names, 'the config differs from that of '
          f'the run in this workdir in {names}. {way}:\n'
          f'{format_changes(changes)}')


def advise_on_incompatible(changes: list[FieldChange]) -> str:
  """Returns what there is to do where a run cannot go on with `changes`; ''
  where none of them is incompatible."""
  names = [change.name for change in changes if change.kind == INCOMPATIBLE]
  if not names:
    return ''
  return ('Take another --workdir: a run cannot go on with another '
          f'{", ".join(names)}. To begin with what fits of its parameters, '
          'pass --config.init_from=WORKDIR and --config.init_partial=True')


def format_changes(changes: list[FieldChange]) -> str:
  """Renders changes for a terminal: field, old, new, class, why."""
  rows = [('field', 'old', 'new', 'class', 'why')]
  for change in changes:
    rows.append((change.name, short(change.old), short(change.new),
                 change.kind, change.why))
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = [cell.ljust(width) for cell, width in zip(row, widths)]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


# A config as the words of a command line.


def training_command(workdir: str | os.PathLike,
                     config: ml_collections.ConfigDict
                     ) -> str:
  """Returns the command that trains in `workdir` with this very config."""
  arch = config.model.arch
  file_of_config = f'configs/{architectures.file_name(arch)}.py'
  if arch in architectures.SYSTEMS:
    file_of_config = architectures.page(arch).__file__
  words = ['python', 'train.py', '--config', file_of_config,
           f'--workdir={workdir}']

  # The fields that differ from those of the file.
  in_file = default_config_of_system(arch)
  defaults = flatten(in_file)
  for name, value in flatten(config).items():
    if not name.startswith('model.kinds.') and value != defaults[name]:
      words.append(f'--config.{name}={value}')
  kinds = config.model.kinds.to_dict()
  if kinds != in_file.model.kinds.to_dict():
    words.append(f'--config.model.kinds={kinds}')
  return shlex.join(words)


def default_config_of_system(arch: str) -> ml_collections.ConfigDict:
  """Returns the `tiny` size of a system's file in configs/; for a system from
  outside the tree, the parts that its class names."""
  if arch in architectures.SYSTEMS:
    config = base.base()
    config.model.update(architectures.SYSTEMS[arch].PARTS, arch=arch)
    return config.lock()
  module = importlib.import_module(f'configs.{architectures.file_name(arch)}')
  return module.get_config('tiny')
