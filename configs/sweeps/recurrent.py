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
  add('attention')
  for name, fields in {
      'deltanet': {'decay': False}, 'gated_deltanet': {},
      'deltaproduct': {'negative': True, 'householders': 2}}.items():
    add(name, **{'model.mixer': 'deltanet'}, **{
        f'model.deltanet.{field}': value for field, value in fields.items()})
  ranks = dict.fromkeys(
      (f'model.rwkv7.{name}_rank' for name in ('decay', 'rate', 'gate')), 8)
  for mixer, fields in {
      'gdn2': {'model.gdn2.rank': 8}, 'rwkv7': ranks, 'mamba': {},
      'mamba2': {'model.mamba2.state': 32}}.items():
    add(mixer, **{'model.mixer': mixer}, **fields)
