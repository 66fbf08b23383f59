"""Mamba: `--config configs/mamba.py:SIZE`.

Lab note. Gu and Dao 2023 (arXiv 2312.00752); the sizes are those of the
published checkpoints, state-spaces/mamba-130m to mamba-2.8b, with 50,277 tokens
that are padded to a multiple of 8. They saw 300B tokens of the Pile in
GPT-NeoX's tokenizer, 2,048 a row. The recipe is appendix E.2: AdamW (0.9, 0.95)
that decays by 0.1, clipping 1.0, no dropout, a peak of five times GPT-3's
learning rate, cosine to 1e-5, half a million tokens a batch. How long the rate
rises is not said: 1 % here. The first weights are drawn as GPT-2's; the
authors' are uniform. Counts are those of transformers' class.

`tiny` has eight layers of 128 features, for trials on the default text.
"""

from configs import base

SIZES = base.table_of_sizes(  # lr is GPT-3's
    'd_model num_layers lr parameters', rows={
        '130m': (768, 24, 6.0e-4, 129_135_360),
        '370m': (1024, 48, 3.0e-4, 371_516_416),
        '790m': (1536, 48, 2.5e-4, 793_204_224),
        '1.4b': (2048, 48, 2.0e-4, 1_372_178_432),
        '2.8b': (2560, 64, 1.6e-4, 2_768_345_600),
    }, max_len=2048, vocab_size=50280)
for _size in SIZES.values():
  _size |= dict(lr=5 * _size['lr'], warmup=3e9,
                final_fraction=1e-5 / (5 * _size['lr']))
SIZES['tiny'] = dict(d_model=128, num_layers=8, max_len=256)

get_config = base.make_get_config(
    'mamba', sizes=SIZES, batch_size=256, tokens=300e9)
