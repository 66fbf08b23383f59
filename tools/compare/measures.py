"""Measures: what they are called, which value is better, and who has them."""

from collections.abc import Collection, Sequence
import fnmatch
import math

from configs.errors import one_of, require, short
from tools.compare import plan as plans
from training import early_stopping, evals
from training.evals.tasks import probe as probe_task

_ENTRIES = ('workload', 'figure', 'better', 'name', 'chance')


def completed(given: Sequence, workloads: Collection[str], file: str
              ) -> list[dict]:
  """Returns the measures of a file with what they leave out, but for `chance`.

  Raises:
    RequestError: for one that is none.
  """
  found = []
  for own in given:
    who = f'{file}: the measure {short(own)}'
    require(isinstance(own, dict) and 'figure' in own, f'{who} has no figure: '
            "write {'workload': 'text', 'figure': 'loss'}")
    for name, x in own.items():
      one_of('entry of a measure', name, _ENTRIES)
      is_number = type(x) in (int, float) and math.isfinite(x)
      require(is_number if name == 'chance' else isinstance(x, str),
              f'{who} has {short(x)} as {name}: write a '
              + ('number' if name == 'chance' else 'text'))
    own = {'workload': plans.TEXT, **own}
    one_of('workload of a measure', own['workload'], workloads)
    last = own['figure'].rpartition('/')[2]
    if 'better' not in own:
      require(last in (*early_stopping.LEAST, *early_stopping.LARGEST,
                       'rows_right'), f'{who}: it is not known which value '
              "of it is better: write 'better': 'lower' or 'higher'")
      own['better'] = (plans.LOWER if last in early_stopping.LEAST else
                       plans.HIGHER)
    one_of('better of a measure', own['better'], (plans.LOWER, plans.HIGHER))
    if 'name' not in own:
      text = own['workload'] == plans.TEXT
      own['name'] = last if text else own['workload']
      if own['name'] in (other['name'] for other in found):
        own['name'] = f'{own["workload"]}-{own["figure"].replace("/", "-")}'
    found.append(own)
  names = [own['name'] for own in found]
  require(len(set(names)) == len(names), f'{file}: two measures are called '
          f'{next((n for n in names if names.count(n) > 1), "")!r}: give each '
          "a 'name' of its own")
  require(found[0]['workload'] == plans.TEXT, f'{file}: the first measure is '
          f'of {found[0]["workload"]!r}: the first is the one that the verdict '
          f'is on, and is of {plans.TEXT!r}')
  for name in workloads:
    require(any(own['workload'] == name for own in found), f'{file}: no '
            f'measure is of workload {name!r}: add one, or leave the workload '
            'out')
  return found


def tasks(measures: Sequence[dict], workload: str) -> tuple[str, ...]:
  """The evaluation tasks that the measures of a workload are figures of."""
  return tuple(dict.fromkeys(
      own['figure'].partition('/')[0] for own in measures
      if own['workload'] == workload and '/' in own['figure']))


def check_of_task(own: dict, config, who: str) -> None:
  """Raises RequestError where a measure is a figure of a task that a run of
  `config` does not have."""
  told = f'measure {own["name"]!r} is {own["figure"]!r} of {own["workload"]}'
  task, is_task, figure = own['figure'].partition('/')
  if not is_task:
    return
  row = evals.check_without_flags(task, told)
  reason = row.unfit(config)
  require(not reason, f'{told}, which {who} cannot have: {reason}')
  known = row.figures(config)
  require(known is None or any(fnmatch.fnmatchcase(figure, pattern)
                               for pattern in known),
          f'{told}, which {who} cannot have: the figures of {task} are '
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
  found = _guessing(config, vocab)
  if found is None:
    own = next((own for own in measures if own['figure'] == 'loss'), {})
    found = own.get('chance')
    require(found is not None, f'objective {config.objective!r} has no loss '
            'that guessing gives, by which runs that diverge are known: say it '
            "in MEASURES, as {'figure': 'loss', 'chance': 2.5}; of numbers, it "
            'is the variance of what is to be told')
  return float(found)


def _guessing(config, vocab: int) -> float | None:
  from training import objectives
  return objectives.of(config).guessing(objectives.with_labels(config), vocab)


def chance(own: dict, config, vocab: int, bytes_per_token: float, file: str
           ) -> float:
  """Returns what guessing gives: of losses, that of one to which all answers
  are alike; of a probe, what the best constant answer scores.

  Args:
    own: the measure, as `completed` returns it.
    config: of a run that has it.
    vocab: of the model.
    bytes_per_token: of what is held out; 0 where there is no text.
    file: for the message.
  """
  if 'chance' in own:
    return float(own['chance'])
  from training import objectives
  from training.data import probes
  guessing = _guessing(config, vocab)
  if own['figure'] == 'loss' and guessing is not None:
    return guessing
  if own['figure'] == 'accuracy' and objectives.of(config).labels is not None:
    return math.exp(-guessing)
  if own['figure'] == 'perplexity':
    return float(vocab)
  if own['figure'] == 'bits_per_byte' and bytes_per_token:
    return math.log2(vocab) / bytes_per_token
  probed = objectives.of(config).records == probes.KIND
  if probed and own['figure'] in probe_task.CONSTANT_FIGURES:
    return probe_task.constant(config, own['figure'])
  if own['figure'] == 'accuracy':
    return 0.0
  require(False, f'{file}: measure {own["name"]!r} needs a chance: what '
          "guessing gives, as 'chance': 0.5")


def unit(frozen, measure) -> str:
  """Returns the unit of a measure, 'nats a token'; '' where it has none, as an
  accuracy, or where it is not known, as of a task's own figure."""
  from training import objectives
  if measure.figure.rpartition('/')[2] == 'bits_per_byte':
    return 'bits a byte'
  if measure.figure != 'loss':
    return ''
  point = frozen.point(frozen.plan.base, frozen.plan.sizes[0], measure.workload)
  name = (frozen.base_config | point['changes'])['objective']
  own = objectives.OBJECTIVES[name]
  if own.guess or own.labels:  # of an answer, or a sum of two losses
    return 'nats'
  # The other heads give numbers, whose loss has the unit of their square.
  return 'nats a token' if own.head in ('lm', 'vector') else ''


def said(frozen, measure, before: str = '', after: str = '') -> str:
  """Returns the unit with what stands around it, or '' where it has none."""
  own = unit(frozen, measure)
  return f'{before}{own}{after}' if own else ''


def amount(frozen, value: float) -> str:
  """Returns '0.2 nats a token', of the primary measure."""
  return f'{value:g}{said(frozen, frozen.plan.primary, " ")}'
