"""MiniMax-M2: `--config configs/minimax_m2.py:SIZE`.

Lab note. MiniMax 2025, the released config.json: widths, heads, 256 experts of
which 8 work for a token, 196,608 positions, theta 5,000,000. How it was trained
is not published: tokens, batch and learning rate are LLaMA 2's, rows have 4,096
tokens, and the bias of the routers moves as in DeepSeek-V3.

`tiny` has 32 experts of 32 hidden units, of which 8 work for a token.
"""

from configs import base, deepseek_v2

SIZES = {
    'tiny': base.SMALL_DECODER | dict(d_ff=32, moe=dict(num_experts=32)),
    '230b-a10b': dict(
        d_model=3072, num_layers=62, num_heads=48, num_kv_heads=8, head_dim=128,
        d_ff=1536, max_len=196608, vocab_size=200064, rope=dict(theta=5e6),
        moe=dict(num_experts=256), parameters=228_689_748_992)}
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'230b-a10b': 62 * 256}

get_config = base.make_get_config(
    'minimax_m2', SIZES, dict(norm_eps=1e-6, moe=deepseek_v2.MOE | dict(
        balance_weight=0.0001, bias_rate=0.001)), length=4096)
