"""What an encoder-decoder writes of held-out pairs, or of spans that were cut
out: the share of targets that it writes to their end, and the BLEU.

BLEU is sacrebleu's corpus BLEU (Post 2018), on text; where the package is
absent the request is refused. What is written are the likeliest tokens, one by
one, or the best text of --beams.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from configs.errors import RequestError
from training.evals.task import Evaluation, Task, without
from training.evals.tasks import samples


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Writes the targets of eval.batches batches."""
  return _figures(evaluation, 'targets', exact=_share)


def translation(evaluation: Evaluation) -> dict[str, Any]:
  """Translates eval.batches batches of held-out pairs."""
  bleu = make_bleu()

  def score(own: Sequence[tuple]) -> float:
    hypotheses, references, _ = zip(*own)
    return bleu.corpus_score(hypotheses, [references]).score

  figures = _figures(evaluation, 'pairs', bleu=score, exact=_share)
  figures['signature'] = str(bleu.get_signature())
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


def _share(own: Sequence[tuple]) -> float:
  """Returns the share of one source's targets that were written exactly."""
  return float(np.mean([same for _, _, same in own]))


def _figures(evaluation: Evaluation, things: str,
             **scores: Callable[[Sequence[tuple]], float]) -> dict[str, Any]:
  """Prints and returns the scores of what is written, of each source and in
  the mean by weight; `things` is what is counted."""
  from training.evals import held_out
  from training.objectives import pipeline
  config = evaluation.run.config
  loaders = pipeline.held_out(config, evaluation.tokenizer)
  found = [written(evaluation, loader, loader.first(config.eval.batches),
                   samples.beams(evaluation.options)) for loader in loaders]
  each = [{name: score(own) for name, score in scores.items()} for own in found]
  figures: dict[str, Any] = {
      name: held_out.mix([one[name] for one in each], loaders)
      for name in scores}
  say = lambda one: ', '.join(f'{name} {one[name]:.4f}' for name in scores)
  for loader, own, one in zip(loaders, found, each):
    print(f'{loader.text}: {len(own)} held-out {things}: {say(one)}')
  if len(loaders) > 1:
    print(f'the mean by weight: {say(figures)}')
    main = next(iter(scores))
    figures |= {f'{main}/{loader.name}': one[main]
                for loader, one in zip(loaders, each)}
  return figures | {things: sum(map(len, found))}


def written(evaluation: Evaluation, loader: Any, batches: int,
            beams: Any = None) -> list[tuple[str, str, bool]]:
  """Returns what `translate` returns of a loader's first batches."""
  from training import progress
  found = []
  for batch in progress.each(loader.iterate(0, batches), 'writing', batches):
    found += translate(evaluation.run.module, evaluation.params, batch,
                       evaluation.tokenizer, beams)
  return found


def translate(module: Any, params: Any, batch: Mapping[str, np.ndarray],
              tokenizer: Any, beams: Any = None
              ) -> list[tuple[str, str, bool]]:
  """Returns (hypothesis, reference, whether their tokens are the same) of
  each pair of a batch; rows without a weight are no pairs. `beams`: a
  generate.Beams; None: the likeliest token each time."""
  import jax
  import jax.numpy as jnp

  from training import generate
  from training.objectives import seq2seq
  start = jnp.full((len(batch['tokens']), 1), seq2seq.start_id(tokenizer))
  given = module, params, start, jnp.ones(len(start), jnp.int32)
  more = dict(max_new_tokens=batch['targets'].shape[1],
              stop_token=tokenizer.separator_id,
              source_BM=jnp.asarray(batch['tokens']),
              source_lengths_B=jnp.asarray(batch['segment_ids'].sum(1)))
  if beams is None:
    tokens = generate.generate(*given, jax.random.key(0),
                               sampling=generate.Sampling(temperature=0),
                               **more)
  else:
    tokens = generate.beam_search(*given, beams=beams, **more)[0][:, 0]
  tokens = jax.device_get(tokens)
  found = []
  for row, target, weights in zip(tokens, batch['targets'], batch['weights']):
    size = int((weights > 0).sum())
    if size:
      same = np.array_equal(row[:size], target[:size])
      found.append((text(row, tokenizer), text(target[:size], tokenizer), same))
  return found


def text(ids: np.ndarray, tokenizer: Any) -> str:
  """Returns the text of a target, up to its end."""
  ends = np.flatnonzero(ids == tokenizer.separator_id)
  return tokenizer.decode(ids[:ends[0]] if ends.size else ids)


TASKS = {
    'exact': Task(
        'the share of held-out targets that are written exactly', run,
        without(lambda objective: 'encoder-decoder' in objective.stacks,
                'has no targets to write'),
        check=samples.check_beams, flags=samples.BEAMS,
        figures=lambda config: ('exact', 'targets', 'exact/*')),
    'translation': Task(
        'BLEU of held-out pairs, and exact', translation,
        without(lambda objective: objective.translates,
                'has no pairs to translate'),
        check=lambda options: (make_bleu(), samples.check_beams(options)),
        flags=samples.BEAMS,
        figures=lambda config: ('bleu', 'exact', 'pairs', 'bleu/*'))}
