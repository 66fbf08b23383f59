"""A study as its file describes it.

A file of configs/studies/ holds `base()` and `sweep(add)`, as a sweep's file
does (tools/compare/spec.py), `SIZES`, the changes of each size by its name,
smallest first, and `EFFECT`, the smallest difference of the first measure that
is wanted. The rest has defaults: see `KNOWN`. A constant of the file itself
begins with an underscore.
"""

from collections.abc import Mapping
import os
import pathlib
import re
from typing import Any

from configs.errors import one_of, require, short
from tools.compare import measures as measures_lib
from tools.compare import plan as plans
from tools.compare import check, matching
from tools.compare import spec as sweep_spec
from tools.compare import statistics
from training import config_files, limits

# What a file may hold, with its default; None: it must.
KNOWN: dict[str, Any] = {
    'QUESTION': '',
    'SIZES': None,
    'EFFECT': None,
    # The runs that measures come from, with the fields in which they leave the
    # base: 'text', and probes by their names.
    'WORKLOADS': {plans.TEXT: {}},
    # Of each {'workload', 'figure', 'better', 'name', 'chance'}; derived: the
    # loss of the text, and the accuracy of each probe.
    'MEASURES': (),
    'SEEDS': {'noise': 5, 'tune': 1, 'screen': 5, 'confirm': 5},
    # 'fields': the values of each that are tried; derived: half of the base's
    # learning rate, the rate, and twice the rate.
    'TUNING': {},
    'ALPHA': 0.05, 'Q': 0.05, 'POWER': 0.8, 'UNSTABLE': 0.1,
    'MATCH': '', 'MATCH_FIELD': matching.FIELD,
}
_WORDS = {dict: 'dictionary', str: 'text', (int, float): 'number',
          (tuple, list): 'tuple of dictionaries'}
LEAST_SIZES = 3
LEAST_SEEDS = {'noise': 3, 'tune': 1, 'screen': statistics.MIN_SEEDS,
               'confirm': statistics.MIN_SEEDS}
# Fields that are the study's own.
_OWN = ('seed', 'init_seed', 'eval.part')
# Fields by which a run sees other data, or more of it, than the base's.
_DATA = (*check.BATCHES, 'train.steps', 'train.grad_accumulation', 'eval.')


class Spec:
  """What a study's file says, checked as far as the file alone can be.

  Attributes:
    file: its path.
    sweep: the base and its variants, as a sweep.
    given: the constants, by the names of KNOWN.
  """

  def __init__(self, file: str):
    require(os.path.isfile(file), f'no study {file!r}: choose from '
            f'{", ".join(_files())}, or write one')
    self.file = file
    self.given = _constants(file, config_files.run(file))
    self.sweep = sweep_spec.read_sweep_file(file, seeds=1, known=KNOWN)
    require(not self.sweep.tasks, f'{file} has TASKS: a study evaluates what '
            'its MEASURES need, as TASK/FIGURE')
    self.sizes = _groups(file, 'SIZES', self.given['SIZES'])
    require(len(self.sizes) >= LEAST_SIZES, f'{file}: SIZES has '
            f'{len(self.sizes)} of them: a study has at least {LEAST_SIZES}, '
            'since a verdict must agree over sizes')
    self.workloads = _groups(file, 'WORKLOADS', self.given['WORKLOADS'])
    require(next(iter(self.workloads), '') == plans.TEXT, f'{file}: WORKLOADS '
            f'begins with {next(iter(self.workloads), "nothing")!r}: begin it '
            f'with {plans.TEXT!r}, which probes stand beside')
    self._check_overlaps()

  def _check_overlaps(self) -> None:
    """Raises RequestError for a field that two would set, or that a study
    sets itself."""
    tuned = _tuned(self.file, self.given['TUNING'])
    _refuse(self.file, 'TUNING', tuned, _OWN, 'which the study sets itself')
    _refuse_data(self.file, 'TUNING', tuned)
    for name in ('init_seed', 'eval.part'):
      value = limits.get(self.sweep.base, name)
      require(not value, f'{self.file}: base() sets {name} to {value!r}, which '
              'the study sets itself: leave it out')
    groups = {f'size {name!r}': own for name, own in self.sizes.items()}
    groups |= {f'workload {name!r}': own
               for name, own in self.workloads.items()}
    for who, own in groups.items():
      _refuse(self.file, who, own, _OWN, 'which the study sets itself')
      _refuse(self.file, who, own, tuned, 'which TUNING tunes')
    for size, own in self.sizes.items():
      for workload, other in self.workloads.items():
        for field in own:
          require(field not in other, f'{self.file}: size {size!r} and '
                  f'workload {workload!r} both set {field}: leave it to one of '
                  'them')
    for point in self.sweep.points:
      who = f'variant {point.name!r}'
      require(point.name != plans.AGAIN, f'{self.file}: a variant is called '
              f'{point.name!r}, which is what the study calls its base with '
              'other first parameters: call it otherwise')
      _refuse(self.file, who, point.changes,
              [name for name in _OWN if name != 'init_seed'],
              'which the study sets itself')
      _refuse(self.file, who, point.changes, tuned, 'which TUNING tunes')
      _refuse_data(self.file, who, point.changes)
      for field in point.changes:
        for other, own in groups.items():
          require(field not in own, f'{self.file}: {who} and {other} both set '
                  f'{field}: leave it to one of them')


def _files() -> list[str]:
  return sorted(str(path) for path in pathlib.Path('configs/studies').glob(
      '*.py') if path.stem != '__init__')


