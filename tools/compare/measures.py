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

_ENTRIES = ('workload', 'figure', 'better', 'name', 'chance')


def completed(entries: Sequence, workloads: Collection[str], file: str
              ) -> list[dict]:
  """Returns the measures of a file with what they leave out, but for `chance`.

  Raises:
    RequestError: for one that is none.
  """
  measures: list[dict] = []
  for entry in entries:
    who = f'{file}: the measure {short(entry)}'
    require(isinstance(entry, dict) and 'figure' in entry, f'{who} has no '
            "figure: write {'workload': 'text', 'figure': 'loss'}")
    for key, x in entry.items():
      one_of('entry of a measure', key, _ENTRIES)
      is_number = type(x) in (int, float) and math.isfinite(x)
      require(is_number if key == 'chance' else isinstance(x, str), f'{who} '
              f'has {short(x)} as {key}: write a '
              + ('number' if key == 'chance' else 'text'))
    figure, workload = entry['figure'], entry.get('workload', plans.TEXT)
    last = figure.rpartition('/')[2]
    one_of('workload of a measure', workload, workloads)
    require('better' in entry or last in (
        *metrics.LEAST, *metrics.LARGEST, 'rows_right'), f'{who}:'
            " it is not known which value of it is better: write 'better': "
            "'lower' or 'higher'")
    better = entry.get('better', plans.LOWER if last in metrics.LEAST
                       else plans.HIGHER)
    one_of('better of a measure', better, (plans.LOWER, plans.HIGHER))
    name = entry.get('name', last if workload == plans.TEXT else workload)
    names = [measure['name'] for measure in measures]
    if name in names and 'name' not in entry:
      name = f'{workload}-{figure.replace("/", "-")}'
    require(name not in names, f'{file}: two measures are called {name!r}: '
            "give each a 'name' of its own")
    measures.append(entry | dict(workload=workload, better=better, name=name))
  first = measures[0]['workload']
  require(first == plans.TEXT, f'{file}: the first measure is of {first!r}: '
          'the first is the one that the verdict is on, and is of '
          f'{plans.TEXT!r}')
  for name in workloads:
    require(name in (measure['workload'] for measure in measures), f'{file}: '
            f'no measure is of workload {name!r}: add one, or leave the '
            'workload out')
  return measures


def tasks(measures: Sequence[dict], workload: str) -> tuple[str, ...]:
  """The evaluation tasks that the measures of a workload are figures of."""
  return tuple(dict.fromkeys(
      measure['figure'].partition('/')[0] for measure in measures
      if measure['workload'] == workload and '/' in measure['figure']))


def check_of_task(measure: dict, config, who: str) -> None:
  """Raises RequestError where a measure is a figure of a task that a run of
  `config` does not have."""
  task, is_task, figure = measure['figure'].partition('/')
  which = (f'measure {measure["name"]!r} is {measure["figure"]!r} of '
           f'{measure["workload"]}')
  if not is_task:
    return
  row = evals.check_without_flags(task, which)
  reason = row.unfit(config)
  require(not reason, f'{which}, which {who} cannot have: {reason}')
  known = row.figures
  require(known is None or any(fnmatch.fnmatchcase(figure, pattern)
                               for pattern in known),
          f'{which}, which {who} cannot have: the figures of {task} are '
          f'{", ".join(known or ()) or "none"}')


def guess(measures: Sequence[dict], config, vocab: int) -> float:
  """Returns the loss of guessing of a run, above which it counts as diverged.

  Args:
    measures: of its workload, as `completed` returns them.
    config: its own.
    vocab: of the model.

  Raises:
    RequestError: where the objective has no such loss, and no measure says it.
  """
  loss = _guessing(config, vocab)
  if loss is None:
    loss = next((measure.get('chance') for measure in measures
                 if measure['figure'] == 'loss'), None)
    require(loss is not None, f'objective {config.objective!r} has no loss '
            'that guessing gives, by which runs that diverge are known: say it '
            "in MEASURES, as {'figure': 'loss', 'chance': 2.5}; of numbers, it "
            'is the variance of what is to be told')
  return float(loss)


def _guessing(config, vocab: int) -> float | None:
  return objectives.of(config).guessing(objectives.with_labels(config), vocab)


def chance(measure: dict, config, vocab: int, bytes_per_token: float, file: str
           ) -> float:
  """Returns what guessing gives: of losses, that of one to which all answers
  are alike; of a probe, what the best constant answer scores.

  Args:
    measure: as `completed` returns it.
    config: of a run that has it.
    vocab: of the model.
    bytes_per_token: of what is held out; 0 where there is no text.
    file: for the message.
  """
  if 'chance' in measure:
    return float(measure['chance'])
  guessing = _guessing(config, vocab)
  figure = measure['figure']
  if figure == 'loss' and guessing is not None:
    return guessing
  if figure == 'accuracy' and objectives.of(config).has_labels:
    return math.exp(-guessing)
  if figure == 'perplexity':
    return float(vocab)
  if figure == 'bits_per_byte' and bytes_per_token:
    return math.log2(vocab) / bytes_per_token
  probed = objectives.of(config).record_kind == probes.KIND
  if probed and figure in probe_task.CONSTANT_FIGURES:
    return probe_task.constant(config, figure)
  require(figure == 'accuracy', f'{file}: measure {measure["name"]!r} needs a '
          "chance: what guessing gives, as 'chance': 0.5")
  return 0.0


def unit_text(frozen, measure, before: str = '', after: str = '') -> str:
  """Returns the unit of a measure, 'nats a token', with what stands around it;
  '' where it has none, as an accuracy, or where it is not known, as of a task's
  own figure."""
  point = frozen.point(frozen.plan.base, frozen.plan.sizes[0], measure.workload)
  objective = objectives.OBJECTIVES[
      (frozen.base_config | point['changes'])['objective']]
  unit = ''
  if measure.figure.rpartition('/')[2] == 'bits_per_byte':
    unit = 'bits a byte'
  elif measure.figure == 'loss':
    unit = objective.loss_unit
  return f'{before}{unit}{after}' if unit else ''


def amount(frozen, value: float) -> str:
  """Returns '0.2 nats a token', of the primary measure."""
  return f'{value:g}{unit_text(frozen, frozen.plan.primary, " ")}'
