"""Induction alone: one attention layer fails it, and two solve it.

  python -m tools.probes run configs/gpt.py:tiny --workdir runs/one \
      --suite=configs/probes/induction.py --config.model.num_layers=1

Lab note. Sixteen letters at 32 places; one hop. With fewer letters the same one
stands so near that a single layer finds it by its distance. docs/probes.md has
the figures.
"""

LRS = (3e-3,)


def suite(add):
  add('induction', **{
      'data.length': 32, 'data.batch_size': 32, 'probe.vocab': 16,
      'probe.examples': 100_000, 'train.steps': 4000})
