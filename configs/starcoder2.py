"""StarCoder2: `--config configs/starcoder2.py:SIZE`.

Lab note. Lozhkov et al. 2024 (arXiv 2402.19173), section 6: sizes, 3.1, 3.5 and
4.1T tokens of code in rows of 4,096, in batches of 2.6, 3.5 and 4.1M tokens;
AdamW b2 0.95, 1,000 steps of warm-up to 3e-4, a cosine to a tenth. theta, the
window of 4,096 keys and 16,384 positions are those of the released config.json,
after another 0.2T tokens in longer rows.

`tiny` is LLaMA's with a window of 128 in 256 tokens.
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff rope.theta batch tokens '
    'parameters', rows={
        '3b': (3072, 30, 24, 2, 12288, 999_999.4420358813, 2_600_000, 3.1e12,
               3_030_371_328),
        '7b': (4608, 32, 36, 4, 18432, 1e6, 3_500_000, 3.5e12, 7_173_923_840),
        '15b': (6144, 40, 48, 4, 24576, 1e5, 4_100_000, 4.1e12,
                15_957_889_024),
    }, max_len=16384, vocab_size=49152, sliding_window=4096)
SIZES['15b']['tie_embeddings'] = False
SIZES['tiny'] = base.SMALL_DECODER | dict(sliding_window=128)

get_config = base.make_get_config(
    'starcoder2', SIZES, dict(norm_eps=1e-5), length=4096, warmup_steps=1000)
