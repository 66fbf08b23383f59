"""Qwen3.5 with experts, of text: `--config configs/qwen3_5_moe.py:SIZE`.

Lab note. Qwen Team 2026: widths, heads, layers, experts, vocabulary, theta and
262,144 positions are those of the text_config of each released config.json.
Counts are without what reads images and without the module that predicts a
second token. How they were trained is not published: tokens, batch and learning
rate are LLaMA 2's, and rows have 4,096 tokens. The weight of the balancing loss
is that of config.json.

`tiny` has 32 experts of 24 hidden units, of which 8 work for a token.
"""

from configs import base, qwen3_next

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads deltanet.value_heads moe.num_experts '
    'moe.top_k moe.d_ff parameters', rows={
        '35b-a3b': (2048, 40, 16, 32, 256, 8, 512, 34_660_610_688),
        '122b-a10b': (3072, 48, 32, 64, 256, 8, 1024, 122_111_526_912),
        '397b-a17b': (4096, 60, 32, 64, 512, 10, 1024, 396_346_350_336),
    }, num_kv_heads=2, **qwen3_next.SAME, vocab_size=248320)
SIZES['tiny'] = qwen3_next.TINY | dict(moe=dict(num_experts=32, d_ff=24))

get_config = base.make_get_config(
    'qwen3_5_moe', SIZES, dict(norm_eps=1e-6, moe=dict(balance_weight=0.001)),
    qwen3_next.DECAY, length=4096)
