"""Measures: what they are called, which value is better, and who has them."""

from collections.abc import Collection, Sequence
import fnmatch
import math

from common.errors import check_choice, require, shorten
from tools.compare import plan as plans
from training import evals, objectives
from training.data import probes
from training.evals.tasks import probe as probe_task
from training.workdir import metrics

# The keys of an entry of MEASURES.
_KEYS_OF_MEASURE = ('workload', 'figure', 'better', 'name', 'chance')


def complete_measures(entries: Sequence, workloads: Collection[str], file: str
                      ) -> list[dict]:
  """Returns the measures of a study's file with all that their entries leave
  out, but for the score of guessing ('chance').

  Args:
    entries: the entries of MEASURES.
    workloads: the names of the workloads: the text and the probes that models
      are trained on.
    file: the file, for messages.

  Raises:
    RequestError: for an entry that is no measure, and for workloads without
      one.
  """
  measures: list[dict] = []
  for entry in entries:
    subject = f'{file}: the measure {shorten(entry)}'
    _check_entry(entry, subject)
    workload = entry.get('workload', plans.TEXT)
    check_choice('workload of a measure', workload, workloads)
    better = _better_direction(entry, subject)
    names = [measure['name'] for measure in measures]
    name = _name_measure(entry, workload, names_in_use=names)
    require(name not in names, f'{file}: two measures are called {name!r}: '
            "give each a 'name' of its own")
    measures.append(
        entry | {'workload': workload, 'better': better, 'name': name})

  # The first one decides, and each workload is for one.
  measured_workloads = [measure['workload'] for measure in measures]
  first_workload = measured_workloads[0]
  require(first_workload == plans.TEXT, f'{file}: the first measure is of '
          f'{first_workload!r}: the first is the one that the verdict is on, '
          f'and is of {plans.TEXT!r}')
  for workload in workloads:
    require(workload in measured_workloads, f'{file}: '
            f'no measure is of workload {workload!r}: add one, or leave the '
            'workload out')
  return measures


def _check_entry(entry, subject: str) -> None:
  """Raises RequestError for an entry of MEASURES that is of another form.

  Args:
    entry: the entry.
    subject: what the message is about.
  """
  require(isinstance(entry, dict) and 'figure' in entry, f'{subject} has no '
          "figure: write {'workload': 'text', 'figure': 'loss'}")
  for key, value in entry.items():
    check_choice('entry of a measure', key, _KEYS_OF_MEASURE)
    if key == 'chance':
      is_right = type(value) in (int, float) and math.isfinite(value)
      expected = 'number'
    else:
      is_right = isinstance(value, str)
      expected = 'text'
    require(is_right,
            f'{subject} has {shorten(value)} as {key}: write a {expected}')


def _better_direction(entry: dict, subject: str) -> str:
  """Returns whether a lower or a higher value of a measure is better: as its
  entry says, or as is known of its figure.

  Args:
    entry: the entry of MEASURES.
    subject: what a message is about.
  """
  figure = entry['figure'].rpartition('/')[2]
  if 'better' in entry:
    check_choice('better of a measure', entry['better'],
                 choices=(plans.LOWER, plans.HIGHER))
    return entry['better']
  if figure in metrics.FIGURES_BEST_WHEN_LEAST:
    return plans.LOWER
  require(figure in metrics.FIGURES_BEST_WHEN_LARGEST or figure == 'rows_right',
          f'{subject}:'
          " it is not known which value of it is better: write 'better': "
          "'lower' or 'higher'")
  return plans.HIGHER


def _name_measure(entry: dict, workload: str, names_in_use: Collection[str]
                  ) -> str:
  """Returns what a measure is called: as its entry says, or by its figure on
  the text, and by its probe elsewhere; by both where that is in use."""
  if 'name' in entry:
    return entry['name']
  figure = entry['figure']
  name = workload
  if workload == plans.TEXT:
    name = figure.rpartition('/')[2]
  if name in names_in_use:
    return f'{workload}-{figure.replace("/", "-")}'
  return name


