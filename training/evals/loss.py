"""Held-out loss in nats per token, perplexity, and bits per byte of text."""

import jax

from training import data
from training import devices
from training import progress
from training import runs
from training.step import make_eval_step


def check(options, config, workdir) -> None:
  """Any run has a held-out loss."""


def run(evaluation) -> dict:
  """Evaluates every held-out token once."""
  config = evaluation.run.config
  index, count = devices.batch_shard(evaluation.run.place,
                                     config.data.batch_size)
  loader = data.load(config, evaluation.tokenizer, 'eval', index, count)
  step = jax.jit(make_eval_step(evaluation.run.module, config))
  figures = runs.evaluate(
      step, evaluation.params, loader, 0, evaluation.run.place,
      show=lambda batches: progress.each(batches, 'evaluating',
                                         loader.num_batches))
  print(f'{loader.text}, {loader.num_tokens:,} tokens of '
        f'{loader.bytes_per_token:.2f} bytes:')
  for name, value in figures.items():
    print(f'  {name.replace("_", " "):<16} {value:.4f}')
  return figures | {'tokens': loader.num_tokens, 'text': loader.text}
