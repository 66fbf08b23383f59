"""A small study that should find nothing: the base against itself.

Lab note. The variants are the base with different initial parameters, so that
every difference is noise, and a verdict of better or worse is wrong. In about
one of twenty studies a variant passes the screening; the confirmation then has
to reject it. The models have 3 to 11 thousand parameters.
  python -m tools.study run configs/studies/tiny.py --workdir runs/tiny_study \
      --parallel=2
"""

from configs import gpt
from configs.sweeps import helpers

QUESTION = 'Is the base better than itself?'
SIZES = {
    's': {'model.d_model': 8},
    'm': {'model.d_model': 12},
    'l': {'model.d_model': 16},
}
WORKLOADS = {
    'text': {},
    'copy': {'data.length': 16, 'probe.levels': (1, 2, 3), 'train.steps': 20},
}
SEEDS = {'noise': 4, 'tune': 3, 'screen': 4, 'confirm': 4}
TUNING = {'fields': {'optim.lr': (4e-3, 8e-3, 1.6e-2)}}
EFFECT = 0.5


def get_config():
  return helpers.small_run_config(
      gpt.get_config('tiny'), steps=40, batch_size=16, length=32, eval_every=10,
      eval_batches=4, lr=8e-3, d_model=8, num_layers=1, num_heads=2)


def sweep(add):
  add('base')
  for i in (2, 3):
    add(f'twin-{i}', init_seed=i)
