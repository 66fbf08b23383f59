"""What a model makes of a text that it reads: a vector of each text of a file,
and the likeliest tokens in the place of each mask of a prompt.

A text is shown to the model as texts are in training: BERT reads it between
[CLS] and [SEP], or after the separator where it learnt masked diffusion, a
decoder reads it after the separator (one that was imported and not trained
since, after the bos of its folder, if that names one), and the encoder of an
encoder-decoder, which runs alone, before the separator. What is pooled are the
outputs of the last layer, after the final norm, where there is one. What stands
around a text counts, as [CLS] and [SEP] do in sentence-transformers; the token
that a decoder begins with does not, because it sees nothing of the text.

Each mask is filled on its own, as in the fill-mask pipeline of transformers:
the model sees the others as masks.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts.moe.layer import without_capacity
from common.errors import one_of, require, short
from training import objectives, progress
from training.data import probes
from training.data import texts as text_files
from training.evals import Evaluation, Flag, Task, scoring, without
from training.hf import generation as hf_generation
from training.workdir import storage

# The module's argument that is 0 on padding, by what it stacks.
PADDING = {'encoder': 'segment_ids_BL', 'decoder': 'valid_BL',
           'encoder-decoder': 'segment_ids_BM'}
# How a reader sees what is blank.
SPACES = str.maketrans({' ': '␣', '\n': '↵', '\t': '⇥', '\r': '␍'})
POOLINGS = 'mean', 'last', 'first', 'pooler'
NO_TEXT = 'reads rows of a probe, whose ids stand for no text'


def reads_text(objective: Any) -> bool:
  """Whether an objective's rows are of text, which a tokenizer encodes."""
  return objective.record_kind != probes.KIND


