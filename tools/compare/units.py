"""The units of measures, as plans, tables and figures say them."""

from tools.compare import frozen as frozen_lib
from tools.compare import plan as plans


def of(frozen: frozen_lib.Frozen, measure: plans.Measure) -> str:
  """Returns the unit of a measure, 'nats a token'; '' where it has none, as an
  accuracy, or where it is not known, as of a task's own figure."""
  if measure.figure.rpartition('/')[2] == 'bits_per_byte':
    return 'bits a byte'
  return of_loss(frozen, measure.workload) if measure.figure == 'loss' else ''


def of_loss(frozen: frozen_lib.Frozen, workload: str) -> str:
  """Returns the unit of the held-out loss of a workload's objective."""
  from training import objectives
  point = frozen.point(frozen.plan.base, frozen.plan.sizes[0], workload)
  name = (frozen.base_config | point['changes'])['objective']
  own = objectives.OBJECTIVES[name]
  if own.guess or own.labels:  # of an answer, or a sum of two losses
    return 'nats'
  # The other heads give numbers, whose loss has the unit of their square.
  return 'nats a token' if own.head in ('lm', 'vector') else ''


def said(frozen: frozen_lib.Frozen, measure: plans.Measure, before: str = '',
         after: str = '') -> str:
  """Returns the unit with what stands around it, or '' where it has none."""
  unit = of(frozen, measure)
  return f'{before}{unit}{after}' if unit else ''


def amount(frozen: frozen_lib.Frozen, value: float) -> str:
  """Returns '0.2 nats a token', of the primary measure."""
  return f'{value:g}{said(frozen, frozen.plan.primary, " ")}'
