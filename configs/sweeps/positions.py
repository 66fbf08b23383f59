"""Every position encoding in a small GPT, with extrapolation.

Lab note. Each run owes the task of extrapolation: its loss at 1, 2, 4 and 8
times the 128 tokens that it was trained on. Learned positions end there; they
also are 8,192 parameters that the others have not, so make the sizes equal:
  python -m tools.sweep run configs/sweeps/positions.py \
      --workdir runs/positions --match=params
One run takes about 20 seconds on one CPU core, and its evaluation as long.
"""

from configs.sweeps import helpers

TASKS = ('extrapolation',)


def get_config():
  return helpers.small_gpt_config(steps=250)


def sweep(add):
  for name, changes in helpers.one_at_a_time({
      'model.position': ('learned', 'sinusoidal', 'rope', 'alibi', 'relative',
                         'none')}):
    add(name, **changes)
