"""Plans of studies, outcomes of their runs, and how both stand in files.

WORKDIR/study.json is the frozen plan. WORKDIR/results.json is everything that
was found, by key:

  study       the name of the study, and the hash of its plan
  outcomes    the Outcome of every run that is done, as an object
  noise       noise.measure_noise's
  announced   noise.announce_power's
  advice      advice.describe_what_lowers_noise's
  tuned       the Tuned of each variant, size and workload
  screen, confirm, ...: the Verdicts of each phase that compares
  predicted   the row of Frozen.predictions for the phase `largest`
  phases      by phase: {'planned': runs, 'done': runs, 'failed': runs,
              'tokens', 'flops', 'seconds', 'finished': bool}
  as_planned  {'differences': [sentences], ...} (results.as_planned)
  provenance  {'codes': [...], 'devices': [...], 'versions': {...}}

What a phase decides (phases.py) is absent where it is not over.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import math
import pathlib
import time
from typing import Any, NamedTuple

from common.errors import RequestError, require
from tools.compare import layout
from training import plugins
from training.workdir import run_config

REPORT = 'report'  # what follows the last phase
TEXT = 'text'  # the workload that every study has, and that comes first
SECOND_BASE = 'base-again'  # the base with other first parameters, of `noise`
LOWER, HIGHER = 'lower', 'higher'  # which value of a measure is better
# whose runs are evaluated as they train
PHASES_WITH_CURVES = ('noise', 'confirm')
# Seeds from the first of a study to the first of another, and how many such
# places there are: all seeds are below 2^31.
SEEDS_BETWEEN_STUDIES, NUM_SEED_RANGES = 100_000, 20_000


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
    """The sign that makes a difference positive where it is an improvement."""
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
  """The plan of a study: its question, and every choice that decides on the
  answer, made before it runs.

  Attributes:
    name, question, file: what the study is called and asks, and its file.
    base: the name of the variant that the others are compared with.
    variants: the names of the others.
    sizes: the names of the sizes, smallest first.
    workloads: the names of the workloads: 'text' first, then probes.
    measures: the first is the primary one, which the verdict is on.
    seeds: how many each phase has, in their order. A phase that is not here is
      none of the study.
    effect: the smallest improvement of the primary measure that is wanted.
    tuning: the search for the values of each variant.
    alpha: the family-wise error of the confirmation (Holm).
    q: the false discovery rate of the screening (Benjamini-Hochberg).
    power: the probability with which `effect` is to be found.
    unstable: how much larger than the base's the share of a variant's runs
      that diverge may be.
    match: the figure of a point that is made equal at each size; '': none.
    match_field: the field that is solved for it.
    tuned_sizes: those that are tuned; the others take the values of the
      largest of these. With muP the smallest alone, else all of `sizes`.
    tuned_at_each_size: the variants without muP of a base with it, which are
      tuned at all of `sizes`; None: there are none.
    checked_size: the size at which the values that muP carries are run beside
      their neighbours; None: no values are carried by muP.
    order_of_sizes: every size of the study, smallest first, where this is the
      plan of a phase that has fewer of them; None: `all_sizes` has them.
    floor: the loss at which one of both laws of a compute multiplier is
      pinned; None: 0.
    largest: the size that the phase `largest` predicts, and that is not in
      `sizes`; None: the study has no such phase.
    margin: the difference in the primary measure within which a variant is
      equivalent to the base; None: equivalence is not asked for.
    settings: the constants of the phases (Phase.constants); None: they have
      none.
    replication: the number of the replication; another one is a study of the
      same with fresh seeds.
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
  tuned_at_each_size: tuple[str, ...] | None = None
  checked_size: str | None = None
  order_of_sizes: tuple[str, ...] | None = None

  @property
  def all_sizes(self) -> tuple[str, ...]:
    """The sizes, and the one that is predicted."""
    if self.largest is None:
      return self.sizes
    return (*self.sizes, self.largest)

  def tuned_sizes_of_variant(self, variant: str) -> tuple[str, ...]:
    """Returns the sizes at which a variant, or the base, is tuned."""
    if not self.tuned_sizes or variant in (self.tuned_at_each_size or ()):
      return self.sizes
    return self.tuned_sizes

  def size_of_tuning(self, size: str, tuned_sizes: Collection[str]) -> str:
    """Returns the size whose tuning the runs of a size take their values from.
    That is the largest tuned size which is not larger.

    Args:
      size: the name of the size of the runs.
      tuned_sizes: the sizes at which their variant has runs of tuning on their
        workload. If none is as small as `size`, `size` itself is returned.
    """
    order = self.order_of_sizes or self.all_sizes
    not_larger = order[:order.index(size) + 1]
    for candidate in reversed(not_larger):
      if candidate in tuned_sizes:
        return candidate
    return size

  @property
  def primary(self) -> Measure:
    """The measure that the verdict is on."""
    return self.measures[0]

  def measures_of_workload(self, workload: str) -> tuple[Measure, ...]:
    """Returns the measures that runs of a workload give."""
    return tuple(measure for measure in self.measures
                 if measure.workload == workload)


