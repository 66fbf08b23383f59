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

from collections.abc import Callable
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import architectures
from architectures.parts.moe.layer import without_capacity
from common.errors import RequestError, check_choice, require, shorten
from training import objectives, progress
from training.data import probes
from training.data import texts as text_files
from training.evals import Evaluation, Flag, Task, scoring
from training.hf import generation as hf_generation
from training.workdir import storage

# The module's argument that is 0 on padding.
MASK_ARGUMENT_OF_STACK = {
    'encoder': 'segment_ids_BL', 'decoder': 'valid_BL',
    'encoder-decoder': 'segment_ids_BM'}
# The signs by which a reader sees what is blank.
VISIBLE_SPACES = str.maketrans({' ': '␣', '\n': '↵', '\t': '⇥', '\r': '␍'})
POOLINGS = 'mean', 'last', 'first', 'pooler'
READS_NO_TEXT = 'reads rows of a probe, whose ids stand for no text'


def reads_text(objective: Any) -> bool:
  """Returns whether an objective trains on text that a tokenizer encodes, and
  not on the rows of a probe."""
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
    """Raises RequestError for --texts that cannot be read, --vectors that
    cannot be written, and a --pooling that is not known."""
    require(bool(options.texts), 'task embed reads texts: pass --texts=FILE')
    require(options.vectors.endswith('.npy'), '--vectors is '
            f'{options.vectors!r}: choose a file OUT.npy')
    check_choice('--pooling', value=options.pooling, choices=POOLINGS)
    storage.checked_output_file(options.vectors, '--vectors')
    read_texts(options.texts)

  def prepare(self, evaluation: Evaluation) -> list[np.ndarray]:
    """Encodes each text of --texts with the special tokens around it, int32
    [L].

    Args:
      evaluation: the evaluation of the run, with the flag --texts.

    Raises:
      RequestError: for a text without a token, or with too many.
    """
    texts = read_texts(evaluation.options.texts)
    tokenizer = evaluation.tokenizer
    max_len = evaluation.run.model.max_len

    # Find the special tokens around each text. Imported weights may have been
    # trained on texts with a bos before them, as their folder says.
    tokens_before, tokens_after = tokens_around_text(evaluation)
    if architectures.stack(evaluation.run.model) == 'decoder':
      folder = hf_generation.load_if_published(evaluation.workdir,
                                               evaluation.step)
      tokens_before = hf_generation.continue_texts(tokenizer, folder).encode([])

    encoded_texts = tokenizer.encode_batch([text for _, text in texts])
    rows = []
    for (location, _), ids in zip(texts, encoded_texts):
      require(len(ids) > 0, f'{location}, has no token that the tokenizer '
              f'{tokenizer.name!r} knows')
      row_L = np.concatenate([tokens_before, ids, tokens_after])
      require(len(row_L) <= max_len, f'{location}, has {len(row_L)} tokens, '
              f'and the model takes max_len {max_len}: shorten it')
      rows.append(row_L.astype(np.int32))
    return rows

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Computes a vector (embedding) of each text, and writes them to a file.

    The suffixes name axes: N texts, B texts of a batch, L length, D features of
    a vector.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      The numbers of `texts` and `tokens`; `size`, the numbers of a vector;
      and `vectors`, the file.
    """
    options = evaluation.options
    rows = evaluation.prepared

    # Compute the vectors. Texts of similar lengths are in one batch, so the
    # vectors must be brought back into the order of the texts.
    pooling = options.pooling
    normalize = options.normalize
    embed = _make_embed_function(evaluation, pooling=pooling,
                                 normalize=normalize)
    step = evaluation.jit_once(embed, 'embed', pooling, normalize)
    max_len = evaluation.run.model.max_len
    batches = list(scoring.pad_into_batches(dict(enumerate(rows)), max_len))
    vector_by_row: dict[int, np.ndarray] = {}
    for row_numbers, tokens_BL, lengths_B in progress.show_items(
        batches, 'embedding'):
      vectors_BD = jax.device_get(
          step(evaluation.params, tokens_BL, lengths_B))
      for i, vector_D in zip(row_numbers, vectors_BD):
        vector_by_row[i] = vector_D
    vectors_ND = np.stack([vector_by_row[i] for i in range(len(rows))])

    # Write them to a file, as an array of numpy.
    file = storage.checked_path(options.vectors, '--vectors')
    with storage.explain_write_failures(file):
      file.parent.mkdir(parents=True, exist_ok=True)
      with file.open('wb') as sink:
        np.save(sink, vectors_ND)
    num_tokens = sum(map(len, rows))
    vector_size = vectors_ND.shape[1]
    print(f'{len(rows):,} texts of {num_tokens:,} tokens, each in '
          f'{vector_size:,} numbers: {file}')
    return {'texts': len(rows), 'tokens': num_tokens, 'size': vector_size,
            'vectors': str(file)}


def read_texts(name: str) -> list[tuple[str, str]]:
  """Reads the texts of a file, one on each line.

  Args:
    name: a text file; or a .jsonl file, whose objects have a 'text'.

  Returns:
    (location, text) of each text. The location is the file and the line, for
    messages.

  Raises:
    RequestError: where there is no such file, or a line has no text.
  """
  path = storage.checked_path(name, '--texts')
  require(path.is_file(), f'--texts is {name!r}, which is no file')
  lines = []
  if path.suffix == '.jsonl':
    for location, row in text_files.read_rows(name):
      text = text_files.check_text(row.get('text'), f"{location}, field "
                                                    "'text',")
      lines.append((location, text))
  else:
    lines += text_files.read_lines(name, all_lines=True)
  require(bool(lines), f'--texts is {name!r}, which is empty')

  # Refuse empty lines: they would have no vector, and vectors are matched to
  # texts by their order.
  for location, text in lines:
    require(bool(text.strip()), f'{location}, is empty: each line is one text')
  return lines


def tokens_around_text(evaluation: Evaluation) -> tuple[list, list]:
  """Returns the special tokens that the model has seen around a text in
  training.

  Args:
    evaluation: the evaluation of the run.

  Returns:
    The ids before a text, and those after it.
  """
  tokenizer = evaluation.tokenizer
  stack = architectures.stack(evaluation.run.model)
  if stack == 'encoder-decoder':
    return [], [tokenizer.separator_id]
  # A decoder reads running text, and so does an encoder that is trained by
  # masked diffusion (its objective gives a bound on the loss).
  objective = objectives.find_objective(evaluation.run.config)
  if stack == 'decoder' or objective.bound:
    return [tokenizer.separator_id], []
  return [tokenizer.cls_id], [tokenizer.sep_id]


def _make_embed_function(evaluation: Evaluation, pooling: str, normalize: bool
                         ) -> Callable:
  """Returns embed(params, tokens_BL, lengths_B), which returns a vector of each
  text, float32 [B, D].

  Args:
    evaluation: the evaluation of the model.
    pooling: which states become a vector, of POOLINGS.
    normalize: whether each vector is scaled to length 1.

  Raises:
    RequestError: where the first token of a decoder is asked for.
  """
  is_prefix_lm = objectives.find_objective(evaluation.run.config).prefix
  stack = architectures.stack(evaluation.run.model)
  if pooling == 'first' and stack == 'decoder' and not is_prefix_lm:
    raise RequestError("--pooling is 'first', but the first token of a decoder "
                       'sees none of those after it: choose mean or last')
  # With a capacity, a text's experts would depend on the batch.
  module = evaluation.run.module.clone(
      config=without_capacity(evaluation.run.model))
  embedder = TextEmbedder(
      module=module, stack=stack, is_prefix_lm=is_prefix_lm, pooling=pooling,
      normalize=normalize)
  return embedder.embed


@dataclasses.dataclass(frozen=True)
class TextEmbedder:
  """Computes a vector of each text from the states of its tokens.

  Attributes:
    module: the Flax module of the model.
    stack: what the model is: 'decoder', 'encoder' or 'encoder-decoder'.
    is_prefix_lm: whether a text is read in both directions, as the prefix of a
      prefix LM.
    pooling: which states become a vector, of POOLINGS.
    normalize: whether each vector is scaled to length 1.
  """
  module: Any
  stack: str
  is_prefix_lm: bool
  pooling: str
  normalize: bool

  def embed(self, params: Any, tokens_BL: jax.Array, lengths_B: jax.Array
            ) -> jax.Array:
    """Computes a vector of D features for each of B texts, float32 [B, D].

    Args:
      params: the parameters of the model, a tree of arrays.
      tokens_BL: the tokens of the texts, with padding.
      lengths_B: how many of them are no padding.
    """
    # Compute the states of all tokens.
    places_1L = jnp.arange(tokens_BL.shape[1])[None]
    is_real_BL = places_1L < lengths_B[:, None]
    mask_argument = MASK_ARGUMENT_OF_STACK[self.stack]
    options = {mask_argument: is_real_BL.astype(jnp.int32),
               'lengths_B': lengths_B}
    if self.is_prefix_lm:
      options['prefix_B'] = lengths_B
    output = self.module.apply({'params': params}, tokens_BL, **options)

    # Pool them. In a decoder, the first token is the separator, which sees
    # nothing of the text and is left out. 1e-12 avoids a division by 0.
    is_counted_BL = is_real_BL
    if self.stack == 'decoder':
      is_counted_BL = is_real_BL & (places_1L >= 1)
    vectors_BD = _pool_states(output, is_counted_BL=is_counted_BL,
                              pooling=self.pooling)
    if self.normalize:
      norms_B1 = jnp.linalg.norm(vectors_BD, axis=-1, keepdims=True)
      vectors_BD /= jnp.maximum(norms_B1, 1e-12)
    return vectors_BD


def _pool_states(output: Any, is_counted_BL: jax.Array, pooling: str
                 ) -> jax.Array:
  """Pools the hidden states of a text's tokens to one vector.

  Args:
    output: the output of the model.
    is_counted_BL: bool, which of the L tokens of B rows count.
    pooling: one of POOLINGS: the mean of the states, that of the first or the
      last token, or the output of BERT's pooler.

  Returns:
    float32 [B, D], a vector of D features for each row.

  Raises:
    RequestError: for the pooler of a model that has none.
  """
  if pooling == 'pooler':
    require('pooled' in output.extra, "--pooling is 'pooler', which this model "
            'has not (BERT has one): choose mean or last')
    return output.extra['pooled'].astype(jnp.float32)

  # Find the states of the last layer. In an encoder-decoder they are those of
  # the encoder (memory). Some heads, such as BERT's, transform the states
  # before `hidden`; then the states themselves are in `extra`.
  states_BLD = output.memory
  if states_BLD is None:
    states_BLD = output.extra.get('hidden', output.hidden)
  states_BLD = states_BLD.astype(jnp.float32)
  if pooling == 'mean':
    weights_BL = is_counted_BL.astype(jnp.float32)
    sums_BD = (states_BLD * weights_BL[..., None]).sum(1)
    return sums_BD / weights_BL.sum(1)[:, None].clip(1)

  # Otherwise take the state of one token. argmax finds the first True; for the
  # last one, look from the end of the rows.
  if pooling == 'first':
    place_B = is_counted_BL.argmax(1)
  else:
    num_after_B = is_counted_BL[:, ::-1].argmax(1)
    place_B = is_counted_BL.shape[1] - 1 - num_after_B
  return states_BLD[jnp.arange(len(place_B)), place_B]


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
    """Raises RequestError where there is no --prompt."""
    text_files.check_text(options.prompt, '--prompt')
    require(bool(options.prompt), 'task fill_mask reads a text: pass '
            "--prompt='Paris is the [MASK] of France'")

  def prepare(self, evaluation: Evaluation) -> list[np.ndarray]:
    """Returns the tokens of each prompt, int32 [L].

    Args:
      evaluation: the evaluation of the run, with the flag --prompt.

    Raises:
      RequestError: where there is no mask in a prompt, or it is longer than the
        model takes.
    """
    # Each prompt is laid out as [CLS] text [SEP].
    tokenizer = evaluation.tokenizer
    max_len = evaluation.run.model.max_len
    cls = tokenizer.cls_id
    sep = tokenizer.sep_id
    rows = []
    for text in evaluation.options.prompt.split('|||'):
      ids = encode_with_masks(text, tokenizer)
      require(tokenizer.mask_id in ids, f'the prompt {shorten(text)} has no '
              'mask: write [MASK] where a token is to be filled in')
      row_L = np.concatenate([[cls], ids, [sep]]).astype(np.int32)
      require(len(row_L) <= max_len, f'the prompt {shorten(text)} has '
              f'{len(row_L)} tokens, [CLS] and [SEP] included, and the model '
              f'takes max_len {max_len}: shorten it')
      rows.append(row_L)
    return rows

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Finds the likeliest tokens of each mask of the prompts, and prints them.

    The suffixes name axes: B prompts, L length, P masks of all prompts
    together, K fillings of a mask.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      `prompts`, for each prompt its text and the fillings of its masks.
    """
    tokenizer = evaluation.tokenizer
    model = evaluation.run.model
    texts = evaluation.options.prompt.split('|||')

    # Find the rows and the places of the P masks, in all prompts. Padding may
    # have the id of the mask.
    tokens_BL, lengths_B = objectives.pad_prompts(evaluation.prepared)
    is_real_BL = np.arange(tokens_BL.shape[1])[None] < lengths_B[:, None]
    is_mask_BL = is_real_BL & (tokens_BL == tokenizer.mask_id)
    rows_P, places_P = np.nonzero(is_mask_BL)

    # Compute the K likeliest tokens of each.
    num_tokens = min(evaluation.options.top_fillings, model.vocab_size)
    fill_masks = _make_fill_function(evaluation, num_tokens)
    step = evaluation.jit_once(fill_masks, 'fill_mask', num_tokens)
    fillings_on_device = step(
        evaluation.params, tokens_BL, is_real_BL.astype(np.int32), rows_P,
        places_P)
    probabilities_PK, ids_PK = jax.device_get(fillings_on_device)

    # Sort the fillings by prompt. np.nonzero goes row by row, so the masks of a
    # prompt are in order.
    prompts: list[dict] = [{'prompt': text, 'masks': []} for text in texts]
    for row, probabilities_K, ids_K in zip(rows_P, probabilities_PK, ids_PK):
      fillings = []
      for token, probability in zip(ids_K, probabilities_K):
        fillings.append({'text': spell_token(token, tokenizer),
                         'id': int(token), 'probability': float(probability)})
      prompts[row]['masks'].append(fillings)

    for prompt in prompts:
      _print_fillings(prompt, tokenizer)
    return {'prompts': prompts}


