"""Full, banded and indexed attention in a small LLaMA, and hybrids with full.

Lab note. The base is LLaMA's wiring at 2 layers of width 32, all of them with
full attention to 128 bytes. In `window` a query sees the last 16 keys, in
`indexed` the 16 that an indexer of 2 heads scores highest; in a hybrid so does
the first layer, and the second has full attention. All settings else are equal,
so that an indexer's parameters and FLOPs come on top:
  python -m tools.sweep run configs/sweeps/sparse.py --workdir runs/sparse
150 steps of 8 rows are 0.15M tokens of the default text, which rank what learns
faster and say nothing of larger models. docs/howto/sparse_attention.md has the
result.
"""

from configs import llama
from configs.sweeps import helpers

SEEDS = 5


def get_config():
  config = helpers.small_run_config(llama.get_config('tiny'), steps=150,
                                    batch_size=8, length=128, eval_every=25,
                                    eval_batches=8, d_model=32, d_ff=128,
                                    num_layers=2, num_heads=2, num_kv_heads=2)
  config.model.indexer.update(top_k=16, heads=2)
  return config


def sweep(add):
  """Adds full attention; each sparse attention in all layers; and each of these
  in every other layer, with full attention between."""
  add('full')
  full_layer = {'attention': 'global'}
  sparse_layers = {'window': {'window': 16},
                   'indexed': {'attention': 'indexed'}}
  for name, sparse_layer in sparse_layers.items():
    add(name, **{'model.pattern': 'sparse',
                 'model.kinds': {'sparse': sparse_layer}})
    add(f'{name}-hybrid', **{
        'model.pattern': 'sparse,full',
        'model.kinds': {'sparse': sparse_layer, 'full': full_layer}})
