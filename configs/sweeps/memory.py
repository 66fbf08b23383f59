"""Tables of n-grams against a wider feed-forward network and against experts.

Lab note. The base is LLaMA's wiring at 2 layers of width 32, with networks of
512 hidden units. `engram` reads 8 tables of 1,021 rows or more before the
second layer and `over_encoding` before the first, with the authors' five times
the learning rate for tables; `moe` has 8 experts, 2 of them for a token;
`moe-engram` has both. What is equal is chosen as the sweep is run, by the width
of the networks, or of an expert:
  python -m tools.sweep run configs/sweeps/memory.py --workdir runs/memory-p \
      --match=params
  python -m tools.sweep run configs/sweeps/memory.py --workdir runs/memory-f \
      --match=flops_per_token
150 steps of 16 x 64 bytes and one learning rate for all: enough to rank what
learns faster, no claim about larger models. With five seeds the base ends at a
held-out loss of 2.334; beside it, at equal parameters and at equal FLOPs,
`engram` is at -0.520 and -0.524, `over_encoding` at -0.496 and -0.502,
`moe-engram` at -0.486 and -0.511 (all better, corrected p < 0.0001), and `moe`
at +0.161 and +0.073 (worse, p 0.0001 and 0.0061). A row of two or three bytes
has at once what attention must learn: this says what learns sooner, not what
ends better.
"""

from configs import llama
from configs.sweeps import helpers

SEEDS = 5


def get_config():
  """Returns the config of the base, a small model without a memory."""
  config = helpers.small_run_config(llama.get_config('tiny'), steps=150,
                                    batch_size=16, length=64, eval_every=25,
                                    d_model=32, d_ff=512, num_layers=2,
                                    num_heads=2, num_kv_heads=2)
  config.model.ngrams.rows = 1021
  config.model.moe.ffn = 'swiglu'
  return config


def sweep(add):
  """Adds each memory in one of the two layers, a mixture of experts, and both
  together."""
  experts = {'model.ffn': 'moe'}
  engram = changes_of_memory('engram', pattern='plain,reads')
  over_encoding = changes_of_memory('over_encoding', pattern='reads,plain')
  add('engram', **engram)
  add('over_encoding', **over_encoding)
  add('moe', **experts)
  add('moe-engram', **experts, **engram)


def changes_of_memory(memory: str, pattern: str) -> dict:
  """Returns the changes that let one of two layers read tables of n-grams.

  Args:
    memory: how the tables are read, as model.memory names it.
    pattern: the order of the layers: 'plain' and 'reads'.
  """
  layer_kinds = {'plain': {'memory': 'none'}, 'reads': {'memory': memory}}
  return {'model.pattern': pattern, 'optim.table_rate': 5.0,
          'model.kinds': layer_kinds}
