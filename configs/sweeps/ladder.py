"""Sizes, shapes and lengths of training of a small GPT, for a scaling fit.

Lab note. Five widths at four layers, and two of them at two and at eight
layers, each trained on three amounts of text, with a cosine schedule drawn out
to its own last step, as Hoffmann et al. 2022 found it must be; the learning
rate falls as the width grows, as muP has it, and is the same at all depths. The
longest run of the widest model takes about a minute on one CPU core. The fit:
  python -m tools.sweep run configs/sweeps/ladder.py --workdir runs/ladder
  python -m tools.sweep fit runs/ladder
"""

from configs.sweeps import helpers

_STEPS = (125, 250, 500)


def get_config():
  config = helpers.small_gpt_config(500, eval_every=40, eval_batches=32)
  config.optim.warmup_steps = 25  # the shortest run has 125 steps
  return config


def sweep(add):
  for widths, depths in ((24, 32, 48, 64, 96), (4,)), ((32, 64), (2, 8)):
    for name, changes in helpers.ladder_of_sizes(
        widths, depths=depths, steps=_STEPS, base_lr=4e-3, base_width=64):
      add(name, **changes)
