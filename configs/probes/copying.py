r"""Copying alone, past the lengths of training: how position encodings order.

  python -m tools.probes run configs/gpt.py:tiny --workdir runs/copy_none \
      --suite=configs/probes/copying.py --config.model.num_layers=2 \
      --config.model.d_model=64 --config.model.d_ff=64 \
      --config.model.position=none

Lab note. Rows of 1 to 6 letters of sixteen; evaluated on 12 and 24 too, which
learned positions do not reach. Kazemnejad et al. 2023 train on up to 20 words
of a hundred and evaluate on 40, with 12 layers of width 768, for 40,000 steps.
docs/probes.md has the figures.
"""

LRS = (1e-3,)


def suite(add):
  add('copy', **{
      'data.length': 13, 'data.batch_size': 64, 'probe.vocab': 16,
      'probe.levels': tuple(range(1, 7)), 'train.steps': 600})
