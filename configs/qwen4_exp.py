"""Qwen4-Exp, of text: `--config configs/qwen4_exp.py:SIZE`.

Lab note. Qwen Team 2026. `176b-a6b` is Qwen3.8-Flash-Next, whose config.json
has the widths, heads, layers, experts, vocabulary, theta, 262,144 positions,
streams, the indexer of 2,048 tokens in blocks of 4, and 16 tables of 20 million
rows or more that its second layer looks up. Its card says 125B parameters, 6B
of which work for a token, and 51B of n-grams; the count is without what reads
images and without the module that predicts a second token. How it was trained
is not published, nor how its indexer learns, which here has the loss of
DeepSeek-V3.2's: tokens, batch and learning rate are LLaMA 2's, and rows have
4,096 tokens.

`tiny` has 32 experts of 24 hidden units, of which 10 work for a token, tables
of 4,096 rows, and of 256 tokens a query sees 64.
"""

from configs import base, qwen3_next

SIZES = {
    'tiny': qwen3_next.TINY | dict(
        moe=dict(num_experts=32, d_ff=24), streams=dict(rank=32),
        indexer=dict(block=4, head_dim=24)),
    '176b-a6b': qwen3_next.SAME | {'deltanet.value_heads': 48} | dict(
        d_model=2560, num_layers=48, num_heads=24, num_kv_heads=2,
        prefix='linear,ngrams,linear,full',
        pattern='linear,linear,linear,full', vocab_size=248320,
        moe=dict(num_experts=512, d_ff=640), indexer=dict(
            block=4, top_k=2048, heads=4, head_dim=128),
        ngrams=dict(stops=True, rows=20_000_000, heads=8, pad_token=248044),
        parameters=176_943_899_520)}

get_config = base.make_get_config(
    'qwen4_exp', SIZES, dict(norm_eps=1e-6, moe=dict(balance_weight=0.001)),
    qwen3_next.DECAY, length=4096)
