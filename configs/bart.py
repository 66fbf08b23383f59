"""BART: `--config configs/bart.py:SIZE`.

Lab note. Lewis et al. 2020 (arXiv 1910.13461), sections 2 and 5: RoBERTa's
160 GB of text and its BPE of 50,265, 500,000 steps of 8,000 rows, 30 % of the
tokens masked in spans of Poisson(3) and all sentences permuted, dropout 0.1;
6 + 6 layers of 768 (base), 12 + 12 of 1,024 (large). Rates, warm-up and the
length of rows, which the paper does not say, are those of configs/roberta.py.
Counts are those of transformers' BartForConditionalGeneration.

`tiny` trains on rows of 64 bytes.
"""

from configs import base

SIZES = base.table_of_sizes(
    'num_layers d_model num_heads d_ff lr warmup_steps parameters', rows={
        'base': (6, 768, 12, 3072, 6e-4, 24_000, 139_420_416),
        'large': (12, 1024, 16, 4096, 4e-4, 30_000, 406_291_456)},
    vocab_size=50265, max_len=1024, dropout=0.1, attention_dropout=0.1)
SIZES['tiny'] = dict(num_layers=2, d_model=128, num_heads=4, d_ff=512,
                     max_len=64, batch_size=32, steps=600)

get_config = base.make_get_config(
    'bart', SIZES, dict(init='normal'),
    {'objective': 'denoising', 'span.noise_density': 0.3}, remat='dots',
    batch_size=8000, length=512, steps=500_000, schedule='linear',
    final_fraction=0.0, weight_decay=0.01, b2=0.98, eps=1e-6, clip_norm=0.0)
