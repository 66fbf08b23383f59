"""Hops, formulas and groups, smaller than published: minutes on two CPU cores.

  python -m tools.probes run configs/gpt.py:tiny --workdir runs/reasoning \
      --suite=configs/probes/reasoning.py --config.model.position=rope

Lab note. depo1 with circles of at most 7 words of two letters at most, where
the paper has 225; mano modulo 7 with up to 3 operators, where it has 23 and 10;
hops of one and of two in eight letters; products of up to 8 permutations in a5.
docs/probes.md has the figures.
"""

LRS = (1e-3,)


def suite(add):
  """Adds the tasks of the suite, each with its own lengths and levels."""
  for name, fields in {
      'depo1': {'data.length': 72, 'probe.vocab': 8, 'probe.levels': (1, 2)},
      'mano': {'data.length': 16, 'probe.vocab': 7, 'probe.levels': (1, 2, 3)},
      'hops': {'data.length': 32, 'probe.vocab': 8, 'probe.levels': (1, 2)},
      'a5': {'data.length': 9, 'probe.levels': tuple(range(1, 9))},
  }.items():
    add(name, **{'data.batch_size': 64, 'train.steps': 2000,
                 'probe.examples': 200_000, **fields})
