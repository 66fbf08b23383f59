"""How many layers of a small model of text should be attention?

Lab note. Gated DeltaNet in 0, 4, 6, 7 or all of 8 layers, in LLaMA's wiring at
93, 156 and 333 thousand parameters, on the State of the Union messages by
bytes, in rows of 128. Where both are, attention stands last in each period, as
in Qwen3-Next and Kimi Linear, whose ratio is 1 to 3. The feed-forward networks
are solved for, so that all have the FLOPs of the base. Attention has rotary
positions. The learning rate is tuned for each ratio and size.
  python -m tools.study plan configs/studies/hybrids.py --parallel=2
  python -m tools.study run configs/studies/hybrids.py \
      --workdir runs/hybrids --parallel=2 --anyway
"""

from configs import llama
from configs.sweeps import helpers

QUESTION = ('How many of the 8 layers of a small model of text should be '
            'attention, and how many Gated DeltaNet?')
SIZES = {
    's': {'model.d_model': 24, 'model.num_heads': 2},
    'm': {'model.d_model': 32, 'model.num_heads': 2},
    'l': {'model.d_model': 48, 'model.num_heads': 3},
}
SEEDS = {'noise': 5, 'tune': 3, 'screen': 5, 'confirm': 5}
TUNING = {'fields': {'optim.lr': (2e-3, 4e-3, 8e-3)}, 'extend': 1}
EFFECT = 0.1  # nats a byte
MATCH = 'flops_per_token'


def get_config():
  return helpers.small_run_config(llama.get_config('tiny'), steps=200,
                                  batch_size=8, length=128, eval_every=40,
                                  eval_batches=8, d_model=24, num_layers=8,
                                  num_heads=2, num_kv_heads=0, d_ff=0)


def sweep(add):
  """Adds attention alone, DeltaNet alone, and hybrids with 1, 3 or 7 layers of
  DeltaNet for each layer of attention."""
  add('attention')
  for recurrent in (1, 3, 7):
    add(f'{recurrent}-to-1', **{
        'model.pattern': ','.join(['delta'] * recurrent + ['whole']),
        'model.kinds.delta.mixer': 'deltanet',
        'model.kinds.whole.mixer': 'attention'})
  add('recurrence', **{'model.mixer': 'deltanet'})
