"""Held-out loss in nats per token, perplexity, and bits per byte of text.

With several sources the figures are means by the weights of data.eval_source,
or of data.source, and each source's own stand beside them.

With --stride whole documents are read in windows that overlap, as perplexity is
usually reported. A document is read as its tokens after the separator. A window
of `length` tokens begins every `stride` tokens and predicts those of them that
no window before it did: each token once, from at least length - stride tokens
(but at the document's beginning). This is the recipe of transformers'
documentation, "Perplexity of fixed-length models", with the separator as the
first token.

The bound on the loss of masked diffusion is told by many draws. In a row of n
tokens each draw masks l of them, and counts the losses of the masked tokens
n / l times. l is uniform from 1 to n, which gives the same mean as a random
share of masked tokens and spreads less (LLaDA, arXiv 2502.09992, equation 6).
The draws of a row take its l evenly spread, from a random start. The standard
error is that of the mean over rows: of another held-out text of the same kind,
and by other draws.
"""

from collections.abc import Iterator, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import RequestError, require
from training import generate, objectives, progress
from training.data import sources, tokens
from training.evals import Evaluation, Flag, Task, held_out, items, scoring
from training.objectives import pipeline
from training.runs import make_eval_step

MOST_DOCUMENT_GROUPS = 256  # of a source, whose losses are told apart


class HeldOutLoss(Task):
  """Evaluates every held-out token once."""

  help = 'held-out loss, perplexity and bits per byte'
  flags = (
      Flag(name='stride', default=0,
           help='Read whole documents in windows of data.length tokens that '
           'begin so many tokens after each other, so that each token is '
           'predicted once, from at least data.length - stride; 0: as in '
           'training.', least=0, most=2**24),
  )

  def check(self, options: Any, config: Any) -> None:
    """Raises RequestError for a --stride that a run cannot be read with."""
    stride = options.stride
    if not stride:
      return
    reason = scoring.why_not_scorable(config)
    require(not reason, f'{reason}: leave --stride at 0')
    data = config.data
    require(stride < data.length, f'--stride is {stride}, but a window has '
            f'data.length {data.length} tokens, the first of which is not '
            'predicted: choose a smaller one')
    # Windows that overlap are made of a text, and tokens are cut already.
    spec = data.eval_source or data.source
    parsed = sources.parse_sources(spec)
    if len(parsed) != 1 or parsed[0][1].tokens:
      raise RequestError(f'--stride reads one source of text, which {spec!r} '
                         'is not: name one by --text')

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and returns the figures of the held-out data, of each source and
    in all."""
    if evaluation.options.stride:
      return measure_with_stride(evaluation)
    loaders = evaluation.held_out_loaders()
    step = evaluation.jit_once(
        make_eval_step(evaluation.run.module, evaluation.run.config), 'loss')
    sums = []
    for loader in loaders:
      results = evaluation.run_on_batches(step, loader, 'evaluating')
      sums.append(held_out.sum_figures(results))

    # The figures of each source, and their means.
    each = {}
    for loader, total in zip(loaders, sums):
      each[loader.name] = _print_figures(loader.text, [total], [loader])
    if len(loaders) == 1:
      return each[loaders[0].name]
    shares = [f'{loader.share:.3g} {loader.name}' for loader in loaders]
    figures = _print_figures(
        f'the mean by weight, {", ".join(shares)}', sums, loaders)
    figures['sources'] = each
    return figures


def _print_figures(text: str, sums: Sequence, loaders: Sequence) -> dict[str,
                                                                         Any]:
  """Prints and returns the figures of some sources together."""
  figures = held_out.average_figures(sums, loaders)
  count = sum(loader.num_tokens for loader in loaders)
  sizes = [loader.bytes_per_token for loader in loaders]
  size = held_out.mean_of_sources(sizes, loaders)
  counted = f'{count:,} tokens'
  if size:  # a probe has no text
    counted += f' of {size:.2f} bytes'
  print(f'{text}, {counted}:')
  for name, value in figures.items():
    print(f'  {name.replace("_", " "):<16} {held_out.format_figure(value)}')
  return figures | {'tokens': count, 'text': text}


def measure_with_stride(evaluation: Evaluation) -> dict[str, Any]:
  """Prints and returns the figures of all of a source's documents."""
  name, documents = _held_out_documents(evaluation)
  length = evaluation.run.config.data.length
  stride = evaluation.options.stride
  tokenizer = evaluation.tokenizer

  # The log-probabilities of all tokens.
  questions: list[scoring.Continuation] = []
  for ids in tokenizer.encode_batch(documents):
    document = np.concatenate([[tokenizer.separator_id], ids])
    questions += cut_into_windows(document, length, stride)
  answers = scoring.score_continuations(questions, evaluation,
                                        'reading windows')
  nats = 0.0
  for answer in answers:
    nats -= float(answer.log_probs.sum())
  count = sum(question.scored for question in questions)

  # Their mean by token, by word and by byte.
  figures = measure_text(nats, count, documents)
  print(f'{name}, {count:,} tokens, each from {length - stride:,} to '
        f'{length - 1:,} before it:')
  for key, value in figures.items():
    if isinstance(value, float):
      print(f'  {key.replace("_", " "):<16} {value:.4f}')
  print(f'  {"words":<16} {figures["words"]:,}, ends of lines included')
  return figures | {'stride': stride, 'length': length, 'text': name}


