"""ELECTRA: `--config configs/electra.py:SIZE`.

Lab note. Clark et al. 2020 (arXiv 2003.10555), section 3 and table 6: BERT's
vocabulary, 1M steps of 128 rows of 128 tokens (small), 766,000 of 256 rows of
512 (base), 1.75M of 2,048 (large, on XLNet's text); a rate of 5e-4 (small) and
2e-4, 10,000 steps of warm-up, linear decay, Adam b2 0.999, eps 1e-6, decay
0.01, dropout 0.1; masks 15 %, of large 25 %; the generator has a quarter of the
encoder's width, heads and hidden units, of base a third, and as many layers;
its loss counts 1, the encoder's 50.

The counts are those of transformers' ElectraForPreTraining, the published
encoders; UNCOUNTED is the generator beside it, which shares the embedding.

`tiny` reads rows of 32 bytes, with a generator of half its width.
"""

from configs import base, bert

SIZES = base.table_of_sizes(
    'num_layers d_model num_heads embed_dim max_len batch_size steps lr '
    'generator.num_layers generator.d_model generator.num_heads parameters',
    rows={
        'small': (12, 256, 4, 128, 512, 128, 1_000_000, 5e-4, 12, 64, 1,
                  13_549_057),
        'base': (12, 768, 12, 0, 512, 256, 766_000, 2e-4, 12, 256, 4,
                 109_483_009),
        'large': (24, 1024, 16, 0, 512, 2048, 1_750_000, 2e-4, 24, 256, 4,
                  335_142_913)},
    vocab_size=30522, dropout=0.1, attention_dropout=0.1)
SIZES['small']['length'] = 128
SIZES['large']['data.mask_rate'] = 0.25
SIZES['tiny'] = bert.SIZES['tiny'] | {
    'generator.num_layers': 2, 'generator.d_model': 64,
    'generator.num_heads': 2}
# The parameters of the generator, without the embedding.
UNCOUNTED = {'small': 647_162, 'base': 9_903_418, 'large': 19_512_378}

get_config = base.make_get_config(
    'electra', SIZES, dict(type_vocab_size=2, norm_eps=1e-12, init='normal'),
    dict(objective='replaced_tokens'), remat='dots', warmup_steps=10_000,
    schedule='linear', final_fraction=0.0, weight_decay=0.01, b2=0.999,
    eps=1e-6)
