"""The phases of a study, each from the outcomes of those before.

noise -> tune -> screen -> confirm: the records of PHASES, the table at the end,
over which plans, costs, results, status and reports go. A phase asks a trainer
for runs, gets their outcomes, and decides. A trainer is an object with

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
from typing import Any, NamedTuple

from common.errors import RequestError
from tools.compare import advice, decide, efficiency, noise, page, statistics
from tools.compare import plan as plans
from training import runs as starts
from training.objectives import pipeline
from training.workdir import run_config

APART = 10_000  # seeds from the first of a phase to the first of the next
Changes = dict[str, Any]


class Run(NamedTuple):
  """A run that a phase asks for.

  Attributes:
    phase, variant, size, workload, seed: as in an Outcome.
    point: the name of its point in the sweep of its folder.
    changes: of the study's base config, but for the seed.
    share: of the steps that a run of its size and workload takes.
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
class State:
  """What a study has found so far.

  Attributes:
    trainer: of the runs.
    outcomes: of all runs.
    records: what the phases decided, by the keys of results.json (plan.py).
    finished: the names of the phases that are over.
  """
  trainer: Any
  outcomes: list[plans.Outcome] = dataclasses.field(default_factory=list)
  records: dict[str, Any] = dataclasses.field(default_factory=dict)
  finished: list[str] = dataclasses.field(default_factory=list)

  def train(self, phase: 'Phase', runs: list[Run], rung: int = 0) -> list:
    """Returns the outcomes of runs; each rung of a phase has its folder."""
    outcomes = self.trainer.train(
        f'{phase.name}-{rung}' if rung else phase.name, runs)
    self.outcomes += outcomes
    return outcomes

  @property
  def weakness(self) -> str:
    """Why the study cannot find what it is after; '' where it can, or where
    the noise is not known yet."""
    announced = self.records.get('announced')
    return '' if not announced or announced.enough else announced.sentence


def of(seeds: Collection[str]) -> list['Phase']:
  """Returns the phases that a study has, in order; `seeds` are its plan's."""
  return [phase for name, phase in PHASES.items() if name in seeds]


