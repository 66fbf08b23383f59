"""Two layers that loop against eight layers, at equal parameters or FLOPs.

Lab note. The base is a GPT of 8 layers of width 32. `loop` runs 2 layers 4
times, each pass reading what the one before returned and the embedding
(model.loop=add), and `shallow` runs 2 layers once. What is equal is chosen as
the sweep is run, by the width of the networks:
  python -m tools.sweep run configs/sweeps/loops.py --workdir runs/loops-f \
      --match=flops_per_token
  python -m tools.sweep run configs/sweeps/loops.py --workdir runs/loops-p \
      --match=params
At equal FLOPs `loop` has the base's layers and a quarter of their parameters;
at equal parameters its networks are 5.6 times as wide, and it has 3.4 times the
FLOPs. 200 steps of 8 x 64 bytes and one learning rate for all: enough to rank
what learns faster, no claim about larger models. With three seeds the base ends
at a held-out loss of 2.563, and `loop` 0.449 [0.298, 0.600] above it at equal
FLOPs and 0.450 [0.297, 0.602] at equal parameters (both worse, corrected p
0.012): it does not leave the plateau of byte frequencies, since a weight that
four passes share has the sum of their gradients at the base's learning rate.
No difference is shown of `shallow`.
"""

from configs import gpt
from configs.sweeps import helpers


def get_config():
  return helpers.small_run_config(gpt.get_config('tiny'), steps=200,
                                  batch_size=8, length=64, eval_every=20,
                                  d_model=32, num_layers=8, num_heads=2)


def sweep(add):
  add('loop', **{'model.num_layers': 2, 'model.loop': 'add',
                 'model.loops.passes': 4})
  add('shallow', **{'model.num_layers': 2})
