"""Qwen3-MoE: `--config configs/qwen3_moe.py:SIZE`.

Lab note. Qwen3 Technical Report (Qwen Team 2025, arXiv 2505.09388), table 2:
layers, heads, 128 experts of which 8 work for a token, 128K of context (by YaRN
after training: the released config.json has 40,960, which is taken); widths,
vocabulary and theta are those of the released config.json. 36T tokens, most of
them 4,096 at a time; batch and learning rate follow scaling laws that are not
published, so those here are LLaMA 3's. Counts are those of the published
checkpoints. The weight of the balancing loss is that of config.json.

`tiny` has 16 experts of 44 hidden units, of which 8 work for a token. It trains
on the default text to a held-out loss of 1.535 nats a byte (2.21 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads d_ff moe.d_ff parameters', rows={
        '30b-a3b': (2048, 48, 32, 6144, 768, 30_532_122_624),
        '235b-a22b': (4096, 94, 64, 12288, 1536, 235_093_634_560),
    }, num_kv_heads=4, head_dim=128, max_len=40960, vocab_size=151936,
    rope=dict(theta=1e6), moe=dict(num_experts=128))
SIZES['tiny'] = base.SMALL_DECODER | dict(
    head_dim=48, moe=dict(num_experts=16, d_ff=44))

get_config = base.make_get_config(
    'qwen3_moe', SIZES, dict(norm_eps=1e-6, moe=dict(balance_weight=0.001)),
    length=4096, tokens=36e12)
