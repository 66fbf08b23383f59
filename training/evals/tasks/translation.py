"""Translations of held-out pairs: their BLEU, and how many are exact.

BLEU is sacrebleu's corpus BLEU (Post 2018), on text; where the package is
absent the request is refused. `exact`, which is also a task of its own, is the
share of sources for which the likeliest tokens, one by one, or the best text of
--beams, spell the target to its end.
"""

from typing import Any

from configs.errors import RequestError
from training.evals.tasks import exact, samples
from training.evals.task import Evaluation, Task, without


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Translates eval.batches batches of held-out pairs, greedily or with
  --beams."""
  from training import evaluating
  bleu = make_bleu()
  loaders, found = exact.written(evaluation)
  scores, shares = [], []
  for loader, own in zip(loaders, found):
    hypotheses, references, _ = zip(*own)
    scores.append(bleu.corpus_score(hypotheses, [references]).score)
    shares.append(exact.share(own))
    print(f'{loader.text}: {len(own)} held-out pairs: BLEU {scores[-1]:.2f}, '
          f'exact {shares[-1]:.4f}')
  figures = dict(bleu=evaluating.mix(scores, loaders),
                 exact=evaluating.mix(shares, loaders),
                 pairs=sum(map(len, found)),
                 signature=str(bleu.get_signature()))
  if len(loaders) > 1:
    print(f'the mean by weight: BLEU {figures["bleu"]:.2f}, exact '
          f'{figures["exact"]:.4f}')
    figures |= {f'bleu/{loader.name}': score
                for loader, score in zip(loaders, scores)}
  print(f'  {figures["signature"]}')
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


TASK = Task(
    'BLEU of held-out pairs, and exact', run,
    without(lambda objective: objective.translates,
            'has no pairs to translate'),
    check=lambda options: (make_bleu(), samples.check_beams(options)),
    flags=samples.BEAMS,
    figures=lambda config: ('bleu', 'exact', 'pairs', 'bleu/*'))
