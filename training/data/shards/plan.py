"""Which documents make which shard: the same for any number of machines.

A shard is made of neighbouring files, so many that they have SHARD_BYTES of
text, or a MOST_SHARDS-th of all. A larger file is a shard of its own, since
each is read by one worker, in order.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
from typing import Any, NamedTuple

from configs.errors import EnvironmentFailure, require
from training.data import hub, sources
from training.data.shards import folder as folders
from training.data.shards import records, write
from training.data.source import Document, Source
from training.data.tokenizers import Tokenizer
from training.workdir import storage

SHARD_BYTES = 256 << 20
MOST_SHARDS = 1 << 14


class Plan(NamedTuple):
  """What a source is cut into.

  Attributes:
    source: whose documents these are.
    parts: the sources whose documents make one shard each, in order.
    sizes: of each, in bytes of its files or, for a dataset of Hugging Face, in
      files.
    digest: of what the parts are made from, and where it is cut.
    uncut: what earlier versions wrote as the digest, which does not say where.
    every: data.holdout_every.
    shard_bytes: of text in a shard; 0 for a dataset of Hugging Face.
  """
  source: Source
  parts: list[Source]
  sizes: list[int]
  digest: str
  uncut: str
  every: int
  shard_bytes: int = 0


def of(spec: str, every: int, shard_bytes: int = SHARD_BYTES) -> Plan:
  """Returns the plan of a source.

  Args:
    spec: the source, as in data.source; of the hub it is streamed.
    every: data.holdout_every.
    shard_bytes: of text in a shard, unless its first file has more.

  Raises:
    RequestError: for a source that is no text, or a single document, or has
      a file of no bytes.
  """
  prefix, _, rest = spec.partition(':')
  if prefix == 'hf':
    digest, parts = hub.streamed(spec, rest, MOST_SHARDS)
    return Plan(parts[0], parts, [1] * len(parts), digest, digest, every)
  (_, source), *others = sources.parse(spec)
  require(not others, f'data source {spec!r} is a mixture: tokenise each of '
          "its sources, and mix them in the run, '0.7*tokens:A,0.3*tokens:B'")
  require(bool(source.files) and not source.records,
          f'data source {source.name!r} holds no plain text: tools.tokenize '
          'takes text:, jsonl:, parquet:, arrayrecord:, hf: and sotu')
  require(source.reader != 'text' or len(source.files) > 1 or every < 2,
          f'data source {source.name!r} is one file, and so one document, of '
          f'which --holdout_every={every} would hold out all: choose 0, and '
          'give runs a data.eval_source; or let runs read it as it is')
  stats = [(path, os.stat(path).st_size) for path in source.files]
  for path, size in stats:
    require(size > 0,
            f'data source {source.name!r} is empty: {path} holds no text')
  target = max(shard_bytes, sum(size for _, size in stats) // MOST_SHARDS)
  groups: list[list[tuple[str, int]]] = []
  room = 0
  for path, size in stats:
    if not groups or size > room:
      groups.append([])
      room = target
    groups[-1].append((path, size))
    room -= size
  named = [[os.path.basename(path), size] for path, size in stats]
  return Plan(
      source, [dataclasses.replace(source, files=tuple(p for p, _ in group))
               for group in groups],
      [sum(size for _, size in group) for group in groups],
      _digest([source.reader, named, [len(group) for group in groups]]),
      _digest([source.reader, named, len(groups)]), every, shard_bytes)


def documents(part: Source) -> Iterator[Document]:
  """Yields the documents of a shard.

  Raises:
    EnvironmentFailure: at their end, where the files were written meanwhile.
  """
  before = _sizes(part)
  yield from part.documents()
  if _sizes(part) != before:
    raise EnvironmentFailure(
        f'data source {part.name!r} changed while it was being read: start '
        'again when its files are complete')


def _sizes(source: Source) -> list[int]:
  return [os.stat(path).st_size for path in source.files]


def of_worker(plan: Plan, worker: int, workers: int) -> list[int]:
  """Returns the shards that are one worker's: all have about as much to do."""
  order = sorted(range(len(plan.parts)), key=lambda i: -plan.sizes[i])
  return order[worker::workers]


def described(plan: Plan, tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns what begun.json holds."""
  return dict(
      format=folders.FORMAT, source=plan.source.name,
      reader=plan.source.reader, files=len(plan.source.files) or sum(
          plan.sizes), digest=plan.digest, shards=len(plan.parts),
      shard_bytes=plan.shard_bytes, holdout_every=plan.every,
      tokenizer=dict(name=tokenizer.name, fingerprint=tokenizer.fingerprint,
                     vocab_size=tokenizer.vocab_size),
      dtype=write.dtype_of(tokenizer).name,
      record_tokens=records.RECORD_TOKENS)


def begin(folder: Any, plan: Plan, tokenizer: Tokenizer) -> dict[str, Any]:
  """Writes begun.json, or sees that it is of the same plan; returns it.

  Raises:
    RequestError: where the folder holds something else.
  """
  ours = described(plan, tokenizer)
  path = folder / folders.BEGUN
  if not path.exists():
    _look_into(plan)
    folder.mkdir(parents=True, exist_ok=True)
    write.put(path, json.dumps(ours, indent=1).encode())
  begun = folders.parsed(path)
  folders.check_format(begun, folder)
  made = begun['tokenizer']
  require(made['fingerprint'] == tokenizer.fingerprint,
          f'{folder} was begun with the tokenizer {made["name"]!r}, and '
          f'--tokenizer is {tokenizer.name!r}, which is another one: choose '
          'the same, or another folder for --out')
  _check_cut(folder, begun, plan)
  return begun


def forget(folder: Any, begun: dict[str, Any]) -> None:
  """Removes begun.json where no shard is finished, and the folder where nothing
  else is in it: of a command that is refused, and that works alone."""
  if any(write.all_finished(folder, begun['shards'])):
    return
  (folder / folders.BEGUN).unlink()
  if not storage.in_bucket(folder) and not any(folder.iterdir()):
    folder.rmdir()


def _look_into(plan: Plan) -> None:
  """Raises RequestError where the first documents are no text: the folder would
  be begun, and refuse the corrected source."""
  part = plan.parts[0]
  with contextlib.closing(write.chunks(documents(part), part.name)) as chunks:
    next(chunks)


def _digest(described_: Any) -> str:
  return hashlib.blake2b(json.dumps(described_).encode(),
                         digest_size=16).hexdigest()


def _check_cut(folder: Any, begun: dict[str, Any], plan: Plan) -> None:
  """Raises RequestError unless a folder is of the same files, cut alike."""
  if begun['digest'] == plan.uncut != plan.digest:
    # As many shards: only of one, or of one a file, are they surely the same.
    require(len(plan.parts) in (1, len(plan.source.files))
            or all(write.all_finished(folder, begun['shards'])),
            f'{folder} was begun by an earlier version, which did not write '
            'down where the files are cut into shards, and not all of these '
            'are finished: go on with that version and the same --shard_mib, '
            'or choose another folder for --out')
    return
  cut = begun.get('shard_bytes', 0) >> 20
  require(begun['digest'] == plan.digest,
          f'{folder} was begun of the source {begun["source"]!r}, and that of '
          f'now, {plan.source.name!r}, has other files or is cut otherwise: '
          f'choose the same{f" and --shard_mib {cut}" if cut else ""}, or '
          'another folder for --out')
