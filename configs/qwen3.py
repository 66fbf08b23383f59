"""Qwen3, dense: `--config configs/qwen3.py:SIZE`.

Lab note. Qwen Team 2025 (arXiv 2505.09388), table 1, for layers, heads and tied
embeddings; widths, heads of 128 features, 1,000,000 for theta and 32,768
positions are those of the config.json of each base model (which YaRN stretches
to 128K from 4B on). 36T tokens; of its training nothing else is published:
batch, learning rate and steps are those of LLaMA 2, whose steps stand for 2T
tokens. Counts are those of the published checkpoints.

`tiny` trains on the default text in 2 minutes of one CPU core, to a held-out
loss of 1.558 nats a byte (2.25 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff tie_embeddings '
    'parameters', rows={
        '0.6b': (1024, 28, 16, 8, 3072, True, 596_049_920),
        '1.7b': (2048, 28, 16, 8, 6144, True, 1_720_574_976),
        '4b': (2560, 36, 32, 8, 9728, True, 4_022_468_096),
        '8b': (4096, 36, 32, 8, 12288, False, 8_190_735_360),
        '14b': (5120, 40, 40, 8, 17408, False, 14_768_307_200),
        '32b': (5120, 64, 64, 8, 25600, False, 32_762_123_264),
    }, head_dim=128, max_len=32768, vocab_size=151936)
SIZES['tiny'] = base.SMALL_DECODER

get_config = base.make_get_config(
    'qwen3', SIZES, dict(norm_eps=1e-6, rope=dict(theta=1e6)), length=4096)