def embed(evaluation: Evaluation) -> dict[str, Any]:
  """Writes the vectors of --texts to --vectors, [N, D] in the file's order."""
  options = evaluation.options
  rows = evaluation.shown
  how = options.pooling, options.normalize
  step = evaluation.program(_embedding(evaluation, *how), 'embed', *how)
  vectors: dict[int, np.ndarray] = {}
  groups = list(scoring.padded(dict(enumerate(rows)),
                               evaluation.run.model.max_len))
  for chosen, tokens_BL, lengths_B in progress.each(groups, 'embedding'):
    vectors |= zip(chosen, jax.device_get(
        step(evaluation.params, tokens_BL, lengths_B)))
  vectors_ND = np.stack([vectors[i] for i in range(len(rows))])
  file = storage.path(options.vectors, '--vectors')
  with storage.writing(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open('wb') as sink:
      np.save(sink, vectors_ND)
  tokens = sum(map(len, rows))
  print(f'{len(rows):,} texts of {tokens:,} tokens, each in '
        f'{vectors_ND.shape[1]:,} numbers: {file}')
  return {'texts': len(rows), 'tokens': tokens, 'size': vectors_ND.shape[1],
          'vectors': str(file)}


def read(name: str) -> list[tuple[str, str]]:
  """Returns (file and line, text) of each line of a file.

  Args:
    name: of a text file; or of a .jsonl file, whose objects have a 'text'.

  Raises:
    RequestError: where there is no such file, or a line holds no text.
  """
  path = storage.path(name, '--texts')
  require(path.is_file(), f'--texts is {name!r}, which is no file')
  lines = list(text_files.lines(name, all_lines=True)
               if path.suffix != '.jsonl' else
               ((where, text_files.checked(row.get('text'),
                                           f"{where}, field 'text',"))
                for where, row in text_files.rows(name)))
  require(bool(lines), f'--texts is {name!r}, which is empty')
  for where, text in lines:
    require(bool(text.strip()), f'{where}, is empty: each line is one text')
  return lines


def _of_texts(evaluation: Evaluation) -> list[np.ndarray]:
  """Returns the tokens that the model is shown of each text of --texts, int32
  [L]."""
  texts = read(evaluation.options.texts)
  tokenizer, most = evaluation.tokenizer, evaluation.run.model.max_len
  before, after = around(evaluation)
  if architectures.stack(evaluation.run.model) == 'decoder':
    # Weights of others may have begun with a bos.
    before = hf_generation.plain(tokenizer, hf_generation.published(
        evaluation.workdir, evaluation.step)).encode([])
  rows = []
  for (where, _), ids in zip(texts, tokenizer.encode_batch(
      [text for _, text in texts])):
    require(len(ids) > 0, f'{where}, has no token that the tokenizer '
            f'{tokenizer.name!r} knows')
    rows.append(np.concatenate([before, ids, after]).astype(np.int32))
    require(len(rows[-1]) <= most, f'{where}, has {len(rows[-1])} tokens, and '
            f'the model takes max_len {most}: shorten it')
  return rows


def around(evaluation: Evaluation) -> tuple[list, list]:
  """Returns the tokens before a text in training, and those after it."""
  tokenizer = evaluation.tokenizer
  stack = architectures.stack(evaluation.run.model)
  if stack == 'encoder-decoder':
    return [], [tokenizer.separator_id]
  # Rows of masked diffusion are stretches of text, as what it writes is.
  if stack == 'decoder' or objectives.of(evaluation.run.config).bound:
    return [tokenizer.separator_id], []
  return [tokenizer.cls_id], [tokenizer.sep_id]


def _embedding(evaluation: Evaluation, pooling: str, normalize: bool):
  prefix = objectives.of(evaluation.run.config).prefix
  stack = architectures.stack(evaluation.run.model)
  # With a capacity, what a text's experts are would hang on the batch.
  module = evaluation.run.module.clone(
      config=without_capacity(evaluation.run.model))
  require(pooling != 'first' or stack != 'decoder' or prefix, '--pooling is '
          "'first', but the first token of a decoder sees none of those after "
          'it: choose mean or last')

  def vectors(params: Any, tokens_BL: jax.Array, lengths_B: jax.Array):
    """Returns float32 [B, D]."""
    places_1L = jnp.arange(tokens_BL.shape[1])[None]
    real_BL = places_1L < lengths_B[:, None]
    options = {PADDING[stack]: real_BL.astype(jnp.int32),
               'lengths_B': lengths_B}
    if prefix:
      options['prefix_B'] = lengths_B
    output = module.apply({'params': params}, tokens_BL, **options)
    vectors_BD = _pooled(output, real_BL & (places_1L >= (stack == 'decoder')),
                         pooling)
    if normalize:
      vectors_BD /= jnp.maximum(
          jnp.linalg.norm(vectors_BD, axis=-1, keepdims=True), 1e-12)
    return vectors_BD
  return vectors


def _pooled(output: Any, counted_BL: jax.Array, pooling: str) -> jax.Array:
  """Returns a vector of each row in float32, [B, D]."""
  if pooling == 'pooler':
    require('pooled' in output.extra, "--pooling is 'pooler', which this model "
            'has not (BERT has one): choose mean or last')
    return output.extra['pooled'].astype(jnp.float32)
  states_BLD = output.memory  # the encoder's, of an encoder-decoder
  if states_BLD is None:  # BERT's `hidden` is what its head makes of them
    states_BLD = output.extra.get('hidden', output.hidden)
  states_BLD = states_BLD.astype(jnp.float32)
  if pooling == 'mean':
    weights_BL = counted_BL.astype(jnp.float32)
    return ((states_BLD * weights_BL[..., None]).sum(1)
            / weights_BL.sum(1)[:, None].clip(1))
  places_B = (counted_BL.argmax(1) if pooling == 'first' else
              counted_BL.shape[1] - 1 - counted_BL[:, ::-1].argmax(1))
  return states_BLD[jnp.arange(len(places_B)), places_B]


def fill_mask(evaluation: Evaluation) -> dict[str, Any]:
  """Prints --top_fillings fillings of each mask of --prompt (or of several
  prompts, by '|||'), with their probabilities."""
  tokenizer, model = evaluation.tokenizer, evaluation.run.model
  texts = evaluation.options.prompt.split('|||')
  tokens_BL, lengths_B = objectives.padded(evaluation.shown)
  real_BL = np.arange(tokens_BL.shape[1])[None] < lengths_B[:, None]
  rows_P, places_P = np.nonzero(real_BL & (tokens_BL == tokenizer.mask_id))
  top = min(evaluation.options.top_fillings, model.vocab_size)
  module = evaluation.run.module.clone(config=without_capacity(model))

  def fill(params: Any, tokens_BL: jax.Array, real_BL: jax.Array,
           rows_P: jax.Array, places_P: jax.Array):
    """Returns the probabilities of the likeliest tokens, and their ids."""
    output = module.apply({'params': params}, tokens_BL,
                          segment_ids_BL=real_BL, lengths_B=real_BL.sum(1))
    logits_1PV = output.head.logits(output.hidden[rows_P, places_P][None])
    return jax.lax.top_k(jax.nn.softmax(logits_1PV[0], -1), top)

  step = evaluation.program(fill, 'fill_mask', top)
  likely_PK, ids_PK = jax.device_get(step(
      evaluation.params, tokens_BL, real_BL.astype(np.int32), rows_P, places_P))
  prompts = [{'prompt': text, 'masks': []} for text in texts]
  for row, likely_K, ids_K in zip(rows_P, likely_PK, ids_PK):
    prompts[row]['masks'].append(
        [{'text': spelt(i, tokenizer), 'id': int(i), 'probability': float(p)}
         for i, p in zip(ids_K, likely_K)])
  for prompt in prompts:
    print(prompt['prompt'])
    for number, fillings in enumerate(prompt['masks'], 1):
      print(f'mask {number} of {len(prompt["masks"])}:')
      for filling in fillings:
        print(f'  {filling["probability"]:.4f}  '
              f'{readable(filling["id"], tokenizer)}')
    print()
  return {'prompts': prompts}


def _of_prompts(evaluation: Evaluation) -> list[np.ndarray]:
  """Returns the tokens of each prompt, int32 [L]; a RequestError where there is
  no mask in one, or it is longer than the model takes."""
  tokenizer, most = evaluation.tokenizer, evaluation.run.model.max_len
  rows = []
  for text in evaluation.options.prompt.split('|||'):
    ids = with_masks(text, tokenizer)
    require(tokenizer.mask_id in ids, f'the prompt {short(text)} has no mask: '
            'write [MASK] where a token is to be filled in')
    rows.append(np.concatenate([[tokenizer.cls_id], ids, [tokenizer.sep_id]]
                               ).astype(np.int32))
    require(len(rows[-1]) <= most, f'the prompt {short(text)} has '
            f'{len(rows[-1])} tokens, [CLS] and [SEP] included, and the model '
            f'takes max_len {most}: shorten it')
  return rows


def with_masks(text: str, tokenizer: Any) -> np.ndarray:
  """Returns the tokens of a text, int32 [L], with a mask where it writes one
  ([MASK], or as the tokenizer does) that the vocabulary has."""
  if 'mask' not in tokenizer.special_ids:
    return tokenizer.encode(text)
  mask = [tokenizer.mask_id]
  pieces = re.split(tokenizer.mask_pattern, text)
  ids = [x for piece in tokenizer.encode_batch(pieces) for x in (mask, piece)]
  return np.concatenate(ids[1:]).astype(np.int32)


def spelt(token: int, tokenizer: Any) -> str:
  """Returns a token for a reader: [SEP], of a special one; \\xc3, of a byte
  that is no character; <500>, of an id that the tokenizer has not."""
  if token >= tokenizer.vocab_size:
    return f'<{token}>'
  spelling = tokenizer.decode_bytes([token]).decode('utf-8', 'backslashreplace')
  return spelling or tokenizer.piece(int(token))


def readable(token: int, tokenizer: Any) -> str:
  """Returns a token for a reader, its spaces and line breaks to be seen."""
  text = spelt(int(token), tokenizer)
  if token < tokenizer.vocab_size and not text.startswith(' ') and (
      tokenizer.piece(int(token)).startswith('▁')):
    text = ' ' + text  # sentencepiece takes it off
  text = text.translate(SPACES)
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _check_embed(options: Any, config: Any) -> None:
  require(bool(options.texts), 'task embed reads texts: pass --texts=FILE')
  require(options.vectors.endswith('.npy'), '--vectors is '
          f'{options.vectors!r}: choose a file OUT.npy')
  one_of('--pooling', options.pooling, POOLINGS)
  storage.output(options.vectors, '--vectors')
  read(options.texts)


def _check_prompt(options: Any, config: Any) -> None:
  text_files.checked(options.prompt, '--prompt')
  require(bool(options.prompt), 'task fill_mask reads a text: pass '
          "--prompt='Paris is the [MASK] of France'")


TASKS = {
    'embed': Task(
        'vectors of the texts of a file', embed, without(reads_text, NO_TEXT),
        check=_check_embed, shown=_of_texts, held_out=False, flags=(
            Flag('texts', '', "A file with a text a line, or jsonl with "
                 "'text'."),
            Flag('vectors', '', 'The file to write: OUT.npy.'),
            Flag('pooling', 'mean', "What becomes a text's vector: the mean of "
                 "its tokens' states, the last, the first, or BERT's pooler."),
            Flag('normalize', False, 'Scale each vector to length 1.'))),
    'fill_mask': Task(
        'the likeliest fillings of each [MASK] of --prompt', fill_mask,
        without(lambda objective: 'data.mask_rate' in objective.reads,
                'predicts no masked tokens of a text between [CLS] and [SEP]'),
        check=_check_prompt, shown=_of_prompts, held_out=False, flags=(
            Flag('prompt', '', "A text with [MASK] in it; several: 'A|||B'."),
            Flag('top_fillings', 5, 'So many of the likeliest tokens.', 1,
                 2**26)))}