def cut_into_windows(ids: np.ndarray, length: int, stride: int
            ) -> Iterator[scoring.Continuation]:
  """Yields the windows of a document, [T] with the token that begins it, as
  questions; all tokens but that one are predicted."""
  ids = ids.astype(np.int32)
  done = 1
  for start in range(0, len(ids) - 1, stride):
    stop = min(start + length, len(ids))
    yield scoring.Continuation(ids[start:stop], stop - done)
    done = stop
    if stop == len(ids):
      return


def measure_text(nats: float, tokens: int, documents: list[str]) -> dict[str,
                                                                         Any]:
  """Returns the figures of text that costs `nats` in all.

  Its words are what white space separates, and the ends of its lines: the
  convention of WikiText, whose test set has 245,569 such words.
  """
  words = 0
  size = 0
  for text in documents:
    words += len(text.split()) + text.count('\n')
    size += len(text.encode())
  return dict(
      loss=nats / tokens, perplexity=_exp_or_inf(nats / tokens),
      bits_per_byte=nats / math.log(2) / size,
      word_perplexity=_exp_or_inf(nats / max(words,
                                             1)), tokens=tokens, words=words,
      bytes=size)


def _exp_or_inf(x: float) -> float:
  """Returns e to the power x; inf where no float is as large."""
  return math.exp(x) if x < 700 else math.inf


def _held_out_documents(evaluation: Evaluation) -> tuple[str, list[str]]:
  """Returns the name of the source, and the documents that are held out."""
  data = evaluation.run.config.data
  part = evaluation.run.config.eval.part
  [(_, whole)] = sources.parse_sources(data.eval_source or data.source)
  every = data.holdout_every
  if data.eval_source:
    every = None
  source = sources.hold_out_end_of_text(whole, every, part)
  if source.is_cut:  # to the part
    part = ''

  # The documents of the split, each of which must be text.
  documents = list(source.documents())
  chosen = tokens.select_documents(np.arange(len(documents)), every=every,
                                   split='eval', part=part)
  kept = [document for document, keep in zip(documents, chosen) if keep]
  for document in kept:
    require(isinstance(document, str), f'{source.name} holds pairs or '
            'conversations: --stride is for text')
  require(kept, f'{source.name} has no document that is held out: pass --text')
  return source.name, kept


class BoundSums(NamedTuple):
  """Sums over rows: of x, the mean of a row's draws of the bound in nats, and
  of n, the tokens of a row.

  Attributes:
    nats: the sum of x.
    tokens: the sum of n.
    squares: the sum of x^2.
    products: the sum of x n.
    lengths: the sum of n^2.
    rows: how many rows there are.
  """
  nats: Any
  tokens: Any
  squares: Any
  products: Any
  lengths: Any
  rows: Any


