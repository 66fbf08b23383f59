"""The best learning rate by width, in the standard form and in muP.

Lab note. GPT-2's wiring, 2 layers, widths 64 and 256 with 4 heads, 250 steps
of 8 x 64 bytes of the default text; rates in powers of 2. muP's base is width
64, where the two forms are one: three series of 7 rates, each one program.
What came out, and what it does not show: docs/mup.md. About 20 minutes on one
CPU core:
  python -m tools.sweep run configs/sweeps/mup.py --workdir runs/mup --seeds=1
"""

from configs import gpt
from configs.sweeps import helpers

_RATES = tuple(2.0 ** n for n in range(-11, -4))


def get_config():
  config = helpers.small_run_config(
      gpt.get_config('tiny'), steps=250, batch_size=8, length=64,
      eval_every=250, eval_batches=64, lr=2.0 ** -9, d_model=64, num_layers=2)
  config.optim.weight_decay = 0.0
  return config


def sweep(add):
  """Adds for each learning rate the narrow model, and the wide one with the
  standard parametrization and with muP."""
  for lr in _RATES:
    rate = {'optim.lr': lr}
    add(f'width=64-lr={lr:.2g}', **rate)
    wide = rate | {'model.d_model': 256}
    add(f'standard-width=256-lr={lr:.2g}', **wide)
    add(f'mup-width=256-lr={lr:.2g}', **wide, **{
        'model.parametrization': 'mup', 'model.mup_base_width': 64})
