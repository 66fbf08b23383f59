"""ZAYA1: `--config configs/zaya.py:SIZE`.

Lab note. Zyphra 2026 (arXiv 2605.05365, and 2511.17127 on the machines: 1,024
MI300X). `8b` has the defaults of transformers' ZayaConfig, those of ZAYA1-8B:
40 layers of 16 experts, of which a token has one or none. The 8.3B parameters
of the reports are without the embedding. 14T tokens, of which most were seen
4,096 at a time, by Muon; AdamW is here. The batch and the rate are LLaMA 2's,
and the biases of the routers move as in DeepSeek-V3, without a loss.

`tiny` has 8 experts of 96 hidden units.
"""

from configs import base

SIZES = base.table_of_sizes(
    'num_layers parameters', rows={'8b': (40, 8_840_488_784)}, d_model=2048,
    num_heads=8, num_kv_heads=2, head_dim=128, max_len=131072,
    vocab_size=262272, moe=dict(num_experts=16, d_ff=2048))
SIZES['tiny'] = base.SMALL_DECODER | dict(
    head_dim=16, moe=dict(num_experts=8, d_ff=96, router_dim=32))
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'8b': 40 * 17}

get_config = base.make_get_config(
    'zaya', SIZES, dict(norm_eps=1e-5, moe=dict(
        dispatch='auto', capacity_factor=0.0, eval_capacity_factor=0.0,
        balance_weight=0.0, bias_rate=0.001)), tokens=14e12, length=4096)
