"""Qwen3.5, dense, of text: `--config configs/qwen3_5.py:SIZE`.

Lab note. Qwen Team 2026: widths, heads, layers, vocabulary, theta and 262,144
positions are those of the text_config of each released config.json. Counts are
without what reads images and without the module that predicts a second token.
How they were trained is not published: tokens, batch and learning rate are
LLaMA 2's, and rows have 4,096 tokens. Norms decay, as Qwen3-Next's report says
of its own.

`tiny` has recurrences with 2 heads of keys and 4 of values in three of four
layers.
"""

from configs import base, qwen3_next

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads d_ff deltanet.value_heads '
    'tie_embeddings parameters', rows={
        '0.8b': (1024, 24, 8, 2, 3584, 16, True, 752_393_024),
        '2b': (2048, 24, 8, 2, 6144, 16, True, 1_881_825_088),
        '4b': (2560, 32, 16, 4, 9216, 32, True, 4_205_751_296),
        '9b': (4096, 32, 16, 4, 12288, 32, False, 8_953_803_264),
        '27b': (5120, 64, 24, 4, 17408, 48, False, 26_895_998_464),
    }, **qwen3_next.SAME, vocab_size=248320)
SIZES['tiny'] = qwen3_next.TINY

get_config = base.make_get_config(
    'qwen3_5', SIZES, dict(norm_eps=1e-6), qwen3_next.DECAY, length=4096)
