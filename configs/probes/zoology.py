r"""Recall as in zoology's figure 2 (Arora et al. 2023, appendix E): 4 pairs in
64 tokens, 8 in 128, 16 in 256, 64 in 512.

  python -m tools.probes run configs/gpt.py:tiny --workdir runs/figure_2 \
      --suite=configs/probes/zoology.py --config.model.num_layers=2 \
      --config.model.d_model=64 --config.model.num_heads=1

Lab note. As the published code has it: rows of 8,192 letters, 100,000 of them,
64 passes, AdamW with weight decay 0.1 and a cosine, four learning rates, one
seed there and three here; models of width 64 to 512, of two layers with one
head, learned positions and no feed-forward network, which stays here. The code
has the fourth length commented out. Of so many steps it is for a GPU:
configs/probes/mqar.py is what two cores do in minutes.
"""

LRS = tuple(10 ** (-4 + 2 * i / 3) for i in range(4))


def suite(add):
  for length, pairs, batch in ((64, 4, 512), (128, 8, 512), (256, 16, 256),
                               (512, 64, 128)):
    add('mqar', label=f'mqar_{length}', **{
        'data.length': length, 'data.batch_size': batch,
        'probe.levels': (pairs,), 'train.steps': 64 * 100_000 // batch,
        'optim.weight_decay': 0.1, 'optim.schedule': 'cosine'})
