"""Encodes chunks of text in parallel processes, in order.

The workers are plain interpreters that read pickled chunks on stdin and write
ids on stdout, each driven by a thread. Unlike multiprocessing's they never
import `__main__` again, so a caller needs no main guard; unlike a fork they
are safe after JAX has started its threads. A worker ends when its stdin does,
however its parent died.
"""

import collections
from collections.abc import Iterable, Iterator
from concurrent import futures
import itertools
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
from typing import BinaryIO, NamedTuple

import numpy as np

from configs.errors import EnvironmentFailure, RequestError
from training.data import chat_templates
from training.data.tokenizers import Tokenizer

Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]


class Rendered(NamedTuple):
  """The parts of a conversation that a Jinja template laid out."""
  parts: list[str]


def encode_chunk(tokenizer: Tokenizer,
                 texts: list[str | tuple[str, str] | Rendered]) -> Encoded:
  """Returns uint32 ids_T of all texts in a row, and int64 ids and bytes a text.

  A pair is two texts that stand side by side: they are encoded as one, and the
  second has the ids from the first one on that it changes. What was rendered
  is encoded as one, too, by chat_templates.encode.
  """
  if any(isinstance(text, Rendered) for text in texts):
    return _together([_rendered(tokenizer, text)
                      if isinstance(text, Rendered)
                      else encode_chunk(tokenizer, [text]) for text in texts])
  whole = tokenizer.encode_batch([
      text if isinstance(text, str) else ''.join(text) for text in texts])
  pairs = [i for i, text in enumerate(texts) if not isinstance(text, str)]
  firsts = tokenizer.encode_batch([texts[i][0] for i in pairs])
  split = {i: shared(whole[i], first) for i, first in zip(pairs, firsts)}
  ids, parts = [], []
  for i, text in enumerate(texts):
    ids += [whole[i][:split[i]], whole[i][split[i]:]] if i in split else [
        whole[i]]
    parts += text if i in split else [text]
  ids_T = np.concatenate([np.asarray(i, np.uint32) for i in ids])
  lengths = np.array([len(i) for i in ids], np.int64)
  num_bytes = np.array([len(text.encode('utf-8')) for text in parts], np.int64)
  return ids_T, lengths, num_bytes


def _rendered(tokenizer: Tokenizer, text: Rendered) -> Encoded:
  ids = chat_templates.encode(text.parts, tokenizer)
  num_bytes = [len(chat_templates.unmarked(part).encode('utf-8'))
               for part in text.parts]
  return (np.concatenate(ids).astype(np.uint32),
          np.array([len(i) for i in ids], np.int64),
          np.array(num_bytes, np.int64))


def _together(encoded: list[Encoded]) -> Encoded:
  ids, lengths, num_bytes = zip(*encoded)
  return (np.concatenate(ids), np.concatenate(lengths),
          np.concatenate(num_bytes))


def shared(a: np.ndarray, b: np.ndarray) -> int:
  """Returns how many ids two sequences begin with alike."""
  size = min(len(a), len(b))
  different = np.flatnonzero(a[:size] != b[:size])
  return int(different[0]) if different.size else size


def encode_chunks(tokenizer: Tokenizer, chunks: Iterable[list], workers: int
                  ) -> Iterator[Encoded]:
  """Yields encode_chunk of every chunk, in order.

  Args:
    tokenizer: whose `name` loads it again in the workers.
    chunks: lists of texts and pairs; at most three a worker are held at once.
    workers: processes; 0 is one per CPU core, 1 is this process.
  """
  workers = workers or os.cpu_count()
  chunks = iter(chunks)
  first = list(itertools.islice(chunks, 2))
  if workers == 1 or len(first) < 2:
    for chunk in itertools.chain(first, chunks):
      yield encode_chunk(tokenizer, chunk)
    return
  idle = queue.SimpleQueue()
  for _ in range(workers):
    idle.put(None)  # Started at first use: few chunks start few workers.
  started = []

  def encode(chunk: list) -> Encoded:
    worker = idle.get()
    if worker is None:
      worker = _start(tokenizer.name)
      started.append(worker)
    try:
      return _ask(worker, chunk)
    finally:
      idle.put(worker)

  pending = collections.deque()
  pool = futures.ThreadPoolExecutor(workers)
  try:
    for chunk in itertools.chain(first, chunks):
      pending.append(pool.submit(encode, chunk))
      if len(pending) >= 3 * workers:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(wait=True, cancel_futures=True)
    for worker in started:
      worker.kill()
      worker.communicate()


def _start(tokenizer_name: str) -> subprocess.Popen:
  root = str(pathlib.Path(__file__).resolve().parents[2])
  path = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
  worker = subprocess.Popen(
      [sys.executable, '-m', 'training.data.token_workers'],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      env=os.environ | {'PYTHONPATH': path, 'TOKENIZERS_PARALLELISM': 'false'})
  pickle.dump(tokenizer_name, worker.stdin)
  return worker


def _ask(worker: subprocess.Popen, chunk: list) -> Encoded:
  try:
    pickle.dump(chunk, worker.stdin, protocol=pickle.HIGHEST_PROTOCOL)
    worker.stdin.flush()
    answer = pickle.load(worker.stdout)
  except (EOFError, OSError, pickle.UnpicklingError) as error:
    raise EnvironmentFailure(
        f'a tokenizer process ended early (exit code {worker.poll()}): it was '
        'killed, perhaps for memory.') from error
  if isinstance(answer, str):
    raise RequestError(answer)
  return answer


def _work():
  """What a worker does: chunks in on stdin, ids out on stdout."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's.
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # Nothing printed may mix with the answers.
  try:
    _answer(sys.stdin.buffer, answers)
  except (EOFError, pickle.UnpicklingError, BrokenPipeError):
    # The parent has ended, perhaps in the middle of a chunk. What `answers`
    # still holds has nowhere to go, so the interpreter must not flush it.
    os._exit(0)


def _answer(requests: BinaryIO, answers: BinaryIO):
  """Reads a tokenizer's name, then encodes chunk after chunk until the end."""
  from training.data import tokenizers
  tokenizer = tokenizers.load(pickle.load(requests))
  while True:
    chunk = pickle.load(requests)
    try:
      answer = encode_chunk(tokenizer, chunk)
    except Exception as error:  # To be raised again by the parent.
      answer = f'tokenizer {tokenizer.name!r} failed: {error}'
    pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
    answers.flush()


if __name__ == '__main__':
  _work()
