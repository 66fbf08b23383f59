"""Measures: what they are called, which value is better, and who has them."""

from collections.abc import Collection, Sequence
import fnmatch
import math

from common.errors import one_of, require, short
from tools.compare import plan as plans
from training import evals, objectives
from training.data import probes
from training.evals.tasks import probe as probe_task
from training.workdir import metrics

# The keys of an entry of MEASURES.
_ENTRIES = ('workload', 'figure', 'better', 'name', 'chance')


def complete_measures(entries: Sequence, workloads: Collection[str], file: str
                      ) -> list[dict]:
  """Returns the measures of a file with what they leave out, but for `chance`.

  Args:
    entries: the entries of MEASURES.
    workloads: the names of the workloads.
    file: the file, for messages.

  Raises:
    RequestError: for one that is none.
  """
  measures: list[dict] = []
  for entry in entries:
    _check_entry(entry, f'{file}: the measure {short(entry)}')
    workload = entry.get('workload', plans.TEXT)
    one_of('workload of a measure', workload, workloads)
    better = _better(entry, f'{file}: the measure {short(entry)}')
    name = _name(entry, workload, taken=[x['name'] for x in measures])
    require(all(name != other['name'] for other in measures),
            f'{file}: two measures are called {name!r}: '
            "give each a 'name' of its own")
    measures.append(
        entry | {'workload': workload, 'better': better, 'name': name})

  # The first one decides, and each workload is for one.
  measured = [measure['workload'] for measure in measures]
  require(measured[0] == plans.TEXT, f'{file}: the first measure is of '
          f'{measured[0]!r}: the first is the one that the verdict is on, and '
          f'is of {plans.TEXT!r}')
  for workload in workloads:
    require(workload in measured, f'{file}: '
            f'no measure is of workload {workload!r}: add one, or leave the '
            'workload out')
  return measures


def _check_entry(entry, who: str) -> None:
  """Raises RequestError for an entry of MEASURES that is of another form."""
  require(isinstance(entry, dict) and 'figure' in entry, f'{who} has no '
          "figure: write {'workload': 'text', 'figure': 'loss'}")
  for key, x in entry.items():
    one_of('entry of a measure', key, _ENTRIES)
    if key == 'chance':
      is_right = type(x) in (int, float) and math.isfinite(x)
      kind = 'number'
    else:
      is_right = isinstance(x, str)
      kind = 'text'
    require(is_right, f'{who} has {short(x)} as {key}: write a {kind}')


def _better(entry: dict, who: str) -> str:
  """Returns which value of a measure is better: as its entry says, or as is
  known of its figure."""
  figure = entry['figure'].rpartition('/')[2]
  if 'better' in entry:
    one_of('better of a measure', entry['better'], (plans.LOWER, plans.HIGHER))
    return entry['better']
  if figure in metrics.FIGURES_BEST_WHEN_LEAST:
    return plans.LOWER
  require(figure in metrics.FIGURES_BEST_WHEN_LARGEST or figure == 'rows_right',
          f'{who}:'
          " it is not known which value of it is better: write 'better': "
          "'lower' or 'higher'")
  return plans.HIGHER


def _name(entry: dict, workload: str, taken: Collection[str]) -> str:
  """Returns what a measure is called: as its entry says, or by its figure on
  the text, and by its probe elsewhere; by both where that is taken."""
  if 'name' in entry:
    return entry['name']
  figure = entry['figure']
  name = workload
  if workload == plans.TEXT:
    name = figure.rpartition('/')[2]
  if name in taken:
    return f'{workload}-{figure.replace("/", "-")}'
  return name


def tasks_of_workload(
    measures: Sequence[dict], workload: str) -> tuple[str, ...]:
  """Returns the evaluation tasks that the measures of a workload are figures
  of."""
  names = {}
  for measure in measures:
    task, is_task, _ = measure['figure'].partition('/')
    if is_task and measure['workload'] == workload:
      names[task] = None
  return tuple(names)


