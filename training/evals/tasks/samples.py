"""Text that the model writes, from a prompt or from nothing."""

from typing import Any

from configs.errors import require
from training.evals.task import Evaluation, Flag, Task, without


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints --samples continuations of --prompt (or of several, by '|||');
  of an encoder-decoder, what it writes when it has read the prompt."""
  import jax

  from training import generate, objectives, progress
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
  written = [tokenizer.decode(generate.until(row, tokenizer.separator_id))
             for row in tokens]
  for i, (prompt, text) in enumerate(zip(rows, written)):
    print(f'sample {i + 1} of {len(rows)}:\n{prompt}{prompts.gap}{text}\n')
  return {'samples': [{'prompt': p, 'text': t}
                      for p, t in zip(rows, written)]}


def _sampling(options: Any):
  from training import generate
  return generate.Sampling(options.temperature, options.top_k, options.top_p)


TASK = Task(
    'texts that the model writes, also asked for by --samples or --prompt', run,
    without(lambda objective: objective.prompt, 'does not write text'),
    check=_sampling,  # which refuses what it cannot honour
    flags=(
        Flag('samples', 1, 'Texts to write for each prompt.', 1, 10_000,
             asks=True),
        Flag('prompt', '', "What a text begins with; several: 'A|||B'.",
             asks=True),
        Flag('max_new_tokens', 0,
             'Tokens to write; 0: as many as fit, 256 at most.', 0, 2**24),
        Flag('temperature', 1.0, '0: always the likeliest token.'),
        Flag('top_k', 0, 'Draw from the k likeliest tokens; 0: from all.', 0,
             2**26),
        Flag('top_p', 1.0, 'Draw from the likeliest tokens that together reach '
             'the probability p.'),
        Flag('sample_seed', 0, 'The seed of the draws.', 0, 2**32 - 1)))