class DiffusionBound(Task):
  """Prints the bound in nats a token and in bits a byte of text."""

  help = 'the bound of masked diffusion on the held-out loss, by many draws'
  why_not_allowed = 'is no masked diffusion, of which the task is'
  figure_names = ('loss', 'bits_per_byte', 'standard_error', 'samples',
                  'tokens')
  flags = (
      Flag(name='bound_samples', default=32,
           help='Draws of each row, of how many tokens are masked and which.',
           least=1, most=100_000),
  )

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.bound

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints and returns the bound on the loss in nats per token."""
    run = evaluation.run
    loaders = evaluation.held_out_loaders()
    count = evaluation.options.bound_samples
    program = make_bound_function(run.module, config=run.config,
                            mask=evaluation.tokenizer.mask_id, count=count)
    step = evaluation.jit_once(program, 'diffusion_bound', count)

    # The bound of each source, and its standard error.
    bounds = []
    errors = []
    tokens = 0.0
    for loader in loaders:
      total_6 = np.zeros(len(BoundSums._fields))
      batches = progress.show_items(
          loader.iterate(), 'evaluating', loader.num_batches)
      for n, batch in enumerate(batches):
        sums_6 = step(evaluation.params, run.put(batch), np.uint32(n))
        total_6 += np.float64(jax.device_get(sums_6))
      sums = BoundSums(*total_6)
      bounds.append(sums.nats / sums.tokens)
      errors.append(standard_error_of_bound(*sums))
      tokens += float(sums.tokens)

    # Their means by weight.
    shares = np.array([loader.share for loader in loaders])
    sizes = [loader.bytes_per_token for loader in loaders]
    size = held_out.mean_of_sources(sizes, loaders)
    loss = held_out.mean_of_sources(bounds, loaders)
    bits = loss / (math.log(2) * size)
    error = float(np.hypot.reduce(shares * errors) / shares.sum())
    print(f'bound of {tokens:,.0f} tokens by {count} draws of each row:\n'
          f'  loss <=          {loss:.4f} (standard error {error:.4f})\n'
          f'  bits per byte <= {bits:.4f}')
    return dict(loss=loss, bits_per_byte=bits, standard_error=error,
                samples=count, tokens=tokens)


def standard_error_of_bound(nats: float, tokens: float, squares: float,
                            products: float,
                lengths: float, rows: float) -> float:
  """Returns the standard error of nats / tokens, a ratio over rows (Cochran
  1977, section 2.11); the arguments are the fields of BoundSums."""
  if rows < 2:
    return math.nan
  mean = nats / tokens
  spread = max(squares - 2 * mean * products + mean ** 2 * lengths, 0.0)
  return math.sqrt(spread * rows / (rows - 1)) / tokens


def make_bound_function(module: Any, config: Any, mask: int, count: int):
  """Returns sums(params, batch, number), for batch `number` of a source.

  Args:
    module: the model.
    config: the config of its run.
    mask: the id of the mask token.
    count: how many draws a row gets.
  """
  objective = objectives.find_objective(config)

  def sums(params: Any, batch: Any, number: jax.Array) -> jax.Array:
    """Returns the sums of BoundSums over the rows of a batch, [6]."""
    real_BL = batch['segment_ids'] != 0
    n_B = real_BL.sum(1)
    # A row's draws are its own, whatever rows are beside it in a batch.
    row_B = number * len(n_B) + jnp.arange(len(n_B))
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), row_B)

    def uniform(k: Any, *shape: int) -> jax.Array:
      """Returns draw k of each row, [B, *shape], from 0 to 1."""
      def of_row(key: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, k), shape)
      return jax.vmap(of_row)(key_B)

    start_B = uniform(count)

    def draw(_: None, k: jax.Array):
      """Returns the bound of each row by draw k, in nats, [B]."""
      # The draw says how many tokens are masked, at random places.
      share_B = (start_B + k / count) % 1.0
      l_B = jnp.minimum(1 + (share_B * n_B).astype(jnp.int32), n_B)
      noise_BL = jnp.where(real_BL, uniform(k, real_BL.shape[1]), -1.0)
      largest_BL = generate.is_among_largest(noise_BL, l_B[:, None])
      masked_BL = real_BL & largest_BL
      shown_BL = jnp.where(masked_BL, mask, batch['targets'])

      # n / l times the losses of the masked tokens (equation 6).
      nats_BL = objective.token_losses(
          module, params, batch | dict(tokens=shown_BL)).loss
      sum_B = jnp.where(masked_BL, nats_BL, 0).sum(1)
      return None, sum_B * n_B / jnp.maximum(l_B, 1)

    _, draws_KB = jax.lax.scan(draw, None, jnp.arange(count))
    x_B = draws_KB.mean(0)

    # A row of padding has no tokens, and is none.
    n_B = n_B.astype(jnp.float32)
    is_row_B = (n_B > 0).astype(jnp.float32)
    bound = BoundSums(
        nats=x_B.sum(), tokens=n_B.sum(), squares=(x_B ** 2).sum(),
        products=(x_B * n_B).sum(), lengths=(n_B ** 2).sum(),
        rows=is_row_B.sum())
    return jnp.stack(bound)
  return sums


class DocumentLoss(Task):
  """Measures the loss of each document, whose weights are its tokens, of the
  rows that training evaluates after its last step: from their spread follows
  what another text of the kind would give. Documents beside each other are
  taken together where there are more than DOCUMENTS. With several sources each
  counts by its weight.
  """

  help = ('the loss of each held-out document, of the rows that training '
          'evaluates')
  why_not_allowed = ('does not predict every token, so it has no loss '
                     'of a document')
  figure_names = ('loss',)

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.every_token

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Prints the loss of all documents, and returns that of each."""
    program = make_token_loss_function(evaluation.run.module,
                                       evaluation.run.config)
    step = evaluation.jit_once(program, 'documents')
    nats: list[float] = []
    counts: list[float] = []
    for loader in evaluation.held_out_loaders():
      sums_2D = _sum_by_document(evaluation, step, loader)
      tokens_D = sums_2D[1]
      weighted_2D = sums_2D[:, tokens_D > 0] * loader.share / tokens_D.sum()
      nats += weighted_2D[0].tolist()
      counts += weighted_2D[1].tolist()
    loss = sum(nats) / sum(counts)
    print(f'loss of {len(nats):,} documents: {loss:.4f}')
    losses = np.divide(nats, counts)
    return {'loss': loss,
            'items': {'loss': items.record_scores(losses, counts, counts)}}


