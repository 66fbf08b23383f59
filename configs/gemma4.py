"""Gemma 4, dense and of text: `--config configs/gemma4.py:SIZE`.

Lab note. Google 2026: widths, heads, layers, windows and positions of
`31b` are those of the text_config in Gemma-4-31B's config.json. Of its training
nothing is set as published: batch, tokens and learning rate are those of
LLaMA 2, and rows have 4,096 tokens. The count is that of transformers' class of
text, with the 60 numbers that multiply layers, which are buffers there.

`tiny` has windows of 128 in 256 tokens, in every other layer.
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads head_dim d_ff parameters',
    rows={'31b': (5376, 60, 32, 16, 256, 21504, 30_697_345_340)},
    max_len=262_144, vocab_size=262_144,
    pattern='local,local,local,local,local,global', kinds={
        'local': dict(window=1024),
        'global': dict(num_kv_heads=4, head_dim=512)})
SIZES['tiny'] = base.SMALL_DECODER | {
    'kinds.global.num_kv_heads': 1, 'kinds.global.head_dim': 64}

get_config = base.make_get_config(
    'gemma4', SIZES, dict(norm_eps=1e-6), length=4096)