def _make_fill_function(evaluation: Evaluation, num_tokens: int) -> Callable:
  """Makes the function that fills in masks.

  Args:
    evaluation: the evaluation of an encoder.
    num_tokens: K, how many tokens are given for each mask.

  Returns:
    fill_masks(params, tokens_BL, is_real_BL, rows_P, places_P), which returns
    the likeliest tokens of P masks.
  """
  # Without a capacity no token is dropped, however many choose an expert.
  module = evaluation.run.module.clone(
      config=without_capacity(evaluation.run.model))

  def fill_masks(params: Any, tokens_BL: jax.Array, is_real_BL: jax.Array,
                 rows_P: jax.Array, places_P: jax.Array
                 ) -> tuple[jax.Array, jax.Array]:
    """Returns the probabilities of the likeliest tokens and their ids, [P, K].

    Args:
      params: the parameters of the model, a tree of arrays.
      tokens_BL: the tokens of the prompts, with padding, [batch, length].
      is_real_BL: int, 0 on padding and else 1.
      rows_P, places_P: where the P masks stand in tokens_BL.
    """
    # The head is applied to the masks alone; it takes [batch, length, D], hence
    # the added axis.
    output = module.apply({'params': params}, tokens_BL,
                          segment_ids_BL=is_real_BL,
                          lengths_B=is_real_BL.sum(1))
    hidden_PD = output.hidden[rows_P, places_P]
    logits_1PV = output.head.logits(hidden_PD[None])
    return jax.lax.top_k(jax.nn.softmax(logits_1PV[0], -1), num_tokens)
  return fill_masks