def _constants(file: str, module: Any) -> dict[str, Any]:
  """Returns the constants of a file by the names of KNOWN."""
  sweep_spec.check_constants(file, module, KNOWN, 'a study')
  found = {}
  for name, default in KNOWN.items():
    value = getattr(module, name, default)
    require(value is not None, f'{file} has no {name}: ' + {
        'SIZES': "add SIZES = {'s': {'model.d_model': 32}, ...}, smallest "
                 'first',
        'EFFECT': 'say the smallest difference in the first measure that is '
                  'worth finding, as EFFECT = 0.02'}.get(name, ''))
    kinds = {'SIZES': dict, 'EFFECT': (int, float), 'MEASURES': (tuple, list)
             }.get(name, (int, float) if type(default) is float
                   else type(default))
    require(isinstance(value, kinds) and type(value) is not bool,
            f'{file}: {name} is {short(value)}, a {type(value).__name__}: '
            f'write a {_WORDS[kinds]}')
    found[name] = value
  for name, most in (('EFFECT', 1e30), ('ALPHA', 1), ('Q', 1), ('POWER', 1)):
    require(0 < found[name] < most, f'{file}: {name} is {found[name]}: it must '
            f'be above 0' + (' and below 1' if most == 1 else ''))
  require(0 <= found['UNSTABLE'] <= 1, f'{file}: UNSTABLE is '
          f'{found["UNSTABLE"]}: it is a share, from 0 to 1')
  one_of('MATCH', found['MATCH'], ('', *matching.WHAT))
  require(bool(found['MATCH']) or found['MATCH_FIELD'] == matching.FIELD,
          f'{file}: MATCH_FIELD is {found["MATCH_FIELD"]}, but MATCH is empty: '
          f'set it to one of {", ".join(matching.WHAT)}')
  return found


def _groups(file: str, name: str, value: Mapping) -> dict[str, dict]:
  """Checks {name: {field: value}}."""
  for key, fields in value.items():
    require(isinstance(key, str) and re.fullmatch(r'[\w=+-]+', key) is not None,
            f'{file}: {name} has {key!r}: choose letters, digits and _ = + - '
            'alone, since it names a folder')
    require(isinstance(fields, Mapping), f'{file}: {name}[{key!r}] is '
            f'{short(fields)}: write the fields that it changes, as '
            "{'model.d_model': 64}")
  return {key: dict(fields) for key, fields in value.items()}


def _refuse(file: str, who: str, own, fields, why: str) -> None:
  for field in own:
    require(field not in fields, f'{file}: {who} sets {field}, {why}')


def _refuse_data(file: str, who: str, own) -> None:
  for field in own:
    require(not field.startswith(_DATA), f'{file}: {who} sets {field}: every '
            'variant of a study has the same data and as many steps as the '
            'base, or no difference would be its own')


def _tuned(file: str, given: Mapping) -> tuple[str, ...]:
  """Returns the fields that TUNING tunes."""
  fields = given.get('fields', {'optim.lr': ()})
  require(isinstance(fields, Mapping) and bool(fields)
          and all(isinstance(name, str) for name in fields), f'{file}: TUNING '
          f"has {short(fields)} as fields: write {{'optim.lr': (1e-3, 2e-3)}}")
  return tuple(fields)


def seeds(spec: Spec) -> plans.Seeds:
  """Returns SEEDS, those that it leaves out at their defaults."""
  given = spec.given['SEEDS']
  for phase in given:
    one_of('phase of SEEDS', phase, plans.PHASES)
  found = {**KNOWN['SEEDS'], **given}
  for phase, number in found.items():
    least = LEAST_SEEDS[phase]
    require(type(number) is int and least <= number <= plans.Seeds.APART,
            f'{spec.file}: SEEDS has {number!r} for {phase}: it must be a '
            f'whole number from {least} to {plans.Seeds.APART:,}' + (
                ', since fewer say nothing about noise' if least > 1 else ''))
  return plans.Seeds(**found)


def tuning(spec: Spec, base) -> plans.Tuning:
  """Returns TUNING; `base` is the base's config."""
  given = dict(spec.given['TUNING'])
  names = ('fields', 'keep', 'rungs', 'extend')
  for name in given:
    one_of('entry of TUNING', name, names)
  lr = base.optim.lr
  fields = given.pop('fields', {'optim.lr': (lr / 2, lr, 2 * lr)})
  found = plans.Tuning({name: tuple(values) if isinstance(
      values, tuple | list) else (values,) for name, values in fields.items()},
                       **given)
  for name, values in found.fields.items():
    who = f'{spec.file}: TUNING of {name}'
    for value in values:
      sweep_spec.changed(base, {name: value}, who)
      require(type(value) in (int, float) and value > 0, f'{who} has '
              f'{value!r}: what is tuned is a number above 0')
    require(len(values) > 1 and list(values) == sorted(set(values)),
            f'{who} is {values}: write two values or more, rising')
  require(type(found.rungs) is int and 1 <= found.rungs <= 10
          and type(found.extend) is int and 0 <= found.extend <= 10
          and type(found.keep) is float and 0 < found.keep < 1,
          f'{spec.file}: TUNING has keep={found.keep!r}, '
          f'rungs={found.rungs!r}, extend={found.extend!r}: keep is a share '
          'between 0 and 1, rungs from 1 to 10, extend from 0 to 10')
  return found


def measures(spec: Spec) -> list[dict]:
  """Returns what MEASURES says, or its default, without `chance`s."""
  given = spec.given['MEASURES'] or [
      {'workload': name, 'figure': 'loss' if name == plans.TEXT else 'accuracy'}
      for name in spec.workloads]
  return measures_lib.completed(given, spec.workloads, spec.file)
