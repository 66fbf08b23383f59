"""Vectors of texts, one for each, written to a file.

A text is shown to the model as texts are in training: BERT reads it between
[CLS] and [SEP], or after the separator where it learnt masked diffusion, a
decoder reads it after the separator (one that was imported and not trained
since, after the bos of its folder, if that names one), and the encoder of an
encoder-decoder, which runs alone, before the separator. What is pooled are the
outputs of the last layer, after the final norm, where there is one. What stands
around a text counts, as [CLS] and [SEP] do in sentence-transformers; the token
that a decoder begins with does not, because it sees nothing of the text.
"""

from collections.abc import Callable, Sequence
import importlib.util
from typing import Any, NamedTuple

import numpy as np

from configs.errors import one_of, require
from training.evals.task import Evaluation, Flag, Task, without


class Stack(NamedTuple):
  """How a kind of model is shown a text.

  Attributes:
    around: tokenizer -> the tokens before a text, and those after it.
    padding: the model's argument that is 0 on padding.
    sees_all: whether each token sees all of the text.
  """
  around: Callable[[Any], tuple[list, list]]
  padding: str
  sees_all: bool


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Writes the vectors of --texts to --vectors, [N, D] in the file's order."""
  from training.workdir import storage
  options = evaluation.options
  texts = read(options.texts)
  rows = laid_out(texts, evaluation)
  vectors_ND = vectors(rows, evaluation)
  file = storage.path(options.vectors, '--vectors')
  write(file, [text for _, text in texts], vectors_ND)
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
  from training.data import texts
  from training.workdir import storage
  path = storage.path(name, '--texts')
  require(path.is_file(), f'--texts is {name!r}, which is no file')
  data = path.read_bytes().removesuffix(b'\n')
  require(bool(data), f'--texts is {name!r}, which is empty')
  found = []
  for number, line in enumerate(data.split(b'\n'), 1):
    where = f'{name}, line {number}'
    text = texts.decoded(line, f'{where},').removesuffix('\r')
    if path.suffix == '.jsonl' and text.strip():
      row = texts.parsed(text, f'{where},')
      require(isinstance(row, dict) and 'text' in row,
              f"{where}, is no JSON object with a field 'text'")
      text = texts.checked(row['text'], f"{where}, field 'text',")
    require(bool(text.strip()), f'{where}, is empty: each line is one text')
    found.append((where, text))
  return found


