"""Held-out loss in nats per token, perplexity, and bits per byte of text.

Of several sources the figures are means by the weights of data.eval_source,
or of data.source, and each source's own stand beside them.

With --stride whole documents are read in windows that overlap, as perplexity is
usually reported. A document is read as its tokens after the separator. A window
of `length` tokens begins every `stride` tokens and predicts those of them that
no window before it did: each token once, from at least length - stride tokens
(but at the document's beginning). This is the recipe of transformers'
documentation, "Perplexity of fixed-length models", with the separator as the
first token.

The bound on the loss of masked diffusion is told by many draws. Of a row of n
tokens each draw masks l of them, and counts the losses of the masked tokens
n / l times. l is uniform from 1 to n, which gives the same mean as a random
share of masked tokens and spreads less (LLaDA, arXiv 2502.09992, equation 6).
The draws of a row take its l evenly spread, from a random start. The standard
error is that of the mean over rows: of another held-out text of the same kind,
and by other draws.
"""

from collections.abc import Iterator, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import require
from training import generate, objectives, progress
from training.data import sources, tokens
from training.evals import Evaluation, Flag, Task, held_out, items, scoring
from training.evals import without
from training.runs import make_eval_step


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Evaluates every held-out token once."""
  config = evaluation.run.config
  if evaluation.options.stride:
    return strided(evaluation)
  loaders = evaluation.held_out()
  step = evaluation.program(make_eval_step(evaluation.run.module, config),
                            'loss')
  sums = [held_out.sums(evaluation.results(step, loader, 'evaluating'))
          for loader in loaders]
  each = {loader.name: _report(loader.text, [total], [loader])
          for loader, total in zip(loaders, sums)}
  if len(loaders) == 1:
    return each[loaders[0].name]
  shares = ', '.join(f'{loader.share:.3g} {loader.name}' for loader in loaders)
  return _report(f'the mean by weight, {shares}', sums, loaders) | {
      'sources': each}


def _report(text: str, sums: Sequence, loaders: Sequence) -> dict[str, Any]:
  """Prints and returns the figures of some sources together."""
  figures = held_out.means(sums, loaders)
  tokens = sum(loader.num_tokens for loader in loaders)
  size = held_out.mix([loader.bytes_per_token for loader in loaders], loaders)
  of = f' of {size:.2f} bytes' if size else ''  # a probe has no text
  print(f'{text}, {tokens:,} tokens{of}:')
  for name, value in figures.items():
    print(f'  {name.replace("_", " "):<16} {held_out.shown(value)}')
  return figures | {'tokens': tokens, 'text': text}


def strided(evaluation: Evaluation) -> dict[str, Any]:
  """Prints and returns the figures of all of a source's documents."""
  options = evaluation.options
  name, documents = _documents(evaluation)
  length, stride = evaluation.run.config.data.length, options.stride
  first = evaluation.tokenizer.separator_id
  questions = []
  for ids in evaluation.tokenizer.encode_batch(documents):
    questions += windows(np.concatenate([[first], ids]), length, stride)
  answers = scoring.answer(questions, evaluation, 'reading windows')
  nats = -sum(float(x.log_probs.sum()) for x in answers)
  figures = measures(nats, sum(q.scored for q in questions), documents)
  print(f'{name}, {figures["tokens"]:,} tokens, each from {length - stride:,} '
        f'to {length - 1:,} before it:')
  for key, value in figures.items():
    if isinstance(value, float):
      print(f'  {key.replace("_", " "):<16} {value:.4f}')
  print(f'  {"words":<16} {figures["words"]:,}, ends of lines included')
  return figures | {'stride': stride, 'length': length, 'text': name}


def windows(ids: np.ndarray, length: int, stride: int) -> Iterator:
  """Yields the windows of a document, [T] with the token that begins it, as
  questions; all tokens but that one are predicted."""
  ids = ids.astype(np.int32)
  done = 1
  for start in range(0, len(ids) - 1, stride):
    stop = min(start + length, len(ids))
    yield scoring.Question(ids[start:stop], stop - done)
    done = stop
    if stop == len(ids):
      return


def measures(nats: float, tokens: int, documents: list[str]) -> dict[str, Any]:
  """Returns the figures of text that costs `nats` in all.

  Its words are what white space separates, and the ends of its lines: the
  convention of WikiText, whose test set has 245,569 such words.
  """
  words = sum(len(text.split()) + text.count('\n') for text in documents)
  size = sum(len(text.encode()) for text in documents)
  exp = lambda x: math.exp(x) if x < 700 else math.inf
  return dict(loss=nats / tokens, perplexity=exp(nats / tokens),
              bits_per_byte=nats / math.log(2) / size,
              word_perplexity=exp(nats / max(words, 1)),
              tokens=tokens, words=words, bytes=size)