class Outcome(NamedTuple):
  """The outcome of one run.

  Attributes:
    phase: the name of its phase.
    variant: a variant of the plan, its base, or AGAIN.
    size, workload, seed: where it stands in the study.
    values: its figures by the measures' names; `chance` where it diverged.
    diverged: whether its loss was not finite, ended well above guessing, or
      the run ended after too many bad steps.
    flops, seconds: what its training steps took; seconds are NaN where they are
      not known.
    params: the number of its parameters.
    changes: what differs from the study's base config, tuned values too.
    loss: the held-out loss of its workload after the last step; infinite where
      it is not finite.
    curve: the curve of held-out loss: lists by 'step', 'tokens', 'flops',
      'seconds', 'loss', and 'warm': whether the learning rate had reached its
      height, from where on a law is fitted; {} of phases beside WITH_CURVES.
    items: what each item scored, of the measures of which it is kept: a record
      of training/evals/items.py by the measure's name; of the held-out loss its
      items are documents.
    cooled: whether the learning rate fell to the end of its schedule by the
      last step, without which a run is no run of its budget; None: not known.
    body: the share of `flops` that is not for products with the vocabulary;
      None: not known.
    shares_clock: whether it trained as one program with others, so that its
      `seconds` are a share of the time of all of them.
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
  shares_clock: bool = False


@dataclasses.dataclass(frozen=True)
class Tuned:
  """The values that tuning found for one variant, size and workload.

  Attributes:
    changes: the values chosen, by field.
    at_edge: the fields whose optimum is still at the edge of what was tried.
    runs: the number of runs that it took.
    tried: for each candidate of each rung {'rung', 'steps', 'changes', 'value',
      'values', 'loss', 'diverged'}: means over the seeds of tuning, of the
      workload's first measure (and its values) and of the held-out loss.
    kept: whether a check at this size kept the values that muP carries from the
      smallest size; None: it was no check.
  """
  variant: str
  size: str
  workload: str
  changes: dict
  at_edge: tuple[str, ...]
  runs: int
  tried: tuple[dict, ...]
  kept: bool | None = None


def find_tuned_row(plan: Plan, tuned: Sequence[Mapping[str, Any]],
                   variant: str, size: str, workload: str
                   ) -> Mapping[str, Any] | None:
  """Returns the search that chose the values of the runs of a variant at a size
  on a workload; None if nothing was tuned. A check that kept values which muP
  carries did not choose them.

  Args:
    plan: the plan of the study.
    tuned: the rows of 'tuned' in its results.json, as Tuned has them.
    variant, size, workload: the names of all three.
  """
  row_by_size = {}
  for row in tuned:
    is_of_variant = (row['variant'], row['workload']) == (variant, workload)
    if is_of_variant and row.get('kept') is not True:
      row_by_size[row['size']] = row
  return row_by_size.get(plan.size_of_tuning(size, row_by_size))


@dataclasses.dataclass
class FrozenPlan:
  """The frozen plan of a study with all that it was planned with: the content
  of study.json.

  Attributes:
    plan: the plan.
    base_config: the config that every run changes, as a tree.
    points: for each variant, size and workload {'variant', 'size', 'workload',
      'changes', 'matched', 'params', 'active_params', 'flops_per_token',
      'tokens', 'vocab', 'guess'}, and for the text 'body'
      (cost.share_of_flops_without_vocabulary): what it changes in base_config
      before it is tuned, what a run of train.steps steps costs, and the loss of
      guessing.
    sources: hashes of the sources of data, as far as they lie on this machine,
      and of the tokenizers.
    code: {'commit', 'diff'} as provenance.describe_this_start() says them.
    amendments: for each {'reason', 'time', 'before', 'changed', 'seen'}: why
      the plan was changed, when, the hash of the plan before, the fields that
      changed, and by phase how many seeds had been looked at.
    notes: what else was decided by hand, as {'time', 'told'}.
    predictions: for each {'time', 'plan', 'hash', 'blind', 'rows'}: when it was
      made, by the plan of which hash, its own hash, whether no run of what it
      predicts had begun, and what efficiency.predict_largest_size returned.
    time: when it was frozen first; 0: it is not.
    inputs: a hash of what `points` follow from; '': not known.
    files: the text of each file from outside the tree that declares a part of
      the study, such as a phase of its own, by its path.
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
  files: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def hash(self) -> str:
    """The hash of all that was planned, and what it was planned with. A field
    of the plan that is None, which a later version may add, is no part of it.
    """
    tree = to_json(self)
    plan = tree['plan']
    planned = {'plan': {name: plan[name] for name in plan
                        if plan[name] is not None}}
    for name in ('base_config', 'points', 'sources', 'code'):
      planned[name] = tree[name]
    return layout.json_checksum(planned)

  @property
  def known_hashes(self) -> set[str]:
    """The hashes of this plan and of those that it was amended from."""
    return {self.hash, *(change['before'] for change in self.amendments)}

  @property
  def seed_offset_of_hash(self) -> int:
    """The offset of seeds that the plan draws by its hash, in which its
    replication is."""
    plan = dataclasses.replace(self.plan, offset=None)
    blank = dataclasses.replace(self, plan=plan)
    return SEEDS_BETWEEN_STUDIES * (1 + int(blank.hash, 16) % NUM_SEED_RANGES)

  def point(self, variant: str, size: str, workload: str) -> dict:
    """Returns the entry of `points` of a variant at a size on a workload."""
    wanted = variant, size, workload
    for row in self.points:
      if (row['variant'], row['size'], row['workload']) == wanted:
        return row
    raise KeyError(wanted)

  def point_of_run(self, run: Any) -> dict:
    """Returns the entry of `points` of a run, or of the Outcome of one."""
    variant = self.plan.base if run.variant == SECOND_BASE else run.variant
    return self.point(variant, run.size, run.workload)

  def steps(self, changes: Mapping[str, Any]) -> int:
    """Returns the steps that a run with a point's or a run's changes trains."""
    return changes.get('train.steps', self.base_config['train']['steps'])


