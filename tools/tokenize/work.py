"""What one machine does: its shards, and the index if it ends last."""

from concurrent import futures
import hashlib
import os
import subprocess
import sys
import time
from typing import Any

from etils import epath

from configs.errors import EnvironmentFailure, RequestError, require
from tools import tether
from training.data import tokenizers
from training.data.shards import files, finish, plan, write
from training.data.shards import folder as folders
from training.workdir import storage

# How an array of SLURM and an indexed Job of Kubernetes say which one this is.
ARRAYS = ('SLURM_ARRAY_TASK_ID', 'JOB_COMPLETION_INDEX')
READ_BYTES = 1 << 20
READERS = 8
POLL_SECONDS = 0.1


def tokenise(args: Any) -> dict[str, Any]:
  """Makes the shards that are this machine's and not finished; returns figures.

  Args:
    args: the flags of tools.tokenize.
  """
  started = time.monotonic()
  job = job_of(args)
  out = storage.path(args.out, '--out').expanduser()
  storage.try_folder(out, '--out')
  storage.refuse_run(out, '--out', folders.BEGUN)
  tokenizer = tokenizers.load(args.tokenizer)
  planned = plan.of(args.source, args.holdout_every, args.shard_mib << 20)
  begun = plan.begin(out, planned, tokenizer)
  processes = args.processes or os.cpu_count() or 1
  before = _seen(out, begun)
  try:
    if processes > 1:
      _spawn(args, job, processes)
    else:
      _shards(out, planned, tokenizer, before, plan.of_worker(
          planned, job, args.jobs))
  except RequestError:
    if args.jobs == 1:
      plan.forget(out, begun)
    raise
  return _end(out, begun, args.holdout_every, before, started)


def job_of(args: Any) -> int:
  """Returns which of --jobs this is."""
  told = [os.environ[name] for name in ARRAYS if name in os.environ]
  job = args.job
  if job is None:
    require(args.jobs == 1 or bool(told), f'--jobs is {args.jobs}, and nothing '
            'says which of them this is: pass --job, from 0')
    job = int(told[0]) if args.jobs > 1 else 0
  require(0 <= job < args.jobs, f'--job is {job}, and --jobs is {args.jobs}: '
          f'choose 0 to {args.jobs - 1}')
  return job


def verify(text: str) -> dict[str, Any]:
  """Reads all shards of a folder and compares their checksums.

  Raises:
    EnvironmentFailure: naming those that are missing or damaged.
  """
  index = folders.load(text, f'tokens:{text}')
  folders.check_shards(index)
  with futures.ThreadPoolExecutor(READERS) as pool:
    digests = list(pool.map(
        lambda shard: _digest(index.folder / (shard['name'] + folders.SHARD)),
        index.shards))
  wrong = [shard['name'] + folders.SHARD for shard, digest in zip(
      index.shards, digests) if shard['digest'] != digest]
  if wrong:
    raise files.damaged(f'{index.folder}/{", ".join(wrong)}', 'its checksum '
                        'is another')
  return _figures(index.described) | {'checked': len(index.shards)}


def _digest(path: epath.Path) -> str:
  digest = hashlib.blake2b(digest_size=16)
  with path.open('rb') as file:
    while data := file.read(READ_BYTES):
      digest.update(data)
  return digest.hexdigest()


def _seen(out: epath.Path, begun: dict[str, Any]) -> list[Any]:
  return write.all_finished(out, begun['shards'])


def _shards(out: epath.Path, planned: plan.Plan, tokenizer: Any,
            seen: list[Any], mine: list[int]) -> None:
  for i in mine:
    if seen[i]:
      continue
    started, part = time.monotonic(), planned.parts[i]
    made = write.shard(out, i, plan.documents(part), tokenizer, part.name)
    seconds = time.monotonic() - started
    print(f'shard {i} of {len(seen)}: {made["documents"]:,} documents, '
          f'{made["tokens"]:,} tokens, {made["bytes"] / 1e6:,.1f} MB in '
          f'{seconds:,.1f} s', file=sys.stderr, flush=True)


def _spawn(args: Any, job: int, processes: int) -> None:
  """Has this machine's shards made by several processes: of those that are its
  job's, for any number of processes, since other machines may have others."""
  running = [subprocess.Popen(
      tether.words([
          sys.executable, '-m', 'tools.tokenize', args.source, '--out',
          args.out, '--tokenizer', args.tokenizer, '--holdout_every',
          str(args.holdout_every), '--shard_mib', str(args.shard_mib),
          '--jobs', str(args.jobs * processes), '--job',
          str(job + i * args.jobs)]), stdout=subprocess.DEVNULL,
      env=os.environ | {'TOKENIZERS_PARALLELISM': 'false'})
      for i in range(processes)]
  try:
    while any(process.poll() is None for process in running):
      if any(process.poll() for process in running):
        break  # its sentence is on stderr
      time.sleep(POLL_SECONDS)
  finally:
    for process in running:
      process.terminate()
    codes = [process.wait() for process in running]
  if 2 in codes:
    raise RequestError('a process was refused, see above')
  if any(codes):
    raise EnvironmentFailure('a process failed, see above; the same command '
                             'goes on')


def _end(out: epath.Path, begun: dict[str, Any], every: int, before: list[Any],
         started: float) -> dict[str, Any]:
  """Writes what is made of all shards and is missing, if they are finished;
  returns figures."""
  shards = _seen(out, begun)
  done = [shard for shard in shards if shard]
  made = sum(shard['bytes'] for shard, old in zip(shards, before)
             if shard and not old)
  figures = {'shards': f'{len(done)} of {len(shards)}',
             'megabytes_made': round(made / 1e6, 1),
             'seconds': round(time.monotonic() - started, 1),
             'cpu_seconds': round(sum(os.times()[:4]), 1)}
  if len(done) < len(shards):
    return figures | {'next': 'the job that ends last writes the index'}
  index = out / folders.INDEX
  # The index is written last: without it, the splits may be of other shards.
  whole = index.exists() and folders.parsed(index)['shards'] == done
  for each in sorted({every, *folders.splits(out)}):
    if not whole or not all(before) or not finish.has_split(out, done, each):
      finish.split(out, done, each)
  if not whole:
    finish.index(out, begun, done)
  return figures | _figures(folders.parsed(index)) | {
      'read_as': f'data.source=tokens:{out}'}


def _figures(described: dict[str, Any]) -> dict[str, Any]:
  return {key: described[key] for key in (
      'source', 'files', 'documents', 'tokens', 'bytes')} | {
          'tokenizer': described['tokenizer']['name'],
          'bytes_per_token': described['bytes'] / max(described['tokens'], 1)}
