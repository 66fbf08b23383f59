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
  return helpers.small_run_config(llama.get_config('tiny'), steps=150,
                                  batch_size=16, length=64, eval_every=50,
                                  d_model=32, d_ff=128, num_layers=2,
                                  num_heads=2, num_kv_heads=2)


def sweep(add):
  """Adds attention, three forms of DeltaNet, and four other recurrences.

  Args:
    add: a function that adds a variant, given its name and the fields of the
      config that it changes.
  """
  add('attention')

  # DeltaNet, without and with a decay, and with two steps of a token.
  add('deltanet', **{'model.mixer': 'deltanet',
                     'model.deltanet.decay': False})
  add('gated_deltanet', **{'model.mixer': 'deltanet'})
  add('deltaproduct', **{'model.mixer': 'deltanet',
                         'model.deltanet.negative': True,
                         'model.deltanet.householders': 2})

  # The other recurrences, with low ranks and states that fit the width.
  add('gdn2', **{'model.mixer': 'gdn2', 'model.gdn2.rank': 8})
  add('rwkv7', **{'model.mixer': 'rwkv7', 'model.rwkv7.decay_rank': 8,
                  'model.rwkv7.rate_rank': 8, 'model.rwkv7.gate_rank': 8})
  add('mamba', **{'model.mixer': 'mamba'})
  add('mamba2', **{'model.mixer': 'mamba2', 'model.mamba2.state': 32})
