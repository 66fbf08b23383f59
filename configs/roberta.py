"""RoBERTa: `--config configs/roberta.py:SIZE`.

Lab note. Liu et al. 2019, section 5 and appendix B (table 9): the sizes of
BERT, byte-level BPE of 50,265, rows of 512 tokens of text over the ends of
documents, masks drawn anew in each pass, no next sentences; 500K steps of 8,192
rows, Adam b2 0.98, eps 1e-6, decay 0.01, dropout 0.1, linear decay, no
clipping; learning rate 6e-4 and 24,000 steps of warm-up for base, 4e-4 and
30,000 for large; 1,024 V100, about a day for 100K steps of large; 160 GB of
text.

Counts are those of transformers' RobertaForMaskedLM: the encoder and its head
for masked words, with the two rows of positions before the first token.

`tiny` is BERT's (configs/bert.py), whose lab note says why its rows are short.
It predicts held-out masked bytes with a loss of 1.50 nats, 55 % of them right.
"""

from configs import base, bert

SIZES = {'tiny': bert.SIZES['tiny']} | {
    size: bert.SIZES[size] | dict(
        vocab_size=50265, lr=lr, warmup_steps=warmup, b2=0.98,
        parameters=parameters)
    for size, lr, warmup, parameters in (
        ('base', 6e-4, 24_000, 124_697_433),
        ('large', 4e-4, 30_000, 355_412_057))}


def get_config(size: str = 'tiny', arch: str = 'roberta', sizes=None):
  return base.make_config(arch, size=size, sizes=sizes or SIZES,
                             model=dict(type_vocab_size=1, init='normal'),
                             run=dict(objective='mlm'), remat='dots',
                             batch_size=8192, steps=500_000, schedule='linear',
                             final_fraction=0.0, clip_norm=0.0)
