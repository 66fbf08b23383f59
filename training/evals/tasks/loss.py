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

The bound on the loss of masked diffusion is estimated by many draws. In a row
of n tokens each draw masks l of them, and counts the losses of the masked
tokens n / l times. l is uniform from 1 to n, which gives the same mean as a
random share of masked tokens and spreads less (LLaDA, arXiv 2502.09992,
equation 6). The draws of a row take its l evenly spread, from a random start.
In block diffusion this holds for each block of a row by itself.
The standard error is that of the mean over rows: of another held-out text of
the same kind, and by other draws.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
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

# How many losses of single documents are written of each source. Where it has
# more documents, neighbours are taken together.
MOST_DOCUMENT_GROUPS = 256


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
    """Checks that the held-out text can be read with --stride.

    Args:
      options: the values of the task's flags, by name.
      config: the config of the run.

    Raises:
      RequestError: where it cannot.
    """
    stride = options.stride
    if not stride:
      return
    reason = scoring.why_not_scorable(config)
    require(not reason, f'{reason}: leave --stride at 0')
    data = config.data
    require(stride < data.length, f'--stride is {stride}, but a window has '
            f'data.length {data.length} tokens, the first of which is not '
            'predicted: choose a smaller one')
    # Overlapping windows are cut from a text, not from a folder of tokens.
    spec = data.eval_source or data.source
    weighted_sources = sources.parse_sources(spec)
    if len(weighted_sources) != 1 or weighted_sources[0][1].tokens:
      raise RequestError(f'--stride reads one source of text, which {spec!r} '
                         'is not: name one by --text')

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Measures the loss of the held-out data, of each source and in all, and
    prints it.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      {name: figure}; of several sources their means, with the figures of each
      as `sources`.
    """
    if evaluation.options.stride:
      return measure_with_stride(evaluation)

    # Sum up the figures over the batches of each source.
    loaders = evaluation.held_out_loaders()
    step = evaluation.jit_once(
        make_eval_step(evaluation.run.module, evaluation.run.config), 'loss')
    sums = []
    for loader in loaders:
      results = evaluation.run_on_batches(step, loader, 'evaluating')
      sums.append(held_out.sum_figures(results))

    # Print the figures of each source, and their means.
    figures_by_source = {}
    for loader, sums_of_source in zip(loaders, sums):
      figures_by_source[loader.name] = _print_figures(
          loader.text, sums=[sums_of_source], loaders=[loader])
    if len(loaders) == 1:
      return figures_by_source[loaders[0].name]
    shares = [f'{loader.share:.3g} {loader.name}' for loader in loaders]
    figures = _print_figures(
        f'the mean by weight, {", ".join(shares)}', sums=sums, loaders=loaders)
    figures['sources'] = figures_by_source
    return figures


def _print_figures(text: str, sums: Sequence, loaders: Sequence
                   ) -> dict[str, Any]:
  """Computes and prints the figures of one source of text, or of several
  together.

  Args:
    text: words for the user about what the figures are of.
    sums: the sums over the batches of each source, by held_out.sum_figures.
    loaders: the loader of each source, in the same order.

  Returns:
    {name: figure}, with the number of tokens and `text`.
  """
  # Average over the sources, weighted by their shares.
  figures = held_out.average_figures(sums, loaders)
  num_tokens = sum(loader.num_tokens for loader in loaders)
  bytes_per_token = held_out.mean_of_sources(
      [loader.bytes_per_token for loader in loaders], loaders)
  size = f'{num_tokens:,} tokens'
  if bytes_per_token:  # a probe has no text
    size += f' of {bytes_per_token:.2f} bytes'
  print(f'{text}, {size}:')
  for name, value in figures.items():
    print(f'  {name.replace("_", " "):<16} {held_out.format_figure(value)}')
  return figures | {'tokens': num_tokens, 'text': text}


def measure_with_stride(evaluation: Evaluation) -> dict[str, Any]:
  """Measures the loss, perplexity and bits per byte of the held-out documents
  of a source, which are read in overlapping windows (--stride). So each token
  is predicted from a long context.

  Args:
    evaluation: the evaluation of the run, with --stride among its options.

  Returns:
    The figures, which are printed too.
  """
  source_name, documents = _held_out_documents(evaluation)
  length = evaluation.run.config.data.length
  stride = evaluation.options.stride
  tokenizer = evaluation.tokenizer

  # Compute the log-probabilities of all tokens. A separator begins each
  # document, so that its first token is predicted, too.
  continuations: list[scoring.Continuation] = []
  for ids in tokenizer.encode_batch(documents):
    document = np.concatenate([[tokenizer.separator_id], ids])
    continuations += cut_into_windows(document, length=length, stride=stride)
  token_scores = scoring.score_continuations(
      continuations, evaluation=evaluation, task_name='reading windows')
  nats = 0.0
  for scores in token_scores:
    nats -= float(scores.log_probs.sum())
  num_tokens = sum(window.num_scored for window in continuations)

  # Divide by the numbers of tokens, words and bytes.
  figures = measure_text(nats, num_tokens=num_tokens, documents=documents)
  print(f'{source_name}, {num_tokens:,} tokens, each from {length - stride:,} '
        f'to {length - 1:,} before it:')
  for name, value in figures.items():
    if isinstance(value, float):
      print(f'  {name.replace("_", " "):<16} {value:.4f}')
  print(f'  {"words":<16} {figures["words"]:,}, ends of lines included')
  return figures | {'stride': stride, 'length': length, 'text': source_name}


def cut_into_windows(ids: np.ndarray, length: int, stride: int
                     ) -> Iterator[scoring.Continuation]:
  """Cuts a document into overlapping windows. Each token is predicted in only
  one of them, from as much context as the overlap gives it.

  Args:
    ids: int [T], the document. Its first token, which only begins it, is not
      predicted.
    length: the largest number of tokens of a window.
    stride: the distance between the starts of two windows. It must be less than
      `length`, or tokens would be left out.

  Yields:
    Each window, with the number of tokens at its end that are scored: those
    that no window before it has.
  """
  # num_done counts the tokens that need no score any more; the first never
  # does.
  ids = ids.astype(np.int32)
  num_done = 1
  for start in range(0, len(ids) - 1, stride):
    stop = min(start + length, len(ids))
    yield scoring.Continuation(tokens=ids[start:stop],
                               num_scored=stop - num_done)
    num_done = stop
    if stop == len(ids):
      return


def measure_text(nats: float, num_tokens: int, documents: list[str]
                 ) -> dict[str, Any]:
  """Computes loss, perplexity and bits per byte of a text, and its size.

  Its words are what white space separates, and the ends of its lines: the
  convention of WikiText, whose test set has 245,569 such words.

  Args:
    nats: minus the natural logarithm of the probability of the whole text.
    num_tokens: the number of tokens that it is the sum over.
    documents: the texts, of which the whole consists.

  Returns:
    loss (nats per token) and perplexity, its exponential; bits_per_byte;
    word_perplexity; and the numbers of tokens, words and bytes.
  """
  # Bytes and words do not depend on the tokenizer, so models with different
  # tokenizers can be compared. A text may have no word, but it has bytes.
  num_words = 0
  num_bytes = 0
  for text in documents:
    num_words += len(text.split()) + text.count('\n')
    num_bytes += len(text.encode())
  loss = nats / num_tokens
  nats_per_word = nats / max(num_words, 1)
  return dict(
      loss=loss, perplexity=_exp_or_inf(loss),
      bits_per_byte=nats / math.log(2) / num_bytes,
      word_perplexity=_exp_or_inf(nats_per_word), tokens=num_tokens,
      words=num_words, bytes=num_bytes)


def _exp_or_inf(x: float) -> float:
  """Returns e to the power x; inf where no float is as large."""
  if x >= 700:
    return math.inf
  return math.exp(x)


def _held_out_documents(evaluation: Evaluation) -> tuple[str, list[str]]:
  """Reads the documents of a run's source that are held out for evaluation.

  Args:
    evaluation: the evaluation of the run.

  Returns:
    The name of the source, and the texts of the documents.

  Raises:
    RequestError: where the source has something other than text, or has no
      held-out document.
  """
  # Hold out what training holds out. There is only one source, as `check` has
  # made sure. If it is a single text, it is cut in two here, which already
  # takes the half of eval.part.
  data = evaluation.run.config.data
  part = evaluation.run.config.eval.part
  [(_, source)] = sources.parse_sources(data.eval_source or data.source)
  holdout_every = data.holdout_every
  if data.eval_source:
    holdout_every = None  # all of that source is held out
  source = sources.hold_out_end_of_text(
      source, holdout_every=holdout_every, part=part)
  if source.is_cut:
    part = ''

  # Select the held-out documents, each of which must be text.
  documents = list(source.documents())
  is_held_out = tokens.select_documents(
      np.arange(len(documents)), holdout_every=holdout_every, split='eval',
      part=part)
  held_out_documents = []
  for document, is_chosen in zip(documents, is_held_out):
    if is_chosen:
      require(isinstance(document, str), f'{source.name} holds pairs or '
              'conversations: --stride is for text')
      held_out_documents.append(document)
  require(bool(held_out_documents), f'{source.name} has no document that is '
          'held out: pass --text')
  return source.name, held_out_documents


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
    """Measures the upper bound that masked diffusion has on the loss, by many
    draws of masks, and prints it.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      loss, bits_per_byte, standard_error, samples and tokens.
    """
    run = evaluation.run
    loaders = evaluation.held_out_loaders()
    num_draws = evaluation.options.bound_samples
    sum_bound = make_bound_function(
        run.module, config=run.config, mask_id=evaluation.tokenizer.mask_id,
        num_draws=num_draws)
    step = evaluation.jit_once(sum_bound, 'diffusion_bound', num_draws)

    # The bound of each source, and its standard error.
    bounds = []
    errors = []
    num_tokens = 0.0
    for loader in loaders:
      total_6 = np.zeros(len(BoundSums._fields))
      batches = progress.show_items(
          loader.iterate(), text='evaluating', total=loader.num_batches)
      for batch_number, batch in enumerate(batches):
        sums_6 = step(evaluation.params, run.put(batch),
                      np.uint32(batch_number))
        total_6 += np.float64(jax.device_get(sums_6))
      sums = BoundSums(*total_6)
      bounds.append(sums.nats / sums.tokens)
      errors.append(standard_error_of_bound(*sums))
      num_tokens += float(sums.tokens)

    # Their means by weight. The errors of the sources are independent, so their
    # squares add up.
    shares = np.array([loader.share for loader in loaders])
    bytes_per_token = held_out.mean_of_sources(
        [loader.bytes_per_token for loader in loaders], loaders)
    loss = held_out.mean_of_sources(bounds, loaders)
    bits_per_byte = loss / (math.log(2) * bytes_per_token)
    error = float(np.hypot.reduce(shares * errors) / shares.sum())
    print(f'bound of {num_tokens:,.0f} tokens by {num_draws} draws of each '
          f'row:\n  loss <=          {loss:.4f} (standard error {error:.4f})\n'
          f'  bits per byte <= {bits_per_byte:.4f}')
    return dict(loss=loss, bits_per_byte=bits_per_byte, standard_error=error,
                samples=num_draws, tokens=num_tokens)


def standard_error_of_bound(nats: float, tokens: float, squares: float,
                            products: float, lengths: float, rows: float
                            ) -> float:
  """Computes the standard error of nats / tokens, a ratio of sums over rows.

  With x the nats of a row, n its tokens, and r = sum x / sum n, it is
    sqrt(sum (x - r n)^2 rows / (rows - 1)) / sum n
  (Cochran 1977, section 2.11).

  Args:
    nats: the sum of x over the rows.
    tokens: the sum of n.
    squares: the sum of x^2.
    products: the sum of x n.
    lengths: the sum of n^2.
    rows: the number of rows.

  Returns:
    The standard error; nan where there is one row alone.
  """
  # (x - r n)^2 is multiplied out, as only the sums over rows are known.
  # Rounding may make the result negative.
  if rows < 2:
    return math.nan
  ratio = nats / tokens
  residuals = squares - 2 * ratio * products + ratio ** 2 * lengths
  residuals = max(residuals, 0.0)
  return math.sqrt(residuals * rows / (rows - 1)) / tokens


class _BlocksOfRows(NamedTuple):
  """The blocks of the rows of a batch, each of which is masked by itself. The
  suffixes name axes: B rows, N blocks of a row, S places of a block.

  Attributes:
    is_token_BNS: which places hold a token; the others are padding.
    n_BN: n, the number of tokens of each block.
    start_BN: where the masked share of each block begins, from 0 to 1.
    key_B: the random key of each row.
  """
  is_token_BNS: jax.Array
  n_BN: jax.Array
  start_BN: jax.Array
  key_B: jax.Array


def _draw_bound(k: jax.Array, batch: Any, blocks: _BlocksOfRows, num_draws: int,
                mask_id: int,
                token_losses: Callable[[Any], objectives.losses.TokenLosses]
                ) -> jax.Array:
  """Estimates the bound on the loss of each row by masking its blocks once at
  random (LLaDA, arXiv 2502.09992, equation 6). Of the n tokens of a block, l
  are masked, and

    estimate = sum over blocks  n / l  sum over masked i  of  -log p(x_i)

  The suffixes name axes: B rows, L tokens of a row, N blocks of a row, S places
  of a block.

  Args:
    k: the number of the draw.
    batch: the arrays of the batch, B rows of L tokens.
    blocks: the blocks of the rows.
    num_draws: the number of all draws.
    mask_id: the id of the mask token.
    token_losses: a function that computes the loss of each token of a batch.

  Returns:
    The estimates in nats, [B].
  """
  # Choose l. Over the draws, it is spread evenly over 1 to n from a random
  # start of each block, which makes the mean vary less.
  n_BN = blocks.n_BN
  share_BN = (blocks.start_BN + k / num_draws) % 1.0
  l_BN = jnp.minimum(1 + (share_BN * n_BN).astype(jnp.int32), n_BN)

  # Mask the l tokens.
  B, N, S = blocks.is_token_BNS.shape
  L = batch['targets'].shape[1]
  noise_BNS = _draw_uniform(blocks.key_B, k, (N, S))
  is_masked_BNS = _mask_at_random(blocks.is_token_BNS, noise_BNS=noise_BNS,
                                  count_BN=l_BN)
  is_masked_BL = is_masked_BNS.reshape(B, N * S)[:, :L]
  tokens_BL = jnp.where(is_masked_BL, mask_id, batch['targets'])

  # Compute their losses, with the factor n / l of their block.
  nats_BL = token_losses(batch | dict(tokens=tokens_BL)).loss
  factor_BN = n_BN / jnp.maximum(l_BN, 1)
  factor_BL = jnp.repeat(factor_BN, S, axis=1)[:, :L]
  return jnp.where(is_masked_BL, factor_BL * nats_BL, 0).sum(1)


def _draw_uniform(key_B: jax.Array, number: jax.Array | int,
                  shape: tuple[int, ...]) -> jax.Array:
  """Draws numbers from 0 to 1 for each row, [B, *shape].

  Args:
    key_B: the random key of each row, from which several draws are made.
    number: the number of the draw. Draws of different numbers are independent.
    shape: the shape of a row's numbers.
  """
  # A row has a key of its own, so that its draws do not depend on the batch
  # that it is in.
  def draw_for_row(key: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, number), shape)

  return jax.vmap(draw_for_row)(key_B)


def _mask_at_random(is_token_BNS: jax.Array, noise_BNS: jax.Array,
                    count_BN: jax.Array) -> jax.Array:
  """Chooses so many tokens of each block at random: those with the largest
  random numbers.

  The suffixes name axes: B rows, N blocks of a row, S places of a block.

  Args:
    is_token_BNS: which places hold a token; the others are padding.
    noise_BNS: random numbers from 0 to 1.
    count_BN: how many tokens of each block are chosen.

  Returns:
    Whether each place is chosen, [B, N, S].
  """
  B, N, S = is_token_BNS.shape
  # Padding comes after all tokens, as -1 is below their numbers.
  rank_BNS = jnp.where(is_token_BNS, noise_BNS, -1.0)
  is_largest = generate.is_among_largest(
      rank_BNS.reshape(B * N, S), count_BN.reshape(B * N, 1))
  return is_token_BNS & is_largest.reshape(B, N, S)


def make_bound_function(module: Any, config: Any, mask_id: int, num_draws: int
                        ) -> Callable:
  """Returns sum_bound(params, batch, batch_number), which returns the sums of
  BoundSums over the rows of a batch, [6].

  Args:
    module: the Flax module of the model.
    config: the config of its run.
    mask_id: the id of the mask token.
    num_draws: the number of draws for each row.
  """
  bound = LossBound(module=module, objective=objectives.find_objective(config),
                    mask_id=mask_id, num_draws=num_draws)
  return bound.sum_bound


@dataclasses.dataclass(frozen=True)
class LossBound:
  """Computes the bound of the loss of masked diffusion for rows of text.

  Attributes:
    module: the Flax module of the model.
    objective: the objective of its run.
    mask_id: the id of the mask token.
    num_draws: K, the number of draws for each row.
  """
  module: Any
  objective: objectives.Objective
  mask_id: int
  num_draws: int

  def sum_bound(self, params: Any, batch: Any, batch_number: jax.Array
                ) -> jax.Array:
    """Returns the sums of BoundSums over the rows of a batch, [6].

    Args:
      params: the parameters of the model, a tree of arrays.
      batch: the batch, of rows of n tokens each.
      batch_number: the number of the batch in its source.
    """
    # The bound of each row is the mean over its draws.
    is_token_BL = batch['segment_ids'] != 0
    n_B = is_token_BL.sum(1)
    blocks = self._cut_into_blocks(is_token_BL, n_B, batch_number)
    draw_bound = functools.partial(
        _draw_bound, batch=batch, blocks=blocks, num_draws=self.num_draws,
        mask_id=self.mask_id, token_losses=functools.partial(
            self.objective.token_losses, self.module, params))
    draws_KB = jax.lax.map(draw_bound, jnp.arange(self.num_draws))
    x_B = draws_KB.mean(0)

    # A row of padding has no tokens, and is none.
    n_B = n_B.astype(jnp.float32)
    is_row_B = (n_B > 0).astype(jnp.float32)
    sums = BoundSums(
        nats=x_B.sum(), tokens=n_B.sum(), squares=(x_B ** 2).sum(),
        products=(x_B * n_B).sum(), lengths=(n_B ** 2).sum(),
        rows=is_row_B.sum())
    return jnp.stack(sums)

  def _cut_into_blocks(self, is_token_BL: jax.Array, n_B: jax.Array,
                       batch_number: jax.Array) -> '_BlocksOfRows':
    """Returns the rows in blocks, [B, blocks N, tokens of a block S], of which
    each is masked by itself. A block is the whole row but in block diffusion.

    Args:
      is_token_BL: bool, which places hold a token; the others are padding.
      n_B: the number of tokens of each row.
      batch_number: the number of the batch in its source.
    """
    # A row's draws are its own, whatever rows are beside it in a batch.
    row_B = batch_number * len(n_B) + jnp.arange(len(n_B))
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), row_B)

    B, L = is_token_BL.shape
    S = self.module.config.diffusion_block or L
    N = -(-L // S)
    padded_BM = jnp.pad(is_token_BL, ((0, 0), (0, N * S - L)))
    is_token_BNS = padded_BM.reshape(B, N, S)
    # One more draw than those of the bound: where the masked shares of a block
    # begin.
    start_BN = _draw_uniform(key_B, self.num_draws, (N,))
    return _BlocksOfRows(is_token_BNS=is_token_BNS, n_BN=is_token_BNS.sum(2),
                         start_BN=start_BN, key_B=key_B)


class DocumentLoss(Task):
  """Measures the loss of each document, whose weights are its tokens, of the
  rows that training evaluates after its last step: from their spread follows
  what another text of the kind would give. Documents beside each other are
  taken together where there are more than MOST_DOCUMENT_GROUPS. With several
  sources each counts by its weight.
  """

  help = ('the loss of each held-out document, of the rows that training '
          'evaluates')
  why_not_allowed = ('does not predict every token, so it has no loss of a '
                     'document')
  figure_names = ('loss',)

  def allows_objective(self, objective: objectives.Objective) -> bool:
    return objective.predicts_every_token

  def run(self, evaluation: Evaluation) -> dict[str, Any]:
    """Measures the loss of each held-out document, and prints their mean.

    Args:
      evaluation: the evaluation of the run: its model, parameters and options.

    Returns:
      `loss`, the mean; and as `items` the loss of each document.
    """
    compute_losses = make_token_loss_function(evaluation.run.module,
                                              evaluation.run.config)
    step = evaluation.jit_once(compute_losses, 'documents')

    # Compute the sum of losses and the number of tokens of each document, both
    # scaled so that a source counts by its share and not by its size.
    nats: list[float] = []
    weights: list[float] = []
    for loader in evaluation.held_out_loaders():
      sums_2D = _sum_by_document(evaluation, step=step, loader=loader)
      tokens_D = sums_2D[1]
      weighted_2D = sums_2D[:, tokens_D > 0] * loader.share / tokens_D.sum()
      nats += weighted_2D[0].tolist()
      weights += weighted_2D[1].tolist()

    loss = sum(nats) / sum(weights)
    print(f'loss of {len(nats):,} documents: {loss:.4f}')
    losses = np.divide(nats, weights)
    record = items.record_scores(losses, names=weights, weights=weights)
    return {'loss': loss, 'items': {'loss': record}}


def _sum_by_document(evaluation: Evaluation, step: Any,
                     loader: pipeline.Loader) -> np.ndarray:
  """Sums the losses of each document, though rows are cut out of a stream of
  documents without regard to where these begin.

  The suffixes name axes: N rows, L tokens of a row.

  Args:
    evaluation: the evaluation of the run.
    step: the function of `make_token_loss_function`, compiled.
    loader: the loader of the source, which gives rows in a shuffled order.

  Returns:
    [2, documents], the losses in nats and the number of tokens of each
    document, or of each group of neighbours where there are too many.
  """
  config = evaluation.run.config
  view = loader.views[0]
  batch_size = config.data.batch_size

  # Find the document of each token, [N rows, L tokens], by counting separators:
  # a document begins with the one that stands before it. Separators also fill
  # up the last row, where they begin nothing.
  rows = [view[i].tokens[:-1] for i in range(len(view))]
  is_start_NL = np.stack(rows) == view.separator
  last_row = view[len(view) - 1]
  is_start_NL[-1, last_row.size - 1:] = False
  document_NL = np.cumsum(is_start_NL).reshape(is_start_NL.shape) - 1
  documents_of_group = document_NL.max() // MOST_DOCUMENT_GROUPS + 1
  group_NL = document_NL // documents_of_group

  # Add up the losses over the rows that are evaluated. loader.place says which
  # row of the stream a row of the shuffled order is. np.add.at adds every token
  # of a document; += would keep only the last one.
  num_batches = loader.first(config.eval.batches)
  num_rows = min(num_batches * batch_size, loader.num_windows)
  sums_2D = np.zeros((2, group_NL.max() + 1))
  results = evaluation.run_on_batches(step, loader.limit_rows(num_rows),
                                      'evaluating documents')
  for n, losses_2BL in enumerate(results):
    for i in range(batch_size):
      row_number = n * batch_size + i
      # Rows from here on only fill up the last batch.
      if row_number >= num_rows:
        break
      group_L = group_NL[loader.place(row_number)]
      losses_2L = np.float64(losses_2BL[:, i])
      np.add.at(sums_2D, (slice(None), group_L), losses_2L)
  return sums_2D


def make_token_loss_function(module: Any, config: Any) -> Callable:
  """Returns compute_losses(params, batch), which returns the weighted losses
  and the weights of all tokens of a batch, [2, B, L].

  Args:
    module: the Flax module of the model.
    config: the config of its run.
  """
  objective = objectives.find_objective(config)

  def compute_losses(params: Any, batch: Any) -> jax.Array:
    """Returns the weighted losses and the weights of all tokens, [2, B, L]."""
    loss_BL = objective.token_losses(module, params, batch).loss
    weights_BL = batch['weights'].astype(jnp.float32)
    return jnp.stack([loss_BL * weights_BL, weights_BL])
  return compute_losses


TASKS = {
    'loss': HeldOutLoss(),
    'documents': DocumentLoss(),
    'diffusion_bound': DiffusionBound(),
}