def run(frozen: plans.Frozen, trainer: Any, until: str = plans.REPORT,
        anyway: bool = False) -> Iterator[State]:
  """Goes through the phases; yields all that is found, after each.

  Args:
    frozen: the plan.
    trainer: of the runs.
    until: the last phase; REPORT: all.
    anyway: whether to go on where the noise is too large for the effect.

  Raises:
    RequestError: after `noise`, where the study cannot find the effect that it
      is after, unless `anyway`.
  """
  state = State(trainer)
  for phase in of(frozen.plan.seeds):
    snrs = {row.measure: row.snr for row in state.records.get('noise', ())}
    state.records |= phase.run(dataclasses.replace(
        frozen, plan=noise.going_on(frozen.plan, snrs)), state)
    state.finished.append(phase.name)
    yield state
    if state.weakness and not anyway:
      raise RequestError(
          f'{state.weakness} {state.records["advice"]} Lower the noise, or '
          'take more seeds, a larger EFFECT, or --anyway')
    if phase.name == until:
      return


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """A phase: variants beside the base, with the values that were tuned, which
  the report tables. Noise and Tune are of other kinds.

  The verdict of a study is that of `confirm`, or of a phase before it that lets
  a variant go no further. What a later phase finds stands beside it.

  Attributes:
    name: what SEEDS and reports call it, and results.json what it decides. Its
      runs are in the folder NAME, or NAME-1, NAME-2, ... for rungs: so a name
      has no '-'.
    block: its seeds begin block * APART after the study's own first one. No
      other phase has the same, and none changes its own, whatever comes before
      it.
    seeds: how many a study has of it that says nothing; 0: only a study whose
      SEEDS says how many has this phase.
    part: the half of the held-out text that its runs are evaluated on
      (eval.part). What confirms has a half that no phase before it sees.
    least: how many it needs.
    decide: (plan, outcomes, name) -> what follows: a Verdict of each variant
      and measure, with the phase's own words where it has others; the plan is
      that of `narrow`, the outcomes are those of all phases so far.
    enter: (plan, records so far) -> the variants that are run; a record has a
      row of each measure, so a variant may stand in it more than once.
    narrow: plan -> the same with the sizes and the measures that this phase
      compares; by default all of them.
    note: plan -> what stands beside its costs.
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
  least: int = statistics.MIN_SEEDS
  decide: Callable[..., list] = decide.confirm
  enter: Callable[..., Sequence[str]] = lambda plan, records: plan.variants
  narrow: Callable[[plans.Plan], plans.Plan] = lambda plan: plan
  note: Callable[[plans.Plan], str] = lambda plan: ''
  methods: str = ''
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def seeds_of(self, plan: plans.Plan) -> tuple[int, ...]:
    first = (plan.offset or 0) + self.block * APART
    return tuple(first + i for i in range(plan.seeds[self.name]))

  def runs(self, frozen: plans.Frozen, best: Callable[[str, str, str], Changes],
           variants: Sequence[str]) -> list[Run]:
    """Returns the runs of the base and of variants with the best values of
    (variant, size, workload): of a size that was not tuned, those of the
    largest that was."""
    plan = self.narrow(frozen.plan)
    return [run_of(frozen, self.name, variant, size, workload, seed, best(
        variant, size if size in plan.tuned_sizes else plan.tuned_sizes[-1],
        workload))
            for size in plan.sizes for workload in plan.workloads
            if plan.of_workload(workload)
            for variant in dict.fromkeys((plan.base, *variants))
            for seed in self.seeds_of(plan)]

  def most(self, frozen: plans.Frozen) -> list[Run]:
    """Returns the runs that it asks for at most, whatever is found before."""
    plan = frozen.plan
    first = {name: values[0] for name, values in plan.tuning.fields.items()}
    return self.runs(frozen, lambda *at: first, plan.variants)

  def run(self, frozen: plans.Frozen, state: State) -> dict[str, Any]:
    """Trains what follows from what was found; returns what it decides, by the
    keys of results.json."""
    tuned = {(row.variant, row.size, row.workload): row.changes
             for row in state.records.get('tuned', ())}
    if variants := self.enter(frozen.plan, state.records):
      state.train(self, self.runs(frozen, lambda *at: tuned[at], variants))
    return {self.name: self.decide(
        self.narrow(frozen.plan), state.outcomes, self.name)}

  def summary(self, records: Mapping[str, Any]) -> list[str]:
    """Returns what it decided, in lines."""
    return [f'  {row.variant}, {row.measure}: '
            f'{page.estimate(row.effect, row.low, row.high).text}, corrected p '
            f'{page.p_value(row.p_corrected).text}: {row.verdict}'
            for row in records[self.name]]


class Noise(Phase):
  """The base, and the base with the first parameters that it has with the next
  seed: so a pair has one order of the data, and each start of the base but the
  first is also seen with another order (advice.split)."""

  def runs(self, frozen, best, variants):
    apart = {frozen.plan.base: {}, plans.AGAIN: {'init_seed': starts.AS_NEXT}}
    return super().runs(frozen, lambda name, *at: apart[name], [plans.AGAIN])

  def run(self, frozen, state):
    rows = super().run(frozen, state)[self.name]
    return {self.name: rows, 'announced': noise.announce(frozen.plan, rows),
            'advice': advice.sentence(frozen.plan, state.outcomes)}

  def summary(self, records):
    return [records['announced'].sentence, *filter(None, [records['advice']])]


class Largest(Phase):
  """The largest size, which no other phase has, once it was predicted; the
  verdict does not depend on it."""

  def run(self, frozen, state):
    plan = frozen.plan
    rows = efficiency.predict(plan, state.outcomes, {
        variant: row['tokens'] * row['flops_per_token']
        for variant in (plan.base, *plan.variants)
        for row in [frozen.point(variant, plan.largest, plans.TEXT)]})
    return {'predicted': state.trainer.predicted(self.name, rows)} | (
        super().run(frozen, state))


class Tune(Phase):
  """The search of each variant and the base, rung by rung."""

  def runs_of(self, frozen: plans.Frozen, search: 'Search') -> list[list[Run]]:
    """Returns the runs of each candidate of a search."""
    return [[run_of(frozen, self.name, *search.name, seed, changes,
                    search.share)
             for seed in self.seeds_of(frozen.plan)]
            for changes in search.candidates]

  def most(self, frozen):
    """Those of all rungs: which candidates survive does not matter here."""
    runs, tuning = [], frozen.plan.tuning
    for search in searches(frozen.plan):
      for search.rung in range(tuning.rungs):
        runs += itertools.chain(*self.runs_of(frozen, search))
        search.candidates = search.candidates[:kept(
            tuning, len(search.candidates))]
    return runs

  def run(self, frozen, state):
    each = searches(frozen.plan)
    for rung in itertools.count(1):
      going = [search for search in each if search.candidates]
      if not going:
        return {'tuned': [search.result() for search in each]}
      asked = [self.runs_of(frozen, search) for search in going]
      outcomes = iter(state.train(
          self, [*itertools.chain(*itertools.chain(*asked))], rung))
      for search, candidates in zip(going, asked):
        search.take(frozen.steps(candidates[0][0].changes),
                    [[next(outcomes) for _ in candidate]
                     for candidate in candidates])

  def summary(self, records):
    return [f'  {row.workload} {row.size} {row.variant}: {row.changes}, at the '
            f'edge: {", ".join(row.at_edge) or "none"}'
            for row in records['tuned']]


def run_of(frozen: plans.Frozen, phase: str, variant: str, size: str,
           workload: str, seed: int, more: dict, share: float = 1.0) -> Run:
  """Returns a run of a point of the plan, with `more` changes."""
  row = frozen.point(frozen.plan.base if variant == plans.AGAIN else variant,
                     size, workload)
  changes = {**row['changes'], **more, 'eval.part': PHASES[phase].part}
  if share < 1:
    shorten(changes, frozen.base_config, share)
  if phase not in plans.WITH_CURVES:
    changes['eval.every_steps'] = frozen.steps(changes)
  name = f'{workload}.{size}.{variant}'
  if phase == 'tune':
    name += ''.join(f'.{field.rpartition(".")[2]}={value:g}'
                    for field, value in more.items())
  return Run(phase, variant, size, workload, seed, name, changes, share)


def shorten(changes: dict, base: dict, share: float) -> None:
  """Makes a run a share as long, with a whole schedule of its own."""
  before = run_config.flatten(base) | changes
  steps = before['train.steps']
  changes['train.steps'] = short = max(round(steps * share), 1)
  for field in ('optim.warmup_steps', 'optim.decay_steps'):
    changes[field] = min(round(before[field] * short / steps), short)
  for field in ('checkpoint.every_steps', 'log.every_steps'):
    changes[field] = min(before[field], short)
  if stages := before['data.batch_ramp']:
    changes['data.batch_ramp'] = pipeline.scaled_ramp(stages, steps, short)


@dataclasses.dataclass
class Search:
  """The search of one variant at one size on one workload.

  Attributes:
    plan: the study's.
    variant, size, workload: whose it is.
    rung: of the candidates; from plan.tuning.rungs on, the edge is moved.
    candidates: that are trained next; () where the search is over.
    best: the best of the last rung, once that is done.
    tried: of each candidate of each rung, as plans.Tuned has it.
    runs: how many were trained.
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

  def __post_init__(self):
    fields = self.plan.tuning.fields
    self.candidates = tuple(dict(zip(fields, values)) for values in
                            itertools.product(*fields.values()))

  @property
  def name(self) -> tuple[str, str, str]:
    return self.variant, self.size, self.workload

  @property
  def share(self) -> float:
    """Of train.steps, what the candidates train."""
    return share(self.plan.tuning, self.rung)

  def take(self, steps: int, outcomes: Sequence[Sequence[plans.Outcome]]
           ) -> None:
    """Takes the outcomes of each candidate, and decides what comes next.

    Args:
      steps: that the candidates trained.
      outcomes: of each candidate, over the seeds of tuning.
    """
    measure = self.plan.of_workload(self.workload)[0]
    mean = lambda values: sum(values) / len(values)
    rows = [{'rung': self.rung, 'steps': steps, 'changes': changes,
             'value': mean([x.values[measure.name] for x in runs]),
             'values': [x.values[measure.name] for x in runs],
             'loss': mean([x.loss for x in runs]),
             'diverged': any(x.diverged for x in runs)}
            for changes, runs in zip(self.candidates, outcomes, strict=True)]
    self.tried += rows
    self.runs += sum(map(len, outcomes))
    tuning = self.plan.tuning
    self.rung += 1

    def worse(row: Mapping) -> tuple:
      """What is larger for a worse candidate: of two with one value, as at what
      guessing gives, the one with the larger loss."""
      return row['diverged'], -measure.sign * row['value'], row['loss']

    ranked = sorted(rows, key=worse)
    if self.rung < tuning.rungs:
      self.candidates = tuple(
          row['changes'] for row in ranked[:kept(tuning, len(ranked))])
      return
    self.best = min([*filter(None, [self.best]), *ranked], key=worse)
    self.candidates = ()
    if self.rung - tuning.rungs < tuning.extend:
      best = self.best['changes']
      further = [{**best, field: further_out(*self._edge(field))}
                 for field in self.at_edge]
      self.candidates = tuple(candidate for candidate in further
                              if candidate != best)

  def _edge(self, field: str) -> tuple[float, float]:
    """The edge of the values of a field that were tried which is nearer to the
    best, and the value within."""
    values = sorted({row['changes'][field] for row in self.tried})
    return (values[0], values[1]) if (
        self.best['changes'][field] == values[0]) else (values[-1], values[-2])

  @property
  def at_edge(self) -> tuple[str, ...]:
    """The fields whose best value is the first or the last that was tried."""
    return tuple(field for field in self.plan.tuning.fields
                 if self.best['changes'][field] == self._edge(field)[0])

  def result(self) -> plans.Tuned:
    return plans.Tuned(
        *self.name, dict(self.best['changes']), self.at_edge, self.runs,
        tuple(self.tried))


