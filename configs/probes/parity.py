"""Parity alone: learnt at the lengths of training, and not beyond.

Lab note. Rows of 1 to 16 bits, and at each bit whether the ones so far are odd
in number; docs/probes.md has the figures. Positions have to reach past the
length of training, so choose rope, alibi, relative or none.
"""

LRS = (3e-3,)


def suite(add):
  add('parity', **{
      'data.length': 17, 'data.batch_size': 64,
      'probe.levels': tuple(range(1, 17)), 'train.steps': 2000})
