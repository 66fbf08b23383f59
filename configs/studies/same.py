"""A study of runs that cannot find anything: twelve times the base itself.

Lab note. Each variant is the base with different initial parameters
(`init_seed`) and the same data, so all verdicts except "no difference shown"
are wrong. With Q = 0.05, one study in twenty may screen a variant as different,
and the confirmation then has to reject it.
  python -m tools.study run configs/studies/same.py --workdir runs/same \
      --parallel=2
"""

from configs.studies import tiny

QUESTION = 'Does a study find a difference where there is none?'
SIZES = tiny.SIZES
SEEDS = {'noise': 8, 'tune': 3, 'screen': 8, 'confirm': 8}
TUNING = tiny.TUNING
EFFECT = 0.2


def get_config():
  config = tiny.get_config()
  config.train.steps = 100
  config.eval.update(every_steps=20, batches=8)
  config.checkpoint.update(every_steps=100)
  return config


def sweep(add):
  add('base')
  for i in range(2, 14):
    add(f'twin-{i}', init_seed=i)