def _check(options: Any, config: Any) -> None:
  """Raises RequestError for a --stride that a run cannot be read with."""
  stride = options.stride
  if not stride:
    return
  reason = scoring.unfit(config)
  require(not reason, f'{reason}: leave --stride at 0')
  data = config.data
  require(stride < data.length, f'--stride is {stride}, but a window has '
          f'data.length {data.length} tokens, the first of which is not '
          'predicted: choose a smaller one')
  spec = data.eval_source or data.source
  parsed = sources.parse(spec)
  require(len(parsed) == 1 and not parsed[0][1].tokens, '--stride reads one '
          f'source of text, which {spec!r} is not: name one by --text')


def _documents(evaluation: Evaluation) -> tuple[str, list[str]]:
  """Returns the name of the source, and the documents that are held out."""
  data = evaluation.run.config.data
  (_, source), = sources.parse(data.eval_source or data.source)
  every = None if data.eval_source else data.holdout_every
  part = evaluation.run.config.eval.part
  source = sources.cut(source, every, part)
  documents = list(source.documents())
  chosen = tokens.chosen(np.arange(len(documents)), every, 'eval',
                         '' if source.is_cut else part)
  kept = [document for document, keep in zip(documents, chosen) if keep]
  require(all(isinstance(x, str) for x in kept), f'{source.name} holds pairs '
          'or conversations: --stride is for text')
  require(kept, f'{source.name} has no document that is held out: pass --text')
  return source.name, kept


def bound(evaluation: Evaluation) -> dict[str, Any]:
  """Prints the bound in nats a token and in bits a byte of text."""
  run_, loaders = evaluation.run, evaluation.held_out()
  count, mask = evaluation.options.bound_samples, evaluation.tokenizer.mask_id
  program = bound_program(run_.module, run_.config, mask, count)
  step = evaluation.program(program, 'diffusion_bound', count)
  totals = []
  for loader in loaders:
    sums = np.zeros(6)
    for n, batch in enumerate(progress.each(
        loader.iterate(), 'evaluating', loader.num_batches)):
      sums += np.float64(jax.device_get(step(
          evaluation.params, run_.put(batch), np.uint32(n))))
    totals.append(sums)
  bounds = [sums[0] / sums[1] for sums in totals]
  errors = [bound_error(*sums) for sums in totals]
  shares = np.array([loader.share for loader in loaders])
  size = held_out.mix([loader.bytes_per_token for loader in loaders], loaders)
  loss = held_out.mix(bounds, loaders)
  bits = loss / (math.log(2) * size)
  error = float(np.hypot.reduce(shares * errors) / shares.sum())
  tokens = float(sum(sums[1] for sums in totals))
  print(f'bound of {tokens:,.0f} tokens by {count} draws of each row:\n'
        f'  loss <=          {loss:.4f} (standard error {error:.4f})\n'
        f'  bits per byte <= {bits:.4f}')
  return dict(loss=loss, bits_per_byte=bits, standard_error=error,
              samples=count, tokens=tokens)


def bound_error(nats: float, tokens: float, squares: float, products: float,
                lengths: float, rows: float) -> float:
  """Returns the standard error of nats / tokens, a ratio over rows (Cochran
  1977, section 2.11), of the sums of `bound_program`."""
  if rows < 2:
    return math.nan
  mean = nats / tokens
  spread = max(squares - 2 * mean * products + mean ** 2 * lengths, 0.0)
  return math.sqrt(spread * rows / (rows - 1)) / tokens


