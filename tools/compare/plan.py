"""What a study plans, what its runs give, and how both stand in its files.

WORKDIR/study.json is the frozen plan. WORKDIR/results.json is everything that
was found, by key:

  study       name, hash of the plan that it is of
  outcomes    Outcome of every run that is done, as objects
  noise       noise.measured's
  announced   noise.announce's
  advice      advice.sentence's
  tuned       Tuned, of each variant, size and workload
  screen, confirm, ...: the Verdicts of each phase that compares
  predicted   of Frozen.predictions, that of the phase `largest`
  phases      by phase: {'planned': runs, 'done': runs, 'failed': runs,
              'tokens', 'flops', 'seconds', 'wall_seconds', 'finished': bool}
  as_planned  {'same': bool, 'differences': [sentences]}
  provenance  {'codes': [...], 'devices': [...], 'versions': {...}}

What a phase decides (phases.py) is absent where it is not over.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
import time
from typing import Any, NamedTuple

from common.errors import require
from tools.compare import layout, spec

REPORT = 'report'  # what follows the last phase
TEXT = 'text'  # the workload that every study has, and that comes first
AGAIN = 'base-again'  # the base with other first parameters, of `noise`
LOWER, HIGHER = 'lower', 'higher'  # which value of a measure is better
WITH_CURVES = ('noise', 'confirm')  # whose runs are evaluated as they train
# Seeds from the first of a study to the first of another, and how many such
# places there are: all seeds are below 2^31.
STUDY_APART, PLACES = 100_000, 20_000


@dataclasses.dataclass(frozen=True)
class Measure:
  """A figure by which variants are compared.

  Attributes:
    name: what tables call it: 'loss', 'mqar'.
    workload: 'text' or a probe's name: which runs give it.
    figure: where it stands among a run's figures: 'loss', 'bits_per_byte',
      'probe/accuracy', TASK/FIGURE.
    better: LOWER or HIGHER.
    chance: what guessing gives, which a run that diverged counts as.
  """
  name: str
  workload: str
  figure: str
  better: str
  chance: float

  @property
  def sign(self) -> int:
    """What makes a difference positive where it is an improvement."""
    return 1 if self.better == HIGHER else -1


@dataclasses.dataclass(frozen=True)
class Tuning:
  """The search that each variant and the base get alike, by halving.

  Attributes:
    fields: the values that are tried, by config field, rising; every
      combination of them is a candidate.
    keep: the share of the candidates that survives a rung.
    rungs: rung r trains train.steps * keep ** (rungs - 1 - r) steps, each with
      a whole schedule of its own.
    extend: how often an optimum at the edge of a field's values may move that
      edge one value out; after that it is marked as at the edge.
  """
  fields: Mapping[str, tuple]
  keep: float = 0.5
  rungs: int = 2
  extend: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is asked, and all that decides on the answer.

  Attributes:
    base: the name of the variant that the others are compared with.
    variants: the others.
    sizes: smallest first.
    workloads: 'text' first, then probes.
    measures: the first is the primary one, which the verdict is on.
    seeds: how many each phase has, in their order. A phase that is not here is
      none of the study.
    effect: the smallest improvement of the primary measure that is wanted.
    alpha: family-wise error of the confirmation (Holm).
    q: false discovery rate of the screening (Benjamini-Hochberg).
    power: with which `effect` is to be found.
    unstable: how much larger than the base's the share of a variant's runs
      that diverge may be.
    match: the figure of a point that is made equal at each size; '': none.
    match_field: the field that is solved for it.
    tuned_sizes: those that are tuned; the others take the values of the
      largest of these. With muP the smallest alone, else all of `sizes`.
    floor: of the loss, at which one of both laws of a compute multiplier is
      pinned; None: 0.
    largest: the size that the phase `largest` predicts, and that is not in
      `sizes`; None: the study has no such phase.
    margin: of the primary measure, within which a variant is equivalent to the
      base; None: equivalence is not asked for.
    settings: the constants of the phases (Phase.constants); None: they have
      none.
    replication: its number; another one is a study of the same with fresh
      seeds.
    offset: what is added to all of its seeds; None: nothing.
    least_snr: the least signal-to-noise that the noise phase must give to a
      measure which is not the primary one, for it to go on; None: none.
    target: the held-out loss of which the report says what each variant spends
      to reach it; None: none.
  """
  name: str
  question: str
  file: str
  base: str
  variants: tuple[str, ...]
  sizes: tuple[str, ...]
  workloads: tuple[str, ...]
  measures: tuple[Measure, ...]
  seeds: Mapping[str, int]
  tuning: Tuning
  effect: float
  alpha: float = 0.05
  q: float = 0.05
  power: float = 0.8
  unstable: float = 0.1
  match: str = ''
  match_field: str = ''
  tuned_sizes: tuple[str, ...] = ()
  margin: float | None = None
  settings: Mapping[str, Any] | None = None
  replication: int | None = None
  offset: int | None = None
  floor: float | None = None
  largest: str | None = None
  least_snr: float | None = None
  target: float | None = None

  @property
  def every_size(self) -> tuple[str, ...]:
    """With the one that is predicted."""
    return (*self.sizes, *filter(None, [self.largest]))

  @property
  def primary(self) -> Measure:
    return self.measures[0]

  def of_workload(self, workload: str) -> tuple[Measure, ...]:
    return tuple(m for m in self.measures if m.workload == workload)


