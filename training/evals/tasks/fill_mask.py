"""The likeliest tokens in the place of each mask of a text.

The text is shown to the model as in training: [CLS] text [SEP]. Each mask is
filled on its own, as in the fill-mask pipeline of transformers: the model sees
the others as masks.
"""

import re
from typing import Any

import numpy as np

from configs.errors import require, short
from training.evals.task import Evaluation, Flag, Task, without


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Prints --top_fillings fillings of each mask of --prompt (or of several
  prompts, by '|||'), with their probabilities."""
  import jax

  from training.objectives import record
  tokenizer, model = evaluation.tokenizer, evaluation.run.model
  texts = evaluation.options.prompt.split('|||')
  tokens_BL, lengths_B = record.padded(
      [laid_out(text, tokenizer, model.max_len) for text in texts])
  real_BL = np.arange(tokens_BL.shape[1])[None] < lengths_B[:, None]
  rows_P, places_P = np.nonzero(real_BL & (tokens_BL == tokenizer.mask_id))
  top = min(evaluation.options.top_fillings, model.vocab_size)
  fill = evaluation.program(lambda: _program(model, evaluation.run.module, top),
                            'fill_mask', top)
  found_PK, ids_PK = jax.device_get(fill(
      evaluation.params, tokens_BL, real_BL.astype(np.int32), rows_P, places_P))
  prompts = [{'prompt': text, 'masks': []} for text in texts]
  for row, likely_K, ids_K in zip(rows_P, found_PK, ids_PK):
    prompts[row]['masks'].append(
        [{'text': spelt(i, tokenizer), 'id': int(i), 'probability': float(p)}
         for i, p in zip(ids_K, likely_K)])
  _show(prompts)
  return {'prompts': prompts}


def laid_out(text: str, tokenizer: Any, most: int) -> np.ndarray:
  """Returns the tokens of one prompt, int32 [L].

  Args:
    text: with a mask or several, each written [MASK] or as the tokenizer does.
    tokenizer: the run's.
    most: how many tokens the model takes.

  Raises:
    RequestError: for a tokenizer without a mask, a text without one, and a
      text that is too long.
  """
  ids = with_masks(text, tokenizer)
  require(tokenizer.mask_id in ids, f'the prompt {short(text)} has no mask: '
          'write [MASK] where a token is to be filled in')
  row = np.concatenate([[tokenizer.cls_id], ids, [tokenizer.sep_id]])
  require(len(row) <= most, f'the prompt {short(text)} has {len(row)} tokens, '
          f'[CLS] and [SEP] included, and the model takes max_len {most}: '
          'shorten it')
  return row.astype(np.int32)


def with_masks(text: str, tokenizer: Any) -> np.ndarray:
  """Returns the tokens of a text, int32 [L], with a mask where it writes one
  that the vocabulary has."""
  if 'mask' not in tokenizer.special_ids:
    return tokenizer.encode(text)
  mask = [tokenizer.mask_id]
  pieces = re.split(tokenizer.mask_pattern, text)
  ids = [x for piece in tokenizer.encode_batch(pieces) for x in (mask, piece)]
  return np.concatenate(ids[1:]).astype(np.int32)


def _program(model: Any, module: Any, top: int):
  import jax

  from architectures.parts.moe.layer import without_capacity
  module = module.clone(config=without_capacity(model))

  def fill(params: Any, tokens_BL: jax.Array, real_BL: jax.Array,
           rows_P: jax.Array, places_P: jax.Array
           ) -> tuple[jax.Array, jax.Array]:
    """Returns the probabilities of the likeliest tokens, and their ids."""
    output = module.apply({'params': params}, tokens_BL,
                          segment_ids_BL=real_BL)
    logits_1PV = output.head.logits(output.hidden[rows_P, places_P][None])
    return jax.lax.top_k(jax.nn.softmax(logits_1PV[0], -1), top)
  return fill


def spelt(token: int, tokenizer: Any) -> str:
  """Returns a token for a reader: [SEP], of a special one; \\xc3, of a byte
  that is no character; <500>, of an id that the tokenizer has not."""
  if token >= tokenizer.vocab_size:
    return f'<{token}>'
  spelling = tokenizer.decode_bytes([token]).decode('utf-8', 'backslashreplace')
  return spelling or tokenizer.piece(int(token))


def _show(prompts: list[dict]) -> None:
  for prompt in prompts:
    print(prompt['prompt'])
    for number, fillings in enumerate(prompt['masks'], 1):
      if len(prompt['masks']) > 1:
        print(f'mask {number} of {len(prompt["masks"])}:')
      for filling in fillings:
        print(f'  {filling["probability"]:.4f}  {filling["text"]}')
    print()


def _check(options: Any) -> None:
  from training.data import texts
  texts.checked(options.prompt, '--prompt')
  require(bool(options.prompt), 'task fill_mask reads a text: pass '
          "--prompt='Paris is the [MASK] of France'")


TASKS = {'fill_mask': Task(
    'the likeliest fillings of each [MASK] of --prompt', run,
    without(lambda objective: 'data.mask_rate' in objective.reads,
            'predicts no masked tokens of a text between [CLS] and [SEP]'),
    check=_check, held_out=False,
    flags=(
        Flag('prompt', '', "A text with [MASK] in it; several: 'A|||B'."),
        Flag('top_fillings', 5, 'So many of the likeliest tokens.', 1, 2**26)))}