def bound_program(module: Any, config: Any, mask: int, count: int):
  objective = objectives.of(config)

  def sums(params: Any, batch: Any, number: jax.Array) -> jax.Array:
    """Returns sums over the rows, of x, the mean of a row's draws, and n, its
    tokens: those of x, n, x^2, x n and n^2, and how many rows there are."""
    real_BL = batch['segment_ids'] != 0
    n_B = real_BL.sum(1)
    # A row's draws are its own, whatever rows are beside it in a batch.
    row_B = number * len(n_B) + jnp.arange(len(n_B))
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), row_B)
    uniform = lambda k, *shape: jax.vmap(lambda key: jax.random.uniform(
        jax.random.fold_in(key, k), shape))(key_B)
    start_B = uniform(count)

    def draw(_: None, k: jax.Array):
      share_B = (start_B + k / count) % 1.0
      l_B = jnp.minimum(1 + (share_B * n_B).astype(jnp.int32), n_B)
      noise_BL = uniform(k, real_BL.shape[1])
      masked_BL = real_BL & generate.among_largest(
          jnp.where(real_BL, noise_BL, -1.0), l_B[:, None])
      shown = batch | dict(tokens=jnp.where(masked_BL, mask, batch['targets']))
      nats_BL = objective.token_losses(module, params, shown).loss
      sum_B = jnp.where(masked_BL, nats_BL, 0).sum(1)
      return None, sum_B * n_B / jnp.maximum(l_B, 1)

    x_B = jax.lax.scan(draw, None, jnp.arange(count))[1].mean(0)
    n_B = n_B.astype(jnp.float32)
    return jnp.stack([x_B.sum(), n_B.sum(), (x_B ** 2).sum(), (x_B * n_B).sum(),
                      (n_B ** 2).sum(), (n_B > 0).astype(jnp.float32).sum()])
  return sums


def documents(evaluation: Evaluation) -> dict[str, Any]:
  """Returns the loss of each document, whose weights are its tokens, of the
  rows that training evaluates after its last step: from their spread follows
  what another text of the kind would give. Documents beside each
  other are taken together where there are more than DOCUMENTS. Of several
  sources each counts by its weight.
  """
  config, step = evaluation.run.config, evaluation.program(
      documents_program(evaluation.run.module, evaluation.run.config),
      'documents')
  nats, counts = [], []
  for loader in evaluation.held_out():
    view, size = loader.views[0], config.data.batch_size
    rows = min(loader.first(config.eval.batches) * size, loader.num_windows)
    # A document begins with the separator that stands before it; separators
    # fill up the last row, too.
    begins = np.stack([view[i].tokens[:-1] for i in range(len(view))]
                      ) == view.separator
    begins[-1, view[len(view) - 1].size - 1:] = False
    of_token = np.cumsum(begins).reshape(begins.shape) - 1
    several = of_token.max() // DOCUMENTS + 1
    sums = np.zeros((2, of_token.max() // several + 1))
    for n, each in enumerate(evaluation.results(
        step, loader.cut(rows), 'evaluating documents')):
      for i, row in enumerate(np.moveaxis(np.float64(each), 1, 0)):
        if (g := n * size + i) < rows:
          np.add.at(sums, (slice(None), of_token[loader.place(g)] // several),
                    row)
    seen = sums[:, sums[1] > 0] * loader.share / sums[1].sum()
    nats, counts = nats + seen[0].tolist(), counts + seen[1].tolist()
  loss = sum(nats) / sum(counts)
  print(f'loss of {len(nats):,} documents: {loss:.4f}')
  return {'loss': loss, 'items': {'loss': items.of(
      np.divide(nats, counts), counts, counts)}}


def documents_program(module: Any, config: Any):
  objective = objectives.of(config)

  def losses(params: Any, batch: Any) -> jax.Array:
    """Returns the weighted losses and the weights of all tokens, [2, B, L]."""
    loss_BL = objective.token_losses(module, params, batch).loss
    weights_BL = batch['weights'].astype(jnp.float32)
    return jnp.stack([loss_BL * weights_BL, weights_BL])
  return losses


DOCUMENTS = 256
TASKS = {
    'loss': Task(
        'held-out loss, perplexity and bits per byte', run, check=_check,
        flags=(
            Flag('stride', 0, 'Read whole documents in windows of data.length '
                 'tokens that begin so many tokens after each other, so that '
                 'each token is predicted once, from at least data.length - '
                 'stride; 0: as in training.', 0, 2**24),)),
    'documents': Task(
        'the loss of each held-out document, of the rows that training '
        'evaluates', documents, without(
            lambda objective: objective.every_token,
            'does not predict every token, so it has no loss of a document'),
        figures=('loss',)),
    'diffusion_bound': Task(
        'the bound of masked diffusion on the held-out loss, by many draws',
        bound, without(lambda objective: objective.bound,
                       'is no masked diffusion, of which the task is'),
        figures=('loss', 'bits_per_byte', 'standard_error', 'samples',
                 'tokens'),
        flags=(Flag('bound_samples', 32, 'Draws of each row, of how many '
                    'tokens are masked and which.', 1, 100_000),))}
