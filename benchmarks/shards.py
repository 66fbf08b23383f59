r"""What it costs to read tokens from shards: windows a second, and memory.

  python -m benchmarks.shards --shards 75
  python -m benchmarks.shards --shards 7451

A shard of 2^27 tokens is written once and linked under so many names, so that
7,451 of them, 10^12 tokens, take the room of one on disk. Then windows of 2,049
tokens are read at random places of the whole, as a run with data.length=2048
reads them. Memory is the resident set of this process.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

from configs.errors import EnvironmentFailure, require
from training import cli

TOKENS, DOCUMENT = 1 << 27, 1024
EOS = 257


def make(folder: pathlib.Path, shards: int) -> None:
  """Writes a folder of shards that are all the same one."""
  from array_record.python import array_record_module
  from training.data.shards import finish, pages, records
  from training.data.shards import folder as folders
  from training.data.shards import write
  documents = TOKENS // DOCUMENT
  shard = folder / f'one{folders.SHARD}'
  writer = array_record_module.ArrayRecordWriter(str(shard), records.OPTIONS)
  pending = records.Pending(np.dtype('<u2'))
  rng = np.random.default_rng(0)
  for _ in range(64):
    tokens = rng.integers(0, 256, TOKENS // 64).astype('<u2')
    for record in pending.add(tokens, np.full(documents // 64, DOCUMENT)):
      writer.write(records.encode(record))
  for record in pending.rest():
    writer.write(records.encode(record))
  writer.close()
  size, digest, places = write.read_back(shard)
  name = folder / folders.split_name(0)
  name.mkdir()
  kinds = pages.classes(np.arange(documents), 0)
  marks = folder / 'marks'
  marks.write_bytes(pages.encode(np.concatenate([finish.table(
      np.full(documents, DOCUMENT), kinds, len(places)), places], axis=1)))
  for i in range(shards):
    os.link(shard, folder / (folders.number(i) + folders.SHARD))
    os.link(marks, name / f'{folders.number(i)}.marks')
  rows = [dict(name=folders.number(i), documents=documents, tokens=TOKENS,
               bytes=TOKENS, records=len(places), size=size, digest=digest)
          for i in range(shards)]
  (folder / folders.INDEX).write_text(json.dumps(dict(
      format=folders.FORMAT, source='made', files=shards, dtype='uint16',
      tokenizer=dict(name='bytes', fingerprint='bytes-384', vocab_size=384),
      documents=documents * shards, tokens=TOKENS * shards,
      bytes=TOKENS * shards, shards=rows)))
  half = [documents // 2, documents // 2, 0, 0]
  of_tokens = [n * DOCUMENT for n in half]
  (folder / f'{folders.split_name(0)}.json').write_text(json.dumps(dict(
      every=0, shards=[[half, of_tokens, of_tokens]] * shards)))


def resident() -> float:
  """Returns the MiB of this process that are in memory."""
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def read(folder: pathlib.Path, windows: int) -> dict[str, float]:
  """Reads windows at random places; returns figures."""
  from training.data.shards import folder as folders
  from training.data.shards import reader
  before, started = resident(), time.monotonic()
  split = reader.split(folders.load(str(folder), 'it'), 'it', 0, None, '', EOS)
  figures = dict(
      tokens=split.num_tokens, open_seconds=time.monotonic() - started,
      MiB_before=before, MiB_opened=resident())
  row = np.zeros(2049, np.int32)
  places = np.random.default_rng(0).integers(
      0, split.num_tokens - len(row), windows)
  started = time.process_time()
  for place in places:
    split.fill(row, int(place))
  seconds = time.process_time() - started
  return figures | dict(
      windows=windows, windows_per_cpu_second=windows / seconds,
      tokens_per_cpu_second=2048 * windows / seconds, MiB_after=resident())


def main() -> None:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.shards', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  parser.add_argument('--shards', type=int, default=7451,
                      help='how many the folder has')
  parser.add_argument('--windows', type=int, default=20_000,
                      help='how many are read')
  parser.add_argument('--folder', default='', help='where a folder for it is '
                      'made, and removed')
  args = parser.parse_args()
  for name in ('shards', 'windows'):
    value = getattr(args, name)
    require(value > 0, f'--{name} is {value}: it must be 1 or more')
  with tempfile.TemporaryDirectory(dir=args.folder or None) as text:
    folder = pathlib.Path(text)
    pid = os.fork()  # what makes the shard has its own memory
    if not pid:
      make(folder, args.shards)
      sys.stdout.flush()
      os._exit(0)
    if os.waitpid(pid, 0)[1]:
      raise EnvironmentFailure('the process that makes the shards failed: see '
                               'above')
    for key, value in read(folder, args.windows).items():
      print(f'{key:>24}  {value:,.6g}')


if __name__ == '__main__':
  cli.run(main)