def _print_fillings(prompt: dict[str, Any], tokenizer: Any) -> None:
  """Prints a prompt and the fillings of each of its masks.

  Args:
    prompt: its text as `prompt`, and as `masks` the fillings of each mask.
    tokenizer: the tokenizer of the run.
  """
  masks = prompt['masks']
  print(prompt['prompt'])
  for number, fillings in enumerate(masks, 1):
    print(f'mask {number} of {len(masks)}:')
    for filling in fillings:
      token = spell_token_visibly(filling['id'], tokenizer)
      print(f'  {filling["probability"]:.4f}  {token}')
  print()


def encode_with_masks(text: str, tokenizer: Any) -> np.ndarray:
  """Encodes a text that may contain masks, written as [MASK] or as the
  tokenizer writes a mask.

  Args:
    text: the text.
    tokenizer: the tokenizer of the run.

  Returns:
    int32 [L], the token ids. If the vocabulary has no mask, [MASK] is read as
    plain text.
  """
  # The tokenizer does not read special tokens in a text as such. So split the
  # text at the masks, encode the parts, and put the id of the mask between
  # them.
  if 'mask' not in tokenizer.special_ids:
    return tokenizer.encode(text)
  first_part, *later_parts = tokenizer.encode_batch(
      re.split(tokenizer.mask_pattern, text))
  ids = [first_part]
  for ids_of_part in later_parts:
    ids += [[tokenizer.mask_id], ids_of_part]
  return np.concatenate(ids).astype(np.int32)


