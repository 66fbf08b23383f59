"""A score card in minutes: tasks of each kind, small, on two CPU cores.

Lab note. Lengths, alphabets and numbers of examples are smaller than published
(training/data/probes says those), so that a card of a two-layer model of width
128 takes minutes. Recall, which 500 steps of 32 rows did not teach, has more of
both. Figures of this suite compare architectures with each other, and not with
papers: configs/probes/mad.py and zoology.py have the published settings.
"""

LRS = (1e-3, 3e-3)


def suite(add):
  """Adds small tasks of every kind: recall, copying and tracking a state.

  Args:
    add: a function that adds a task to the suite, given its name and the fields
      of the config in which its runs differ from the architecture's.
  """
  fields_of_task = {
      'mqar': {'probe.vocab': 32, 'probe.levels': (1, 2, 4),
               'data.batch_size': 64, 'train.steps': 800},
      'induction': {'probe.vocab': 8, 'probe.levels': (1, 2)},
      'noisy_recall': {'probe.vocab': 8, 'probe.levels': (0.0, 0.2, 0.6)},
      'selective_copying': {'probe.vocab': 8, 'probe.levels': (2, 4)},
      'compression': {'probe.vocab': 8, 'probe.levels': (2, 4, 8)},
      'copy': {'probe.vocab': 8, 'probe.levels': tuple(range(1, 8))},
      'parity': {'probe.levels': tuple(range(1, 16))},
      's3': {'probe.levels': tuple(range(1, 16))},
  }
  for name, fields in fields_of_task.items():
    add(name, **{'data.length': 16, 'data.batch_size': 32, 'train.steps': 600,
                 'probe.examples': 100_000, **fields})