def save_frozen_plan(workdir, frozen: FrozenPlan) -> None:
  """Writes the frozen plan of a study to study.json and to the ledger beside
  it, a database that keeps all plans that the study has had."""
  with layout.StudyLedger(workdir) as ledger, ledger.transaction():
    _write_with_ledger(ledger, workdir, frozen)


def _write_with_ledger(ledger, workdir, frozen: FrozenPlan) -> None:
  """Writes study.json, and adds the plan to the open ledger of the study where
  it is new."""
  tree = to_json(frozen)
  if ledger.last_plan() != tree:
    ledger.add_plan(frozen.hash, tree)
  layout.save_with_checksum(pathlib.Path(workdir) / 'study.json', tree)


def load_frozen_plan(workdir) -> FrozenPlan:
  """Reads the plan of a study from its study.json. The plan is frozen: it was
  written down before anything was trained.

  Args:
    workdir: the folder of the study.

  Raises:
    RequestError: if there is no plan, or if the study's ledger (a database that
      keeps a copy of it) has another one.
  """
  path = pathlib.Path(workdir) / 'study.json'
  require(path.is_file(), f'{path} is missing: no study was run in this '
          'workdir')

  # Another process may write both files. The transaction keeps it from doing so
  # between the two reads. Without a ledger, or with one that has no plan,
  # there is nothing to compare with.
  tree = layout.load_with_checksum(path)
  plan_of_ledger = None
  if path.with_name(layout.StudyLedger.file_name).is_file():
    with layout.StudyLedger(workdir) as ledger, ledger.transaction():
      tree = layout.load_with_checksum(path)
      plan_of_ledger = ledger.last_plan()
  require(plan_of_ledger in (None, tree), f'{path} is not the plan that the '
          'ledger beside it has: remove it, and `run` puts back what was '
          'planned')
  return _frozen_plan_from_json(tree)


