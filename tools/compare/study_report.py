"""report: writes W/report/ anew, from W/study.json and W/results.json: a page,
Markdown, LaTeX tables, CSV and the figures.
"""

from collections.abc import Iterator, Mapping, Sequence
import datetime
import json
import pathlib
from typing import Any, NamedTuple

from configs.errors import require
from tools.compare import decide, figures, layout, page, spec, statistics
from tools.compare import measures as measures_lib
from tools.compare import phases as phases_lib
from tools.compare import plan as plans
from tools.compare import results as results_lib
from tools.compare import tables
from tools.compare.tables import UNKNOWN, Cell, Table, label, listed
from training.workdir import run_config, storage

# What a study that was frozen and no more has found.
_NOTHING = {'outcomes': [], 'noise': [], 'announced': None, 'tuned': [],
            'screen': [], 'confirm': [], 'phases': {},
            'as_planned': {'same': True, 'differences': []},
            'provenance': {'codes': [], 'devices': [], 'versions': {}}}
STOPPED, OPEN = 'stopped at the screen', 'not confirmed yet'
UNSTABLE = f'{STOPPED}: unstable'
# How a verdict is coloured.
MARKS = {decide.BETTER: 'better', decide.WORSE: 'worse',
         decide.UNSTABLE: 'worse', UNSTABLE: 'worse'}
INTERVALS = 'Square brackets are 95 % intervals.'
# Fields that say where and how a run is done, not what it computes.
ASIDE = ('log.', 'checkpoint.', 'mesh.', 'profile.')
FIGURES = ('effects', 'curves', 'noise', 'measures')


