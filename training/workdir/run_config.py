"""The config of a run on disk, and what changing it half-way would do.

WORKDIR/config.json is the config tree as it is, plus three more keys: `format`,
the version of this file; `derived`, the value that each field left at 0 or ''
was resolved to, by its dotted name; and `starts`, the code, command and data of
each start (provenance.py).
"""

from collections.abc import Callable, Mapping
import dataclasses
import importlib
import json
import os
import re
import shlex
from typing import Any

from etils import epath
import jax
import ml_collections

import architectures
from configs import base
from configs.errors import RequestError, require, short
from training import config_files, schema
from training.workdir import checkpoints, provenance, storage

FORMAT = 1  # of config.json
_FORMAT, _DERIVED, _STARTS = 'format', storage.DERIVED, 'starts'

# What a changed field does to a run that is resumed.
SAFE = 'safe'
OPTIMISATION = 'changes the optimisation'
INCOMPATIBLE = 'incompatible'


def _steps(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
  """Of train.steps, given the fields of both configs by their dotted names."""
  if {old['optim.schedule'], new['optim.schedule']} <= {'constant', 'rsqrt'}:
    return SAFE, 'this schedule does not depend on the last step'
  if old['optim.decay_steps'] == new['optim.decay_steps'] > 0:
    return SAFE, 'the schedule ends at optim.decay_steps'
  return OPTIMISATION, 'the schedule is drawn out to the last step'


def _ema(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
  if bool(old['optim.ema']) == bool(new['optim.ema']):
    return OPTIMISATION, 'another average from here on'
  return INCOMPATIBLE, 'an average that is kept from the first step on, or not'


# What a change of a field does to a run that is resumed: (pattern over the
# dotted name, class, why), first match wins. A field that no row covers is an
# error, so a new one is never classed by accident.
CLASSES: tuple[tuple[str, str | Callable, str], ...] = (
    (r'(log|checkpoint|eval)\..*', SAFE, 'only what is written, and when'),
    (r'mesh\..*', SAFE, 'same sums in another order: equal to about 1e-5'),
    (r'data\.(cache_dir|workers|tokenize_workers)', SAFE,
     'batches do not depend on it'),
    (r'train\.max_bad_steps', SAFE, 'only when a failing run ends'),
    (r'train\.loss_chunk', SAFE, 'same sums in another order'),
    (r'model\.(remat|keep_gathered|scan_layers|attention_kernel'
     r'|moe\.grouped_kernel)', SAFE,
     'the same function, computed another way'),
    (r'model\.moe\.eval_capacity_factor', SAFE, 'only evaluation'),
    (r'train\.steps', _steps, ''),
    (r'train\.(z_loss|label_smoothing|mtp_weight)', OPTIMISATION, 'the loss'),
    (r'train\.grad_accumulation', OPTIMISATION,
     'dropout and expert capacity see other micro-batches'),
    (r'seed', OPTIMISATION, 'another order of the data, another dropout'),
    (r'init_(from|partial|seed)|model\.init(_stddev|_scale)?', OPTIMISATION,
     'read only where a run begins: a resumed run ignores it'),
    (r'objective', INCOMPATIBLE, 'another task, maybe with other heads'),
    (r'probe\..*', OPTIMISATION, 'other rows from here on'),
    (r'span\..*', OPTIMISATION, 'another difficulty of the task'),
    (r'data\.chat_template', OPTIMISATION, 'another layout of conversations: '
     'data.chat_template=earlier is that of a run begun without this field'),
    (r'data\.pair_separators', OPTIMISATION, 'another layout of pairs: '
     'data.pair_separators=1 is that of a run begun without this field'),
    (r'data\.labels', INCOMPATIBLE, 'scores mean other labels'),
    (r'data\.tokenizer', INCOMPATIBLE, 'token numbers mean something else'),
    (r'data\..*', OPTIMISATION, 'other batches from here on'),
    (r'optim\.(name|freeze)', INCOMPATIBLE, 'another optimizer state'),
    (r'optim\.ema', _ema, ''),
    (r'optim\..*', OPTIMISATION, 'other updates'),
    (r'model\.((attention_|ffn_|head_|lora\.)?dropout'
     r'|moe\.(jitter|logit_noise|expert_dropout|balance_loss|balance_weight'
     r'|z_loss_weight|bias_rate))', OPTIMISATION, 'another regularisation'),
    (r'model\.(norm_eps|sinusoid|learned_stretch|rope\..*|relative\.max_distance'
     r'|sliding_window|attention_(softcap|scale)|embed_scale|logits_scale'
     r'|logits_softcap|parametrization|mup_base_(width|head_dim)|dtype'
     r'|pooling|latent\.(scale|norm_eps)|(deltanet|kda)\.negative'
     r'|gla\.temperature|lora\.alpha|streams\.(iterations|block_size)'
     r'|mamba2\.(norm_over|least_step|most_step)'
     r'|kinds\.\w+\.(window|rope\..*|attention_(softcap|scale))'
     r'|clamp\..*|moe\.(top_k|dispatch|capacity_factor|normalize_gates|group_size'
     r'|gate_scale|expert_groups|top_groups))',
     OPTIMISATION, 'the same parameters in another function'),
    (r'model\.(moe\.logit_bias|next_sentence)', INCOMPATIBLE,
     'other parameters'),
    (r'model\.(arch|norm|embed_norm|position|ffn|block|residual|mixer|attention'
     r'|qk_norm(_over)?|attention_(sinks|gate|(out_)?bias)|ffn_bias'
     r'|value_(residual|embedding)|kv_sharing'
     r'|tie_embeddings|logits_bias|head|lora\.(rank|targets)|pattern|prefix'
     r'|suffix|deltanet\.decay|mamba2\.conv_bias|kinds(\..*)?'
     r'|moe\.(router|ffn|shared_(experts|gate)))', INCOMPATIBLE,
     'other parameters'),
    (r'model\.(d_model|num_layers|num_decoder_layers|num_heads|num_kv_heads'
     r'|head_dim|d_ff|vocab_size|max_len|type_vocab_size|position_offset'
     r'|num_labels|mtp_depth|attention_conv|streams\.(count|dynamic)|param_dtype'
     r'|relative\.buckets|latent\.(q_rank|kv_rank|nope_dim|rope_dim|v_dim)'
     r'|(deltanet|kda)\.(key_heads|value_heads|key_dim|value_dim|conv|rank)'
     r'|(gla|retnet)\.(heads|key_dim|value_dim|conv|rank)'
     r'|mamba2\.(heads|head_dim|groups|state|conv)'
     r'|moe\.(num_experts|d_ff))', INCOMPATIBLE,
     'parameters of another shape or dtype'),
)


@dataclasses.dataclass(frozen=True)
class Change:
  """One field that differs; a field that one side lacks is MISSING there."""
  name: str
  old: Any
  new: Any
  kind: str
  why: str


MISSING = '(none)'


def save(workdir: epath.Path, config: ml_collections.ConfigDict,
         derived: Mapping[str, Any] | None = None,
         data: Mapping[str, str] | None = None):
  """Writes config.json, from process 0, whole or not at all.

  Args:
    workdir: a folder, which is made if it isn't there.
    config: the run's config.
    derived: the resolved value of fields left at 0 or '', by dotted name.
    data: what the sources hold; see provenance.this_start.
  """
  tree = to_json(config)
  for name in derived or {}:
    if name not in flatten(config):
      raise ValueError(f'derived value for {name!r}: no such config field')
  if jax.process_index() != 0:
    return
  before, now = starts(workdir), provenance.this_start(data)
  if before[-1:] != [now]:
    before.append(now)
  text = json.dumps({
      _FORMAT: FORMAT, **tree, _DERIVED: dict(derived or {}), _STARTS: before},
                    indent=2, allow_nan=False)
  storage.write(file(workdir), text + '\n')


def load_config(workdir: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config that `save` wrote; see from_json."""
  tree = _load(workdir)
  for name in (_FORMAT, _DERIVED, _STARTS):
    del tree[name]
  return from_json(tree)


def load_derived(workdir: epath.Path) -> dict[str, Any]:
  return {name: tuples(value)
          for name, value in _load(workdir)[_DERIVED].items()}


def labels(workdir: epath.Path) -> tuple[str, ...]:
  """Returns what the outputs of a run's model stand for: data.labels."""
  found = flatten(load_config(workdir)) | load_derived(workdir)
  return tuple(found.get('data.labels', ()))


def starts(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns what is remembered of each start of a run that has begun, the last
  start last; a start that equals the one before it counts once."""
  if not (exists(workdir) and has_begun(workdir)):
    return []
  return list(_load(workdir)[_STARTS])


def exists(workdir: epath.Path) -> bool:
  return file(workdir).exists()


def has_begun(workdir: epath.Path) -> bool:
  """Whether there is a checkpoint to go on from; its config ought to be."""
  folder = checkpoints.directory(workdir)
  return folder.exists() and any(checkpoints.step_number(path.name) is not None
                                 for path in folder.iterdir())


def compare(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict,
            old_derived: Mapping[str, Any] | None = None,
            new_derived: Mapping[str, Any] | None = None) -> list[Change]:
  """Returns the fields that differ, worst class first.

  With the derived values, 0 is the same as the value that it stands for, and
  a derived value that changes with another field is a change too.

  Raises:
    ValueError: for a changed field that no row of CLASSES covers.
  """
  olds = flatten(old) | dict(old_derived or {})
  news = flatten(new) | dict(new_derived or {})
  changes = []
  for name in dict.fromkeys([*olds, *news]):
    before, after = olds.get(name, MISSING), news.get(name, MISSING)
    if type(before) is not type(after) or before != after:
      changes.append(Change(name, before, after, *classify(name, olds, news)))
  order = (INCOMPATIBLE, OPTIMISATION, SAFE)
  return sorted(changes, key=lambda change: order.index(change.kind))


def changes(workdir: epath.Path, config: ml_collections.ConfigDict,
            derived: Mapping[str, Any]) -> list[Change]:
  """Returns what differs from the run that has begun in a workdir, if any."""
  return compare(load_config(workdir), config, load_derived(workdir),
                 derived) if has_begun(workdir) else []


def classify(name: str, old: Mapping[str, Any],
             new: Mapping[str, Any]) -> tuple[str, str]:
  """Returns (class, why) for a change of the field `name`."""
  _, kind, why = row(name)
  return kind(old, new) if callable(kind) else (kind, why)


def row(name: str) -> tuple[str, str | Callable, str]:
  for pattern, kind, why in CLASSES:
    if re.fullmatch(pattern, name):
      return pattern, kind, why
  raise ValueError(
      f'config field {name!r} has no row in CLASSES of '
      f'training/workdir/run_config.py: add one that says {SAFE!r}, '
      f'{OPTIMISATION!r} or {INCOMPATIBLE!r}')


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config as plain dicts and lists.

  Raises:
    ValueError: for a value that JSON cannot give back as it was.
  """
  for name, value in flatten(config).items():
    _check_plain(name, value)
  return config.to_dict()


def from_json(tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Returns the config, locked, as config_flags locks what it parses."""
  return ml_collections.ConfigDict(tuples(tree)).lock()


def check_fields(tree: Mapping[str, Any], who: str) -> None:
  """Raises RequestError for fields of a config out of a file that are not those
  of this version of the code, and for one of another type."""
  expected = base.base()
  _check_group(tree, expected, who)
  there, known = ({name for name in flatten_dict(fields)
                   if not name.startswith('model.kinds.')}
                  for fields in (tree, expected.to_dict()))
  others = sorted(there ^ known)
  require(not others, f'{who}{others[0] if others else ""} is a field of '
          + ('another' if others and others[0] in there else 'this')
          + ' version of the code alone: go on with the version that wrote it, '
          'or train anew')


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns {'model.d_model': 128, ...}."""
  return flatten_dict(config.to_dict())


def flatten_dict(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the leaves of nested dicts by their dotted names."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten_dict(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat


def file(workdir: epath.Path):
  """Returns where the config of a run lies."""
  return storage.path(workdir) / storage.CONFIG


def _load(workdir: epath.Path) -> dict[str, Any]:
  path = file(workdir)
  require(path.exists(), f'{path} is missing, although the workdir has '
          'checkpoints: put it back, or take another --workdir'
          if has_begun(workdir) else
          f'{path} is missing: no run was started in this workdir')
  tree = tuples(schema.parse(path.read_bytes(), str(path)))
  require(isinstance(tree, dict) and isinstance(tree.get(_DERIVED), dict),
          f'{path} is damaged: it has no {_DERIVED!r}')
  require(tree.get(_FORMAT) == FORMAT, f'{path} is of format '
          f'{short(tree.get(_FORMAT))}, and this version of the code reads '
          f'{FORMAT}: go on with the version that wrote it, or train anew')
  provenance.check_shape(tree.get(_STARTS), f'{path}: {_STARTS}')
  check_fields({name: value for name, value in tree.items()
                if name not in (_FORMAT, _DERIVED, _STARTS)},
               f'{path} is damaged: ')
  known = flatten(base.base())
  for name, value in tree[_DERIVED].items():
    if name in known:
      config_files.check_type(
          value, known[name], f'{path} is damaged: {_DERIVED} {name}')
  return tree


def _check_group(group: Mapping, expected: Mapping, who: str) -> None:
  for name, value in group.items():
    require(re.fullmatch(r'\w+', name) is not None,
            f'{who}{short(name)} is no name of a field')
    if name in expected:
      config_files.check_type(value, expected[name], who + name)
      if 'kinds' in expected and name == 'kinds':
        config_files.check_kinds(value, expected, who.removesuffix('model.'))
      elif isinstance(value, dict):
        _check_group(value, expected[name], f'{who}{name}.')


def tuples(value: Any):
  """Returns a value out of JSON with tuples for its lists, as configs have."""
  if isinstance(value, (list, tuple)):
    return tuple(tuples(item) for item in value)
  if isinstance(value, dict):
    return {name: tuples(item) for name, item in value.items()}
  return value


def _check_plain(name: str, value: Any):
  if isinstance(value, tuple):
    for item in value:
      _check_plain(name, item)
  elif value is not None and type(value) not in (bool, int, float, str):
    raise RequestError(
        f'config field {name} holds {value!r}, a {type(value).__name__}: '
        'choose from bool, int, float, str, None, and tuples of them')


def refuse(changes: list[Change], allow_config_change: bool,
           workdir: epath.Path | None = None):
  """Raises ValueError where changes need --allow_config_change and lack it.

  Args:
    changes: from the run's config.
    allow_config_change: whether the flag is there.
    workdir: that of the run.
  """
  grave = [change for change in changes if change.kind != SAFE]
  if grave and not allow_config_change:
    raise RequestError(
        'the config differs from that of the run in this workdir in fields '
        f'that matter:\n{table(changes)}\n'
        + (way_on(changes) or _other_ways(workdir)))


def _other_ways(workdir: epath.Path | None) -> str:
  if workdir and _is_import(workdir):
    return (f'Pass --allow_config_change to train the weights in {workdir}. '
            'Another --workdir starts from random parameters, unless '
            f'--config.init_from={workdir} is added')
  return 'Take another --workdir, or pass --allow_config_change to go on'


def way_on(changes: list[Change]) -> str:
  """Says what there is to do where a run cannot go on with `changes`; '' where
  none of them is incompatible."""
  names = [c.name for c in changes if c.kind == INCOMPATIBLE]
  return (f'Take another --workdir: a run cannot go on with another '
          f'{", ".join(names)}. To begin with what fits of its parameters, '
          'pass --config.init_from=WORKDIR and --config.init_partial=True'
          ) if names else ''


def _is_import(workdir: epath.Path) -> bool:
  """Whether a workdir holds weights that no run in it has trained."""
  folder = checkpoints.directory(workdir)
  return checkpoints.finished(folder) == [0] and checkpoints.parameters_alone(
      checkpoints.arrays(folder, 0))


def table(changes: list[Change]) -> str:
  """Renders changes for a terminal: field, old, new, class, why."""
  rows = [('field', 'old', 'new', 'class', 'why')]
  rows += [(c.name, _short(c.old), _short(c.new), c.kind, c.why)
           for c in changes]
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join(
      '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
      for row in rows)


def _short(value: Any) -> str:
  text = value if value is MISSING else repr(value)
  return text if len(text) <= 32 else text[:29] + '...'


def to_train(workdir: str | os.PathLike, config: ml_collections.ConfigDict
             ) -> str:
  """Returns the command that trains in `workdir` with this very config."""
  arch = config.model.arch
  return shlex.join(['python', 'train.py', '--config',
                     f'configs/{architectures.file_name(arch)}.py',
                     f'--workdir={workdir}', *flags(config, usual(arch))])


def usual(arch: str) -> ml_collections.ConfigDict:
  """Returns the `tiny` of a system's file of configs/."""
  return importlib.import_module(
      f'configs.{architectures.file_name(arch)}').get_config('tiny')


def flags(wanted: ml_collections.ConfigDict, there: ml_collections.ConfigDict
          ) -> list[str]:
  """Returns the words of a command line that make `wanted` of `there`."""
  flat, kinds = flatten(there), wanted.model.kinds.to_dict()
  words = [f'--config.{name}={value}'
           for name, value in flatten(wanted).items()
           if not name.startswith('model.kinds.') and value != flat[name]]
  if kinds != there.model.kinds.to_dict():
    words.append(f'--config.model.kinds={kinds}')
  return words
