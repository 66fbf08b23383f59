"""XLM-R: `--config configs/xlm_roberta.py:SIZE`.

Lab note. Conneau et al. 2020 (arXiv 1911.02116), sections 3 and 5: 1.5M steps
of 8,192 rows of 2.5 TB of CommonCrawl in 100 languages, no language embeddings,
a SentencePiece vocabulary of 250,002; BERT's sizes. The rest, which the paper
does not say, is RoBERTa's. Counts are those of transformers'
XLMRobertaForMaskedLM.

`tiny` is RoBERTa's (configs/roberta.py).
"""

from configs import roberta

SIZES = {'tiny': roberta.SIZES['tiny']} | {
    size: roberta.SIZES[size] | dict(
        vocab_size=250002, steps=1_500_000, parameters=parameters)
    for size, parameters in (('base', 278_295_186), ('large', 560_142_482))}


def get_config(size: str = 'tiny'):
  return roberta.get_config(size, 'xlm_roberta', SIZES)
