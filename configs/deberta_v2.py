"""DeBERTa-v3: `--config configs/deberta_v2.py:SIZE`.

Lab note. He et al. 2023 (arXiv 2111.09543), section 5 and appendix A: RoBERTa's
160 GB of text, a SentencePiece vocabulary of 128,000 (128,100 rows), rows of
512, 500,000 steps of 8,192 rows, AdamW with a decay of 0.01, b2 0.98 and eps
1e-6, 10,000 steps of warm-up, linear decay, dropout 0.1, replaced-token
detection with a generator of half the layers; small has base's width and half
its layers. Learning rates here are RoBERTa's.

Counts are those of transformers' DebertaV2Model, the encoder alone; UNCOUNTED
is what pre-training needs: the generator, the head, and the encoder's own part
of the table of tokens.

`tiny` is BERT's (configs/bert.py), with 16 buckets on each side.
"""

from configs import base, bert

SIZES = base.table_of_sizes(
    'num_layers generator.num_layers d_model num_heads d_ff lr parameters',
    rows={'v3-xsmall': (12, 6, 384, 6, 1536, 6e-4, 70_682_112),
          'v3-small': (6, 3, 768, 12, 3072, 6e-4, 141_304_320),
          'v3-base': (12, 6, 768, 12, 3072, 6e-4, 183_831_552),
          'v3-large': (24, 12, 1024, 16, 4096, 4e-4, 434_012_160)},
    vocab_size=128100, max_len=512, dropout=0.1, attention_dropout=0.1)
SIZES['tiny'] = bert.SIZES['tiny'] | dict(
    disentangled=dict(buckets=16, max_distance=32),
    generator=dict(num_layers=2))
UNCOUNTED = {'v3-xsmall': 60_460_261, 'v3-small': 121_352_293,
             'v3-base': 142_615_909, 'v3-large': 285_087_845}

get_config = base.make_get_config(
    'deberta_v2', SIZES, dict(norm_eps=1e-7, init='normal'),
    dict(objective='replaced_tokens'), remat='dots', batch_size=8192,
    steps=500_000, warmup_steps=10_000, schedule='linear', final_fraction=0.0,
    weight_decay=0.01, b2=0.98, eps=1e-6, clip_norm=0.0)
