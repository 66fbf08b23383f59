"""The phases of a study, each from the outcomes of those before.

noise -> tune -> screen -> confirm: the records of PHASES, the table at the end,
over which plans, costs, results, status and reports go. A study's file may have
PHASES of its own, which come after these (training/plugins.py). A phase asks a
trainer for runs, gets their outcomes, and decides. A trainer is an object with

    train(folder, runs) -> [Outcome of each run]
    predicted(phase, rows) -> plan.predicted's record

such as study.Trainer, which returns what it has at once where runs are done
already: so a study that is started again walks through its phases until there
is something left to do.

Tuning is the same search for each variant and the base, by successive halving:
rung by rung the candidates train longer and the better share of them survives
(Jamieson and Talwalkar 2016). Then an optimum at the edge of what was tried
moves that edge, at most `extend` times. What a search does next follows from
the outcomes alone, so that a study which is resumed, or run by two at once,
searches in the same way.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
import re
from typing import Any, NamedTuple

from common.errors import RequestError
from tools.compare import advice, decide, efficiency, noise, page, statistics
from tools.compare import tuning as tuning_lib
from tools.compare import plan as plans
from training import runs as starts
from training.objectives import pipeline
from training.workdir import run_config

# From the first seed of a phase to the first of the next; and how many phases
# fit between the first seeds of two studies.
SEEDS_BETWEEN_PHASES = 10_000
NUM_SEED_BLOCKS = plans.SEEDS_BETWEEN_STUDIES // SEEDS_BETWEEN_PHASES
Changes = dict[str, Any]  # values of config fields by dotted key


class Run(NamedTuple):
  """A run that a phase asks for.

  Attributes:
    phase, variant, size, workload, seed: as in an Outcome.
    point: the name of its point in the sweep of its folder.
    changes: what it changes in the study's base config, but for the seed.
    share: the share that it trains of the steps that a run of its size and
      workload takes.
  """
  phase: str
  variant: str
  size: str
  workload: str
  seed: int
  point: str
  changes: Changes
  share: float = 1.0


@dataclasses.dataclass
class StudyState:
  """The outcomes of a study so far, and what its phases have decided by them.

  Attributes:
    trainer: the trainer of the runs.
    outcomes: the outcomes of all runs.
    records: what the phases decided, by the keys of results.json (plan.py).
    finished: the names of the phases that are over.
  """
  trainer: Any
  outcomes: list[plans.Outcome] = dataclasses.field(default_factory=list)
  records: dict[str, Any] = dataclasses.field(default_factory=dict)
  finished: list[str] = dataclasses.field(default_factory=list)

  def train(self, phase: 'Phase', runs: list[Run], rung: int = 0) -> list:
    """Trains the runs of a phase, in a folder of their own for each rung, and
    returns their outcomes."""
    folder = f'{phase.name}-{rung}' if rung else phase.name
    outcomes = self.trainer.train(folder, runs)
    self.outcomes += outcomes
    return outcomes

  @property
  def weakness(self) -> str:
    """The sentence that says why the noise is too large for the effect that the
    study looks for; '' where it is not, or is not known yet."""
    announced = self.records.get('announced')
    if announced is None or announced.enough:
      return ''
    return announced.sentence


def phases_of_study(seeds: Collection[str]) -> list['Phase']:
  """Returns the phases of a study, in order: those of which its plan gives the
  number of seeds."""
  return [phase for name, phase in PHASES.items() if name in seeds]


def default_seeds_by_phase() -> dict[str, int]:
  """Returns the default number of seeds of each phase that a study has by
  default."""
  return {name: phase.seeds for name, phase in PHASES.items() if phase.seeds}


def check_phases(file: str) -> None:
  """Checks the table PHASES, in which each phase of a study is registered by
  its name. The file of a study may add phases of its own.

  Args:
    file: the path of the study's file, for messages.

  Raises:
    RequestError: for an entry under a wrong name, or with the block of seeds of
      another phase.
  """
  name_of_block: dict[int, str] = {}
  for name, phase in PHASES.items():
    _check_name_of_phase(f'{file}: PHASES has {name!r}', name, phase)

    # Each phase must take its seeds from a block of its own, so that no phase
    # decides by data and initial weights that an earlier one has seen.
    subject = f'{file}: PHASES has {name!r} with block={phase.block}'
    if not 0 <= phase.block < NUM_SEED_BLOCKS:
      raise RequestError(
          f'{subject}: choose a whole number from 0 to {NUM_SEED_BLOCKS - 1}')
    owner = name_of_block.setdefault(phase.block, name)
    if owner != name:
      raise RequestError(
          f'{subject}, which is that of {owner!r}, so that both would have the '
          f'same seeds: choose another, from 0 to {NUM_SEED_BLOCKS - 1}')


def _check_name_of_phase(subject: str, name: str, phase: Any) -> None:
  """Checks an entry of PHASES. Its key must be the name of the phase, because
  both are used to look it up, and a good name of a folder.

  Args:
    subject: the beginning of a message, which names the entry.
    name: the key.
    phase: the entry.

  Raises:
    RequestError: for something else than a phase, or a wrong name.
  """
  if not isinstance(phase, Phase) or phase.name != name:
    raise RequestError(
        f'{subject}, which is no Phase of that name: write '
        f'{{{name!r}: Phase(name={name!r}, ...)}}')
  if re.fullmatch('[a-z_]+', name) is None:
    raise RequestError(
        f'{subject}, which names a folder and a row of results.json: choose '
        'lower-case letters and _')


def run_phases(frozen: plans.FrozenPlan, trainer: Any,
               until: str = plans.REPORT,
               anyway: bool = False) -> Iterator[StudyState]:
  """Runs the phases of a study one after the other, and yields the state of the
  study after each, so that the caller can save and print it.

  Args:
    frozen: the plan of the study, which no longer changes.
    trainer: the object that trains runs (study.Trainer).
    until: the name of the last phase to run; REPORT: all of them.
    anyway: whether to go on if the noise is too large to find the effect that
      the study looks for.

  Yields:
    The outcomes of the runs and the decisions so far. It is always the same
    object, which each phase adds to.

  Raises:
    RequestError: after the phase `noise`, if the noise is too large, unless
      `anyway`.
  """
  state = StudyState(trainer)
  for phase in phases_of_study(frozen.plan.seeds):
    # Drop the measures whose ratio of signal to noise is too small. The ratios
    # are known only once the phase `noise` has ended.
    ratios = {row.measure: row.snr for row in state.records.get('noise', ())}
    without_noisy = dataclasses.replace(
        frozen, plan=noise.drop_noisy_measures(frozen.plan, ratios))

    # Run the phase. It adds the outcomes of its runs to the state itself, and
    # returns what it decides.
    state.records |= phase.run(without_noisy, state)
    state.finished.append(phase.name)
    yield state

    # A weak study must be refused only after the yield, so that the caller has
    # saved the figures that the refusal is about.
    if state.weakness and not anyway:
      raise RequestError(
          f'{state.weakness} {state.records["advice"]} Lower the noise, or '
          'take more seeds, a larger EFFECT, or --anyway')
    if phase.name == until:
      return


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """A phase: variants beside the base, with the values that were tuned, which
  the report tables. A phase that differs in more than these fields is a class
  of its own, here or in the file of the study that has it.

  The verdict of a study is that of `confirm`, or of a phase before it that lets
  a variant go no further. What a later phase finds stands beside it.

  Attributes:
    name: the name by which SEEDS and reports call it, and results.json what it
      decides. Its runs are in the folder NAME, or NAME-1, NAME-2, ... for
      rungs: so a name has no '-'.
    block: the place of its seeds, which begin block * APART after the study's
      own first one. No other phase has the same, and none changes its own,
      whatever comes before it.
    seeds: the number of its seeds in a study that does not say it; 0: only a
      study whose SEEDS says how many has this phase.
    part: the half of the held-out text that its runs are evaluated on
      (eval.part). What confirms has a half that no phase before it sees.
    least: the number of seeds that it needs.
    decide: (plan, outcomes, name) -> what follows: a Verdict of each variant
      and measure, with the phase's own words where it has others; the plan is
      that of `narrow`, the outcomes are those of all phases so far.
    methods: a paragraph of the report, made by str.format(plan=plan), which
      takes no index from the end such as {plan.sizes[-1]}, where
      templates/methods.txt.jinja does not say it.
    constants: what the file of a study that has this phase may also hold, with
      the defaults; they stand in Plan.settings.
  """
  name: str
  block: int
  seeds: int
  part: str = 'second'
  min_seeds: int = statistics.MIN_SEEDS
  decide: Callable[..., list] = decide.confirm_variants
  methods: str = ''
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def choose_variants(self, plan: plans.Plan, records: Mapping[str, Any]
                      ) -> Sequence[str]:
    """Returns the variants that this phase trains, by what the phases before it
    decided; by default all of them. The list may name a variant twice.

    Args:
      plan: the plan of the study.
      records: what each phase before decided, by its name: a Verdict of each
        variant and measure.
    """
    return plan.variants

  def narrow_plan(self, plan: plans.Plan) -> plans.Plan:
    """Returns the plan with the sizes and the measures that this phase
    compares; by default all of them."""
    return plan

  def note_on_cost(self, plan: plans.Plan) -> str:
    """Returns what is said beside the costs of this phase; '': nothing."""
    return ''

  def seeds_of_phase(self, plan: plans.Plan) -> tuple[int, ...]:
    """Returns the seeds of the runs of this phase, which no other phase has."""
    first = (plan.offset or 0) + self.block * SEEDS_BETWEEN_PHASES
    return tuple(range(first, first + plan.seeds[self.name]))

  def runs(self, frozen: plans.FrozenPlan,
           best: Callable[[str, str, str], Changes],
           variants: Sequence[str]) -> list[Run]:
    """Returns the runs of this phase: the base and some variants, at each size
    of the model, on each workload (the text, and probes), with each seed.

    Args:
      frozen: the plan of the study.
      best: a function of (variant, size, workload) that returns the values
        that were tuned for runs there, by the dotted name of their field.
      variants: the names of the variants to run.
    """
    plan = self.narrow_plan(frozen.plan)
    runs = []
    for size in plan.sizes:
      for workload in plan.workloads:
        # Without a measure, nothing would be read from runs on this workload.
        if not plan.measures_of_workload(workload):
          continue
        # The base comes first, and once, even if it is one of the variants.
        for variant in dict.fromkeys((plan.base, *variants)):
          for seed in self.seeds_of_phase(plan):
            runs.append(make_run(
                frozen=frozen, phase=self.name, variant=variant, size=size,
                workload=workload, seed=seed,
                more=best(variant, size, workload)))
    return runs

  def largest_set_of_runs(self, frozen: plans.FrozenPlan) -> list[Run]:
    """Returns the runs of this phase if every variant comes so far; by these
    its costs are told beforehand."""
    plan = frozen.plan
    first = {name: values[0] for name, values in plan.tuning.fields.items()}

    def any_value(variant: str, size: str, workload: str) -> Changes:
      return first

    return self.runs(frozen, any_value, plan.variants)

  def run(self, frozen: plans.FrozenPlan, state: StudyState) -> dict[str, Any]:
    """Trains the runs of this phase, and decides by their outcomes.

    Args:
      frozen: the plan of the study.
      state: the outcomes and decisions of the phases before. The outcomes of
        this one are added to it.

    Returns:
      The decisions of the phase, by their keys in results.json.
    """
    # Look up the values that the phase `tune` chose, by size. Not each size is
    # tuned.
    tuned: dict[tuple[str, str], dict[str, Changes]] = {}
    for row in state.records.get('tuned', ()):
      by_size = tuned.setdefault((row.variant, row.workload), {})
      by_size[row.size] = row.changes

    def best(variant: str, size: str, workload: str) -> Changes:
      by_size = tuned[variant, workload]
      return by_size[frozen.plan.size_of_tuning(size, by_size)]

    # Train the variants that the phases before let pass. state.train waits
    # until all runs have ended, and adds their outcomes to state.outcomes. If
    # no variant passed, nothing is trained, and the decision is empty.
    variants = self.choose_variants(frozen.plan, state.records)
    if variants:
      state.train(self, self.runs(frozen, best, variants))

    # Decide by the sizes and measures of this phase alone.
    plan = dataclasses.replace(
        self.narrow_plan(frozen.plan), order_of_sizes=frozen.plan.all_sizes)
    return {self.name: self.decide(plan, state.outcomes, self.name)}

  def summary(self, records: Mapping[str, Any]) -> list[str]:
    """Returns lines for a terminal that say what this phase decided."""
    lines = []
    for row in records[self.name]:
      effect = page.estimate(mean=row.effect, low=row.low, high=row.high).text
      p = page.p_value(row.p_corrected).text
      lines.append(f'  {row.variant}, {row.measure}: {effect}, corrected p '
                   f'{p}: {row.verdict}')
    return lines


class Noise(Phase):
  """The base, and the base with the first parameters that it has with the next
  seed: so a pair has one order of the data, and each start of the base but the
  first is also seen with another order (advice.split)."""

  def runs(self, frozen, best, variants):
    changes = {frozen.plan.base: {},
               plans.SECOND_BASE: {'init_seed': starts.INIT_SEED_OF_NEXT_SEED}}

    def apart(variant: str, size: str, workload: str) -> Changes:
      return changes[variant]

    return super().runs(frozen, apart, [plans.SECOND_BASE])

  def run(self, frozen, state):
    rows = super().run(frozen, state)[self.name]
    return {
        self.name: rows, 'announced': noise.announce_power(frozen.plan, rows),
        'advice': advice.describe_what_lowers_noise(
            frozen.plan, state.outcomes)}

  def summary(self, records):
    lines = [records['announced'].sentence]
    if records['advice']:
      lines.append(records['advice'])
    return lines


class Tune(Phase):
  """The search of each variant and the base, rung by rung; and, of values that
  muP carries to larger sizes, a check at the smallest of these: they and their
  neighbours are run there. Where a neighbour is better, the search goes on from
  it, and each larger size has a search, as without muP."""

  def note_on_cost(self, plan):
    """Returns words about the runs that tuning may add to those it is sure to
    have; '' if it cannot add any.

    Args:
      plan: the plan of the study.
    """
    # What each search may add by moving an edge: one value at a time of each
    # field, up to `extend` times.
    searches = make_searches(plan)
    runs_of_edges = (
        len(plan.tuning.fields) * plan.tuning.extend * plan.seeds['tune'])
    notes = []
    if runs_of_edges:
      added = len(searches) * runs_of_edges
      notes.append(
          f'at most {added} more runs, where an optimum is at an edge')

    # What it adds if the values of one search are not kept: the check goes on
    # as a search, whose first rung is run already, and each larger size has a
    # whole one.
    if plan.checked_size is not None:
      sizes = plan.sizes[plan.sizes.index(plan.checked_size):]
      num_new_searches = len(sizes) - 1
      added = (num_new_searches * num_runs_of_search(plan)
               + len(sizes) * runs_of_edges)
      notes.append(f'{added} more at most for each variant and workload whose '
                   f'values do not hold at {plan.checked_size}')
    if not notes:
      return ''
    return f'and {"; and ".join(notes)}'

  def runs_of_candidates(self, frozen: plans.FrozenPlan,
                         search: 'Search') -> list[list[Run]]:
    """Returns the runs of each candidate of a search for the best
    hyper-parameters. A candidate is one value for each field that is tuned.

    Args:
      frozen: the plan of the study.
      search: the search of one variant at one size on one workload.

    Returns:
      A list of runs for each of search.candidates, in that order: one run for
      each seed of tuning.
    """
    runs_by_candidate = []
    for changes in search.candidates:
      runs_of_candidate = []
      # Candidates share their seeds, so they are compared on the same data.
      for seed in self.seeds_of_phase(frozen.plan):
        runs_of_candidate.append(make_run(
            frozen=frozen, phase=self.name, variant=search.variant,
            size=search.size, workload=search.workload, seed=seed,
            more=changes, share=search.share))
      runs_by_candidate.append(runs_of_candidate)
    return runs_by_candidate

  def largest_set_of_runs(self, frozen):
    """Returns all runs that tuning may need, to estimate its cost before
    anything has run.

    Tuning is successive halving: in each rung the remaining candidates train
    for longer, and then only the best of them remain.

    Args:
      frozen: the plan of the study.
    """
    # These searches are of this estimate alone, which changes them.
    tuning = frozen.plan.tuning
    searches = make_searches(frozen.plan)
    runs = []
    for search in searches:
      for rung in range(tuning.rungs):
        # The rung decides how many steps its candidates train.
        search.rung = rung
        for runs_of_candidate in self.runs_of_candidates(frozen, search):
          runs += runs_of_candidate
        # Only the number of survivors is known yet. All candidates cost the
        # same, so the first ones stand for the survivors.
        survivors = num_survivors(tuning, len(search.candidates))
        search.candidates = search.candidates[:survivors]

    # The values that the searches will choose are not known. All cost the same,
    # so the first candidate stands for them and for each of their neighbours.
    for search in searches:
      if is_carried(search):
        # The carried values, and two neighbours by each field.
        candidates_of_check = 1 + 2 * len(tuning.fields)
        check = Search(
            plan=frozen.plan, variant=search.variant,
            size=frozen.plan.checked_size, workload=search.workload,
            rung=tuning.rungs - 1,
            candidates=search.candidates[:1] * candidates_of_check)
        for runs_of_candidate in self.runs_of_candidates(frozen, check):
          runs += runs_of_candidate
    return runs

  def run(self, frozen, state):
    """Tunes each variant at each size on each workload where it is not carried
    by muP, and checks what is carried.

    Args:
      frozen: the plan of the study.
      state: the outcomes and decisions of the phases before. The outcomes of
        this one are added to it.

    Returns:
      {'tuned': what was chosen in each search}, as results.json has it.
    """
    searches = make_searches(frozen.plan)
    next_rung = self._search(frozen, state, searches, first_rung=1)

    # Check the values that muP carries. All neighbours are run before the first
    # decision, since their noise is pooled.
    checks = make_checks(searches)
    if not checks:
      return {'tuned': [search.result() for search in searches]}
    self._train_rung(frozen, state, checks, rung=next_rung)
    runs_of_tuning = tuning_lib.read_tuning_runs(frozen.plan, state.outcomes)
    for check in checks:
      point = check.variant, check.size, check.workload
      carried = tuple(check.carried.values())
      check.end_check(not runs_of_tuning.better_neighbours(point, carried))

    # Where values were not kept, go on from the better neighbour, and search at
    # each larger size.
    larger_searches = make_searches_without_rules(checks)
    self._search(frozen, state, [*checks, *larger_searches],
                 first_rung=next_rung + 1)
    all_searches = [*searches, *checks, *larger_searches]
    return {'tuned': [search.result() for search in all_searches]}

  def _search(self, frozen: plans.FrozenPlan, state: StudyState,
              searches: Sequence['Search'], first_rung: int) -> int:
    """Takes searches to their ends, rung by rung. In each rung the remaining
    candidates train for longer, and then only the best of them remain
    (successive halving).

    Args:
      frozen: the plan of the study.
      state: the outcomes so far, to which those of this phase are added.
      searches: the searches, which are updated.
      first_rung: the number of the first folder of runs.

    Returns:
      The number of the next folder of runs.
    """
    # The number of rungs is not known beforehand. After the last planned one, a
    # search goes on if its best value is at an edge of what was tried. A search
    # is over once it has no candidates.
    rung = first_rung
    while any(search.candidates for search in searches):
      self._train_rung(frozen, state, searches, rung)
      rung += 1
    return rung

  def _train_rung(self, frozen: plans.FrozenPlan, state: StudyState,
                  searches: Sequence['Search'], rung: int) -> None:
    """Trains one rung of all searches that have candidates.

    Args:
      frozen: the plan of the study.
      state: the outcomes so far, to which those of this rung are added.
      searches: the searches, which choose their next candidates.
      rung: the number of the folder of the runs.
    """
    # Train the runs of all searches together, so that they share programs and
    # machines. The outcomes come back in the order of the runs.
    ongoing = [search for search in searches if search.candidates]
    runs_by_search = [self.runs_of_candidates(frozen, search)
                      for search in ongoing]
    runs = []
    for candidates in runs_by_search:
      runs += itertools.chain(*candidates)
    outcomes = iter(state.train(self, runs, rung))

    # Hand the outcomes back to the searches. Each candidate takes its own from
    # the front of what is left, so these loops must visit searches and
    # candidates in the order of those above.
    for search, candidates in zip(ongoing, runs_by_search):
      steps = frozen.steps(candidates[0][0].changes)
      outcomes_of_search = []
      for candidate in candidates:
        outcomes_of_search.append(
            list(itertools.islice(outcomes, len(candidate))))
      # This chooses the candidates of the next rung, perhaps none.
      search.record_rung(steps, outcomes_of_search)

  def summary(self, records):
    lines = []
    for row in records['tuned']:
      at_edge = ', '.join(row.at_edge) or 'none'
      lines.append(f'  {row.workload} {row.size} {row.variant}: {row.changes}, '
                   f'at the edge: {at_edge}')
      if row.kept is not None:
        lines[-1] += f', carried values kept: {row.kept}'
    return lines


class Screen(Phase):
  """All variants at the smallest size, by the primary measure."""

  def narrow_plan(self, plan):
    return dataclasses.replace(
        plan, sizes=plan.sizes[:1], measures=plan.measures[:1])


class Rescreen(Phase):
  """The most promising of the variants that were stopped, at the next size."""

  def choose_variants(self, plan, records):
    promising = decide.list_promising_variants(plan, records['screen'])
    return promising[:plan.settings['KEEP']]

  def narrow_plan(self, plan):
    return dataclasses.replace(
        plan, sizes=plan.sizes[1:2], measures=plan.measures[:1])


class Confirm(Phase):
  """The variants that passed a screening, at all sizes."""

  def choose_variants(self, plan, records):
    passed = []
    for name in ('screen', 'rescreen'):
      for row in records.get(name, ()):
        if row.verdict == decide.PASSED:
          passed.append(row.variant)
    return passed

  def note_on_cost(self, plan):
    return 'if every variant passes the screening'


class Largest(Phase):
  """The largest size, which no other phase has, once it was predicted; the
  verdict does not depend on it."""

  def choose_variants(self, plan, records):
    return [row.variant for row in records['confirm']]

  def narrow_plan(self, plan):
    return dataclasses.replace(plan, sizes=(plan.largest,))

  def note_on_cost(self, plan):
    return 'if every variant is confirmed'

  def run(self, frozen, state):
    plan = frozen.plan
    flops = {}
    for variant in (plan.base, *plan.variants):
      point = frozen.point(variant, plan.largest, plans.TEXT)
      flops[variant] = point['tokens'] * point['flops_per_token']
    rows = efficiency.predict_largest_size(plan, state.outcomes, flops)
    predicted = state.trainer.predicted(self.name, rows)
    return {'predicted': predicted} | super().run(frozen, state)


def make_run(frozen: plans.FrozenPlan, phase: str, variant: str, size: str,
             workload: str, seed: int, more: dict, share: float = 1.0) -> Run:
  """Describes a run that a phase of a study wants to be trained: the changes of
  the config, and the name of its folder.

  Args:
    frozen: the plan of the study.
    phase: the name of the phase, such as 'tune'.
    variant: the name of the variant. SECOND_BASE stands for the base once more,
      with other initial parameters.
    size: the name of the size of the model.
    workload: the name of the data that it is trained on: the text, or a probe.
    seed: the seed.
    more: further changes of the config, such as tuned values. They win over
      those that the plan has for this variant and size.
    share: the share of its planned steps that the run trains, 1 or less.
  """
  # The plan has no config for the second base: it is trained with that of the
  # base.
  planned_variant = (
      frozen.plan.base if variant == plans.SECOND_BASE else variant)
  planned_point = frozen.point(planned_variant, size, workload)
  # Later entries win: tuned values replace those of the plan.
  changes = {**planned_point['changes'], **more,
             'eval.part': PHASES[phase].part}
  if share < 1:
    shorten_run(changes, frozen.base_config, share)
  # A phase that needs no curves evaluates once, after the last step.
  if phase not in plans.PHASES_WITH_CURVES:
    changes['eval.every_steps'] = frozen.steps(changes)

  # Name the folder of the runs that differ only in their seed. Each candidate
  # of tuning has a folder of its own: optim.lr=0.1 adds ".lr=0.1".
  point = f'{workload}.{size}.{variant}'
  if phase == 'tune':
    for field, value in more.items():
      point += f'.{field.rpartition(".")[2]}={value:g}'
  return Run(phase=phase, variant=variant, size=size, workload=workload,
             seed=seed, point=point, changes=changes, share=share)


def shorten_run(changes: dict, base: dict, share: float) -> None:
  """Shortens a run to a share of its steps. The schedules of the learning rate
  and of the batch size shrink with it.

  Args:
    changes: what the run changes in the base config, by dotted name; it is
      updated in place.
    base: the base config, as a tree.
    share: the share of the steps, below 1.
  """
  # The config of the whole run, by dotted name.
  config = run_config.flatten(base) | changes
  planned_steps = config['train.steps']
  # A run has at least one step.
  num_steps = max(round(planned_steps * share), 1)
  changes['train.steps'] = num_steps
  # These shrink with the run. Neither may be longer than it after rounding.
  for field in ('optim.warmup_steps', 'optim.decay_steps'):
    changes[field] = min(
        round(config[field] * num_steps / planned_steps), num_steps)
  # These keep their distance, but happen at least once.
  for field in ('checkpoint.every_steps', 'log.every_steps'):
    changes[field] = min(config[field], num_steps)
  # The stages at which the batch grows; empty where its size is constant.
  stages = config['data.batch_ramp']
  if stages:
    changes['data.batch_ramp'] = pipeline.scale_ramp(
        stages, planned_steps, num_steps)


@dataclasses.dataclass
class Search:
  """The search for the best values of one variant at one size on one workload,
  by successive halving (Jamieson and Talwalkar 2016).

  Attributes:
    plan: the plan of the study.
    variant, size, workload: the names of what is tuned.
    rung: the rung of the candidates; from plan.tuning.rungs on, the edge is
      moved.
    candidates: the values that are trained next; () where the search is over.
      A search that begins without any has all of plan.tuning.
    best: the best of the last rung, once that is done.
    tried: what each candidate of each rung gave, as plans.Tuned has it.
    runs: how many runs were trained.
    carried: the values that muP carries here, of a search that began as a
      check of these; None: it did not.
    kept: whether the check has kept them; None: that is not known.
  """
  plan: plans.Plan
  variant: str
  size: str
  workload: str
  rung: int = 0
  candidates: tuple[Changes, ...] = ()
  best: dict | None = None
  tried: list[dict] = dataclasses.field(default_factory=list)
  runs: int = 0
  carried: Changes | None = None
  kept: bool | None = None

  def __post_init__(self):
    if self.candidates:
      return
    fields = self.plan.tuning.fields
    combinations = itertools.product(*fields.values())
    self.candidates = tuple(dict(zip(fields, values))
                            for values in combinations)

  @property
  def share(self) -> float:
    """The share of train.steps that the candidates train."""
    return share_of_steps(self.plan.tuning, self.rung)

  def record_rung(self, steps: int, outcomes: Sequence[Sequence[plans.Outcome]]
                  ) -> None:
    """Records the outcomes of a rung of successive halving, and chooses the
    candidates of the next one.

    Args:
      steps: the number of steps that the candidates trained.
      outcomes: for each of self.candidates, in that order, the outcome of its
        run with each seed of tuning.
    """
    # The first measure of the workload is the one that is tuned for. A
    # candidate has its mean over the seeds.
    measure, *_ = self.plan.measures_of_workload(self.workload)
    rows = []
    for changes, runs in zip(self.candidates, outcomes, strict=True):
      values = [run.values[measure.name] for run in runs]
      losses = [run.loss for run in runs]
      diverged = any(run.diverged for run in runs)
      rows.append({
          'rung': self.rung, 'steps': steps, 'changes': changes,
          'value': sum(values) / len(values), 'values': values,
          'loss': sum(losses) / len(losses), 'diverged': diverged})
      self.runs += len(runs)
    self.tried += rows
    self.rung += 1

    def worse(row: Mapping) -> tuple:
      """Returns what is larger for a worse candidate: of two with one value, as
      at what guessing gives, the one with the larger loss is worse."""
      return row['diverged'], -measure.sign * row['value'], row['loss']

    # Before the last rung, the better part of the candidates goes on to the
    # next one, which trains longer.
    ranked = sorted(rows, key=worse)
    tuning = self.plan.tuning
    if self.rung < tuning.rungs:
      survivors = ranked[:num_survivors(tuning, len(ranked))]
      self.candidates = tuple(row['changes'] for row in survivors)
      return

    # From the last rung on, runs are whole and can be compared with the best of
    # the rungs before. Where the best value lies at the edge of what was tried,
    # the next value beyond is tried, up to tuning.extend times. The search is
    # over where there is none.
    if self.best is not None:
      ranked = [self.best, *ranked]
    self.best = min(ranked, key=worse)
    beyond_edges = []
    if self.rung - tuning.rungs < tuning.extend:
      best = self.best['changes']
      for field in self.at_edge:
        edge, inner = self._edge(field)
        candidate = best | {field: move_edge_outwards(edge, inner)}
        if candidate != best:
          beyond_edges.append(candidate)
    self.candidates = tuple(beyond_edges)

  def end_check(self, kept: bool) -> None:
    """Ends the first rung of a check: with the carried values, if they are
    kept; else the search goes on as any other.

    Args:
      kept: whether they are kept.
    """
    self.kept = kept
    if not kept:
      return
    # The check has run the carried values too, so there is a trial of them.
    self.best = next(trial for trial in self.tried
                     if trial['changes'] == self.carried)
    # A search without candidates is over.
    self.candidates = ()

  def neighbours_of_best(self) -> list[Changes]:
    """Returns the values next to the best ones: of each field the next lower
    and the next higher one that was tried, or that the grid would go on with,
    where the best is the outermost."""
    best = self.best['changes']
    neighbours = []
    for field in self.plan.tuning.fields:
      # Two values of each field or more are tried: freeze.py checks it.
      tried = sorted({trial['changes'][field] for trial in self.tried})
      lower = move_edge_outwards(tried[0], tried[1])
      higher = move_edge_outwards(tried[-1], tried[-2])
      grid = [lower, *tried, higher]
      # `lower` is equal to the first value if that has no lower one. The search
      # begins behind it, so that there is always a value before the best.
      position = grid.index(best[field], 1)
      for value in grid[position - 1], grid[position + 1]:
        # A whole number such as 1 has no lower one.
        if value != best[field]:
          neighbours.append(best | {field: value})
    return neighbours

  def _edge(self, field: str) -> tuple[float, float]:
    """Returns the first and second, or the last and last but one, of the values
    of a field that were tried: by the end at which the best one is, if any."""
    values = sorted({row['changes'][field] for row in self.tried})
    if self.best['changes'][field] == values[0]:
      return values[0], values[1]
    return values[-1], values[-2]

  @property
  def at_edge(self) -> tuple[str, ...]:
    """The fields whose best value is the first or the last that was tried."""
    fields = []
    for field in self.plan.tuning.fields:
      edge, _ = self._edge(field)
      if self.best['changes'][field] == edge:
        fields.append(field)
    return tuple(fields)

  def result(self) -> plans.Tuned:
    """Returns the best values that the search has found, and all it tried."""
    return plans.Tuned(
        variant=self.variant, size=self.size, workload=self.workload,
        changes=dict(self.best['changes']), at_edge=self.at_edge,
        runs=self.runs, tried=tuple(self.tried), kept=self.kept)


def move_edge_outwards(edge: float, inner: float) -> float:
  """Returns the next value to try when the best one was at the edge of what was
  tried. It continues the geometric grid: edge * (edge / inner).

  Args:
    edge: the least or the largest value that was tried.
    inner: the value beside it.

  Returns:
    The value. If `edge` is a whole number, such as a number of layers, so is
    the value, which is 1 or more. It is `edge` itself if no smaller whole
    number is left.
  """
  beyond = edge * edge / inner
  # Six digits hide the error of the arithmetic in the names of folders.
  if not isinstance(edge, int):
    return float(f'{beyond:.6g}')

  # For whole numbers, rounding may end at the edge again. An upper edge then
  # moves by 1, and a lower one stays.
  beyond = max(round(beyond), 1)
  return edge + 1 if beyond == edge > inner else beyond


def num_survivors(tuning: plans.Tuning, candidates: int) -> int:
  """Returns how many candidates of a rung of successive halving survive it."""
  return max(1, math.ceil(tuning.keep * candidates))


def share_of_steps(tuning: plans.Tuning, rung: int) -> float:
  """Returns the share of train.steps that a candidate of a rung trains."""
  rungs_to_come = max(tuning.rungs - 1 - rung, 0)
  return tuning.keep ** rungs_to_come


def num_runs_of_search(plan: plans.Plan) -> int:
  """Returns how many runs one search takes, if no edge is moved."""
  candidates = math.prod(map(len, plan.tuning.fields.values()))
  runs = 0
  for _ in range(plan.tuning.rungs):
    runs += candidates * plan.seeds['tune']
    candidates = num_survivors(plan.tuning, candidates)
  return runs


def is_carried(search: Search) -> bool:
  """Returns whether muP carries the values of a search to larger sizes."""
  plan = search.plan
  is_checked = plan.checked_size is not None
  tuned_sizes = plan.tuned_sizes_of_variant(search.variant)
  return is_checked and plan.checked_size not in tuned_sizes


def make_checks(searches: Sequence[Search]) -> list[Search]:
  """Returns the checks of values that muP carries, before their runs.

  Args:
    searches: the searches, which are over.
  """
  checks = []
  for search in searches:
    if is_carried(search):
      plan, carried = search.plan, search.best['changes']
      # Candidates of the last rung are trained for all steps.
      checks.append(Search(
          plan=plan, variant=search.variant, size=plan.checked_size,
          workload=search.workload, rung=plan.tuning.rungs - 1,
          candidates=(carried, *search.neighbours_of_best()), carried=carried))
  return checks


def make_searches_without_rules(checks: Sequence[Search]) -> list[Search]:
  """Returns the searches at larger sizes of what muP's rules do not hold for,
  before their first rung.

  Args:
    checks: the checks, which have decided.
  """
  searches = []
  for check in checks:
    if not check.kept:
      position = check.plan.sizes.index(check.size)
      for size in check.plan.sizes[position + 1:]:
        searches.append(Search(
            plan=check.plan, variant=check.variant, size=size,
            workload=check.workload))
  return searches


def make_searches(plan: plans.Plan) -> list[Search]:
  """Returns the searches of a study, before their first rung."""
  each = []
  for size in plan.sizes:
    for workload in plan.workloads:
      for variant in (plan.base, *plan.variants):
        if size in plan.tuned_sizes_of_variant(variant):
          each.append(Search(plan=plan, variant=variant, size=size,
                             workload=workload))
  return each


PHASES = {phase.name: phase for phase in (
    Noise(name='noise', block=0, seeds=5, part='first',
          decide=noise.measure_noise),
    # One seed would choose among rates by the noise of a run, and verdicts
    # would rest on that choice.
    Tune(name='tune', block=1, seeds=tuning_lib.MIN_SEEDS_OF_TUNING,
         part='first'),
    Screen(name='screen', block=2, seeds=5, part='first',
           decide=decide.screen_variants),
    Rescreen(
        name='rescreen', block=4, seeds=0, part='first',
        decide=decide.screen_variants,
        constants={'KEEP': 1},
        methods='Of the variants that were stopped there, the best (at most '
        '{plan.settings[KEEP]}) that looked better than the base were looked '
        'at again at {plan.sizes[1]} with {plan.seeds[rescreen]} seeds.'),
    Confirm(name='confirm', block=3, seeds=5),
    Largest(
        name='largest', block=5, seeds=0,
        methods='The outcome at {plan.largest} was predicted by a scaling '
        'law of the other sizes, in which a variant has one compute '
        'multiplier. This was recorded, and {plan.seeds[largest]} fresh '
        'seeds then run, with the values tuned at smaller sizes.'),
)}