class Outcome(NamedTuple):
  """What one run gave.

  Attributes:
    phase: its name.
    variant: of the plan, its base, or AGAIN.
    values: by the measures' names; `chance` where the run diverged.
    diverged: whether its loss was not finite, ended well above guessing, or
      the run ended after too many bad steps.
    flops, seconds: of its training steps; seconds are NaN where not known.
    changes: what differs from the study's base config, tuned values too.
    loss: held out, of its workload, after the last step; infinite where it is
      not finite.
    curve: of held-out loss: lists by 'step', 'tokens', 'flops', 'seconds',
      'loss', and 'warm': whether the learning rate had reached its height, from
      where on a law is fitted; {} of phases beside WITH_CURVES.
    items: what each item scored, of the measures of which it is kept: a record
      of training/evals/items.py by the measure's name; of the held-out loss its
      items are documents.
    cooled: whether the learning rate fell to the end of its schedule by the
      last step, without which a run is no run of its budget; None: not known.
    body: the share of `flops` that is not for products with the vocabulary;
      None: not known.
  """
  phase: str
  variant: str
  size: str
  workload: str
  seed: int
  values: dict[str, float]
  diverged: bool
  flops: float
  seconds: float
  params: int
  changes: dict
  loss: float = float('nan')
  curve: dict = {}
  items: dict = {}
  cooled: bool | None = None
  body: float | None = None


@dataclasses.dataclass(frozen=True)
class Tuned:
  """What tuning found for one variant at one size on one workload.

  Attributes:
    changes: the values chosen, by field.
    at_edge: of these fields, those whose optimum is still at the edge of what
      was tried.
    runs: how many it took.
    tried: of each candidate of each rung {'rung', 'steps', 'changes', 'value',
      'values', 'loss', 'diverged'}: means over the seeds of tuning, of the
      workload's first measure (and its values) and of the held-out loss.
  """
  variant: str
  size: str
  workload: str
  changes: dict
  at_edge: tuple[str, ...]
  runs: int
  tried: tuple[dict, ...]


@dataclasses.dataclass
class Frozen:
  """What study.json holds.

  Attributes:
    plan: the plan.
    base_config: the config that every run changes, as a tree.
    points: of each variant, size and workload {'variant', 'size', 'workload',
      'changes', 'matched', 'params', 'active_params', 'flops_per_token',
      'tokens', 'vocab', 'guess'}, and of the text 'body' (cost.body): what
      it changes in base_config before it is tuned, what a run of train.steps
      steps costs, and the loss of guessing.
    sources: hashes of the sources of data, as far as they lie on this machine,
      and of the tokenizers.
    code: {'commit', 'diff'} as provenance.this_start() says them.
    amendments: of each {'reason', 'time', 'before', 'changed', 'seen'}: why
      the plan was changed, when, the hash of the plan before, the fields that
      changed, and by phase how many seeds had been looked at.
    notes: what else was decided by hand, as {'time', 'told'}.
    predictions: of each {'time', 'plan', 'hash', 'blind', 'rows'}: when it was
      made, by the plan of which hash, its own hash, whether no run of what it
      predicts had begun, and what efficiency.predict returned.
    time: when it was frozen first; 0: it is not.
    inputs: a hash of what `points` follow from; '': not known.
  """
  plan: Plan
  base_config: dict
  points: list[dict]
  sources: dict[str, str]
  code: dict
  amendments: list[dict] = dataclasses.field(default_factory=list)
  notes: list[dict] = dataclasses.field(default_factory=list)
  time: float = 0.0
  predictions: list[dict] = dataclasses.field(default_factory=list)
  inputs: str = ''

  @property
  def hash(self) -> str:
    """Of all that was planned, and what it was planned with. A field of the
    plan that is None, which a later version may add, is no part of it."""
    tree = to_json(self)
    tree['plan'] = {name: x for name, x in tree['plan'].items()
                    if x is not None}
    return layout.checksum({name: tree[name] for name in (
        'plan', 'base_config', 'points', 'sources', 'code')})

  @property
  def known(self) -> set[str]:
    """The hashes of this plan and of those that it was amended from."""
    return {self.hash, *(change['before'] for change in self.amendments)}

  @property
  def drawn(self) -> int:
    """The offset of seeds that the plan draws by its hash, in which its
    replication is."""
    plan = dataclasses.replace(self.plan, offset=None)
    blank = dataclasses.replace(self, plan=plan)
    return STUDY_APART * (1 + int(blank.hash, 16) % PLACES)

  def point(self, variant: str, size: str, workload: str) -> dict:
    wanted = (variant, size, workload)
    return next(row for row in self.points if wanted == (
        row['variant'], row['size'], row['workload']))

  def point_of(self, run: Any) -> dict:
    """Returns the point of a run, or of its Outcome."""
    return self.point(self.plan.base if run.variant == AGAIN
                      else run.variant, run.size, run.workload)

  def steps(self, changes: Mapping[str, Any]) -> int:
    """Returns the steps that a run with a point's or a run's changes trains."""
    return changes.get('train.steps', self.base_config['train']['steps'])


