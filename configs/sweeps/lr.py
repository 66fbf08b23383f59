"""The learning rate of a small GPT: five, each twice the one before.

Lab note. The points differ in a number alone, so that they and their seeds
train as programs of 8 runs at most (`--group=15`: all as one). One run takes
about 40 seconds on one CPU core.
"""

from configs.sweeps import helpers


def get_config():
  return helpers.small_gpt_config(500, eval_every=50, eval_batches=32)


def sweep(add):
  for name, changes in helpers.grid({
      'optim.lr': (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)}):
    add(name, **changes)
