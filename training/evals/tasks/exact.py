"""Exact-match accuracy: the share of held-out targets, of pairs or of spans
that were cut out, that the model writes correctly to their end."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.evals.task import Evaluation, Task, without
from training.evals.tasks import samples


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Writes the targets of eval.batches batches, greedily or with --beams."""
  from training import evaluating
  loaders, found = written(evaluation)
  each = [share(own) for own in found]
  for loader, own, exact in zip(loaders, found, each):
    print(f'{loader.text}: {len(own)} held-out targets: exact {exact:.4f}')
  figures = dict(exact=evaluating.mix(each, loaders),
                 targets=sum(map(len, found)))
  if len(loaders) > 1:
    print(f'the mean by weight: exact {figures["exact"]:.4f}')
    figures |= {f'exact/{loader.name}': exact
                for loader, exact in zip(loaders, each)}
  return figures


def share(own: Sequence[tuple]) -> float:
  """Returns the share of one source's targets that were written exactly."""
  return float(np.mean([same for _, _, same in own]))


def written(evaluation: Evaluation) -> tuple[list, list[list[tuple]]]:
  """Returns the loaders of what is held out, and for each of them what
  `translate` returns of its rows."""
  from training import progress
  from training.data import pipeline
  run, config = evaluation.run, evaluation.run.config
  loaders = pipeline.held_out(config, evaluation.tokenizer)
  beams = samples.beams(evaluation.options)
  found = []
  for loader in loaders:
    found.append([])
    batches = loader.first(config.eval.batches)
    for batch in progress.each(loader.iterate(0, batches),
                               'writing targets', batches):
      found[-1] += translate(run.module, evaluation.params, batch,
                             evaluation.tokenizer, beams)
  return loaders, found


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


TASK = Task('the share of held-out targets that are written exactly', run,
            without(lambda objective: 'encoder-decoder' in objective.stacks,
                    'has no targets to write'),
            check=samples.check_beams, flags=samples.BEAMS,
            figures=lambda config: ('exact', 'targets', 'exact/*'))