def spell_token(token: int, tokenizer: Any) -> str:
  """Returns the text of a token for a reader: [SEP], of a special one; \\xc3,
  of a byte that is no character; <500>, of an id that the tokenizer has not."""
  if token >= tokenizer.vocab_size:
    return f'<{token}>'
  spelling = tokenizer.decode_bytes([token]).decode('utf-8', 'backslashreplace')
  return spelling or tokenizer.piece(int(token))


def spell_token_visibly(token: int, tokenizer: Any) -> str:
  """Returns the text of a token for the user, with visible signs in place of
  spaces, line breaks and characters that cannot be printed.

  Args:
    token: the id of the token.
    tokenizer: the tokenizer of the run.
  """
  text = spell_token(int(token), tokenizer)
  # sentencepiece leaves out the space before a word, which its vocabulary
  # writes as '▁'.
  if token < tokenizer.vocab_size and not text.startswith(' '):
    if tokenizer.piece(int(token)).startswith('▁'):
      text = ' ' + text

  # Other signs that cannot be printed are written as escapes, such as \n.
  characters = []
  for character in text.translate(VISIBLE_SPACES):
    if not character.isprintable():
      character = ascii(character)[1:-1]
    characters.append(character)
  return ''.join(characters)


TASKS = {'embed': Embed(), 'fill_mask': FillMask()}