def check_task_has_figure(measure: dict, config, who: str) -> None:
  """Raises RequestError where a measure is a figure of a task that a run of
  `config` does not have."""
  task, is_task, figure = measure['figure'].partition('/')
  if not is_task:
    return
  which = (f'measure {measure["name"]!r} is {measure["figure"]!r} of '
           f'{measure["workload"]}')
  row = evals.check_task_without_flags(task, which)
  reason = row.why_unfit(config)
  require(not reason, f'{which}, which {who} cannot have: {reason}')
  if row.figure_names is None:
    return  # the task does not say which it has
  is_known = any(fnmatch.fnmatchcase(figure, x) for x in row.figure_names)
  require(is_known, f'{which}, which {who} cannot have: the figures of {task} '
          f'are {", ".join(row.figure_names) or "none"}')


def loss_of_guessing(measures: Sequence[dict], config, vocab: int) -> float:
  """Returns the loss of guessing of a run, above which it counts as diverged.

  Args:
    measures: the measures of its workload, as `completed` returns them.
    config: the config of the run.
    vocab: the size of the vocabulary of its model.

  Raises:
    RequestError: where the objective has no such loss, and no measure says it.
  """
  loss = _guessing(config, vocab)
  if loss is None:
    said = [measure.get('chance') for measure in measures
            if measure['figure'] == 'loss']
    loss = said[0] if said else None
  require(loss is not None, f'objective {config.objective!r} has no loss '
          'that guessing gives, by which runs that diverge are known: say it '
          "in MEASURES, as {'figure': 'loss', 'chance': 2.5}; of numbers, it "
          'is the variance of what is to be told')
  return float(loss)


def _guessing(config, vocab: int) -> float | None:
  """Returns the loss of a model to which all answers are alike; None where the
  objective has none."""
  return objectives.find_objective(
      config).guessing(objectives.fill_in_labels(config), vocab)


def score_of_guessing(
    measure: dict, config, vocab: int, bytes_per_token: float, file: str
    ) -> float:
  """Returns what guessing gives: of losses, that of one to which all answers
  are alike; of a probe, what the best constant answer scores.

  Args:
    measure: the measure, as `completed` returns it.
    config: the config of a run that has it.
    vocab: the size of the vocabulary of its model.
    bytes_per_token: the bytes of a token of the text that is held out; 0 where
      there is no text.
    file: the file, for messages.
  """
  if 'chance' in measure:
    return float(measure['chance'])
  objective = objectives.find_objective(config)
  guessing = _guessing(config, vocab)
  figure = measure['figure']

  # Figures that follow from a uniform guess.
  if figure == 'loss' and guessing is not None:
    return guessing
  if figure == 'accuracy' and objective.has_labels:
    return math.exp(-guessing)
  if figure == 'perplexity':
    return float(vocab)
  if figure == 'bits_per_byte' and bytes_per_token:
    return math.log2(vocab) / bytes_per_token

  # Figures of a probe, and an accuracy among more answers than are counted.
  is_probe = objective.record_kind == probes.KIND_OF_SOURCE
  if is_probe and figure in probe_task.CONSTANT_FIGURES:
    return probe_task.score_constant_answer(config, figure)
  require(figure == 'accuracy', f'{file}: measure {measure["name"]!r} needs a '
          "chance: what guessing gives, as 'chance': 0.5")
  return 0.0


def format_unit(frozen, measure, before: str = '', after: str = '') -> str:
  """Returns the unit of a measure, 'nats a token', between two texts; '' where
  it has none, as an accuracy, or where it is not known, as of a task's own
  figure.

  Args:
    frozen: the plan that has the measure.
    measure: the measure.
    before, after: the texts that stand around a unit.
  """
  point = frozen.point(frozen.plan.base, frozen.plan.sizes[0], measure.workload)
  name = (frozen.base_config | point['changes'])['objective']
  unit = ''
  if measure.figure.rpartition('/')[2] == 'bits_per_byte':
    unit = 'bits a byte'
  elif measure.figure == 'loss':
    unit = objectives.OBJECTIVES[name].loss_unit
  return f'{before}{unit}{after}' if unit else ''


def format_amount(frozen, value: float) -> str:
  """Returns '0.2 nats a token', of the primary measure."""
  return f'{value:g}{format_unit(frozen, frozen.plan.primary, " ")}'
