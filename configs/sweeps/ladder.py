"""Sizes and lengths of training of a small GPT, for a scaling fit.

Lab note. Five widths, each trained on three amounts of text, with a cosine
schedule drawn out to its own last step, as Hoffmann et al. 2022 found it must
be; the learning rate falls as the width grows, as muP has it. The longest run
of the widest model takes about a minute on one CPU core. The fit:
  python -m tools.sweep run configs/sweeps/ladder.py --workdir runs/ladder
"""

from configs.sweeps import helpers

WIDTHS = (24, 32, 48, 64, 96)
STEPS = (125, 250, 500)


def base():
  c = helpers.small_gpt(steps=500)
  c.optim.warmup_steps = 25  # the shortest run has 125 steps
  c.eval.update(every_steps=40, batches=32)
  return c


get_config = base


def sweep(add):
  for width in WIDTHS:
    for steps in STEPS:
      add(f'd{width}-{steps}', **{
          'model.d_model': width, 'train.steps': steps,
          'optim.lr': 4e-3 * 64 / width})
