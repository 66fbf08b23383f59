"""GLM-4.5: `--config configs/glm4_moe.py:SIZE`.

Lab note. GLM Team 2025 (arXiv 2508.06471), table 1: `355b-a32b`, and as
`106b-a12b` GLM-4.5-Air; widths, scale of the gates and theta are those of the
released config.json, whose context of 131,072 tokens is from later training.
23T tokens, most of them 4,096 at a time, in batches of 64M tokens after the
first 500B; a rate of 2.5e-4 that falls by a cosine. Their optimiser is Muon;
AdamW is here. Counts are without the module that predicts a second token.

`tiny` has 32 experts of 32 hidden units, of which 8 work for a token.
"""

from configs import base, deepseek_v2

SIZES = base.table_of_sizes(
    'd_model num_layers d_ff prefix qk_norm moe.num_experts moe.d_ff '
    'moe.gate_scale parameters', rows={
        '106b-a12b': (4096, 46, 10944, 'dense', False, 128, 1408, 1.0,
                      106_852_245_504),
        '355b-a32b': (5120, 92, 12288, 'dense,dense,dense', True, 160, 1536,
                      2.5, 352_797_814_784),
    }, num_heads=96, num_kv_heads=8, head_dim=128, max_len=4096,
    vocab_size=151552, rope=dict(theta=1e6))
SIZES['tiny'] = base.SMALL_DECODER | dict(moe=dict(num_experts=32, d_ff=32))
# The biases of the routers, which no gradient moves.
UNCOUNTED = {'106b-a12b': 45 * 128, '355b-a32b': 89 * 160}

get_config = base.make_get_config(
    'glm4_moe', SIZES, dict(norm_eps=1e-5, moe=deepseek_v2.MOE | dict(
        balance_weight=0.0001, bias_rate=0.001)),
    tokens=23e12, batch_size=16384, lr=2.5e-4)
