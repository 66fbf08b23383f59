"""What a change of a config does to a run that is resumed: the kinds, and the
fields whose kind depends on their values (CLASSES of run_config.py).

A function takes the fields of the old and of the new config by their dotted
names, and returns (kind, why).
"""

from collections.abc import Mapping
from typing import Any

SAFE = 'safe'
OPTIMISATION = 'changes the optimisation'
INCOMPATIBLE = 'incompatible'


def steps(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
  """Of train.steps."""
  read = ('optim.schedule', 'optim.decay_steps')
  if any(name not in fields for fields in (old, new) for name in read):
    return OPTIMISATION, 'the schedule may depend on the last step'
  schedules = old['optim.schedule'], new['optim.schedule']
  if all(name in ('constant', 'rsqrt') for name in schedules):
    return SAFE, 'this schedule does not depend on the last step'
  if old['optim.decay_steps'] and old['optim.decay_steps'] == new[
      'optim.decay_steps']:
    return SAFE, 'the schedule ends at optim.decay_steps'
  return OPTIMISATION, 'the schedule is drawn out to the last step'


def ema(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str]:
  """Of optim.ema, which runs of earlier versions do not have."""
  if bool(old.get('optim.ema')) == bool(new.get('optim.ema')):
    return OPTIMISATION, 'another average from here on'
  return INCOMPATIBLE, 'an average that is kept from the first step on, or not'
