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
"""

from collections.abc import Callable, Iterator, Sequence
import math
import re
from typing import Any

import numpy as np

from configs.errors import one_of, require
from training.evals.task import Evaluation, Flag, Task


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Evaluates every held-out token once."""
  from training import progress
  from training.evals import held_out
  from training.runs import make_eval_step
  config = evaluation.run.config
  if evaluation.options.stride:
    return strided(evaluation)
  loaders = evaluation.held_out()
  step = evaluation.program(
      lambda: make_eval_step(evaluation.run.module, config), 'loss')
  sums = [held_out.sums(
      step, evaluation.params, progress.each(
          loader.iterate(), 'evaluating', loader.num_batches),
      evaluation.run.put) for loader in loaders]
  own = {}
  for loader, total in zip(loaders, sums):
    own[loader.name] = _told(loader.text, [total], [loader])
  if len(loaders) == 1:
    return own[loaders[0].name]
  shares = ', '.join(f'{loader.share:.3g} {loader.name}' for loader in loaders)
  return _told(f'the mean by weight, {shares}', sums, loaders) | {
      'sources': own}


def _told(text: str, sums: Sequence, loaders: Sequence) -> dict[str, Any]:
  """Prints and returns the figures of some sources together."""
  from training.evals import held_out
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
  from training.evals import scoring
  options = evaluation.options
  name, documents = _documents(evaluation)
  length, stride = evaluation.run.config.data.length, options.stride
  form = DETOKENIZE[options.detokenize]
  first = evaluation.tokenizer.separator_id
  questions = []
  for ids in evaluation.tokenizer.encode_batch([form(x) for x in documents]):
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
  from training.evals.scoring import Question
  ids = ids.astype(np.int32)
  done = 1
  for start in range(0, len(ids) - 1, stride):
    stop = min(start + length, len(ids))
    yield Question(ids[start:stop], stop - done)
    done = stop
    if stop == len(ids):
      return


def measures(nats: float, tokens: int, documents: list[str]) -> dict[str, Any]:
  """Returns the figures of text that costs `nats` in all.

  Its words are what white space separates, and the ends of its lines: the
  convention of WikiText, whose test set has 245,569 such words. Words and
  bytes are those of the documents as they are, before they are detokenised.
  """
  words = sum(len(text.split()) + text.count('\n') for text in documents)
  size = sum(len(text.encode()) for text in documents)
  exp = lambda x: math.exp(x) if x < 700 else math.inf
  return dict(loss=nats / tokens, perplexity=exp(nats / tokens),
              bits_per_byte=nats / math.log(2) / size,
              word_perplexity=exp(nats / max(words, 1)),
              tokens=tokens, words=words, bytes=size)


def _check(options: Any) -> None:
  one_of('--detokenize', options.detokenize, DETOKENIZE)
  require(options.detokenize == 'none' or options.stride > 0, '--detokenize is '
          f'{options.detokenize!r}, which is read with --stride alone')


def _fits(config: Any, options: Any) -> None:
  """Raises RequestError for a --stride that a run cannot be read with."""
  from training.data import sources
  from training.evals import scoring
  data, stride = config.data, options.stride
  if not stride:
    return
  reason = scoring.unfit(config)
  require(not reason, f'{reason}: leave --stride at 0')
  require(stride < data.length, f'--stride is {stride}, but a window has '
          f'data.length {data.length} tokens, the first of which is not '
          'predicted: choose a smaller one')
  spec = data.eval_source or data.source
  found = sources.parse(spec)
  require(len(found) == 1, f'--stride reads one source, and {spec!r} is a '
          'mixture: name one of them by --text')
  require(not found[0][1].tokens, f'--stride reads text, and {spec!r} holds '
          'tokens: name a text by --text')


def _documents(evaluation: Evaluation) -> tuple[str, list[str]]:
  """Returns the name of the source, and the documents that are held out."""
  from training.data import sources
  data = evaluation.run.config.data
  (_, source), = sources.parse(data.eval_source or data.source)
  every = None if data.eval_source else data.holdout_every
  part = evaluation.run.config.eval.part
  source = sources.cut(source, every, part)
  documents = list(source.documents())
  chosen = sources.chosen(np.arange(len(documents)), every, 'eval',
                          '' if source.is_cut else part)
  found = [document for document, own in zip(documents, chosen) if own]
  require(all(isinstance(x, str) for x in found), f'{source.name} holds pairs '
          'or conversations: --stride is for text')
  require(found, f'{source.name} has no document that is held out: pass --text')
  return source.name, found


def _wikitext(text: str) -> str:
  """Undoes the tokenisation of WikiText, as lm_eval's task `wikitext` does:
  the same replacements in the same order, what they miss included."""
  text = text.replace("s '", "s'")
  text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
  for mark in '-,.':
    text = text.replace(f' @{mark}@ ', mark)
  for mark in ':;.!?,':
    text = text.replace(f' {mark} ', f'{mark} ')
  for first, last in ('()', '[]', '{}', '""', "''"):
    text = re.sub(rf'{re.escape(first)}\s*([^{re.escape(last)}]*?)\s*'
                  rf'{re.escape(last)}', rf'{first}\1{last}', text)
  for old, new in (('= = = =', '===='), ('= = =', '==='), ('= =', '=='),
                   (' \N{DEGREE SIGN} ', '\N{DEGREE SIGN}'), (' \n', '\n'),
                   ('\n ', '\n'), (' N ', ' 1 '), (" 's", "'s")):
    text = text.replace(old, new)
  return text


DETOKENIZE: dict[str, Callable[[str], str]] = {
    'none': lambda text: text, 'wikitext': _wikitext}
TASKS = {'loss': Task(
    'held-out loss, perplexity and bits per byte', run, check=_check,
    fits=_fits,
    flags=(
        Flag('stride', 0, 'Read whole documents in windows of data.length '
             'tokens that begin so many tokens after each other, so that each '
             'token is predicted once, from at least data.length - stride; 0: '
             'as in training.', 0, 2**24),
        Flag('detokenize', 'none', "With --stride: 'wikitext' undoes "
             "WikiText's tokenisation, as lm_eval does, before the text is "
             'read.')))}
