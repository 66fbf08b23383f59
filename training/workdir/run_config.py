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
from common.errors import RequestError, require, shorten
from common.fields import INCOMPATIBLE, OPTIMISATION, SAFE
from configs import base
from training import plugins
from training.workdir import checkpoints, provenance, storage

FORMAT_VERSION = 1  # the version of config.json
_FORMAT_KEY = 'format'
_DERIVED_KEY = storage.DERIVED_KEY
_STARTS_KEY = 'starts'
_FILES_KEY = 'files'
MISSING_VALUE = '(none)'  # stands for the value of a field that is not there


class FieldChange(NamedTuple):
  """One field of the config that differs from that of the run so far.
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
  """Writes the config.json of a run: its config, and a record of each start.
  Only process 0 writes it, in one move, so that it is never half-written.

  Args:
    workdir: the folder of the run, which is made if it does not exist.
    config: the config of the run.
    derived: {dotted name: value} of the fields that were left at 0 or '', and
      were given a value by others.
    data: the hashes of the data sources and the tokenizer, which
      pipeline.digest_contents computes.
    model: the resolved config.model. Fields that it does not read are left out;
      None: all are written.
  """
  if jax.process_index() != 0:
    return
  if model is None:
    fields = config.to_dict()
  else:
    fields = without_unread_fields(config, model)
  # Record this start, unless the last one had the same code, data and command.
  starts = load_starts(workdir)
  this_start = provenance.describe_this_start(data)
  if not starts or starts[-1] != this_start:
    starts.append(this_start)
  tree = {_FORMAT_KEY: FORMAT_VERSION, **fields,
          _DERIVED_KEY: dict(derived or {}), _STARTS_KEY: starts}
  if plugins.text_of_loaded_file:
    tree[_FILES_KEY] = plugins.text_of_loaded_file
  text = json.dumps(tree, indent=2, allow_nan=False)
  storage.write_file(config_file(workdir), text + '\n')


def load_config(workdir: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config of a run that `save_config` wrote, locked."""
  return config_from_json(_config_fields(_load_config_json(workdir)))


def _config_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of the config out of all that config.json holds."""
  other_keys = _FORMAT_KEY, _DERIVED_KEY, _STARTS_KEY, _FILES_KEY
  fields = {}
  for name, value in tree.items():
    if name not in other_keys:
      fields[name] = value
  return fields


def load_derived_fields(workdir: epath.Path) -> dict[str, Any]:
  """Returns the values of the fields of a run's config that were left empty and
  derived, by dotted name."""
  return _load_config_json(workdir)[_DERIVED_KEY]


def load_labels(workdir: epath.Path) -> tuple[str, ...]:
  """Returns the labels that the outputs of a run's classifier stand for, in
  their order (data.labels); () for another model."""
  fields = flatten(load_config(workdir)) | load_derived_fields(workdir)
  return tuple(fields.get('data.labels', ()))


def load_starts(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns what config.json remembers of each start of a run (its code, its
  command, its data), the last start last; [] for a run that has not begun. A
  start that equals the one before it is there once."""
  if not config_file(workdir).exists() or not has_begun(workdir):
    return []
  return list(_load_config_json(workdir)[_STARTS_KEY])


def config_file(workdir: epath.Path):
  """Returns the path of a run's config.json."""
  return storage.checked_path(workdir) / storage.CONFIG_FILE


def has_begun(workdir: epath.Path) -> bool:
  """Whether the run in a folder has a checkpoint, so that it has begun to
  train."""
  folder = checkpoints.checkpoint_folder(workdir)
  if not folder.exists():
    return False
  return any(path.name.isdecimal() for path in folder.iterdir())


def _load_config_json(workdir: epath.Path) -> dict[str, Any]:
  """Reads and checks the config.json of a run.

  Args:
    workdir: the folder of the run.

  Returns:
    The content of the file, with tuples in place of JSON's lists.

  Raises:
    RequestError: where the file is missing, damaged, or of another format.
  """
  path = config_file(workdir)
  is_begun = has_begun(workdir)
  # The file may be missing, or that of a Hugging Face model.
  if not path.exists():
    advice = 'no run was started in this workdir'
    if is_begun:
      advice = 'put it back, or take another --workdir'
    raise RequestError(f'{path} is missing: {advice}')
  if not is_begun and storage.is_hugging_face(workdir):
    raise RequestError(
        f'{workdir} is a folder in the Hugging Face format, which python -m '
        'tools.chat takes as its --folder, and not that of a run, which '
        'python -m tools.convert import makes of it')
  # It must have the format that this version of the code writes.
  json_tree = storage.read_json(
      path, {_DERIVED_KEY: dict, _STARTS_KEY: list})
  tree = lists_to_tuples(json_tree)
  require(tree.get(_FORMAT_KEY) == FORMAT_VERSION, f'{path} is of format '
          f'{shorten(tree.get(_FORMAT_KEY))}, and this version of the code '
          f'reads {FORMAT_VERSION}: go on with the version that wrote it, or '
          'train anew')
  # The run may use parts of models, with fields of their own, that the user's
  # own code declares. That code must be loaded before the fields are checked.
  plugins.restore_declared_parts(tree.get(_FILES_KEY, {}))
  base.check_config(_config_fields(tree), f'{path} is damaged: ')
  base.check_config(tree[_DERIVED_KEY], f'{path} is damaged: ')
  return tree