def laid_out(texts: Sequence[tuple[str, str]], evaluation: Evaluation
             ) -> list[np.ndarray]:
  """Returns the tokens that the model is shown of each text, int32 [L]."""
  import architectures
  from training import chat
  from training.hf import generation as hf_generation
  tokenizer, most = evaluation.tokenizer, evaluation.run.model.max_len
  stack = architectures.stack(evaluation.run.model)
  before, after = around(evaluation)
  if stack == 'decoder':  # weights of others may have begun with a bos
    before = chat.plain(tokenizer, hf_generation.published(
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
  import architectures
  from training import objectives
  if objectives.of(evaluation.run.config).bound:
    # Its rows are stretches of text, as what it writes is.
    return [evaluation.tokenizer.separator_id], []
  return STACKS[architectures.stack(evaluation.run.model)].around(
      evaluation.tokenizer)


def reads_text(objective: Any) -> bool:
  """Whether an objective's rows are of text, which a tokenizer encodes."""
  from training.data import probes
  return objective.records != probes.KIND


def vectors(rows: Sequence[np.ndarray], evaluation: Evaluation) -> np.ndarray:
  """Returns the vector of each row of tokens, float32 [N, D]."""
  import jax

  from training import progress
  from training.evals import scoring
  options = evaluation.options
  step = evaluation.program(
      lambda: _program(evaluation, options.pooling, options.normalize),
      'embed', options.pooling, options.normalize)
  found = [None] * len(rows)
  groups = list(scoring.padded(dict(enumerate(rows)),
                               evaluation.run.model.max_len))
  for chosen, tokens_BL, lengths_B in progress.each(groups, 'embedding'):
    got_BD = jax.device_get(step(evaluation.params, tokens_BL, lengths_B))
    for vector_D, i in zip(got_BD, chosen):
      found[i] = vector_D
  return np.stack(found)


def _program(evaluation: Evaluation, pooling: str, normalize: bool):
  import jax
  import jax.numpy as jnp

  import architectures
  from architectures.parts.moe.layer import without_capacity
  from training import objectives
  objective = objectives.of(evaluation.run.config)
  stack = STACKS[architectures.stack(evaluation.run.model)]
  # With a capacity, what a text's experts are would hang on the batch.
  module = evaluation.run.module.clone(
      config=without_capacity(evaluation.run.model))
  prefix = objective.prefix
  require(pooling != 'first' or stack.sees_all or prefix, '--pooling is '
          "'first', but the first token of a decoder sees none of those after "
          'it: choose mean or last')

  def embed(params: Any, tokens_BL: jax.Array, lengths_B: jax.Array
            ) -> jax.Array:
    """Returns float32 [B, D]."""
    places_1L = jnp.arange(tokens_BL.shape[1])[None]
    real_BL = places_1L < lengths_B[:, None]
    options = {stack.padding: real_BL.astype(jnp.int32)}
    if prefix:
      options['prefix_B'] = lengths_B
    output = module.apply({'params': params}, tokens_BL, **options)
    counted_BL = real_BL & (places_1L >= (0 if stack.sees_all else 1))
    vectors_BD = POOLINGS[pooling](output, counted_BL).astype(jnp.float32)
    if normalize:
      vectors_BD /= jnp.maximum(
          jnp.linalg.norm(vectors_BD, axis=-1, keepdims=True), 1e-12)
    return vectors_BD
  return embed


def _states(output: Any):
  """The outputs of the last layer, [B, L, D], in float32; of an
  encoder-decoder the encoder's."""
  states_BLD = output.memory
  if states_BLD is None:  # BERT's `hidden` is what its head makes of them
    states_BLD = output.extra.get('hidden', output.hidden)
  return states_BLD.astype('float32')


def _mean(output: Any, counted_BL: Any):
  weights_BL = counted_BL.astype('float32')
  sums_BD = (_states(output) * weights_BL[..., None]).sum(1)
  return sums_BD / weights_BL.sum(1)[:, None].clip(1)


def _at(output: Any, places_B: Any):
  return _states(output)[np.arange(len(places_B)), places_B]


def _last(output: Any, counted_BL: Any):
  length = counted_BL.shape[1]
  return _at(output, length - 1 - counted_BL[:, ::-1].argmax(1))


def _first(output: Any, counted_BL: Any):
  return _at(output, counted_BL.argmax(1))


def _pooler(output: Any, counted_BL: Any):
  require('pooled' in output.extra, "--pooling is 'pooler', which this model "
          'has not (BERT has one): choose mean or last')
  return output.extra['pooled']


def write(file: Any, texts: Sequence[str], vectors_ND: np.ndarray) -> None:
  """Writes the vectors: as an array; or as a table with the texts."""
  from training.workdir import storage
  with storage.writing(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open('wb') as sink:
      if file.suffix == '.npy':
        np.save(sink, vectors_ND)
        return
      import pyarrow
      from pyarrow import parquet
      column = pyarrow.FixedSizeListArray.from_arrays(
          pyarrow.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
      parquet.write_table(
          pyarrow.table({'text': list(texts), 'vector': column}), sink)


def _check(options: Any) -> None:
  from training.workdir import storage
  require(bool(options.texts), 'task embed reads texts: pass --texts=FILE')
  require(options.vectors.endswith(('.npy', '.parquet')), '--vectors is '
          f'{options.vectors!r}: choose a file OUT.npy or OUT.parquet')
  one_of('--pooling', options.pooling, POOLINGS)
  require(options.vectors.endswith('.npy')
          or importlib.util.find_spec('pyarrow') is not None, '--vectors is '
          f'{options.vectors!r}, which needs the package pyarrow: pip install '
          "-e '.[data]', or choose OUT.npy")
  storage.output(options.vectors, '--vectors')
  read(options.texts)


STACKS = {
    'encoder': Stack(lambda tokenizer: ([tokenizer.cls_id], [tokenizer.sep_id]),
                     'segment_ids_BL', True),
    'decoder': Stack(lambda tokenizer: ([tokenizer.separator_id], []),
                     'valid_BL', False),
    'encoder-decoder': Stack(
        lambda tokenizer: ([], [tokenizer.separator_id]), 'segment_ids_BM',
        True)}
NO_TEXT = 'reads rows of a probe, whose ids stand for no text'
POOLINGS = {'mean': _mean, 'last': _last, 'first': _first, 'pooler': _pooler}
TASKS = {'embed': Task(
    'vectors of the texts of a file', run, without(reads_text, NO_TEXT),
    check=_check, held_out=False, flags=(
        Flag('texts', '', "A file with a text a line, or jsonl with 'text'."),
        Flag('vectors', '', 'The file to write: OUT.npy or OUT.parquet.'),
        Flag('pooling', 'mean', "What becomes a text's vector: the mean of its "
             "tokens' states, the last, the first, or BERT's pooler."),
        Flag('normalize', False, 'Scale each vector to length 1.')))}
