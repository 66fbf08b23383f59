"""OPT: `--config configs/opt.py:SIZE`.

Lab note. Zhang et al. 2022 (arXiv 2205.01068), table 1: sizes, learning rates,
and batches in tokens; 300B tokens in rows of 2,048; AdamW b2 0.95, decay 0.1,
dropout 0.1, clipping 1.0, 2,000 steps of warm-up, and a linear decay to a
tenth. The vocabulary has the 50,272 rows of the released models. 350M, another
architecture, is left out.

`tiny` is GPT's (configs/gpt.py).
"""

from configs import base, gpt

SIZES = {'tiny': gpt.TINY} | base.table_of_sizes(
    'num_layers d_model num_heads batch lr parameters', rows={
        '125m': (12, 768, 12, 500_000, 6e-4, 125_239_296),
        '1.3b': (24, 2048, 32, 1_000_000, 2e-4, 1_315_758_080),
        '2.7b': (32, 2560, 32, 1_000_000, 1.6e-4, 2_651_596_800),
        '6.7b': (32, 4096, 32, 2_000_000, 1.2e-4, 6_658_473_984),
        '13b': (40, 5120, 40, 4_000_000, 1e-4, 12_853_473_280),
        '30b': (48, 7168, 56, 4_000_000, 1e-4, 29_974_540_288),
        '66b': (64, 9216, 72, 2_000_000, 8e-5, 65_719_701_504),
        '175b': (96, 12288, 96, 2_000_000, 1.2e-4, 174_604_468_224),
    }, max_len=2048, vocab_size=50272, dropout=0.1)

get_config = base.make_get_config(
    'opt', sizes=SIZES, tokens=300e9, schedule='linear')