def lists_to_tuples(value: Any):
  """Returns a value that was read from JSON with tuples in place of its lists,
  as configs have them."""
  if isinstance(value, (list, tuple)):
    return tuple(lists_to_tuples(item) for item in value)
  if isinstance(value, dict):
    return {name: lists_to_tuples(item) for name, item in value.items()}
  return value


def config_from_json(tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Returns a run's config, locked, given its fields as JSON holds them, in
  nested dicts. A field that is not there has its default."""
  tree = lists_to_tuples(tree)
  layer_kinds = tree.get('model', {}).get('kinds', {})
  config = base.base()
  config.model.kinds = ml_collections.ConfigDict(layer_kinds)
  for name, value in flat.flatten_groups(tree).items():
    if not name.startswith('model.kinds.'):
      config.update_from_flattened_dict({name: value})
  return config.lock()


def without_unread_fields(config: ml_collections.ConfigDict, model: ModelConfig,
                          resolved: bool = False) -> dict[str, Any]:
  """Returns a run's config as nested dicts, without those fields of
  config.model that its model does not read, such as the fields of experts in a
  dense model.

  Args:
    config: the config of the run.
    model: the resolved config.model of the run.
    resolved: whether fields that were left empty get the values that were
      derived for them.
  """
  tree = config.to_dict()
  if resolved:
    tree['model'] = flat.to_dict(model)
  for name in flat.fields_that_are_unread(model):
    if name == 'position':
      # By default positions are learned, which is read under every mixer.
      tree['model'][name] = 'none'
      continue
    # A field such as moe.top_k lies in a dict of its group. Collect the dicts
    # around the field, the outermost one first.
    *group_names, field_name = name.split('.')
    nested_dicts = [tree['model']]
    for group_name in group_names:
      nested_dicts.append(nested_dicts[-1].get(group_name, {}))
    # Remove the field, and then its group if that is empty now. A dict that is
    # no group but a kind of layer (a named set of fields) stays even if it is
    # empty, since its name is a part of the model.
    nested_dicts[-1].pop(field_name, None)
    if not nested_dicts[-1] and group_names[-1] in flat.GROUPS:
      nested_dicts[-2].pop(group_names[-1], None)
  return tree


def flatten(tree: Mapping[str, Any] | ml_collections.ConfigDict
            ) -> dict[str, Any]:
  """Returns {'model.d_model': 128, ...} for a config or for nested dicts."""
  return flat.flatten_groups(tree)


# Changes of a config half-way.


def list_changes(workdir: epath.Path, config: ml_collections.ConfigDict,
                 derived: Mapping[str, Any]) -> list[FieldChange]:
  """Lists the fields in which a config differs from that of a run in a folder,
  which is to be resumed; [] if there is no run.

  Args:
    workdir: the folder of the run.
    config: the config with which the run would be resumed.
    derived: {dotted name: value} of its fields that were left empty, and were
      given a value by others.

  Raises:
    RequestError: where the run's config.json describes no possible model.
  """
  if not has_begun(workdir):
    return []
  old_config = load_config(workdir)
  old_derived = load_derived_fields(workdir)
  # Somebody may have changed the config.json by hand.
  try:
    old_fields = fields_that_run_reads(old_config, old_derived)
  except RequestError as error:
    raise RequestError(f'{config_file(workdir)} is damaged: {error}') from error
  return compare_fields(old_fields, fields_that_run_reads(config, derived))


def fields_that_run_reads(config: ml_collections.ConfigDict,
                          derived: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of a config that have an effect on its run.

  Args:
    config: the config of the run.
    derived: {dotted name: value} of the fields that were left at 0 or '', in
      whose place these values are returned.

  Returns:
    {dotted name: value}.

  Raises:
    RequestError: for a model that is not possible.
  """
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(derived)
  model = architectures.resolve(config.model)
  return flatten(without_unread_fields(config, model))


def compare_fields(old: Mapping[str, Any], new: Mapping[str, Any]
                   ) -> list[FieldChange]:
  """Lists the fields in which two configs of one run differ. Changes that
  forbid to resume the run come first.

  Args:
    old: {dotted name: value} of the fields that the run has read so far, from
      `fields_that_run_reads`. Fields left at 0 have the value that was derived
      for them. So an equal value that is now written out is no change, and a
      derived value that follows another field is one.
    new: the fields that the run would read from now on.
  """
  changes = []
  for name in old | new:
    old_value = old.get(name, MISSING_VALUE)
    new_value = new.get(name, MISSING_VALUE)
    if type(old_value) is type(new_value) and old_value == new_value:
      continue
    change_class, why = base.find_effect_of_change(name, old=old, new=new)
    changes.append(FieldChange(name=name, old=old_value, new=new_value,
                               kind=change_class, why=why))
  # Put the changes that forbid to resume first.
  order = (INCOMPATIBLE, OPTIMISATION, SAFE)
  return sorted(changes, key=lambda change: order.index(change.kind))


def refuse_changes(changes: list[FieldChange], allow_config_change: bool
                   ) -> None:
  """Refuses to resume a run with a changed config, unless the user allows it or
  every change is safe.

  Args:
    changes: the fields that have changed. The kind of a change is SAFE where
      the run computes the same in another way.
    allow_config_change: whether the user has passed --allow_config_change.

  Raises:
    RequestError: with the names of the fields, and what to do.
  """
  names = ', '.join(change.name for change in changes if change.kind != SAFE)
  advice = advise_on_incompatible(changes)
  if not advice:
    advice = ('Take another --workdir, or pass --allow_config_change to go on')
  # The first line must say it all: a sweep shows only that of a failed run.
  require(allow_config_change or not names, 'the config differs from that of '
          f'the run in this workdir in {names}. {advice}:\n'
          f'{format_changes(changes)}')


def advise_on_incompatible(changes: list[FieldChange]) -> str:
  """Returns what a user can do about the changes with which a run cannot go on;
  '' where none of them is incompatible."""
  names = [change.name for change in changes if change.kind == INCOMPATIBLE]
  if not names:
    return ''
  return ('Take another --workdir: a run cannot go on with another '
          f'{", ".join(names)}. To begin with what fits of its parameters, '
          'pass --config.init_from=WORKDIR and --config.init_partial=True')


def format_changes(changes: list[FieldChange]) -> str:
  """Formats changes of a config as a table for the terminal.

  Args:
    changes: the changed fields.

  Returns:
    The table, with the columns field, old, new, class and why.
  """
  rows = [('field', 'old', 'new', 'class', 'why')]
  for change in changes:
    rows.append((change.name, shorten(change.old), shorten(change.new),
                 change.kind, change.why))
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = []
  for row in rows:
    cells = [cell.ljust(width) for cell, width in zip(row, widths)]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


# A config as the words of a command line.


def training_command(workdir: str | os.PathLike,
                     config: ml_collections.ConfigDict) -> str:
  """Returns the command line that trains a config by train.py.

  Args:
    workdir: the folder of the run.
    config: the config. Each field that differs from the default config of its
      architecture becomes a flag.
  """
  arch = config.model.arch
  file_of_config = f'configs/{architectures.file_name(arch)}.py'
  if arch in architectures.SYSTEMS:
    file_of_config = architectures.page(arch).__file__
  words = ['python', 'train.py', '--config', file_of_config,
           f'--workdir={workdir}']

  # Write a flag for each field that differs. The kinds of layers (named sets of
  # fields) may have other names in the default, so they are given as a whole.
  config_of_file = default_config_of_system(arch)
  values_in_file = flatten(config_of_file)
  for name, value in flatten(config).items():
    if not name.startswith('model.kinds.') and value != values_in_file[name]:
      words.append(f'--config.{name}={value}')
  layer_kinds = config.model.kinds.to_dict()
  if layer_kinds != config_of_file.model.kinds.to_dict():
    words.append(f'--config.model.kinds={layer_kinds}')
  return shlex.join(words)


def default_config_of_system(arch: str) -> ml_collections.ConfigDict:
  """Returns the config of a system (model.arch) before any field is set: the
  `tiny` size of its file in configs/; for a system that a file from outside the
  tree declares, the defaults with the parts that its class names."""
  if arch in architectures.SYSTEMS:
    config = base.base()
    config.model.update(architectures.SYSTEMS[arch].PARTS, arch=arch)
    return config.lock()
  module = importlib.import_module(f'configs.{architectures.file_name(arch)}')
  return module.get_config('tiny')
