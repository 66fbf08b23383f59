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
  """Checks the measures that a study's file lists, such as the loss on text,
  and adds what their entries leave out, except for the score of guessing
  ('chance').

  Args:
    entries: the entries of MEASURES in the file.
    workloads: the names of the workloads, on which models are trained: the
      text, and probes (synthetic tasks).
    file: the path of the file, for messages.

  Returns:
    The entries with 'workload', 'better' ('lower' or 'higher') and 'name'.

  Raises:
    RequestError: for an entry that is no measure, and for a workload that has
      no measure.
  """
  # Complete each entry.
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

  # The first measure decides, and is of the text. Each workload has a measure.
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
  """Raises RequestError unless an entry of a study's MEASURES has the right
  form: a dict with 'figure', whose values are texts, or a number for 'chance'.

  Args:
    entry: the entry.
    subject: the words that a message begins with.
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
  """Returns whether a lower or a higher value of a measure is better. Its entry
  may say so; for losses, accuracies and the like it is known.

  Args:
    entry: the entry of a study's MEASURES.
    subject: the words that a message begins with.

  Returns:
    plans.LOWER or plans.HIGHER.
  """
  # A figure of an evaluation task is named TASK/FIGURE.
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
  """Returns the name of a measure in a report.

  Args:
    entry: the entry of a study's MEASURES, which may have a 'name'.
    workload: the workload of the measure: the text, or a probe.
    names_in_use: the names of the measures before it.
  """
  if 'name' in entry:
    return entry['name']

  # On text it is named after its figure, and on a probe after the probe. If
  # that name is in use, it is named after both.
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
  """Checks that a measure which is a figure of an evaluation task can be
  measured: that the run can do the task, and that the task has the figure.

  Args:
    measure: the measure, as `complete_measures` returns it.
    config: the config of the run.
    subject: the name of the run in messages.

  Raises:
    RequestError: if it cannot be measured.
  """
  # A figure of a task is named TASK/FIGURE. Others need no task.
  task_name, slash, figure = measure['figure'].partition('/')
  if not slash:
    return
  measure_text = (f'measure {measure["name"]!r} is {measure["figure"]!r} of '
                  f'{measure["workload"]}')
  task = evals.check_task_without_flags(task_name, measure_text)
  reason = task.why_unfit(config)
  require(not reason, f'{measure_text}, which {subject} cannot have: {reason}')

  # A task may list patterns for the names of its figures. If it does not, any
  # name is accepted.
  if task.figure_names is None:
    return
  is_known = any(fnmatch.fnmatchcase(figure, pattern)
                 for pattern in task.figure_names)
  require(is_known, f'{measure_text}, which {subject} cannot have: the figures '
          f'of {task_name} are {", ".join(task.figure_names) or "none"}')


def loss_of_guessing(measures: Sequence[dict], config, vocab: int) -> float:
  """Returns the loss of a model that guesses. A run that ends near this loss
  has learnt nothing, and counts as diverged.

  Args:
    measures: the measures of the run's workload, as `complete_measures` returns
      them.
    config: the config of the run.
    vocab: the size of the vocabulary of its model.

  Raises:
    RequestError: if the loss is not known for this objective, and no measure
      states it as 'chance'.
  """
  # Use the loss of a uniform guess, or else the 'chance' of the measure `loss`.
  loss = _uniform_loss(config, vocab)
  if loss is None:
    stated_losses = [measure.get('chance') for measure in measures
                     if measure['figure'] == 'loss']
    loss = stated_losses[0] if stated_losses else None
  require(loss is not None, f'objective {config.objective!r} has no loss of '
          'guessing that is known, and runs that diverge are recognised by it: '
          "write it in MEASURES, as {'figure': 'loss', 'chance': 2.5}; where "
          'the targets are numbers, it is their variance')
  return float(loss)


def _uniform_loss(config, vocab: int) -> float | None:
  """Returns the loss of a model that gives all answers the same probability;
  None where the objective has no such loss."""
  objective = objectives.find_objective(config)
  return objective.loss_of_guessing(objectives.fill_in_labels(config), vocab)


def score_of_guessing(
    measure: dict, config, vocab: int, bytes_per_token: float, file: str
    ) -> float:
  """Returns the score that a model without knowledge gets in a measure. For a
  loss, it is that of a model that gives all answers the same probability. For a
  probe (a synthetic task), it is that of the best constant answer.

  Args:
    measure: the measure, as `complete_measures` returns it.
    config: the config of a run that has the measure.
    vocab: the size of the vocabulary of its model.
    bytes_per_token: the mean number of bytes of a token of the held-out text; 0
      if the workload is not text.
    file: the path of the study's file, for messages.

  Raises:
    RequestError: if the score is not known, and the file does not state it.
  """
  if 'chance' in measure:
    return float(measure['chance'])
  objective = objectives.find_objective(config)
  guessing = _uniform_loss(config, vocab)
  figure = measure['figure']

  # Figures that follow from a uniform guess.
  if figure == 'loss' and guessing is not None:
    return guessing
  # The loss of a uniform guess among n labels is log(n), and 1 / n are right.
  if figure == 'accuracy' and objective.has_labels:
    return math.exp(-guessing)
  if figure == 'perplexity':
    return float(vocab)
  if figure == 'bits_per_byte' and bytes_per_token:
    return math.log2(vocab) / bytes_per_token

  # Figures of a probe, and an accuracy among so many answers that guessing
  # scores about 0.
  is_probe = objective.record_kind == probes.KIND_OF_SOURCE
  if is_probe and figure in probe_task.CONSTANT_FIGURES:
    return probe_task.score_constant_answer(config, figure)
  require(figure == 'accuracy', f'{file}: measure {measure["name"]!r} needs a '
          "chance: what guessing gives, as 'chance': 0.5")
  return 0.0


def format_unit(frozen: plans.FrozenPlan, measure: plans.Measure,
                before: str = '', after: str = '') -> str:
  """Returns the unit of a measure, such as 'nats a token', between two texts.
  Returns '' if it has no unit, as an accuracy, or an unknown one.

  Args:
    frozen: the plan of the study that has the measure.
    measure: the measure.
    before: the text before a unit.
    after: the text after a unit.
  """
  # The unit of a loss depends on the objective that the workload trains with.
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
