"""study.json: the plan of a study as it was frozen, and its hash."""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

from configs.errors import require
from tools.compare import plan as plans
from training.workdir import run_config, schema


@dataclasses.dataclass
class Frozen:
  """What study.json holds.

  Attributes:
    plan: the plan.
    base_config: the config that every run changes, as a tree.
    points: of each variant, size and workload {'variant', 'size', 'workload',
      'changes', 'matched', 'params', 'active_params', 'flops_per_token',
      'tokens', 'vocab'}: what it changes in base_config before it is tuned,
      and what a run of train.steps steps costs; and where it is not the
      logarithm of 'vocab', 'guess': the loss of guessing.
    sources: hashes by what was hashed: 'file', the text of the study's file,
      and each source of data, as far as it lies on this machine.
    code: {'commit', 'diff'} as provenance.this_start() says them.
    amendments: of each {'reason', 'time', 'before', 'changed', 'seen'}: why
      the plan was changed, when, the hash of the plan before, the fields that
      changed, and the phases that had been looked at.
    notes: what else was decided by hand, as {'time', 'told'}.
  """
  plan: plans.Plan
  base_config: dict
  points: list[dict]
  sources: dict[str, str]
  code: dict
  amendments: list[dict] = dataclasses.field(default_factory=list)
  notes: list[dict] = dataclasses.field(default_factory=list)

  @property
  def hash(self) -> str:
    """Of all that was planned, and what it was planned with."""
    return _hash(plans.to_json(self))

  def point(self, variant: str, size: str, workload: str) -> dict:
    wanted = (variant, size, workload)
    return next(row for row in self.points if wanted == (
        row['variant'], row['size'], row['workload']))

  def point_of(self, run: Any) -> dict:
    """Returns the point of a run, or of its Outcome."""
    return self.point(self.plan.base if run.variant == plans.AGAIN
                      else run.variant, run.size, run.workload)

  def guess(self, point: dict) -> float:
    """Returns the loss that guessing gives a run of a point."""
    return point.get('guess', math.log(point['vocab']))

  def steps(self, point: dict) -> int:
    """Returns the steps that a whole run of a point trains."""
    return point['changes'].get('train.steps',
                                self.base_config['train']['steps'])


def digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def to_json(frozen: Frozen) -> dict[str, Any]:
  return plans.to_json(frozen) | {'hash': frozen.hash}


def _hash(tree: dict) -> str:
  return digest(json.dumps({name: tree[name] for name in _PLANNED},
                           sort_keys=True).encode())


_PLANNED = ('plan', 'base_config', 'points', 'sources', 'code')
# What is told of a plan beside what its hash vouches for.
_TOLD = {'amendments': [{'reason': str, 'time': schema.NUMBER, 'before': str,
                         'changed': [str], 'seen': [str]}],
         'notes': [{'time': schema.NUMBER, 'told': str}], 'hash': str}


def from_json(tree: Any, who: str) -> Frozen:
  """Returns what study.json holds.

  Raises:
    RequestError: where it is damaged; `who` is the file.
  """
  schema.check_shape(tree, dict.fromkeys(_PLANNED, {}) | {'points': [{}]}
                     | _TOLD, who)
  require(_hash(tree) == tree['hash'], f'{who} is not as it was written: its '
          f'hash is {_hash(tree)}, and it says {tree["hash"]}; put it back')
  own = {field.name: tree[field.name] for field in dataclasses.fields(Frozen)}
  return Frozen(**own | {'plan': plans.plan_from_json(tree['plan'])})


def changed(old: Frozen, new: Frozen) -> list[str]:
  """Returns the dotted names of what was planned otherwise; the code may
  differ, which results.as_planned tells. Data of which the old plan has no hash
  are as planned."""
  flat = []
  for each in (old, new):
    tree = plans.to_json(each)
    points = {'.'.join((row['variant'], row['size'], row['workload'])): row
              for row in tree['points']}
    flat.append(run_config.flatten_dict(json.loads(json.dumps({
        'plan': tree['plan'], 'base_config': tree['base_config'],
        'sources': {name: held for name, held in tree['sources'].items()
                    if name in old.sources}, 'points': points}))))
  before, after = flat
  return [name for name in {**before, **after}
          if name not in before or name not in after
          or before[name] != after[name]]


def load(workdir) -> Frozen:
  """Returns what study.json holds; RequestError where there is none."""
  path = pathlib.Path(workdir) / 'study.json'
  require(path.is_file(), f'{path} is missing: no study was run in this '
          'workdir')
  tree = schema.parse(path.read_bytes(), str(path))
  return from_json(tree, str(path))
