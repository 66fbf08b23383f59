"""ALBERT: `--config configs/albert.py:SIZE`.

Lab note. Lan et al. 2020, table 1 and section 4.1: a SentencePiece vocabulary
of 30,000, embeddings of 128, batch 4,096, 125,000 steps with LAMB at 1.76e-3,
masked n-grams; Books and English Wikipedia, in rows of 512, of which one in ten
is shorter. The sizes are those of version 2 of the weights (10x more data and
no dropout), whose xlarge has 16 heads. Here the optimiser is AdamW with BERT's
rate, as there is no LAMB, and masks are of single tokens.

Counts are those of transformers' AlbertModel, the paper's 12M, 18M, 60M and
235M (233M in its table 2); what pre-training needs on top is UNCOUNTED. One
layer runs `loops.passes` times, so that the sizes differ less in parameters
than in FLOPs: base has a tenth of BERT's parameters and all of its FLOPs.

`tiny` is BERT's four layers, of one layer's weights, on masked bytes and the
order of two passages.
"""

from configs import base, bert

SIZES = base.table_of_sizes(
    'd_model num_heads d_ff loops.passes parameters', rows={
        'base': (768, 12, 3072, 12, 11_683_584),
        'large': (1024, 16, 4096, 24, 17_683_968),
        'xlarge': (2048, 16, 8192, 24, 58_724_864),
        'xxlarge': (4096, 64, 16384, 12, 222_595_584)},
    num_layers=1, embed_dim=128, max_len=512, vocab_size=30000)
SIZES['tiny'] = bert.SIZES['tiny'] | {
    'num_layers': 1, 'embed_dim': 32, 'loops.passes': 4}
# Pre-training needs these beside `parameters`: transform, its norm, sop, head.
UNCOUNTED = {size: 128 * (row['d_model'] + 1) + 2 * 128 + 30000 + 2 * (
    row['d_model'] + 1) for size, row in SIZES.items() if size != 'tiny'}

get_config = base.make_get_config(
    'albert', SIZES, dict(type_vocab_size=2, norm_eps=1e-12, init='normal'),
    dict(objective='mlm_sop'), remat='dots', batch_size=4096, steps=125_000,
    lr=1e-4, warmup_steps=3125, schedule='linear', final_fraction=0.0,
    weight_decay=0.01, b2=0.999, eps=1e-6)
