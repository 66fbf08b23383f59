r"""Tokenises a source of text into shards, with as many machines as there are.

  python -m tools.tokenize 'jsonl:corpus/*.jsonl:text' --processes 8 \
      --out gs://BUCKET/corpus --tokenizer runs/bpe.json
  python -m tools.tokenize hf:NAME --out gs://BUCKET/corpus --launcher slurm \
      --jobs 64 --slurm slurm_partition=cpu,timeout_min=600
  python -m tools.tokenize --verify --out gs://BUCKET/corpus

A run reads what this writes as --config.data.source=tokens:gs://BUCKET/corpus,
with the batches that it would have from the source itself. Each file of the
source is read by one worker. The same command goes on where it was killed, on
any number of machines; the one that ends last writes the index. The same
command with another --holdout_every adds what that holds out; it reads no text.
"""

import argparse
import json

from configs import base
from configs.errors import RequestError, require
from training import cli, limits

LAUNCHERS = ('here', 'slurm')
# What each reads, beside the source; --verify reads --out and --json alone.
WORK = ('out', 'tokenizer', 'holdout_every', 'shard_mib', 'processes', 'jobs',
        'launcher')
FLAGS = {
    'here': (*WORK, 'job', 'json'),
    'slurm': (*WORK, 'slurm', 'logs', 'dry_run')}


def _parser() -> argparse.ArgumentParser:
  from training.data import sources
  from training.data.shards import plan
  parser = argparse.ArgumentParser(
      prog='python -m tools.tokenize', description=__doc__, allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  parser.add_argument('source', nargs='?', default='',
                      help=', '.join(sources.USAGE[name] for name in (
                          'text', 'jsonl', 'parquet', 'arrayrecord', 'hf')))
  parser.add_argument('--out', required=True, metavar='FOLDER',
                      help='of the shards, on disk or gs://BUCKET/NAME')
  parser.add_argument('--tokenizer', default=base.base().data.tokenizer,
                      help='as data.tokenizer')
  parser.add_argument('--holdout_every', type=int,
                      default=base.base().data.holdout_every,
                      help='the data.holdout_every of the runs')
  parser.add_argument('--shard_mib', type=int,
                      default=plan.SHARD_BYTES >> 20, help='MiB of text in a '
                      'shard; a larger file is a shard of its own')
  parser.add_argument('--processes', type=int, default=1,
                      help='on each machine; 0: one a core')
  parser.add_argument('--jobs', type=int, default=1, help='machines')
  parser.add_argument('--job', type=int, default=None, help='which of them '
                      'this is, from 0; default: as an array of SLURM '
                      'says')
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


def _check_read(given: list[str], launcher: str, verify: bool) -> None:
  """Raises RequestError for a flag that the command would not read."""
  if verify:
    wrong = [f'--{name}' for name in given
             if name not in ('verify', 'out', 'json', 'source')]
    require(not wrong, f'--verify reads the shards of --out and nothing else: '
            f'leave {", ".join(wrong)} out')
  for name in given:
    of = [place for place, names in FLAGS.items() if name in names]
    require(not of or launcher in of, f'--{name} is for --launcher='
            f'{" or ".join(of)}, and --launcher is {launcher}: leave it out')


def main(argv: list[str] | None = None) -> int:
  parser = _parser()
  args = parser.parse_args(argv)
  # A default is for what the namespace lacks: here, for nothing.
  nothing = argparse.Namespace(**dict.fromkeys(vars(args)))
  given = [name for name, value in vars(
      parser.parse_args(argv, nothing)).items() if value is not None]
  _check_read(given, args.launcher, args.verify)
  for name, least, most in (
      ('holdout_every', 0, 2**31), ('shard_mib', 1, 2**20),
      ('processes', 0, 512), ('jobs', 1, 100_000)):
    limits.number(f'--{name}', getattr(args, name),
                  (('>=', least), ('<=', most)))
  from tools.tokenize import work
  if args.verify:
    require(not args.source, f'--verify reads the shards of --out, and no '
            f'source: leave {args.source!r} out')
    figures = work.verify(args.out)
  elif not args.source:
    raise RequestError('pass the source, as jsonl:GLOB:FIELD')
  elif args.launcher == 'here':
    figures = work.tokenise(args)
  else:
    from tools.tokenize import launch
    return launch.slurm(args)
  if args.json:
    print(json.dumps(figures))
  else:
    for key, value in figures.items():
      print(f'{key:>16}  {value}')
  return 0


if __name__ == '__main__':
  cli.run(main)
