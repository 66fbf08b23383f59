"""Held-out pairs: BLEU of what the model writes, and whole targets right.

BLEU is sacrebleu's corpus BLEU (Post 2018), on text; where the package is
absent the request is refused. `exact` is the share of sources for which the
likeliest tokens, one by one, spell the target to its end.
"""

import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts.config import require
from training import data
from training import generate
from training import pairs


def run(evaluation) -> dict:
  """Translates eval.batches batches of held-out pairs, greedily."""
  run, tokenizer = evaluation.run, evaluation.tokenizer
  config = run.config
  require(config.objective == 'seq2seq',
          f'objective {config.objective!r} has no pairs to translate: leave '
          'translation out of --tasks')
  bleu = make_bleu()
  loader = data.load(config, tokenizer, 'eval')
  found = []
  for batch in loader.iterate(0, config.eval.batches or None):
    found += translate(run.module, evaluation.params, batch, tokenizer)
  hypotheses, references, exact = zip(*found)
  score = bleu.corpus_score(hypotheses, [references])
  figures = dict(bleu=score.score, exact=float(np.mean(exact)),
                 pairs=len(found), signature=str(bleu.get_signature()))
  print(f'{len(found)} held-out pairs: BLEU {score.score:.2f}, exact '
        f'{figures["exact"]:.4f}\n  {figures["signature"]}')
  return figures


def translate(module, params, batch, tokenizer) -> list[tuple]:
  """Returns (hypothesis, reference, whether their tokens are the same) of
  each pair of a batch; rows without a weight are no pairs."""
  start = jnp.full((len(batch['tokens']), 1), pairs.start_id(tokenizer))
  end = tokenizer.separator_id
  tokens = jax.device_get(generate.generate(
      module, params, start, jnp.ones(len(start), jnp.int32),
      jax.random.key(0), max_new_tokens=batch['targets'].shape[1],
      sampling=generate.Sampling(temperature=0), stop_token=end,
      source_BM=jnp.asarray(batch['tokens']),
      source_lengths_B=jnp.asarray(batch['segment_ids'].sum(1))))
  found = []
  for row, target, weights in zip(tokens, batch['targets'], batch['weights']):
    size = int((weights > 0).sum())
    if size:
      same = np.array_equal(row[:size], target[:size])
      found.append((_text(row, end, tokenizer),
                    _text(target[:size], end, tokenizer), same))
  return found


def _text(ids, end: int, tokenizer) -> str:
  ends = np.flatnonzero(ids == end)
  return tokenizer.decode(ids[:ends[0]] if ends.size else ids)


def make_bleu():
  """Returns sacrebleu's metric, with its own tokenisation (13a)."""
  try:
    from sacrebleu.metrics import BLEU
  except ImportError as error:
    raise ValueError("task translation needs the package sacrebleu: "
                     "pip install 'archetype[bleu]'") from error
  return BLEU()