def tasks_of_workload(measures: Sequence[dict], workload: str
                      ) -> tuple[str, ...]:
  """Returns the evaluation tasks that give the measures of a workload: TASK of
  each figure that is called TASK/FIGURE."""
  tasks = {}
  for measure in measures:
    task, slash, _ = measure['figure'].partition('/')
    if slash and measure['workload'] == workload:
      tasks[task] = None
  return tuple(tasks)


def check_task_has_figure(measure: dict, config, subject: str) -> None:
  """Raises RequestError where a measure is a figure of an evaluation task, and
  a run cannot do the task, or the task does not give the figure.

  Args:
    measure: the measure, as `complete_measures` returns it.
    config: the config of the run.
    subject: the run, for messages.
  """
  task_name, slash, figure = measure['figure'].partition('/')
  if not slash:
    return
  measure_text = (f'measure {measure["name"]!r} is {measure["figure"]!r} of '
                  f'{measure["workload"]}')
  task = evals.check_task_without_flags(task_name, measure_text)
  reason = task.why_unfit(config)
  require(not reason, f'{measure_text}, which {subject} cannot have: {reason}')
  if task.figure_names is None:
    return  # the task does not say which it has
  is_known = any(fnmatch.fnmatchcase(figure, pattern)
                 for pattern in task.figure_names)
  require(is_known, f'{measure_text}, which {subject} cannot have: the figures '
          f'of {task_name} are {", ".join(task.figure_names) or "none"}')


def loss_of_guessing(measures: Sequence[dict], config, vocab: int) -> float:
  """Returns the loss of a model that guesses, above which a run counts as
  diverged.

  Args:
    measures: the measures of its workload, as `complete_measures` returns them.
    config: the config of the run.
    vocab: the size of the vocabulary of its model.

  Raises:
    RequestError: where the objective has no such loss, and no measure says it.
  """
  loss = _uniform_loss(config, vocab)
  if loss is None:
    stated_losses = [measure.get('chance') for measure in measures
                     if measure['figure'] == 'loss']
    loss = stated_losses[0] if stated_losses else None
  require(loss is not None, f'objective {config.objective!r} has no loss '
          'that guessing gives, by which runs that diverge are known: say it '
          "in MEASURES, as {'figure': 'loss', 'chance': 2.5}; of numbers, it "
          'is the variance of what is to be told')
  return float(loss)


def _uniform_loss(config, vocab: int) -> float | None:
  """Returns the loss of a model that gives all answers the same probability;
  None where the objective has no such loss."""
  objective = objectives.find_objective(config)
  return objective.loss_of_guessing(objectives.fill_in_labels(config), vocab)


def score_of_guessing(
    measure: dict, config, vocab: int, bytes_per_token: float, file: str
    ) -> float:
  """Returns the value of a measure that guessing gives: of losses, that of a
  model that gives all answers the same probability; of a probe, the score of
  the best constant answer.

  Args:
    measure: the measure, as `complete_measures` returns it.
    config: the config of a run that has it.
    vocab: the size of the vocabulary of its model.
    bytes_per_token: the bytes of a token of the text that is held out; 0 where
      there is no text.
    file: the file, for messages.
  """
  if 'chance' in measure:
    return float(measure['chance'])
  objective = objectives.find_objective(config)
  guessing = _uniform_loss(config, vocab)
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


def format_unit(frozen: plans.FrozenPlan, measure: plans.Measure,
                before: str = '', after: str = '') -> str:
  """Returns the unit of a measure, such as 'nats a token', between two texts;
  '' where it has none, as an accuracy, or where it is not known, as of a task's
  own figure.

  Args:
    frozen: the plan that has the measure.
    measure: the measure.
    before, after: the texts that stand around a unit.
  """
  point = frozen.point(frozen.plan.base, frozen.plan.sizes[0], measure.workload)
  objective = (frozen.base_config | point['changes'])['objective']
  unit = ''
  if measure.figure.rpartition('/')[2] == 'bits_per_byte':
    unit = 'bits a byte'
  elif measure.figure == 'loss':
    unit = objectives.OBJECTIVES[objective].loss_unit
  return f'{before}{unit}{after}' if unit else ''


def format_amount(frozen: plans.FrozenPlan, value: float) -> str:
  """Returns a value of the primary measure with its unit, such as '0.2 nats a
  token'."""
  return f'{value:g}{format_unit(frozen, frozen.plan.primary, " ")}'
