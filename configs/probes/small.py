"""A score card in minutes: tasks of each kind, small, on two CPU cores.

Lab note. Lengths, alphabets and numbers of examples are smaller than published
(training/data/probes says those), so that a two-layer model of width 128 learns
what it can in about a thousand steps of 32 rows. Figures of this suite compare
architectures with each other, and not with papers.
"""

SEEDS = 3
LRS = (1e-3, 3e-3)


def suite(add):
  for name, fields in {
      'mqar': {'probe.vocab': 64, 'probe.levels': (2, 4, 8)},
      'induction': {'probe.vocab': 8, 'probe.levels': (1, 2)},
      'recall': {'probe.levels': (8, 16)},
      'noisy_recall': {'probe.levels': (0.2, 0.6)},
      'selective_copying': {'probe.levels': (2, 4, 8)},
      'copy': {'probe.levels': tuple(range(1, 16))},
      'reverse': {'probe.levels': tuple(range(1, 16))},
      'parity': {'probe.levels': tuple(range(1, 17))},
      's3': {'probe.levels': tuple(range(1, 17))},
  }.items():
    add(name, **{'data.length': 32, 'data.batch_size': 32, 'train.steps': 1000,
                 'probe.examples': 100_000, **fields})
