"""Held-out pairs: BLEU of what the model writes, and whole targets right.

BLEU is sacrebleu's corpus BLEU (Post 2018), on text; where the package is
absent the request is refused. `exact`, which is a task of its own too, is the
share of sources for which the likeliest tokens, one by one, spell the target
to its end.
"""

import numpy as np

from configs.errors import RequestError, require
from training.evals import exact


def check(options, config, workdir) -> None:
  require(config.objective == 'seq2seq',
          f'objective {config.objective!r} has no pairs to translate: leave '
          'translation out of --tasks')
  make_bleu()


def run(evaluation) -> dict:
  """Translates eval.batches batches of held-out pairs, greedily."""
  bleu = make_bleu()
  hypotheses, references, same = zip(*exact.written(evaluation))
  score = bleu.corpus_score(hypotheses, [references])
  figures = dict(bleu=score.score, exact=float(np.mean(same)),
                 pairs=len(same), signature=str(bleu.get_signature()))
  print(f'{len(same)} held-out pairs: BLEU {score.score:.2f}, exact '
        f'{figures["exact"]:.4f}\n  {figures["signature"]}')
  return figures


def make_bleu():
  """Returns sacrebleu's metric, with its own tokenisation (13a)."""
  try:
    from sacrebleu.metrics import BLEU
  except ImportError as error:
    raise RequestError("task translation needs the package sacrebleu: "
                       "pip install 'archetype[bleu]'; exact does without"
                       ) from error
  return BLEU()