def save(workdir, frozen: Frozen) -> None:
  """Writes study.json, and what it holds into the ledger beside it."""
  with layout.StudyLedger(workdir) as ledger, ledger.transaction():
    _save(ledger, workdir, frozen)


def _save(ledger, workdir, frozen: Frozen) -> None:
  tree = to_json(frozen)
  if ledger.plan() != tree:
    ledger.add_plan(frozen.hash, tree)
  layout.save_checked(pathlib.Path(workdir) / 'study.json', tree)


def load(workdir) -> Frozen:
  """Returns what study.json holds; RequestError where there is none, or where
  it is not what the ledger has."""
  path = pathlib.Path(workdir) / 'study.json'
  require(path.is_file(), f'{path} is missing: no study was run in this '
          'workdir')
  tree = last = layout.load_checked(path)
  if path.with_name(layout.StudyLedger.file).is_file():
    with layout.StudyLedger(workdir) as ledger, ledger.transaction():
      tree, last = layout.load_checked(path), ledger.plan()
  require(last in (None, tree), f'{path} is not the plan that the ledger beside'
          ' it has: remove it, and `run` puts back what was planned')
  return _frozen(tree)


def last(workdir) -> Frozen | None:
  """Returns the plan that the ledger of a workdir has last, if any."""
  if not (pathlib.Path(workdir) / layout.StudyLedger.file).is_file():
    return None
  with layout.StudyLedger(workdir) as ledger, ledger.transaction():
    tree = ledger.plan()
  return tree and _frozen(tree)


def _frozen(tree: Mapping[str, Any]) -> Frozen:
  plan = spec.tuples(tree['plan'])
  return Frozen(**tree | {'plan': Plan(**plan | dict(
      measures=tuple(Measure(**row) for row in plan['measures']),
      tuning=Tuning(**plan['tuning'])))})


def date(seconds: float) -> str:
  return time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(seconds))


def phase_of(folder: pathlib.Path) -> str:
  """Returns the phase whose runs a folder of a study has."""
  return folder.name.partition('-')[0]