def load_last_plan(workdir) -> FrozenPlan | None:
  """Returns the plan that the ledger of a study had last; None where there is
  no ledger."""
  if not (pathlib.Path(workdir) / layout.StudyLedger.file_name).is_file():
    return None
  with layout.StudyLedger(workdir) as ledger, ledger.transaction():
    tree = ledger.last_plan()
  return tree and _frozen_plan_from_json(tree)


def _frozen_plan_from_json(tree: Mapping[str, Any]) -> FrozenPlan:
  """Returns the frozen plan that `to_json` wrote, and loads the Python files of
  the user that it holds, such as one with a phase of its own."""
  plugins.restore_declared_parts(tree.get('files', {}))
  fields = run_config.lists_to_tuples(tree['plan'])
  measures = tuple(Measure(**row) for row in fields['measures'])
  tuning = Tuning(**fields['tuning'])
  plan = Plan(**fields | {'measures': measures, 'tuning': tuning})
  return FrozenPlan(**tree | {'plan': plan})


def format_date(seconds: float) -> str:
  """Returns a time in seconds since 1970 as '2026-01-31 12:00 UTC'."""
  return time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(seconds))


def phase_of_folder(folder: pathlib.Path) -> str:
  """Returns the phase whose runs a folder of a study has."""
  return folder.name.partition('-')[0]


def adopt_plan(workdir, frozen: FrozenPlan, reason: str = '') -> FrozenPlan:
  """Returns the plan by which a study begins or goes on in a workdir, and
  writes it there. A change since the plan was frozen is recorded as an
  amendment.

  What was planned before is what the ledger has last: so study.json may be
  removed, and is put back. Where the ledger is gone, too, the runs and the
  results say by which plan they were made.

  Args:
    workdir: the folder of the study.
    frozen: the plan of the file as it is now.
    reason: why it was changed, where it was.

  Raises:
    RequestError: where it was changed, or there are runs or results of another
      plan, and no reason is given.
  """
  path = pathlib.Path(workdir) / 'study.json'
  with layout.StudyLedger(workdir) as ledger, ledger.transaction():
    # The plan before; where there was none, that of now.
    tree = ledger.last_plan()
    if not tree and path.is_file():
      tree = layout.load_with_checksum(path)
    if tree:
      old = _frozen_plan_from_json(tree)
    else:
      old = dataclasses.replace(frozen, time=time.time())
    new = _keep_seeds_of_older_plan(old, frozen)

    # The fields that have changed since, and runs that are of other plans.
    changed = _changed_fields(old, new)
    _check_unchanged(workdir, changed, reason)
    others = _results_of_other_plans(workdir, old.known_hashes)
    _check_no_other_plans(workdir, others, reason)

    # Each is an amendment, of which the report tells.
    amendments = list(old.amendments)
    told = {'reason': reason, 'time': time.time()}
    seen = _count_begun_seeds(workdir, ledger, old.plan)
    for hash in others:
      changed_from = [f'from {_name_of_plan(hash)}, which is not kept']
      amendments.append(
          told | {'before': hash, 'changed': changed_from, 'seen': seen})
    if changed:
      amendments.append(
          told | {'before': old.hash, 'changed': changed, 'seen': seen})
    going = dataclasses.replace(
        new if changed else old, time=old.time, notes=old.notes,
        predictions=list(old.predictions), amendments=amendments)
    _write_with_ledger(ledger, workdir, going)
  return going


