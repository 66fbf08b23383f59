"""BLOOM: `--config configs/bloom.py:SIZE`.

Lab note. Scao et al. 2022, table 3: sizes, batch in tokens and learning rate;
2,048 tokens, ROOTS in 46 languages, 250,880 entries of vocabulary, Adam b2
0.95, decay 0.1, clipping 1.0, cosine to 10 % over 410B tokens after 375M of
warm-up; 341B tokens trained (366B with the last stage); 384 A100 for the
largest, 3.5 months. Counts are those of the published checkpoints: the two
called 1b1 and 1b7 have 1.07 and 1.72B.

`tiny` reads 1.2M bytes of the default text in 4 minutes of one CPU core, to a
loss of 1.823 nats a byte (2.63 bits) on 16 held-out batches.
"""

from configs import base

SIZES = base.table_of_sizes(
    'd_model num_layers num_heads batch_size lr parameters', rows={
        '560m': (1024, 24, 16, 256, 3.0e-4, 559_214_592),
        '1b1': (1536, 24, 16, 256, 2.5e-4, 1_065_314_304),
        '1b7': (2048, 24, 16, 512, 2.0e-4, 1_722_408_960),
        '3b': (2560, 30, 32, 512, 1.6e-4, 3_002_557_440),
        '7b1': (4096, 30, 32, 512, 1.2e-4, 7_069_016_064),
        '176b': (14336, 70, 112, 2048, 6.0e-5, 176_247_271_424),
    }, max_len=2048, vocab_size=250880)
SIZES['tiny'] = dict(d_model=128, num_layers=4, num_heads=4, max_len=256,
                     batch_size=8, steps=600, lr=2e-3, warmup_steps=100)

get_config = base.make_get_config('bloom', sizes=SIZES, tokens=341e9,
                                     warmup=375e6)
