r"""Norms of a small LLaMA, and a norm of queries and keys with each.

Lab note. RMSNorm, GatedNorm (RMSNorm times a gate of low rank) and dynamic
tanh in the place of every norm of the residual stream, each with and without a
norm of queries and keys, which is the same norm over a head's features. Dynamic
tanh cannot enlarge embeddings that begin at 0.02. So it stands with embeddings
times the root of the width, too, which is how its authors begin for LLaMA; this
point was added once the others had been seen. The base is LLaMA's wiring at 3
layers of width 48, with 128 bytes of context; 300 steps of 16 rows are 0.6M
tokens of the default text. The sweep that docs/sweeps.md reports:
  python -m tools.sweep run configs/sweeps/norms.py --workdir runs/norms \
      --match=flops_per_token
"""

from configs import llama
from configs.sweeps import helpers

SEEDS = 6


def get_config():
  return helpers.small_run_config(
      llama.get_config('tiny'), steps=300, batch_size=16, length=128,
      eval_every=50, d_model=48, d_ff=128, num_layers=3, num_heads=3,
      num_kv_heads=3)


def sweep(add):
  """Adds each norm, without and with a norm of queries and keys.

  Args:
    add: a function that adds a variant, given its name and the fields of the
      config that it changes.
  """
  add('rmsnorm')
  add('rmsnorm-qk_norm', **{'model.qk_norm': True})
  for norm, fields in {
      'rmsnorm_gated': {'model.gated_norm.rank': 8},
      'dynamic_tanh': {}}.items():
    add(norm, **{'model.norm': norm}, **fields)
    add(f'{norm}-qk_norm', **{'model.norm': norm, 'model.qk_norm': True},
        **fields)
  add('dynamic_tanh-scaled', **{'model.norm': 'dynamic_tanh',
                                'model.embed_scale': 0.0})
