"""LFM2, dense: `--config configs/lfm2.py:SIZE`.

Lab note. Liquid AI 2025 (arXiv 2511.23404, and the model cards): 10T tokens,
with a larger model as the teacher, which is not here. Widths, heads, the order
of the layers, theta and 128,000 positions are those of the config.json of each
model; d_ff is what transformers makes of block_ff_dim. Of its training nothing
else is set as published: batch and learning rate are those of LLaMA 2, and rows
have 4,096 tokens. Counts are those of the published checkpoints.

`tiny` has a short convolution and attention in turn, in four layers.
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_heads d_ff parameters', rows={
        '350m': (1024, 16, 4608, 354_483_968),
        '700m': (1536, 24, 6912, 742_489_344),
        '1.2b': (2048, 32, 8192, 1_170_340_608),
        '2.6b': (2048, 32, 10752, 2_569_272_320),
    }, num_layers=16, num_kv_heads=8, max_len=128_000, vocab_size=65536,
    prefix='conv,conv,full,conv,conv,full,conv,conv', pattern='full,conv')
SIZES['2.6b'] |= dict(
    num_layers=30, prefix='conv,conv,full,conv', pattern='conv,full,conv,conv',
    suffix='full,conv,conv,full,conv,conv')
SIZES['tiny'] = base.SMALL_DECODER

get_config = base.make_get_config(
    'lfm2', SIZES, dict(rope=dict(theta=1e6)), length=4096, tokens=10e12)
