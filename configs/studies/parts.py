"""Two parts in a very small GPT: what a study costs that takes minutes.

Lab note. The base is GPT-2's wiring at one layer of width 8 to 16 and 32 bytes
of context, 4 to 10 thousand parameters; 60 steps are 31 thousand tokens. Of
models so small nothing follows for others. The rows of docs/verdicts.md:
  python -m tools.study run configs/studies/parts.py --workdir runs/parts
"""

from configs import gpt
from configs.sweeps import helpers

QUESTION = 'Do RoPE and RMSNorm help a GPT of one layer?'
SIZES = {'s': {'model.d_model': 8}, 'm': {'model.d_model': 12},
         'l': {'model.d_model': 16}}
WORKLOADS = {
    'text': {},
    'copy': {'data.length': 16, 'probe.levels': (1, 2, 3), 'train.steps': 60},
}
SEEDS = {'noise': 6, 'tune': 3, 'screen': 5, 'confirm': 6}
TUNING = {'fields': {'optim.lr': (8e-3, 1.6e-2, 3.2e-2)}, 'rungs': 1}
EFFECT = MARGIN = 0.03


def base():
  return helpers.small(gpt.get_config('tiny'), 60, 16, 32, every=6, batches=4,
                       lr=1.6e-2, d_model=8, num_layers=1, num_heads=2)


get_config = base


def sweep(add):
  add('learned')
  add('rope', **{'model.position': 'rope'})
  add('rmsnorm', **{'model.norm': 'rmsnorm'})