def adopted(workdir, frozen: Frozen, reason: str = '') -> Frozen:
  """Returns the plan that goes on in a workdir, and writes it there.

  What was planned before is what the ledger has last: so study.json may be
  removed, and is put back. Where the ledger is gone, too, the runs and the
  results say by which plan they were made.

  Args:
    workdir: of the study.
    frozen: of the file as it is now.
    reason: why it was changed, where it was.

  Raises:
    RequestError: where it was changed, or there are runs or results of another
      plan, and no reason is given.
  """
  path = pathlib.Path(workdir) / 'study.json'
  with layout.StudyLedger(workdir) as ledger, ledger.transaction():
    tree = ledger.plan() or (
        layout.load_checked(path) if path.is_file() else None)
    old = _frozen(tree) if tree else dataclasses.replace(
        frozen, time=time.time())
    # An amendment keeps the seeds, unless the file asks for others.
    if (frozen.plan.offset == frozen.drawn
        and frozen.plan.replication == old.plan.replication):
      frozen = dataclasses.replace(frozen, plan=dataclasses.replace(
          frozen.plan, offset=old.plan.offset))
    before, after = map(_planned, (old, frozen))
    # What an older version does not say of a point is as planned.
    for name, row in before['points'].items():
      if name in after['points']:
        after['points'][name] = {
            key: x for key, x in after['points'][name].items() if key in row}
    # Data of which the old plan has no hash are as planned.
    after['sources'] = {name: frozen.sources[name] for name in old.sources
                        if name in frozen.sources}
    changed = layout.differences(before, after)
    require(not changed or bool(reason), f'{workdir} was planned otherwise: '
            f'{", ".join(changed[:8])}{", ..." * (len(changed) > 8)} changed '
            'since. Take another --workdir, or give the reason by '
            '--amend=REASON, which the report will tell')
    others = _others(workdir, old.known)
    require(not others or bool(reason), f'{workdir} holds what is of another '
            'plan than this study has had: ' + '; '.join(
                f'{", ".join(where)} by {_plan(hash)}'
                for hash, where in others.items()) + '. Move it away, take '
            'another --workdir, or give the reason why it is of this study by '
            '--amend=REASON, which the report will tell')
    seen = _seen(workdir, ledger, old.plan)
    amendments = [{'before': hash, 'changed': [
        f'from {_plan(hash)}, which is not kept']} for hash in others]
    if changed:
      amendments.append({'before': old.hash, 'changed': changed})
    going = dataclasses.replace(
        frozen if changed else old, notes=old.notes, time=old.time,
        predictions=[*old.predictions],
        amendments=[*old.amendments, *(
            {'reason': reason, 'time': time.time(), **row, 'seen': seen}
            for row in amendments)])
    _save(ledger, workdir, going)
  return going


def predicted(workdir, frozen: Frozen, phase: str, rows: Sequence) -> dict:
  """Returns the prediction of what a phase will find that was frozen first by
  this plan: `rows`, which stand in the ledger from then on, if there is none.
  """
  with layout.StudyLedger(workdir) as ledger, ledger.transaction():
    kept = ledger.plan().get('predictions', [])
    record = next((x for x in kept if x['plan'] == frozen.hash), None)
    if record is None:
      record = {'time': time.time(), 'plan': frozen.hash,
                'hash': layout.checksum(rows), 'rows': rows,
                'blind': phase not in _seen(workdir, ledger, frozen.plan)}
      kept = [*kept, record]
    frozen.predictions[:] = kept
    _save(ledger, workdir, frozen)
  return record


def _plan(hash: str) -> str:
  return f'the plan {hash}' if hash else 'no plan'


def _others(workdir, known: set[str]) -> dict[str, list[str]]:
  """Returns the folders and files of a study that are of no plan of `known`,
  by the hash of their plan; '': of none."""
  others: dict[str, list[str]] = {}
  for path in sorted(pathlib.Path(workdir).glob('*/sweep.json')):
    for hash in sorted(layout.plans_of(path.parent) - known):
      others.setdefault(hash, []).append(path.parent.name)
  results = pathlib.Path(workdir) / 'results.json'
  if results.is_file():
    hash = layout.load_checked(results)['study']['hash']
    if hash not in known:
      others.setdefault(hash, []).append(results.name)
  return others


def _seen(workdir, ledger, plan: Plan) -> dict[str, int]:
  """Returns how many seeds of each phase have been begun, also of runs that are
  deleted since."""
  seeds = {(phase_of(path.parents[2]), int(path.name.removeprefix('seed-')))
           for path in pathlib.Path(workdir).glob('*/points/*/seed-*')}
  seeds |= {(phase_of(pathlib.Path(folder)), seed)
            for folder, _, seed in ledger.begun()}
  phases = [phase for phase, _ in seeds]
  return {phase: phases.count(phase) for phase in plan.seeds if phase in phases}


def _planned(frozen: Frozen) -> dict:
  """Returns what must not change of a plan; the code may, which
  results.as_planned tells."""
  return {'plan': to_json(frozen.plan), 'base_config': frozen.base_config,
          'sources': frozen.sources, 'points': {
              '.'.join((row['variant'], row['size'], row['workload'])): row
              for row in frozen.points}}


def to_json(value: Any) -> Any:
  """Returns dataclasses and Outcomes as plain dicts and lists; figures that
  are not finite as null."""
  if dataclasses.is_dataclass(value):
    return {field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)}
  if hasattr(value, '_asdict'):
    return to_json(value._asdict())
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  if isinstance(value, float) and not abs(value) < math.inf:
    return None
  return value


def outcome_from_json(tree: Mapping[str, Any]) -> Outcome:
  """Returns the outcome that `to_json` wrote."""
  return Outcome(**tree | {
      name: missing for name, missing in (
          ('seconds', math.nan), ('loss', math.inf)) if tree[name] is None})
