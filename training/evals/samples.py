"""Text that the model writes, from a prompt or from nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from architectures.parts.encoder_decoder import EncoderDecoder
from configs.errors import require
from training import generate
from training import objectives
from training import progress
from training.data import conversations
from training.data import pairs


def check(options, config, workdir) -> None:
  require(objectives.OBJECTIVES[config.objective].generates,
          f'objective {config.objective!r} does not write text: leave samples '
          'out of --tasks')
  _sampling(options)


def _sampling(options) -> generate.Sampling:
  return generate.Sampling(options.temperature, options.top_k, options.top_p)


def run(evaluation) -> dict:
  """Prints --samples continuations of --prompt (or of several, by '|||');
  of an encoder-decoder, what it writes when it has read the prompt."""
  options, model = evaluation.options, evaluation.run.model
  objective = evaluation.run.config.objective
  texts = options.prompt.split('|||')
  rows = [text for text in texts for _ in range(options.samples)]
  prompts, lengths, more = _shown(rows, evaluation)
  room = model.max_len - prompts.shape[1]
  count = options.max_new_tokens or min(256, room)
  require(count > 0, f'the prompt fills all {model.max_len} positions of the '
          'model: shorten it')
  with progress.during('writing'):
    tokens = jax.device_get(generate.generate(
        evaluation.run.module, evaluation.params, prompts, lengths,
        jax.random.key(options.sample_seed), max_new_tokens=count,
        sampling=_sampling(options),
        stop_token=evaluation.tokenizer.separator_id,
        **more))
  written = [evaluation.tokenizer.decode(_until(
      row, evaluation.tokenizer.separator_id)) for row in tokens]
  gap = '\n' if objective == 'chat' else ''
  for i, (prompt, text) in enumerate(zip(rows, written)):
    print(f'sample {i + 1} of {len(rows)}:\n{prompt}{gap}{text}\n')
  return {'samples': [{'prompt': p, 'text': t}
                      for p, t in zip(rows, written)]}


def _shown(rows, evaluation):
  """Returns what the model is shown, as its objective lays it out: prompts,
  their lengths, and further arguments of generate."""
  tokenizer, config = evaluation.tokenizer, evaluation.run.config
  if config.objective == 'chat':
    ids = [conversations.question(text, config, tokenizer) for text in rows]
    return *_padded(ids), {}
  prompts, lengths = encode(rows, tokenizer)
  if isinstance(evaluation.run.module, EncoderDecoder):
    return as_source(prompts, lengths, tokenizer)
  if config.objective == 'prefix':
    return prompts, lengths, dict(prefix_B=lengths)
  return prompts, lengths, {}


def encode(texts, tokenizer) -> tuple[jax.Array, jax.Array]:
  """Returns prompts [B, L], a document's start before each, and lengths."""
  return _padded([np.concatenate([[tokenizer.separator_id], ids])
                  for ids in tokenizer.encode_batch(texts)])


def _padded(rows):
  lengths = np.array([len(row) for row in rows], np.int32)
  prompts = np.zeros((len(rows), lengths.max()), np.int32)
  for row, ids in zip(prompts, rows):
    row[:len(ids)] = ids
  return jnp.asarray(prompts), jnp.asarray(lengths)


def as_source(prompts, lengths, tokenizer):
  """Returns the start of a target, its length, and the prompts, without a
  document's start, as the source."""
  start = jnp.full((len(prompts), 1), pairs.start_id(tokenizer))
  return start, jnp.ones_like(lengths), dict(
      source_BM=prompts[:, 1:] if prompts.shape[1] > 1 else prompts,
      source_lengths_B=jnp.maximum(lengths - 1, 1))


def _until(row, stop: int):
  ends = np.flatnonzero(row == stop)
  return row[:ends[0]] if ends.size else row
