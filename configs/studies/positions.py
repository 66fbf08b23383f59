"""Which position encoding should a small GPT have?

Lab note. Rotary positions, ALiBi, T5's bias, none at all, and learned positions
as the base, in GPT-2's wiring at 40, 120 and 230 thousand parameters, on the
State of the Union messages by bytes and on three probes. Learned positions are
parameters that the others have not, so the feed-forward networks are made wider
until all have as many. The learning rate is tuned for each encoding, size and
workload.
  python -m tools.study plan configs/studies/positions.py --parallel=2
  python -m tools.study run configs/studies/positions.py \
      --workdir runs/positions --parallel=2
"""

from configs import gpt
from configs.sweeps import helpers

QUESTION = 'Which position encoding should a small GPT have?'
SIZES = {
    's': {'model.d_model': 32, 'model.num_layers': 2, 'model.num_heads': 2},
    'm': {'model.d_model': 48, 'model.num_layers': 3, 'model.num_heads': 3},
    'l': {'model.d_model': 64, 'model.num_layers': 4, 'model.num_heads': 4},
}
_PROBE = {'data.length': 32, 'train.steps': 600, 'probe.examples': 100_000}
WORKLOADS = {
    'text': {},
    'mqar': {**_PROBE, 'probe.vocab': 64, 'probe.levels': (2, 4, 8)},
    'copy': {**_PROBE, 'probe.levels': tuple(range(1, 16))},
    'parity': {**_PROBE, 'probe.levels': tuple(range(1, 17))},
}
SEEDS = {'noise': 6, 'tune': 3, 'screen': 12, 'confirm': 6}
TUNING = {'fields': {'optim.lr': (1e-3, 2e-3, 4e-3, 8e-3)}, 'extend': 1}
EFFECT = 0.16  # nats a byte
MATCH = 'params'


def get_config():
  return helpers.small_run_config(gpt.get_config('tiny'), steps=300,
                                  batch_size=32, length=64, eval_every=30,
                                  d_model=32, num_layers=2, num_heads=2)


def sweep(add):
  add('learned')
  for position in ('rope', 'alibi', 'relative', 'none'):
    add(position, **{'model.position': position})