def further_out(edge: float, inner: float) -> float:
  """Returns the value beyond an edge, as many times as far from it as the edge
  is from the value within; of whole numbers the edge, where none is left."""
  out = edge * edge / inner
  if not isinstance(edge, int):
    return float(f'{out:.6g}')
  out = max(round(out), 1)
  return edge + 1 if out == edge > inner else out


def kept(tuning: plans.Tuning, candidates: int) -> int:
  """How many of a rung's candidates survive it."""
  return max(1, math.ceil(tuning.keep * candidates))


def share(tuning: plans.Tuning, rung: int) -> float:
  """Of train.steps, what a candidate of a rung trains."""
  return tuning.keep ** max(tuning.rungs - 1 - rung, 0)


def searches(plan: plans.Plan) -> list[Search]:
  """Returns the searches of a study, before their first rung."""
  return [Search(plan, variant, size, workload)
          for size in plan.tuned_sizes for workload in plan.workloads
          for variant in (plan.base, *plan.variants)]


def _edges(plan: plans.Plan) -> str:
  more = (plan.tuning.extend * len(plan.tuning.fields) * plan.seeds['tune']
          * len(searches(plan)))
  return (f'and at most {more} more runs, where an optimum is at an edge'
          if more else '')


PHASES = {phase.name: phase for phase in (
    Noise(name='noise', block=0, seeds=5, part='first', decide=noise.measured),
    Tune(name='tune', block=1, seeds=1, part='first', least=1, note=_edges),
    Phase(name='screen', block=2, seeds=5, part='first', decide=decide.screen,
          narrow=lambda plan: dataclasses.replace(
              plan, sizes=plan.sizes[:1], measures=plan.measures[:1])),
    Phase(name='rescreen', block=4, seeds=0, part='first',
          decide=decide.screen, constants={'KEEP': 1},
          enter=lambda plan, records: decide.promising(
              plan, records['screen'])[:plan.settings['KEEP']],
          narrow=lambda plan: dataclasses.replace(
              plan, sizes=plan.sizes[1:2], measures=plan.measures[:1]),
          methods='Of the variants that were stopped there, the best (at most '
          '{plan.settings[KEEP]}) that looked better than the base were looked '
          'at again at {plan.sizes[1]} with {plan.seeds[rescreen]} seeds.'),
    Phase(name='confirm', block=3, seeds=5, decide=decide.confirm,
          enter=lambda plan, records: [
              row.variant for name in ('screen', 'rescreen')
              for row in records.get(name, ()) if row.verdict == decide.PASSED],
          note=lambda plan: 'if every variant passes the screening'),
    Largest(name='largest', block=5, seeds=0, decide=decide.confirm,
            enter=lambda plan, records: [
                row.variant for row in records['confirm']],
            narrow=lambda plan: dataclasses.replace(
                plan, sizes=(plan.largest,)),
            note=lambda plan: 'if every variant is confirmed',
            methods='The outcome at {plan.largest} was predicted by a scaling '
            'law of the other sizes, in which a variant has one compute '
            'multiplier. This was recorded, and {plan.seeds[largest]} fresh '
            'seeds then run, with the values tuned at smaller sizes.'),
)}
