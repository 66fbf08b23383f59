"""Position encodings and block parts, one at a time, in a very small GPT.

Lab note. The base is GPT-2's wiring at 2 layers of width 32 and 64 bytes of
context, 40 thousand parameters; 300 steps of 32 x 64 bytes are 0.6M tokens.
Sinusoids are tried twice: as large as they are beside embeddings that begin at
0.02, and with the embeddings times the root of the width, as in the
Transformer. Each run owes the task of extrapolation. The sweep that
docs/sweeps.md reports:
  python -m tools.sweep run configs/sweeps/small.py --workdir runs/small \
      --match=params
A group of three seeds takes about 20 seconds on one free CPU core, and the
evaluation of each run as long.
"""

from configs import gpt
from configs.sweeps import helpers

TASKS = ('extrapolation',)


def get_config():
  return helpers.small_run_config(
      gpt.get_config('tiny'), steps=300, batch_size=32, length=64,
      eval_every=25, num_checkpoints=2, d_model=32, num_layers=2, num_heads=2)


def sweep(add):
  """Adds the base, and one variant for each other part of it."""
  add('learned')
  for name, changes in helpers.one_at_a_time({
      'model.position': ('sinusoidal', 'rope', 'alibi', 'relative', 'none'),
      'model.norm': ('rmsnorm',),
      'model.ffn': ('swiglu',),
      'model.block': ('parallel', 'post_norm', 'sandwich')}):
    add(name, **changes)
  add('sinusoidal-scaled', **{
      'model.position': 'sinusoidal', 'model.embed_scale': 0.0})
