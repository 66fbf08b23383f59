"""Norm x position x feed-forward x block of a small GPT: 16 points.

Lab note. The base is GPT-2's wiring at 4 layers of width 64; each other point
swaps one to four parts for LLaMA's or GPT-NeoX's. 250 steps of 16 x 128 bytes
are 0.5M tokens, a fraction of an epoch of the default text: enough to rank
what learns faster, no claim about larger models. One run takes about 20
seconds on one CPU core. swiglu has three matrices where gelu has two, so make
the sizes equal:
  python -m tools.sweep run configs/sweeps/parts.py --workdir runs/parts \
      --match=params
"""

from configs.sweeps import helpers


def get_config():
  return helpers.small_gpt_config(steps=250)


def sweep(add):
  for name, changes in helpers.grid({
      'model.norm': ('layernorm', 'rmsnorm'),
      'model.position': ('learned', 'rope'),
      'model.ffn': ('gelu_tanh', 'swiglu'),
      'model.block': ('pre_norm', 'parallel')}):
    add(name, **changes)
