"""The learning rate of a small GPT: five, each twice the one before.

Lab note. The points differ in a number alone, so that with --vectorised they
and their seeds train as one program. One run takes about 40 seconds on one CPU
core.
"""

from configs import gpt
from configs.sweeps import helpers


def base():
  c = gpt.get_config('tiny')
  c.model.update(d_model=64, max_len=128)
  c.data.update(length=128, batch_size=16)
  c.train.steps = 500
  c.optim.update(lr=4e-3, warmup_steps=50)
  c.eval.update(every_steps=100, batches=32)
  c.checkpoint.update(every_steps=250, keep=1)
  return c


get_config = base


def sweep(add):
  for name, changes in helpers.grid({
      'optim.lr': (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)}):
    add(name, **changes)
