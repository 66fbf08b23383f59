"""The tasks of a model that reads text: embed, which writes a vector of each
text of a file, and fill_mask, which prints the likeliest tokens in the place of
each mask of a prompt.

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
from common.errors import RequestError, one_of, require, short
from training import objectives, progress
from training.data import probes
from training.data import texts as text_files
from training.evals import Evaluation, Flag, Task, scoring
from training.hf import generation as hf_generation
from training.workdir import storage

# The module's argument that is 0 on padding, by what it stacks.
MASK_ARGUMENT_OF_STACK = {'encoder': 'segment_ids_BL', 'decoder': 'valid_BL',
           'encoder-decoder': 'segment_ids_BM'}
# How a reader sees what is blank.
VISIBLE_SPACES = str.maketrans({' ': '␣', '\n': '↵', '\t': '⇥', '\r': '␍'})
POOLINGS = 'mean', 'last', 'first', 'pooler'
READS_NO_TEXT = 'reads rows of a probe, whose ids stand for no text'


def reads_text(objective: Any) -> bool:
  """Returns whether an objective's rows are of text, which a tokenizer
  encodes."""
  return objective.record_kind != probes.KIND_OF_SOURCE


class Embed(Task):
  """Writes the vectors of --texts to --vectors, [N, D] in the file's order."""

  help = 'vectors of the texts of a file'
  why_not_allowed = READS_NO_TEXT
  reads_held_out = False
  flags = (
      Flag(name='texts', default='',
           help="A file with a text a line, or jsonl with 'text'."),
      Flag(name='vectors', default='', help='The file to write: OUT.npy.'),
      Flag(name='pooling', default='mean',
           help="What becomes a text's vector: the mean of its tokens' states, "
           "the last, the first, or BERT's pooler."),
      Flag(name='normalize', default=False,
           help='Scale each vector to length 1.'),
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return reads_text(objective)

  def check(self, options: Any, config: Any) -> None:
    require(bool(options.texts), 'task embed reads texts: pass --texts=FILE')
    require(options.vectors.endswith('.npy'), '--vectors is '
            f'{options.vectors!r}: choose a file OUT.npy')
    one_of('--pooling', options.pooling, POOLINGS)
    storage.checked_output_file(options.vectors, '--vectors')
    read_texts(options.texts)

  def prepare(self, evaluation: Evaluation) -> list[np.ndarray]:
    """Returns the tokens that the model is shown of each text of --texts, int32
    [L]."""
    lines = read_texts(evaluation.options.texts)
    tokenizer = evaluation.tokenizer
    most = evaluation.run.model.max_len
    before, after = tokens_around_text(evaluation)
    if architectures.stack(evaluation.run.model) == 'decoder':
      # Imported weights may have begun with a bos.
      folder = hf_generation.published(evaluation.workdir, evaluation.step)
      before = hf_generation.plain(tokenizer, folder).encode([])
    encoded = tokenizer.encode_batch([text for _, text in lines])
    rows = []
    for (where, _), ids in zip(lines, encoded):
      require(len(ids) > 0, f'{where}, has no token that the tokenizer '
              f'{tokenizer.name!r} knows')
      row_L = np.concatenate([before, ids, after]).astype(np.int32)
      require(len(row_L) <= most, f'{where}, has {len(row_L)} tokens, and '
              f'the model takes max_len {most}: shorten it')
      rows.append(row_L)
    return rows

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Writes a vector of each text to a file."""
    options = evaluation.options
    rows = evaluation.prepared

    # Texts of about one length go through the model together.
    pooling = options.pooling
    normalize = options.normalize
    step = evaluation.jit_once(
        _make_embed_function(evaluation, pooling,
                             normalize), 'embed', pooling, normalize)
    most = evaluation.run.model.max_len
    groups = list(scoring.pad_into_batches(dict(enumerate(rows)), most))
    vectors: dict[int, np.ndarray] = {}
    for chosen, tokens_BL, lengths_B in progress.show_items(groups,
                                                            'embedding'):
      vectors_BD = jax.device_get(
          step(evaluation.params, tokens_BL, lengths_B))
      for i, vector_D in zip(chosen, vectors_BD):
        vectors[i] = vector_D
    vectors_ND = np.stack([vectors[i] for i in range(len(rows))])

    # The file.
    file = storage.checked_path(options.vectors, '--vectors')
    with storage.explain_write_failures(file):
      file.parent.mkdir(parents=True, exist_ok=True)
      with file.open('wb') as sink:
        np.save(sink, vectors_ND)
    tokens = sum(map(len, rows))
    size = vectors_ND.shape[1]
    print(f'{len(rows):,} texts of {tokens:,} tokens, each in {size:,} '
          f'numbers: {file}')
    return {'texts': len(rows), 'tokens': tokens, 'size': size,
            'vectors': str(file)}


def read_texts(name: str) -> list[tuple[str, str]]:
  """Returns (file and line, text) of each line of a file.

  Args:
    name: the name of a text file; or of a .jsonl file, whose objects have a
      'text'.

  Raises:
    RequestError: where there is no such file, or a line holds no text.
  """
  path = storage.checked_path(name, '--texts')
  require(path.is_file(), f'--texts is {name!r}, which is no file')
  lines = []
  if path.suffix == '.jsonl':
    for where, row in text_files.read_rows(name):
      text = text_files.check_text(row.get('text'), f"{where}, field 'text',")
      lines.append((where, text))
  else:
    lines += text_files.read_lines(name, all_lines=True)
  require(bool(lines), f'--texts is {name!r}, which is empty')
  # An empty line would shift all that follow it.
  for where, text in lines:
    require(bool(text.strip()), f'{where}, is empty: each line is one text')
  return lines


def tokens_around_text(evaluation: Evaluation) -> tuple[list, list]:
  """Returns the tokens before a text in training, and those after it."""
  tokenizer = evaluation.tokenizer
  stack = architectures.stack(evaluation.run.model)
  if stack == 'encoder-decoder':
    return [], [tokenizer.separator_id]
  # Rows of masked diffusion are stretches of text, as what it writes is.
  if stack == 'decoder' or objectives.find_objective(
      evaluation.run.config).bound:
    return [tokenizer.separator_id], []
  return [tokenizer.cls_id], [tokenizer.sep_id]


def _make_embed_function(evaluation: Evaluation, pooling: str, normalize: bool):
  """Returns vectors(params, tokens_BL, lengths_B) -> float32 [B, D].

  Args:
    evaluation: the evaluation of the model.
    pooling: which states become a vector, of POOLINGS.
    normalize: whether each vector is scaled to length 1.
  """
  prefix = objectives.find_objective(evaluation.run.config).prefix
  stack = architectures.stack(evaluation.run.model)
  if pooling == 'first' and stack == 'decoder' and not prefix:
    raise RequestError("--pooling is 'first', but the first token of a decoder "
                       'sees none of those after it: choose mean or last')
  # With a capacity, what a text's experts are would hang on the batch.
  module = evaluation.run.module.clone(
      config=without_capacity(evaluation.run.model))

  def vectors(params: Any, tokens_BL: jax.Array, lengths_B: jax.Array):
    """Returns float32 [B, D]."""
    places_1L = jnp.arange(tokens_BL.shape[1])[None]
    real_BL = places_1L < lengths_B[:, None]
    options = {MASK_ARGUMENT_OF_STACK[stack]: real_BL.astype(jnp.int32),
               'lengths_B': lengths_B}
    if prefix:
      options['prefix_B'] = lengths_B
    output = module.apply({'params': params}, tokens_BL, **options)
    counted_BL = real_BL
    if stack == 'decoder':  # whose first token sees nothing of the text
      counted_BL = real_BL & (places_1L >= 1)
    vectors_BD = _pool_states(output, counted_BL, pooling)
    if normalize:
      norms_B1 = jnp.linalg.norm(vectors_BD, axis=-1, keepdims=True)
      vectors_BD /= jnp.maximum(norms_B1, 1e-12)
    return vectors_BD
  return vectors


def _pool_states(output: Any, counted_BL: jax.Array, pooling: str) -> jax.Array:
  """Returns a vector of each row in float32, [B, D].

  Args:
    output: the output of the model.
    counted_BL: bool, the tokens that count.
    pooling: which states become a vector, of POOLINGS.
  """
  if pooling == 'pooler':
    require('pooled' in output.extra, "--pooling is 'pooler', which this model "
            'has not (BERT has one): choose mean or last')
    return output.extra['pooled'].astype(jnp.float32)
  states_BLD = output.memory  # the states of an encoder-decoder's encoder
  if states_BLD is None:  # BERT's `hidden` is what its head makes of them
    states_BLD = output.extra.get('hidden', output.hidden)
  states_BLD = states_BLD.astype(jnp.float32)
  if pooling == 'mean':
    weights_BL = counted_BL.astype(jnp.float32)
    sums_BD = (states_BLD * weights_BL[..., None]).sum(1)
    return sums_BD / weights_BL.sum(1)[:, None].clip(1)
  if pooling == 'first':
    places_B = counted_BL.argmax(1)
  else:  # the last one
    places_B = counted_BL.shape[1] - 1 - counted_BL[:, ::-1].argmax(1)
  return states_BLD[jnp.arange(len(places_B)), places_B]


class FillMask(Task):
  """Prints --top_fillings fillings of each mask of --prompt (or of several
  prompts, by '|||'), with their probabilities."""

  help = 'the likeliest fillings of each [MASK] of --prompt'
  why_not_allowed = ('predicts no masked tokens of a text between [CLS] '
                     'and [SEP]')
  reads_held_out = False
  flags = (
      Flag(name='prompt', default='',
           help="A text with [MASK] in it; several: 'A|||B'."),
      Flag(name='top_fillings', default=5,
           help='So many of the likeliest tokens.', least=1, most=2**26),
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return 'data.mask_rate' in objective.reads

  def check(self, options: Any, config: Any) -> None:
    text_files.check_text(options.prompt, '--prompt')
    require(bool(options.prompt), 'task fill_mask reads a text: pass '
            "--prompt='Paris is the [MASK] of France'")

  def prepare(self, evaluation: Evaluation) -> list[np.ndarray]:
    """Returns the tokens of each prompt, int32 [L]; a RequestError where there
    is no mask in one, or it is longer than the model takes."""
    tokenizer = evaluation.tokenizer
    most = evaluation.run.model.max_len
    cls = tokenizer.cls_id
    sep = tokenizer.sep_id
    rows = []
    for text in evaluation.options.prompt.split('|||'):
      ids = encode_with_masks(text, tokenizer)
      require(tokenizer.mask_id in ids, f'the prompt {short(text)} has no '
              'mask: write [MASK] where a token is to be filled in')
      row_L = np.concatenate([[cls], ids, [sep]]).astype(np.int32)
      require(len(row_L) <= most, f'the prompt {short(text)} has '
              f'{len(row_L)} tokens, [CLS] and [SEP] included, and the model '
              f'takes max_len {most}: shorten it')
      rows.append(row_L)
    return rows

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and returns the likeliest tokens of each mask."""
    tokenizer = evaluation.tokenizer
    model = evaluation.run.model
    texts = evaluation.options.prompt.split('|||')

    # The places P of the masks, in all prompts.
    tokens_BL, lengths_B = objectives.pad_prompts(evaluation.prepared)
    real_BL = np.arange(tokens_BL.shape[1])[None] < lengths_B[:, None]
    rows_P, places_P = np.nonzero(real_BL & (tokens_BL == tokenizer.mask_id))

    # The K likeliest tokens of each.
    top = min(evaluation.options.top_fillings, model.vocab_size)
    step = evaluation.jit_once(_make_fill_function(evaluation, top),
                               'fill_mask',
                              top)
    likely_PK, ids_PK = jax.device_get(step(
        evaluation.params, tokens_BL, real_BL.astype(np.int32), rows_P,
        places_P))
    prompts: list[dict] = [{'prompt': text, 'masks': []} for text in texts]
    for row, likely_K, ids_K in zip(rows_P, likely_PK, ids_PK):
      fillings = []
      for token, probability in zip(ids_K, likely_K):
        fillings.append({'text': spell_token(token, tokenizer),
                         'id': int(token),
                         'probability': float(probability)})
      prompts[row]['masks'].append(fillings)

    for prompt in prompts:
      _print_fillings(prompt, tokenizer)
    return {'prompts': prompts}


def _make_fill_function(evaluation: Evaluation, top: int):
  """Returns a function that gives the likeliest `top` tokens of masks."""
  # No token is dropped, however many choose an expert.
  module = evaluation.run.module.clone(
      config=without_capacity(evaluation.run.model))

  def fill(params: Any, tokens_BL: jax.Array, real_BL: jax.Array,
           rows_P: jax.Array, places_P: jax.Array):
    """Returns the probabilities of the likeliest tokens, and their ids."""
    output = module.apply({'params': params}, tokens_BL,
                          segment_ids_BL=real_BL, lengths_B=real_BL.sum(1))
    hidden_PD = output.hidden[rows_P, places_P]
    logits_1PV = output.head.logits(hidden_PD[None])
    return jax.lax.top_k(jax.nn.softmax(logits_1PV[0], -1), top)
  return fill


def _print_fillings(prompt: dict[str, Any], tokenizer: Any) -> None:
  """Prints a prompt and the fillings of each of its masks."""
  masks = prompt['masks']
  print(prompt['prompt'])
  for number, fillings in enumerate(masks, 1):
    print(f'mask {number} of {len(masks)}:')
    for filling in fillings:
      token = spell_token_visibly(filling['id'], tokenizer)
      print(f'  {filling["probability"]:.4f}  {token}')
  print()


def encode_with_masks(text: str, tokenizer: Any) -> np.ndarray:
  """Returns the tokens of a text, int32 [L], with a mask where it writes one
  ([MASK], or as the tokenizer does) that the vocabulary has."""
  if 'mask' not in tokenizer.special_ids:
    return tokenizer.encode(text)
  first, *others = tokenizer.encode_batch(
      re.split(tokenizer.mask_pattern, text))
  parts = [first]
  for piece in others:
    parts += [[tokenizer.mask_id], piece]
  return np.concatenate(parts).astype(np.int32)


def spell_token(token: int, tokenizer: Any) -> str:
  """Returns a token for a reader: [SEP], of a special one; \\xc3, of a byte
  that is no character; <500>, of an id that the tokenizer has not."""
  if token >= tokenizer.vocab_size:
    return f'<{token}>'
  spelling = tokenizer.decode_bytes([token]).decode('utf-8', 'backslashreplace')
  return spelling or tokenizer.piece(int(token))


def spell_token_visibly(token: int, tokenizer: Any) -> str:
  """Returns a token for a reader, its spaces and line breaks to be seen."""
  text = spell_token(int(token), tokenizer)
  if token < tokenizer.vocab_size and not text.startswith(' '):
    if tokenizer.piece(int(token)).startswith('▁'):
      text = ' ' + text  # sentencepiece takes it off
  characters = []
  for character in text.translate(VISIBLE_SPACES):
    if not character.isprintable():
      character = ascii(character)[1:-1]
    characters.append(character)
  return ''.join(characters)


TASKS = {'embed': Embed(), 'fill_mask': FillMask()}
