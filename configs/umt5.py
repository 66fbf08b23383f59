"""UMT5: `--config configs/umt5.py:SIZE`.

Lab note. Chung et al. 2023 (arXiv 2304.09151): mC4 anew, 29T characters in 107
languages, each drawn alike often but for a cap on how often a text is repeated
(UniMax); a vocabulary of 256,000 pieces, of which embeddings have 256,384 rows.
There is no large. What of the training stands here is mT5's (configs/mt5.py).
Counts are those of transformers' UMT5ForConditionalGeneration with a head of
its own, as the published checkpoints have it.

`tiny` is that of mT5 with its biases in each layer.
"""

from configs import mt5, t5

SIZES = mt5.sizes(
    256_384, small=306_601_984, base=592_043_520, xl=3_768_356_864,
    xxl=12_972_531_712)

get_config = t5.of('umt5', SIZES, {})
