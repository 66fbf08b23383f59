"""Every position encoding in a small GPT, with extrapolation.

Lab note. Each run owes the task of extrapolation: its loss at 1, 2, 4 and 8
times the 128 tokens that it was trained on. Learned positions end there; they
also are 8,192 parameters that the others have not, so make the sizes equal:
  python -m tools.sweep run configs/sweeps/positions.py \
      --workdir runs/positions --match=params
One run takes about 20 seconds on one CPU core, and its evaluation as long.
"""

from configs import gpt
from configs.sweeps import helpers

TASKS = ('extrapolation',)


def base():
  c = gpt.get_config('tiny')
  c.model.update(d_model=64, max_len=128)
  c.data.update(length=128, batch_size=16)
  c.train.steps = 250
  c.optim.update(lr=4e-3, warmup_steps=25)
  c.eval.update(every_steps=25, batches=16)
  c.checkpoint.update(every_steps=125, keep=1)
  return c


get_config = base


def sweep(add):
  for name, changes in helpers.one_at_a_time({
      'model.position': ('learned', 'sinusoidal', 'rope', 'alibi', 'relative',
                         'none')}):
    add(name, **changes)
