"""The Transformer: `--config configs/transformer.py:SIZE`.

Lab note. Vaswani et al. 2017, table 3: base 65M, big 213M parameters on WMT14
English-German, a shared BPE vocabulary of 37,000. Batches of about 25,000
source and 25,000 target tokens; Adam (0.9, 0.98, 1e-9), a rate of
d_model^-0.5 step^-0.5 after 4,000 steps of warm-up; dropout 0.1 (big 0.3),
label smoothing 0.1. Base: 100,000 steps, 12 hours on 8 P100 (0.4 s a step),
BLEU 27.3; big: 300,000 steps, 3.5 days, BLEU 28.4.

  python train.py --config configs/transformer.py:base --workdir DIR \
      --config.data.source=parallel:train.tsv --config.data.tokenizer=FILE

Counts: base is 63.1M here, 2.9 % under the paper's 65M, and big is 214.3M,
0.6 % over. With the paper's table of 37,000 no base of its shape has more:
18.9M of embedding and 44.1M of layers; 65M would take a table of 40,700.

`tiny` trains in 3 minutes of one CPU core on pairs cut from plain text, a
stretch of 64 bytes and the 64 bytes that follow it, to a held-out loss of 1.826
nats a byte. No such target is guessed whole: BLEU is 0.3.
"""

from configs import base

SIZES = base.table_of_sizes(
    'num_layers d_model num_heads dropout steps parameters', rows={
        'base': (6, 512, 8, 0.1, 100_000, 65e6),
        'big': (6, 1024, 16, 0.3, 300_000, 213e6),
    }, vocab_size=37000, remat='none')
for _size in SIZES.values():
  _size['lr'] = (_size['d_model'] * 4000) ** -0.5
SIZES['tiny'] = dict(num_layers=2, d_model=128, num_heads=4, length=64,
                     batch_size=8, steps=1600, lr=1e-3, warmup_steps=200)
for _size in SIZES.values():
  _size |= dict(init_stddev=_size['d_model'] ** -0.5, schedule='rsqrt', b1=0.9,
                b2=0.98, eps=1e-9, weight_decay=0.0, clip_norm=0.0)

get_config = base.make_get_config(
    'transformer', SIZES, dict(init='fan_in'),
    {'objective': 'seq2seq', 'train.label_smoothing': 0.1},
    length=256, batch_size=96, warmup_steps=4000)