class Study(NamedTuple):
  """What a study planned and found.

  Attributes:
    frozen: study.json.
    results: results.json.
    outcomes: of it, the runs.
  """
  frozen: plans.Frozen
  results: Mapping[str, Any]
  outcomes: Sequence[plans.Outcome]

  @property
  def plan(self) -> plans.Plan:
    return self.frozen.plan

  @property
  def variants(self) -> tuple[str, ...]:
    """The base first."""
    return (self.plan.base, *self.plan.variants)

  @property
  def finished(self) -> tuple[str, ...]:
    """The phases that are over."""
    phases = self.results['phases']
    return tuple(name for name in plans.PHASES
                 if name in phases and phases[name]['finished'])

  def verdict(self, variant: str, measure: str = ''
              ) -> Mapping[str, Any] | None:
    """What the confirmation says of a measure, if '' the primary one; None of
    what it has not compared."""
    wanted = variant, measure or self.plan.primary.name
    return next((row for row in self.results['confirm']
                 if (row['variant'], row['measure']) == wanted), None)

  def runs(self, phase: str, variant: str, size: str = '', workload: str = ''
           ) -> list[plans.Outcome]:
    """The runs of a phase that are done; of any size and workload, if ''."""
    return [run for run in self.outcomes
            if (run.phase, run.variant) == (phase, variant)
            and size in ('', run.size) and workload in ('', run.workload)]

  def values(self, phase: str, variant: str, size: str,
             measure: plans.Measure) -> list[float]:
    """A measure of each run of a phase that has it."""
    return [value for run in self.runs(phase, variant, size, measure.workload)
            if tables.known(value := run.values.get(measure.name))]

  def standing(self, variant: str) -> str:
    """How far a variant came, in the words of the verdict's column."""
    if variant == self.plan.base:
      return 'base'
    if found := self.verdict(variant):
      return found['verdict']
    screened = next((row for row in self.results['screen'] if (
        row['variant'], row['measure']) == (
            variant, self.plan.primary.name)), {'passed': True})
    if screened['passed']:
      return OPEN
    return UNSTABLE if screened['unstable'] else STOPPED

  def unit(self, measure: plans.Measure, before: str = '', after: str = ''
           ) -> str:
    """The unit of a measure with what stands around it, '' if it has none."""
    return measures_lib.said(self.frozen, measure, before, after)

  @property
  def wanted(self) -> str:
    """The effect that the plan wants, with its unit."""
    return measures_lib.amount(self.frozen, self.plan.effect)

  def alone(self, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a point changes beside the base of its size and workload."""
    base = self.frozen.point(self.plan.base, row['size'], row['workload'])
    return differing(row['changes'], base['changes'])


def differing(own: Mapping[str, Any], other: Mapping[str, Any]
              ) -> dict[str, Any]:
  return {name: x for name, x in own.items()
          if name not in other or other[name] != x}


def load(workdir) -> Study:
  """Returns what lies in a study's folder.

  Raises:
    RequestError: where no study was planned there, a file is damaged, or the
      results are not of the plan.
  """
  frozen, results = plans.load(workdir), _NOTHING
  path = pathlib.Path(workdir) / results_lib.FILE
  if path.is_file():
    results = layout.load_checked(path)
    require(results['study']['hash'] == frozen.hash, f'{path} is of another '
            'plan than study.json, whose study has to be run before it is '
            'reported')
  return Study(frozen, results,
               [plans.outcome_from_json(row) for row in results['outcomes']])


def write(workdir) -> list[pathlib.Path]:
  """Writes the report of a study, as far as it is; returns the files' paths.

  Args:
    workdir: W, with study.json and, once a phase has begun, results.json.

  Raises:
    RequestError: where there is no study, or a file is damaged.
    EnvironmentFailure: where a file cannot be written.
  """
  study = load(workdir)
  folder = pathlib.Path(workdir) / 'report'
  storage.try_folder(folder)
  drawn = list(figures.of_study(study))
  own = document(study, drawn)
  texts = {'index.html': page.html(own), 'report.md': page.markdown(own),
           'tables.tex': page.latex(own), 'results.csv': estimates(study),
           'runs.csv': sheet_of_runs(study)}
  folder.mkdir(parents=True, exist_ok=True)
  for name in FIGURES:  # of an earlier report, which may have them no more
    for path in folder.glob(f'{name}.*'):
      path.unlink()
  for name, content in texts.items():
    storage.write(folder / name, content)
  pictures = {f'{figure.name}.{kind}': content for figure in drawn
              for kind, content in figure.files.items()}
  for name, content in pictures.items():
    (folder / name).write_bytes(content)
  return [folder / name for name in (*texts, *pictures)]


def document(study: Study, drawn: Sequence[page.Figure]) -> page.Document:
  """Returns the document, with the sections that there is something for."""
  pick = lambda name: [figure for figure in drawn if figure.name == name]
  sections = [
      page.Section('verdict', 'Verdict', (), pick('effects'), [
          verdicts(study), by_size(study), means(study)]),
      page.Section('curves', 'Loss curves', (), pick('curves')),
      page.Section('measures', 'Probes and other measures', (),
                   pick('measures')),
      page.Section('stability', 'Stability', (), (), [
          stability(study), diverged(study)]),
      page.Section('noise', 'Noise', (), pick('noise'), [noise(study)]),
      page.Section('screen', 'Screen', (), (), [screen(study)]),
      page.Section('tuning', 'Tuning', (), (), [tuning(study)]),
      page.Section('planned', 'Planned and run', as_planned(study), (), [
          amendments(study)]),
      page.Section('methods', 'Methods', methods(study), (), [
          points(study), config(study)]),
      page.Section('provenance', 'Provenance and cost', (), (), [
          spent(study), provenance(study)])]
  return page.Document('study', study.plan.name, study.plan.question,
                       answer(study), warnings(study), page.filled(sections))


# What a study says in sentences: its answer, how far it is, how it was done.


def answer(study: Study) -> str:
  """The answer to the question, as far as there is one, in a sentence."""
  groups: dict[str, list[str]] = {}
  for variant in study.plan.variants:
    groups.setdefault(study.standing(variant), []).append(variant)
  announced = study.results['announced']
  if study.finished == ('noise',) and announced and not announced['enough']:
    return ('The study has no answer, since it could hardly find one: '
            + announced['sentence'])
  if 'screen' not in study.finished:
    return 'The study has no answer yet: ' + progress(study)
  if 'confirm' not in study.finished and OPEN in groups:
    return ('The study has no answer yet: the confirmation of '
            f'{listed(groups[OPEN])} is not over.')
  told = []
  for word, says in (
      (decide.BETTER, '{} better than {base}'),
      (decide.WORSE, '{} worse than {base}'),
      (decide.DISAGREE, '{} better at some sizes and worse at others'),
      (decide.UNSTABLE, '{} unstable'),
      (decide.NONE_SHOWN, 'no difference from {base} is shown of {names}'),
      (UNSTABLE, 'the screen stopped {the} as unstable'),
      (STOPPED, 'the screen stopped {the}, since it showed no difference '
       'from {base}')):
    if word in groups:
      names = listed([_with_effect(study, v) for v in groups[word]])
      many = len(groups[word]) > 1
      # A variant may be called 'none'.
      told.append(says.format(
          f'{names} {"are" if many else "is"}', names=names,
          the=f'the variant{"s" * many} {names}', base=study.plan.base))
  unit = study.unit(study.plan.primary, ' (', ')')
  return f'By {study.plan.primary.name}{unit}, {"; ".join(told)}.'


def _with_effect(study: Study, variant: str) -> str:
  row = study.verdict(variant)
  if row is None or not tables.known(row['effect']):
    return variant
  effect = _effect(row).text
  if _excluded(study, row):
    effect += f': an effect of {study.plan.effect:g} is excluded'
  return f'{variant} ({effect})'


def _excluded(study: Study, row: Mapping[str, Any]) -> bool:
  """Whether a variant of which no difference is shown cannot have one of
  EFFECT: its interval lies within, and does so where it is as wide as makes
  the intervals of all confirmed variants hold at once (Bonferroni)."""
  if row['verdict'] != decide.NONE_SHOWN or not tables.known(row['low']):
    return False
  from scipy.stats import t
  plan, df = study.plan, row['n'] - 1
  family = sum(own['primary'] for own in study.results['confirm'])
  wider = t.isf(plan.alpha / (2 * family), df) / t.isf(0.025, df)
  half = (row['high'] - row['low']) / 2 * max(wider, 1.0)
  return abs(row['effect']) + half < plan.effect


def progress(study: Study) -> str:
  """Which phases are over and which are not."""
  over = study.finished
  left = [name for name in plans.PHASES if name not in over]
  are = lambda names: f'{listed(names)} {"are" if names[1:] else "is"}'
  done = f'{are(over)} over' if over else (
      'the plan is frozen and no phase is over')
  return f'{done}; {are(left)} not.' if left else f'{done}.'


def warnings(study: Study) -> list[str]:
  """What a reader must know before the figures."""
  told = []
  if len(study.finished) < len(plans.PHASES):
    told.append(f'This study is not over: {progress(study)}')
  if not _is_as_planned(study):
    told.append('What ran is not what was planned at first: see "Planned and '
                'run".')
  announced = study.results['announced']
  if announced and not announced['enough']:
    told.append(announced['sentence'] + ' That no difference is shown does not '
                'mean that there is none.')
  edges = dict.fromkeys(row['variant'] for row in study.results['tuned']
                        if row['at_edge'])
  if edges:
    told.append('Tuning ended at the edge of what was tried for '
                f'{listed([*edges])}: a better value may lie beyond.')
  return told


def _is_as_planned(study: Study) -> bool:
  return study.results['as_planned']['same'] and not study.frozen.amendments


def as_planned(study: Study) -> list[str]:
  """Whether what ran is what was planned, and what differs."""
  if _is_as_planned(study):
    return ['What ran is what was planned: both files are of the plan '
            f'{study.frozen.hash}, and nothing was changed after it was '
            'frozen.']
  return study.results['as_planned']['differences']


def methods(study: Study) -> list[str]:
  """The paragraphs that a paper needs to say how this was done."""
  chosen: dict[str, list[str]] = {}
  for row in study.results['tuned']:
    what = (f'on {row["workload"]} at {row["size"]} {changed(row["changes"])}'
            + ', at the edge' * bool(row['at_edge']))
    chosen.setdefault(what, []).append(row['variant'])
  grid = [f'{name} in {{{", ".join(map(value, values))}}}'
          for name, values in study.plan.tuning.fields.items()]
  return page.paragraphs(
      'methods.txt', study=study, plan=study.plan, primary=study.plan.primary,
      point=study.frozen.point, fields=_fields_of_base(study), grid=grid,
      chosen=chosen, tuning=phases_lib, changed=changed, differing=differing,
      listed=listed, value=value, some=tables.some, percent=tables.percent,
      amount=study.wanted)


# What a paper says of a run; the rest of the config is in its own table.
_GROUPS = {'model': 'Model', 'data': 'Data', 'train': 'Training',
           'optim': 'Optimiser', 'eval': 'Evaluation'}


def _fields_of_base(study: Study) -> dict[str, dict[str, Any]]:
  """Returns what the base reads on text at the smallest size, by _GROUPS, with
  what the model derives filled in; not what its parts do not read, nor what is
  empty."""
  from training import limits, runs
  plan = study.plan
  point = study.frozen.point(plan.base, plan.sizes[0], plans.TEXT)
  own = spec.changed(run_config.from_json(study.frozen.base_config),
                     point['changes'], f'the base {plan.base!r}')
  read = run_config.flatten_dict(limits.as_read(
      own, runs.resolve_alone(own), resolved=True))
  groups: dict[str, dict[str, Any]] = {}
  for name, x in (read | {'model.vocab_size': point['vocab']}).items():
    group, _, rest = name.partition('.')
    word, rest = (_GROUPS[group], rest) if group in _GROUPS else ('Also', name)
    if not (name.startswith(ASIDE) or x in ('', [], (), None)):
      groups.setdefault(word, {})[rest] = x
  return groups


def value(x: Any) -> str:
  """Returns a config's value as a flag would have it."""
  return x if isinstance(x, str) and x else json.dumps(x)


def changed(changes: Mapping[str, Any]) -> str:
  return ', '.join(f'{name}={value(x)}' for name, x in changes.items())


# What a study decided, as tables.


def _name(study: Study, variant: str) -> Cell:
  text = f'{variant} (the base)' if variant == study.plan.base else variant
  return Cell(text, variant)


def _effect(row: Mapping[str, Any], name: str = 'effect') -> Cell:
  return tables.estimate(row[name], row['low'], row['high'])


def _minus(study: Study, measure: plans.Measure,
           over: str = 'sizes and paired seeds') -> dict[str, str]:
  """What the heading of a difference from the base means."""
  return {f'{measure.name} minus base':
          f'{study.unit(measure, "in ", ": ")}mean over {over} that ended, and '
          f'its 95 % interval; {measure.better} is better'}


def _units(study: Study, *measures: plans.Measure) -> list[str]:
  """A note on the unit of each measure that has one, if none are given of all
  that the study has."""
  told = [study.unit(m, f'{m.name} is in ', '.')
          for m in measures or study.plan.measures]
  return [*filter(None, told)]


def _no_speed_up(study: Study) -> list[str]:
  """A note on why speed-ups are n/a, where one is."""
  found = [row for v in study.plan.variants if (row := study.verdict(v))]
  wanted = len(study.plan.sizes) * len(decide.BY)
  if all(sum(tables.known(own['factor']) for own in row['speed_ups']) == wanted
         for row in found):
    return []
  return [f'A speed-up is n/a where a run has fewer than '
          f'{statistics.MIN_POINTS} evaluations after warm-up, all runs '
          'diverged, their time is not known, or the loss of one of them does '
          'not fall as the law that is fitted to it or never comes to that of '
          'the other.']


def _speed_ups(row: Mapping[str, Any], size: str) -> dict[str, Cell]:
  by = {own['by']: own for own in row['speed_ups'] if own['size'] == size}
  return {f'speed-up in {word}': tables.estimate(
      by[key]['factor'], by[key]['low'], by[key]['high'], '.2f')
          if key in by else Cell(UNKNOWN)
          for key, word in (('flops', 'FLOPs'), ('seconds', 'time'))}


def verdicts(study: Study) -> Table:
  """Each variant beside the base, the base first."""
  plan, announced, rows = study.plan, study.results['announced'], []
  for variant in study.variants:
    found, word = study.verdict(variant), study.standing(variant)
    row = {'variant': _name(study, variant),
           'verdict': label(word, MARKS.get(word, ''))}
    headings = (f'{plan.primary.name} minus base', 'p (Holm)', 'power',
                'speed-up in FLOPs', 'speed-up in time', 'trend over size',
                *(f'{m.name} minus base' for m in plan.measures[1:]))
    row |= dict.fromkeys(headings, Cell('-'))
    if found:
      bad, of = found['diverged'], found['runs']
      row |= {
          headings[0]: _effect(found),
          'p (Holm)': tables.p_value(found['p_holm']),
          'power': tables.share(announced and announced['power']),
          **_speed_ups(found, plan.sizes[-1]),
          'trend over size': _effect(found['trend'], 'slope')
          if found['trend'] else Cell(UNKNOWN),
          **{f'{m.name} minus base': _secondary(study.verdict(variant, m.name))
             for m in plan.measures[1:]}}
    else:
      row[headings[0]] = Cell('base' if variant == plan.base else '-')
      runs = study.runs('confirm', variant, workload=plan.primary.workload)
      bad, of = sum(run.diverged for run in runs), len(runs)
    rows.append(row | {'diverged': tables.fraction(bad, of) if of
                       else Cell('-')})
  notes = [INTERVALS, *_units(study), *_no_speed_up(study)]
  stopped = [v for v in plan.variants
             if study.standing(v) in (STOPPED, UNSTABLE)]
  if stopped:
    notes.append('What the screen found of the variants that it stopped '
                 f'({", ".join(stopped)}) is in its own table.')
  if plan.measures[1:] and study.results['confirm']:
    notes.append(
        'The verdict is on the primary measure alone. The others are '
        'secondary: their p-values are corrected among themselves, and no '
        'verdict rests on them.')
  why = {}
  for measure in plan.measures:
    why |= _minus(study, measure)
  return Table('verdicts', rows, notes, 'Each variant beside the base',
               {'effect': study.wanted, 'size': plan.sizes[-1]}, why)


def _secondary(row: Mapping[str, Any] | None) -> Cell:
  if row is None:
    return Cell(UNKNOWN)
  cell, p = _effect(row), tables.p_value(row['p_holm'])
  if p.value is None:
    return cell
  sign = '' if p.text.startswith('<') else '= '
  return Cell(f'{cell.text}, p {sign}{p.text}', cell.value)


def by_size(study: Study) -> Table:
  """The primary measure of each confirmed variant at each size."""
  primary = study.plan.primary
  rows = [{'variant': label(variant), 'size': label(row['size']),
           f'{primary.name} minus base': _effect(row, 'mean'),
           'seeds': tables.count(row['n']), 'p': tables.p_value(row['p']),
           **_speed_ups(found, row['size'])}
          for variant in study.plan.variants
          if (found := study.verdict(variant)) for row in found['sizes']]
  return Table('by-size', rows, [
      INTERVALS, *_units(study, primary), *_no_speed_up(study),
      'A verdict needs the same direction at all sizes.'], 'At each size',
               why=_minus(study, primary, 'paired seeds'))


def means(study: Study) -> Table:
  """Each measure of each variant, side by side: in the confirmation, or of what
  the screen stopped, there."""
  plan, rows = study.plan, []
  for variant in study.variants:
    phase = 'confirm' if study.runs('confirm', variant) else 'screen'
    for size in plan.sizes:
      values = {m.name: study.values(phase, variant, size, m)
                for m in plan.measures}
      if any(values.values()):
        rows.append({'variant': _name(study, variant), 'size': Cell(size),
                     'phase': Cell(phase)} | {
            name: tables.mean(own) for name, own in values.items()})
  return Table('means', rows, [
      *_units(study), 'A run that diverged counts with what guessing gives.'],
               'Means', why={
          m.name: f'mean ± standard deviation over seeds; {m.better} is '
          f'better; guessing gives {m.chance:.4g}' for m in plan.measures})


def noise(study: Study) -> Table:
  """What a variant without effect shows, and what can be found beside it."""
  plan = study.plan
  rows = [{'size': label(row['size']), 'measure': label(row['measure']),
           'phase': label(row['phase']), 'pairs': tables.count(row['pairs']),
           'standard deviation': tables.estimate(
               row['sd'], row['sd_low'], row['sd_high'], '.4f'),
           'smallest effect': tables.number(row['smallest_effect']),
           'seeds': tables.count(row['seeds']),
           'seeds needed': tables.count(row['seeds_needed']),
           'power': tables.share(row['power'])}
          for row in study.results['noise']]
  return Table('noise-table', rows, [
      INTERVALS, *_units(study),
      f'Wanted is an effect of {study.wanted} on {plan.primary.name}.'],
               'Base against base',
               {'effect': study.wanted, 'power': tables.percent(plan.power)})


def screen(study: Study) -> Table:
  plan = study.plan
  rows = [{'variant': label(row['variant']), 'measure': label(row['measure']),
           'minus base': _effect(row), 'seeds': tables.count(row['n']),
           'p': tables.p_value(row['p']), 'q': tables.p_value(row['q']),
           'diverged': tables.fraction(row['diverged'], row['runs']),
           'passed': Cell('yes' if row['passed'] else
                          'no' + ': unstable' * row['unstable'],
                          row['passed'])}
          for row in study.results['screen']]
  return Table('screened', rows, [
      INTERVALS, *_units(study, plan.primary),
      f'At the smallest size, {plan.sizes[0]}.'],
               'Every variant at the smallest size', {'q': f'{plan.q:g}'})


def stability(study: Study) -> Table:
  """How often each confirmed variant diverges, beside the base."""
  plan = study.plan
  counted = f'{plan.primary.name} minus base, all counted'
  rows = [{'variant': label(variant),
           'diverged': tables.fraction(row['diverged'], row['runs']),
           'the base': tables.fraction(row['base_diverged'], row['runs']),
           'share': Cell(f'[{row["rate_low"]:.4f}, {row["rate_high"]:.4f}]',
                         row['rate_low']),
           'p (Holm)': tables.p_value(row['p_diverged']),
           counted: tables.number(row['counted'], '+.4f')}
          for variant in plan.variants if (row := study.verdict(variant))]
  return Table('diverging', rows, [
      *_units(study, plan.primary), 'Unstable is a variant of which more than '
      f'{tables.percent(plan.unstable)} of the runs diverge.'],
               'How often variants diverge', why={counted: 'where a run that '
               'diverged counts with what guessing gives'})


def diverged(study: Study) -> Table:
  """Runs that diverged, by phase and size."""
  rows = []
  for variant in study.variants:
    for phase in plans.PHASES:
      by = {size: [run.diverged for run in study.runs(phase, variant, size)]
            for size in study.plan.sizes}
      if any(map(any, by.values())):
        rows.append({'variant': _name(study, variant), 'phase': Cell(phase)} | {
            size: tables.fraction(sum(own), len(own)) if own else Cell('-')
            for size, own in by.items()})
  return Table('diverged', rows, (), 'Runs that diverged', why=dict.fromkeys(
      study.plan.sizes, 'runs that diverged, of those done, of all workloads'))


# How a study went, as tables.


def tuning(study: Study) -> Table:
  """What each variant was tuned to, and what that took."""
  rows = []
  for row in study.results['tuned']:
    tried = row['tried']
    rows.append({
        'variant': _name(study, row['variant']), 'size': Cell(row['size']),
        'workload': Cell(row['workload']),
        'chosen': Cell(changed(row['changes'])), 'tried': Cell(_grid(tried)),
        'at the edge': Cell(', '.join(row['at_edge']) or 'no'),
        'diverged': tables.fraction(sum(bool(one['diverged']) for one in tried),
                                    len(tried)),
        'runs': tables.count(row['runs']), 'FLOPs': tables.flops(row['flops']),
        'time': tables.duration(row['seconds'])})
  return Table('tuned', rows, (), 'What each variant was tuned to')


def _grid(tried: Sequence[Mapping[str, Any]]) -> str:
  """'optim.lr: 0.001, 0.002', of what was tried."""
  values: dict[str, list] = {}
  for one in tried:
    for name, x in one['changes'].items():
      own = values.setdefault(name, [])
      own += [] if x in own else [x]
  return '; '.join(
      f'{name}: {", ".join(map(value, sorted(own, key=_order)))}'
      for name, own in values.items())


def _order(x: Any) -> float:
  return x if isinstance(x, int | float) else 0


def spent(study: Study) -> Table:
  """Runs, FLOPs and time of each phase, and of all."""
  forms = {'planned': ('runs planned at most', tables.count),
           'done': ('done', tables.count), 'failed': ('diverged', tables.count),
           'tokens': ('tokens', tables.count), 'flops': ('FLOPs', tables.flops),
           'seconds': ('training time', tables.duration),
           'wall_seconds': ('time by the clock', tables.duration)}
  phases = study.results['phases']
  known = {phase: phases.get(phase) for phase in plans.PHASES}
  states = {phase: 'not begun' if own is None else
            'over' if own['finished'] else 'not over'
            for phase, own in known.items()}
  if phases:
    known['all'] = {key: sum(values) if all(map(tables.known, values)) else None
                    for key in forms
                    for values in [[own[key] for own in phases.values()]]}
  rows = [{'phase': Cell(phase), 'state': Cell(states.get(phase, ''))} | {
      heading: form(own[key]) if own else Cell('-')
      for key, (heading, form) in forms.items()}
          for phase, own in known.items()]
  return Table('spent', rows, (), 'Spent, by phase')


def amendments(study: Study) -> Table:
  """What was changed after the plan was frozen, and why."""
  utc = lambda seconds: datetime.datetime.fromtimestamp(
      seconds, datetime.UTC).strftime('%Y-%m-%d %H:%M')
  rows = [{'when': Cell(utc(row['time']), row['time']),
           'why': Cell(row['reason']),
           'what was changed': Cell(', '.join(row['changed'])),
           'after looking at': Cell(', '.join(row['seen']) or 'nothing'),
           'hash before': Cell(row['before'])}
          for row in study.frozen.amendments]
  return Table('amendments', rows, (), 'Changes after the plan was frozen')


def points(study: Study) -> Table:
  """What each variant changes at each size, and what it costs."""
  grouped: dict[tuple, list[str]] = {}
  for row in study.frozen.points:
    told = (row['variant'], row['size'], row['params'], row['flops_per_token'],
            row['tokens'], changed(study.alone(row)), ', '.join(row['matched']))
    grouped.setdefault(told, []).append(row['workload'])
  rows = [{'variant': _name(study, variant), 'size': label(size),
           'workloads': Cell(', '.join(workloads)),
           'parameters': tables.count(params),
           'FLOPs a token': tables.flops(flops),
           'tokens': tables.count(tokens),
           'changes': Cell('-' if variant == study.plan.base
                           else what or 'nothing'),
           'solved': Cell(solved or '-')}
          for (variant, size, params, flops, tokens, what, solved), workloads
          in grouped.items()]
  return Table('points', rows, (), 'Variants and sizes')


def config(study: Study) -> Table:
  """Every field of the config that all runs change."""
  rows = [{'field': Cell(name), 'value': Cell(value(x))}
          for name, x in run_config.flatten_dict(
              study.frozen.base_config).items() if not name.startswith(ASIDE)]
  return Table('config', rows, (), 'The config that all runs change')


def provenance(study: Study) -> Table:
  """Code, machines, versions and data."""
  frozen, found = study.frozen, study.results['provenance']
  rows = [('plan frozen at commit', frozen.code.get('commit') or 'not known'),
          ('changes beside that commit', frozen.code.get('diff') or 'none'),
          *(('code that ran', code) for code in found['codes']),
          *(('device', device) for device in found['devices']),
          *(('version', f'{name} {version}')
            for name, version in found['versions'].items()),
          *(('hash', f'{name}: {code}')
            for name, code in frozen.sources.items())]
  return Table('code', [{'what': Cell(name), 'which': Cell(told)}
                        for name, told in rows], (),
               'Code, machines and data')


# results.csv, every estimate in full, and runs.csv, every run.

ESTIMATES = ('phase', 'variant', 'measure', 'size', 'effect', 'low', 'high',
             'n', 'p', 'p_corrected', 'correction', 'verdict', 'diverged',
             'base_diverged', 'runs')
RUNS = ('phase', 'variant', 'size', 'workload', 'seed', 'measure', 'value',
        'diverged', 'loss', 'flops', 'seconds', 'params', 'changes')


def estimates(study: Study) -> str:
  """Returns a line for each effect, speed-up and trend."""
  return tables.sheet(ESTIMATES, _estimates(study))


def _estimates(study: Study) -> Iterator[dict[str, Any]]:
  kept = lambda row: {name: row[name] for name in ESTIMATES if name in row}
  for row in study.results['screen']:
    yield kept(row) | dict(
        phase='screen', size=study.plan.sizes[0], p_corrected=row['q'],
        correction='Benjamini-Hochberg',
        verdict='passed' if row['passed'] else 'stopped')
  for row in study.results['confirm']:
    of = dict(phase='confirm', variant=row['variant'])
    yield kept(row) | of | dict(size=decide.ALL, p_corrected=row['p_holm'],
                                correction='Holm')
    for own in row['sizes']:
      yield kept(own) | of | dict(measure=row['measure'], effect=own['mean'])
    for own in row['speed_ups']:
      yield kept(own) | of | dict(measure=f'speed-up by {own["by"]}',
                                  effect=own['factor'])
    if row['trend']:
      yield kept(row['trend']) | of | dict(
          measure=f'trend of {row["measure"]}', size=decide.ALL,
          effect=row['trend']['slope'])


def sheet_of_runs(study: Study) -> str:
  """Returns a line for each measure of each run."""
  return tables.sheet(RUNS, (
      {name: getattr(run, name) for name in RUNS if hasattr(run, name)}
      | dict(measure=measure, value=value,
             changes=json.dumps(run.changes, sort_keys=True))
      for run in study.outcomes for measure, value in run.values.items()))
