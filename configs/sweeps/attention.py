r"""Four disputed parts of attention in a small LLaMA, alone and in pairs.

Lab note. Exclusive self-attention (the part of a head's result along its
token's own value is removed), a gate of each head's features, a norm of the
result before the gate, and a sink (a score for a key without a value) each
remove something of what a token adds to itself. Some boards keep all of them
and some say that one does the other's work, so that all six pairs are here
too. The base is LLaMA's wiring at 3 layers of width 48, with 128 bytes of
context; 300 steps of 16 rows are 0.6M tokens of the default text. The sweep
that docs/sweeps.md reports:
  python -m tools.sweep run configs/sweeps/attention.py \
      --workdir runs/attention --match=flops_per_token
"""

import itertools

from configs import llama
from configs.sweeps import helpers

SEEDS = 6

# The parts, by their names in the sweep.
_PARTS = {
    'exclusive': {'model.attention_exclusive': 'all'},
    'gate': {'model.attention_gate': 'elementwise'},
    'context_norm': {'model.context_norm': True},
    'sinks': {'model.attention_sinks': True},
}


def get_config():
  return helpers.small_run_config(
      llama.get_config('tiny'), steps=300, batch_size=16, length=128,
      eval_every=50, d_model=48, d_ff=128, num_layers=3, num_heads=3,
      num_kv_heads=3)


def sweep(add):
  """Adds LLaMA as it is, each part alone, and each pair of parts.

  Args:
    add: a function that adds a variant, given its name and the fields of the
      config that it changes.
  """
  add('llama')
  for name, changes in _PARTS.items():
    add(name, **changes)
  for first, second in itertools.combinations(_PARTS, 2):
    add(f'{first}-{second}', **_PARTS[first], **_PARTS[second])
