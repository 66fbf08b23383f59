r"""How a small model forgets: softmax, forgetting attention, and a delta rule.

Lab note. Softmax attention keeps all tokens; a forget gate (FoX) lowers the
weights of old ones, with and without rotary positions; PaTH lets each token
reflect the keys before it, in the place of rotary positions; a gated DeltaNet
forgets by its decay and by what it writes over. The DeltaNet stands without
its short convolution too, since that alone tells a token its neighbours, and
attention with such a convolution, so that both can be told apart from it. The
base is LLaMA's wiring at 3 layers of width 48, with 128 bytes of context; 300
steps of 16 rows are 0.6M tokens of the default text. Parameters are made
equal, as no network is small enough to make up for the FLOPs of PaTH. The sweep
that docs/sweeps.md reports:
  python -m tools.sweep run configs/sweeps/forgetting.py \
      --workdir runs/forgetting --match=params
"""

from configs import llama
from configs.sweeps import helpers

SEEDS = 5


def get_config():
  return helpers.small_run_config(
      llama.get_config('tiny'), steps=300, batch_size=16, length=128,
      eval_every=50, d_model=48, d_ff=128, num_layers=3, num_heads=3,
      num_kv_heads=3)


def sweep(add):
  """Adds attention with rotary positions, the base, and each way to forget.

  Args:
    add: a function that adds a variant, given its name and the fields of the
      config that it changes.
  """
  add('softmax')
  add('softmax-conv', **{'model.attention_conv': 4})

  # A gate of each head says how much of what came before a token is kept.
  add('fox', **{'model.forget_gate': True, 'model.position': 'none'})
  add('fox-rope', **{'model.forget_gate': True})

  # Each token reflects the keys before it.
  add('path', **{'model.position': 'path', 'model.path.rank': 8})

  # A state in place of a cache of all tokens.
  add('deltanet', **{'model.mixer': 'deltanet'})
  add('deltanet-no_conv', **{'model.mixer': 'deltanet',
                             'model.deltanet.conv': 0})
