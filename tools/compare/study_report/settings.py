"""The hyperparameters of a study, as its runs read them."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from architectures.parts import unread as unread_lib
from tools.compare import plan as plans
from tools.compare.study_report.record import Record
from tools.compare import spec
from training import runs
from training.workdir import run_config

# Fields that say where and how a run is done, not what it computes.
ASIDE = ('log.', 'checkpoint.', 'mesh.', 'profile.')


def of_base(record: Record) -> dict[str, Any]:
  """Returns what the base reads on text at the smallest size, by dotted name,
  with what the model derives filled in; not what its parts do not read."""
  plan, frozen = record.plan, record.frozen
  point = frozen.point(plan.base, plan.sizes[0], plans.TEXT)
  config = run_config.from_json(frozen.base_config)
  config = spec.changed(config, point['changes'], f'the base {plan.base!r}')
  model = runs.resolve_alone(config)
  resolved = run_config.flatten_dict({'model': dataclasses.asdict(model)})
  unread = {f'model.{name}' for name in unread_lib.unread(model)}
  found = {}
  for name, value in run_config.flatten(config).items():
    if not (name.startswith(ASIDE) or name in unread):
      found[name] = resolved.get(name, value)
  return found | {'model.vocab_size': point['vocab']}


def alone(record: Record, row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a point changes beside the base of its size and workload; of
  the base, nothing."""
  plan = record.plan
  base = record.frozen.point(plan.base, row['size'], row['workload'])['changes']
  missing = object()
  return {name: value for name, value in row['changes'].items()
          if base.get(name, missing) != value}