def _sum_by_document(evaluation: Evaluation, step: Any, loader: pipeline.Loader
                   ) -> np.ndarray:
  """Returns the losses in nats and the tokens of each document, [2, documents].

  Args:
    evaluation: the evaluation of the run.
    step: the compiled `documents_program`.
    loader: the loader of the source.
  """
  config = evaluation.run.config
  view = loader.views[0]
  size = config.data.batch_size

  # The document of each token of each row. A document begins with the
  # separator that stands before it; separators fill up the last row, too.
  rows = [view[i].tokens[:-1] for i in range(len(view))]
  begins_NL = np.stack(rows) == view.separator
  last = view[len(view) - 1]
  begins_NL[-1, last.size - 1:] = False
  document_NL = np.cumsum(begins_NL).reshape(begins_NL.shape) - 1
  several = document_NL.max() // MOST_DOCUMENT_GROUPS + 1
  group_NL = document_NL // several

  # The sums of the rows that are evaluated.
  count = min(loader.first(config.eval.batches) * size, loader.num_windows)
  sums_2D = np.zeros((2, group_NL.max() + 1))
  results = evaluation.run_on_batches(step, loader.cut(count),
                                      'evaluating documents')
  for n, sums_2BL in enumerate(results):
    for i in range(size):
      number = n * size + i
      if number >= count:  # the row fills up the batch
        break
      group_L = group_NL[loader.place(number)]
      row_2L = np.float64(sums_2BL[:, i])
      np.add.at(sums_2D, (slice(None), group_L), row_2L)
  return sums_2D


def make_token_loss_function(module: Any, config: Any):
  """Returns losses(params, batch) of a model; see below."""
  objective = objectives.find_objective(config)

  def losses(params: Any, batch: Any) -> jax.Array:
    """Returns the weighted losses and the weights of all tokens, [2, B, L]."""
    loss_BL = objective.token_losses(module, params, batch).loss
    weights_BL = batch['weights'].astype(jnp.float32)
    return jnp.stack([loss_BL * weights_BL, weights_BL])
  return losses


TASKS = {
    'loss': HeldOutLoss(),
    'documents': DocumentLoss(),
    'diffusion_bound': DiffusionBound(),
}
