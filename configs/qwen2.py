"""Qwen2.5, dense: `--config configs/qwen2.py:SIZE`.

Lab note. Qwen Team 2024 (arXiv 2412.15115), table 1, for layers, heads, tied
embeddings and context; widths, 1,000,000 for theta and the norms' epsilon are
those of the config.json of each. 18T tokens; of its training nothing else is
published: batch, learning rate and steps are those of LLaMA 2, whose steps
stand for 2T tokens. Counts are those of the published checkpoints.

`tiny` trains on the default text in 2 minutes of one CPU core, to a held-out
loss of 1.628 nats a byte (2.35 bits).
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff vocab_size norm_eps '
    'parameters', {
        '0.5b': (896, 24, 14, 2, 4864, 151936, 1e-6, 494_032_768),
        '1.5b': (1536, 28, 12, 2, 8960, 151936, 1e-6, 1_543_714_304),
        '3b': (2048, 36, 16, 2, 11008, 151936, 1e-6, 3_085_938_688),
        '7b': (3584, 28, 28, 4, 18944, 152064, 1e-6, 7_615_616_512),
        '14b': (5120, 48, 40, 8, 13824, 152064, 1e-5, 14_770_033_664),
        '32b': (5120, 64, 40, 8, 27648, 152064, 1e-5, 32_763_876_352),
        '72b': (8192, 80, 64, 8, 29568, 152064, 1e-5, 72_706_203_648),
    }, max_len=131072)
for _size in ('0.5b', '1.5b', '3b'):
  SIZES[_size] |= dict(max_len=32768, tie_embeddings=True)
SIZES['tiny'] = base.SMALL_DECODER | dict(norm_eps=1e-6)

get_config = base.make_get_config(
    'qwen2', SIZES, dict(rope=dict(theta=1e6)), length=4096)
