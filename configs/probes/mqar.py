r"""Recall alone, by the number of pairs: attention, and attention to a window.

  python -m tools.probes run configs/gpt.py:tiny --workdir runs/recall \
      --suite=configs/probes/mqar.py --config.model.num_layers=2 \
      --config.model.d_model=64 --config.model.num_heads=1 \
      --config.model.d_ff=64
  python -m tools.probes run configs/gpt.py:tiny --workdir runs/recall_4 \
      --suite=configs/probes/mqar.py --config.model.num_layers=2 \
      --config.model.d_model=64 --config.model.num_heads=1 \
      --config.model.d_ff=64 --config.model.attention=banded \
      --config.model.sliding_window=4

Lab note. Zoology's figure 2 (Arora et al. 2023, appendix E) has 4 pairs in 64
tokens, 8 in 128 and 16 in 256, of 8,192 letters; two layers of width 64 to 512
without feed-forward network, one head, learned positions; 64 passes over
100,000 rows in batches of 512 (256 of 256 tokens); the best of four learning
rates from 1e-4 to 1e-2. Those rows are what probe:mqar draws by itself, with
data.length=64, 128 or 256 and probe.levels. Here rows are shorter, letters
fewer, and one model has all numbers of pairs, so that it takes minutes. With 4
pairs in 32 tokens and learning rates of 3e-3 and 1e-2 it still guessed among
the values of the row after 500 steps, where 1e-3 had solved it (one seed).
docs/probes.md has the figures.
"""

LRS = (1e-3,)


def suite(add):
  add('mqar', **{
      'data.length': 16, 'data.batch_size': 64, 'probe.vocab': 32,
      'probe.levels': (1, 2, 4), 'train.steps': 1000})
