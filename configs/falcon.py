"""Falcon: `--config configs/falcon.py:SIZE`.

Lab note. Almazrouei et al. 2023 (arXiv 2311.16867) and the model cards: widths
and heads; 1.5T, 1T and 3.5T tokens, most of them RefinedWeb, in rows of 2,048;
batches of 2,304, 1,152 and 2,048 rows, reached after a ramp that is not here;
a rate that rises over 4B tokens and falls by a cosine; decay 0.1. They add a
loss on log(Z)^2 of the logits, with a weight of 1e-4. Counts are exact.

`tiny` has one head of keys and values for four of queries.
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads num_kv_heads block batch_size tokens lr '
    'parameters', rows={
        '7b': (4544, 32, 71, 1, 'shared_norm', 2304, 1.5e12, 6e-4,
               6_921_720_704),
        '40b': (8192, 60, 128, 8, 'parallel', 1152, 1e12, 1.85e-4,
                41_303_293_952),
        '180b': (14848, 80, 232, 8, 'parallel', 2048, 3.5e12, 1.25e-4,
                 178_557_088_768),
    }, max_len=2048, vocab_size=65024)
SIZES['tiny'] = base.SMALL_DECODER | dict(num_kv_heads=1, d_ff=0)

get_config = base.make_get_config('falcon', SIZES, warmup=4e9)
