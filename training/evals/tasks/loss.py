"""Held-out loss in nats per token, perplexity, and bits per byte of text.

Of several sources the figures are means by the weights of data.eval_source,
or of data.source, and each source's own stand beside them. With --stride, whole
documents are read in windows that overlap (training/evals/strided.py).
"""

from collections.abc import Sequence
from typing import Any

from training.evals import strided
from training.evals.task import Evaluation, Flag, Task


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Evaluates every held-out token once."""
  from training import evaluating, progress
  from training.data import pipeline
  from training.distributed import devices
  from training.step import make_eval_step
  config = evaluation.run.config
  if evaluation.options.stride:
    return strided.run(evaluation)
  loaders = pipeline.held_out(
      config, evaluation.tokenizer,
      *devices.batch_shard(evaluation.run.place, config.data.batch_size))
  step = evaluation.program(
      lambda: make_eval_step(evaluation.run.module, config), 'loss')
  sums = [evaluating.sums(
      step, evaluation.params, progress.each(
          loader.iterate(), 'evaluating', loader.num_batches),
      evaluation.run.put) for loader in loaders]
  own = {}
  for loader, total in zip(loaders, sums):
    own[loader.name] = _told(loader.text, [total], [loader])
  if len(loaders) == 1:
    return own[loaders[0].name]
  shares = ', '.join(f'{loader.share:.3g} {loader.name}' for loader in loaders)
  return _told(f'the mean by weight, {shares}', sums, loaders) | {
      'sources': own}


def _told(text: str, sums: Sequence, loaders: Sequence) -> dict[str, Any]:
  """Prints and returns the figures of some sources together."""
  from training import evaluating
  figures = evaluating.means(sums, loaders)
  tokens = sum(loader.num_tokens for loader in loaders)
  size = evaluating.mix([loader.bytes_per_token for loader in loaders], loaders)
  of = f' of {size:.2f} bytes' if size else ''  # a probe has no text
  print(f'{text}, {tokens:,} tokens{of}:')
  for name, value in figures.items():
    print(f'  {name.replace("_", " "):<16} {evaluating.shown(value)}')
  return figures | {'tokens': tokens, 'text': text}


TASK = Task(
    'held-out loss, perplexity and bits per byte', run, check=strided.check,
    fits=strided.check_fits,
    flags=(
        Flag('stride', 0, 'Read whole documents in windows of data.length '
             'tokens that begin so many tokens after each other, so that each '
             'token is predicted once, from at least data.length - stride; 0: '
             'as in training.', 0, 2**24),
        Flag('detokenize', 'none', "With --stride: 'wikitext' undoes "
             "WikiText's tokenisation, as lm_eval does, before the text is "
             'read.')))
