"""LFM3, dense: `--config configs/lfm3.py:SIZE`.

Lab note. Liquid AI 2026: widths, heads, the order of the layers and positions
of LFM3-1.7B are the defaults of transformers' Lfm3Config. Of its training
nothing is set as published: batch, tokens and learning rate are those of
LLaMA 2, and rows have 4,096 tokens. The count is that of transformers' class.
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads head_dim d_ff parameters',
    rows={'1.7b': (2048, 24, 16, 4, 128, 7680, 1_728_801_536)},
    max_len=128_000, vocab_size=128_000, prefix='conv,conv,global,conv',
    kinds=dict(local=dict(window=256)))
SIZES['tiny'] = base.SMALL_DECODER

get_config = base.make_get_config('lfm3', SIZES, length=4096)
