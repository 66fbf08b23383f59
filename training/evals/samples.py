"""Text that the model writes, from a prompt or from nothing."""

import jax
import numpy as np

from configs.errors import require
from training import generate
from training import objectives
from training import progress


def check(options, config, workdir) -> None:
  require(objectives.of(config).prompt,
          f'objective {config.objective!r} does not write text: leave samples '
          'out of --tasks')
  _sampling(options)


def _sampling(options) -> generate.Sampling:
  return generate.Sampling(options.temperature, options.top_k, options.top_p)


def run(evaluation) -> dict:
  """Prints --samples continuations of --prompt (or of several, by '|||');
  of an encoder-decoder, what it writes when it has read the prompt."""
  options, model = evaluation.options, evaluation.run.model
  config, tokenizer = evaluation.run.config, evaluation.tokenizer
  texts = options.prompt.split('|||')
  rows = [text for text in texts for _ in range(options.samples)]
  prompts = objectives.of(config).prompt(rows, config, tokenizer)
  room = model.max_len - prompts.tokens.shape[1]
  count = options.max_new_tokens or min(256, room)
  require(count > 0, f'the prompt fills all {model.max_len} positions of the '
          'model: shorten it')
  with progress.during('writing'):
    tokens = jax.device_get(generate.generate(
        evaluation.run.module, evaluation.params, prompts.tokens,
        prompts.lengths, jax.random.key(options.sample_seed),
        max_new_tokens=count, sampling=_sampling(options),
        stop_token=tokenizer.separator_id, **prompts.arguments))
  written = [tokenizer.decode(_until(row, tokenizer.separator_id))
             for row in tokens]
  for i, (prompt, text) in enumerate(zip(rows, written)):
    print(f'sample {i + 1} of {len(rows)}:\n{prompt}{prompts.gap}{text}\n')
  return {'samples': [{'prompt': p, 'text': t}
                      for p, t in zip(rows, written)]}


def _until(row, stop: int):
  ends = np.flatnonzero(row == stop)
  return row[:ends[0]] if ends.size else row
