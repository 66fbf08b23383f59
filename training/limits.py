"""The numbers that a run can honour, and the fields that it would not read.

What belongs to a model is checked where it is built, what belongs to an
optimiser or a schedule in its own file.
"""

import math
import operator

from configs import base
from configs.errors import require

# Of each field, the bounds.
LEAST_0, LEAST_1 = (('>=', 0),), (('>=', 1),)
LIMITS = {
    'seed': LEAST_0,
    'span.noise_density': (('>', 0), ('<', 1)),
    'span.mean_length': LEAST_1,
    'data.length': LEAST_1,
    'data.target_length': LEAST_0,
    'data.batch_size': LEAST_1,
    'data.holdout_every': LEAST_0,
    'data.mask_rate': (('>', 0), ('<=', 1)),
    'data.workers': LEAST_0,
    'data.tokenize_workers': LEAST_0,
    'train.steps': LEAST_1,
    'train.grad_accumulation': LEAST_1,
    'train.max_bad_steps': LEAST_1,
    'train.z_loss': LEAST_0,
    'train.label_smoothing': (('>=', 0), ('<', 1)),
    'train.loss_chunk': LEAST_0,
    'mesh.slices': LEAST_0,
    'checkpoint.every_steps': LEAST_0,
    'checkpoint.every_minutes': LEAST_0,
    'checkpoint.keep': LEAST_1,
    'checkpoint.keep_every': LEAST_0,
    'eval.every_steps': LEAST_0,
    'eval.batches': LEAST_0,
    'log.every_steps': LEAST_1,
}
SIGNS = {'>=': operator.ge, '>': operator.gt, '<=': operator.le,
         '<': operator.lt}

# Fields that only some objectives read.
READS = {
    'span.noise_density': ('span',),
    'span.mean_length': ('span',),
    'data.target_length': ('seq2seq',),
    'data.mask_rate': ('mlm', 'mlm_nsp'),
    'data.whole_words': ('mlm', 'mlm_nsp'),
}


def ranges(config, *sections: str) -> None:
  """Raises ValueError for a number that cannot be honoured.

  Args:
    config: a run's.
    *sections: of it, such as 'data'; default: all.
  """
  for name, bounds in LIMITS.items():
    if sections and name.split('.')[0] not in sections:
      continue
    value = get(config, name)
    fits = math.isfinite(value) and all(
        SIGNS[sign](value, bound) for sign, bound in bounds)
    text = ' and '.join(f'{sign} {bound}' for sign, bound in bounds)
    require(fits, f'{name} is {value}: it must be {text}')


def refuse_unread(config) -> None:
  """Raises ValueError for a field that was set, differing from its default in
  configs/base.py, and that nothing will read."""
  defaults = base.base()
  for name, readers in READS.items():
    default = get(defaults, name)
    require(config.objective in readers or get(config, name) == default,
            f'{name} is {get(config, name)}, which objective '
            f'{config.objective!r} does not read (it is read by '
            f'{", ".join(readers)}): leave it at {default}, or choose one of '
            'these')
  default = defaults.data.holdout_every
  require(not config.data.eval_source
          or config.data.holdout_every in (0, default),  # 0: as it is then
          f'data.holdout_every is {config.data.holdout_every}, which is not '
          'read where data.eval_source names other documents: leave it at '
          f'{default}, or data.eval_source empty')
  require(not config.init_partial or config.init_from,
          'init_partial is True, but init_from names nothing to take weights '
          'from: set it, or leave init_partial at False')


def get(config, name: str):
  """Returns the field of a config by its dotted name."""
  for part in name.split('.'):
    config = config[part]
  return config