def _keep_seeds_of_older_plan(old: FrozenPlan,
                              frozen: FrozenPlan) -> FrozenPlan:
  """Returns a plan with the seeds of an older one: an amendment keeps them,
  unless the file asks for others."""
  is_drawn = frozen.plan.offset == frozen.seed_offset_of_hash
  is_replication = frozen.plan.replication != old.plan.replication
  if not is_drawn or is_replication:
    return frozen
  plan = dataclasses.replace(frozen.plan, offset=old.plan.offset)
  return dataclasses.replace(frozen, plan=plan)


def _changed_fields(old: FrozenPlan, new: FrozenPlan) -> list[str]:
  """Returns the names of the fields in which a new plan differs from an old
  one."""
  before, after = _fixed_by_plan(old), _fixed_by_plan(new)
  # A figure of a point that an older version does not have is as planned.
  for name, row in before['points'].items():
    if name in after['points']:
      after['points'][name] = _common_entries(after['points'][name], row)
  # Data of which the old plan has no hash are as planned.
  after['sources'] = _common_entries(new.sources, old.sources)
  return layout.differing_names(before, after)


def _common_entries(new: Mapping[str, Any],
                    old: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the entries of a dict whose keys an older one has, too."""
  return {name: new[name] for name in new if name in old}


def _check_unchanged(workdir, changed: Sequence[str], reason: str) -> None:
  """Raises RequestError where a plan was changed without a reason."""
  if not changed or reason:
    return
  listed = ', '.join(changed[:8])
  if len(changed) > 8:
    listed += ', ...'
  raise RequestError(
      f'{workdir} was planned otherwise: {listed} changed '
      'since. Take another --workdir, or give the reason by '
      '--amend=REASON, which the report will tell')


def _check_no_other_plans(workdir, names_by_plan: Mapping[str, Sequence[str]],
                          reason: str) -> None:
  """Refuses to go on with a study whose folder has runs or results that were
  made by other plans, unless the user gives a reason.

  Args:
    workdir: the folder of the study.
    names_by_plan: the names of the folders and files of these runs and results,
      by the hash of their plan.
    reason: the reason why they belong to this study, or ''.

  Raises:
    RequestError: if there are any, and no reason.
  """
  if not names_by_plan or reason:
    return
  # Say for each plan what was made by it.
  descriptions = []
  for hash, names in names_by_plan.items():
    descriptions.append(f'{", ".join(names)} by {_name_of_plan(hash)}')
  raise RequestError(
      f'{workdir} holds what is of another plan than this study has had: '
      f'{"; ".join(descriptions)}. Move it away, take another --workdir, or '
      'give the reason why it is of this study by --amend=REASON, which the '
      'report will tell')


def record_prediction(workdir, frozen: FrozenPlan, phase: str,
                      rows: Sequence) -> dict:
  """Records what a phase of a study is predicted to find, before it runs, in
  study.json and in the ledger (the database beside it). Only the first
  prediction of a plan counts: later calls change nothing, and return it.

  Args:
    workdir: the folder of the study.
    frozen: the plan of the study, whose predictions are updated.
    phase: the name of the phase.
    rows: the prediction, as efficiency.predict returns it.

  Returns:
    The first prediction by this plan, as FrozenPlan.predictions has it.
  """
  with layout.StudyLedger(workdir) as ledger, ledger.transaction():
    predictions = ledger.last_plan().get('predictions', [])
    of_this_plan = [prediction for prediction in predictions
                    if prediction['plan'] == frozen.hash]
    record = of_this_plan[0] if of_this_plan else None
    if record is None:
      # The prediction is blind if none of the runs that it is about has begun.
      is_blind = phase not in _count_begun_seeds(workdir, ledger, frozen.plan)
      record = {
          'time': time.time(), 'plan': frozen.hash,
          'hash': layout.json_checksum(rows), 'rows': rows, 'blind': is_blind}
      predictions = [*predictions, record]
    # The list is changed in place, so that all who hold it see the prediction.
    frozen.predictions[:] = predictions
    _write_with_ledger(ledger, workdir, frozen)
  return record


def _name_of_plan(hash: str) -> str:
  """Returns what a plan is called in messages: by its hash, or 'no plan'."""
  return f'the plan {hash}' if hash else 'no plan'


def _results_of_other_plans(workdir, known: set[str]) -> dict[str, list[str]]:
  """Finds the runs and results in a study's folder that were made by plans
  which the study never had.

  Args:
    workdir: the folder of the study.
    known: the hashes of the plans that the study has had.

  Returns:
    The names of folders and files, by the hash of their plan; '' is the hash of
    runs that no study started.
  """
  # The runs, and then the results.
  names_by_plan: dict[str, list[str]] = {}
  for sweep_file in sorted(pathlib.Path(workdir).glob('*/sweep.json')):
    folder = sweep_file.parent
    for hash in sorted(layout.plan_hashes_of_runs(folder) - known):
      names_by_plan.setdefault(hash, []).append(folder.name)
  results_file = pathlib.Path(workdir) / 'results.json'
  if results_file.is_file():
    hash = layout.load_with_checksum(results_file)['study']['hash']
    if hash not in known:
      names_by_plan.setdefault(hash, []).append(results_file.name)
  return names_by_plan


def _count_begun_seeds(workdir, ledger, plan: Plan) -> dict[str, int]:
  """Counts, for each phase of a study, the seeds of which a run has begun. Runs
  that were deleted since then count too, because the ledger (a database) has
  noted their beginning. Phases without any are left out.

  Args:
    workdir: the folder of the study.
    ledger: the open ledger of the study.
    plan: the plan of the study.
  """
  # Collect pairs of a phase and a seed, from the folders and from the ledger.
  # Several points and folders of a phase have the same seed, which counts once.
  begun = set()
  for path in pathlib.Path(workdir).glob('*/points/*/seed-*'):
    seed = int(path.name.removeprefix('seed-'))
    # path is WORKDIR/FOLDER/points/POINT/seed-N.
    folder_of_phase = path.parents[2]
    begun.add((phase_of_folder(folder_of_phase), seed))
  for folder_name, _, seed in ledger.begun_runs():
    begun.add((phase_of_folder(pathlib.Path(folder_name)), seed))
  num_seeds: dict[str, int] = {}
  for phase in plan.seeds:
    seeds_of_phase = {seed for name, seed in begun if name == phase}
    if seeds_of_phase:
      num_seeds[phase] = len(seeds_of_phase)
  return num_seeds


def _fixed_by_plan(frozen: FrozenPlan) -> dict:
  """Returns what must not change of a plan without an amendment, as a tree. The
  code may change: results.as_planned reports that."""
  points = {}
  for row in frozen.points:
    name = '.'.join((row['variant'], row['size'], row['workload']))
    points[name] = row
  return {'plan': to_json(frozen.plan), 'base_config': frozen.base_config,
          'sources': frozen.sources, 'points': points}


def to_json(value: Any) -> Any:
  """Turns a value with dataclasses and named tuples in it into plain dicts and
  lists, which JSON can hold. Numbers that are not finite become None.

  Args:
    value: any nesting of dataclasses, named tuples, mappings, lists, tuples and
      plain values.
  """
  if dataclasses.is_dataclass(value):
    tree = {}
    for field in dataclasses.fields(value):
      tree[field.name] = to_json(getattr(value, field.name))
    return tree
  if hasattr(value, '_asdict'):
    return to_json(value._asdict())
  if isinstance(value, Mapping):
    return {str(key): to_json(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [to_json(item) for item in value]
  # JSON has no infinity and no NaN.
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def outcome_from_json(tree: Mapping[str, Any]) -> Outcome:
  """Returns the outcome that `to_json` wrote."""
  figures = dict(tree)
  if figures['seconds'] is None:
    figures['seconds'] = math.nan
  if figures['loss'] is None:
    figures['loss'] = math.inf
  return Outcome(**figures)
