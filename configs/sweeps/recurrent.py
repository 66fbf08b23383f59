r"""Attention and the recurrences in a small LLaMA: a point for each mixer.

Lab note. The base is LLaMA's wiring at 2 layers of width 32, with 64 bytes of
context; 150 steps of 16 rows are 0.15M tokens of the default text, which rank
what learns faster and say nothing of larger models. Heads have 16 features in
all of them; what a mixer has beside its products goes to the width of the
networks, by --match=params. The sweep that docs/mixers.md reports:
  python -m tools.sweep run configs/sweeps/recurrent.py \
      --workdir runs/recurrent --match=params
"""

from configs import llama
from configs.sweeps import helpers

SEEDS = 5


def get_config():
  return helpers.small_run_config(
      llama.get_config('tiny'), 150, 16, 64, every=50, d_model=32,
      d_ff=128, num_layers=2, num_heads=2, num_kv_heads=2)


def sweep(add):
  """Adds attention, three forms of DeltaNet, and four other recurrences."""
  add('attention')
  deltanets = {
      'deltanet': {'model.deltanet.decay': False},
      'gated_deltanet': {},
      'deltaproduct': {'model.deltanet.negative': True,
                       'model.deltanet.householders': 2}}
  for name, fields in deltanets.items():
    add(name, **{'model.mixer': 'deltanet'}, **fields)

  others = {
      'gdn2': {'model.gdn2.rank': 8},
      'rwkv7': {'model.rwkv7.decay_rank': 8, 'model.rwkv7.rate_rank': 8,
                'model.rwkv7.gate_rank': 8},
      'mamba': {},
      'mamba2': {'model.mamba2.state': 32}}
  for mixer, fields in others.items():
    add(mixer, **{'model.mixer': mixer}, **fields)
