"""mT5: `--config configs/mt5.py:SIZE`.

Lab note. Xue et al. 2021 (arXiv 2010.11934), section 3: mC4, 101 languages,
each drawn in proportion to |L|^0.3; a SentencePiece vocabulary of 250,000
pieces; T5 v1.1's sizes; 1M steps of 1,024 rows of 1,024 tokens (1T), span
corruption (15 %, mean 3), no dropout, Adafactor, a rate of
1/sqrt(max(step, 10,000)). Counts are those of the published checkpoints, whose
embeddings have 250,112 rows (in the paper's words 300M to 13B).

`tiny` is that of T5 (configs/t5.py) with a gated network and a head of its own.
"""

from configs import t5


def sizes(vocab_size: int, **parameters: int) -> dict[str, dict]:
  """Returns T5 v1.1's sizes with another vocabulary and other counts."""
  return {'tiny': t5.SIZES['tiny']} | {
      size: t5.SIZES[f'v1.1-{size}'] | dict(
          vocab_size=vocab_size, steps=1_000_000, batch_size=1024, length=1024,
          parameters=count) for size, count in parameters.items()}


SIZES = sizes(
    250_112, small=300_176_768, base=582_401_280, large=1_229_581_312,
    xl=3_742_619_648, xxl=12_921_057_280)

get_config = t5.of('mt5', SIZES, {})
