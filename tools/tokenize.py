r"""Tokenises a source of text into shards, with as many machines as there are.

  python -m tools.tokenize 'jsonl:corpus/*.jsonl:text' \
      --out gs://BUCKET/corpus --tokenizer runs/bpe.json
  sbatch --array=0-63 --wrap="python -m tools.tokenize 'parquet:c/*:text' \
      --out gs://BUCKET/corpus --jobs 64"

A run reads what this writes as --config.data.source=tokens:gs://BUCKET/corpus,
with the batches that it would have from the source itself. The same command
goes on where it was killed, on any number of machines.
"""

import argparse
import json
import os
import time
from typing import Any

from common.errors import require
from common.fields import check_number
from configs import base
from training import cli
from training.data import conversations, sources, tokenizers, tokens
from training.workdir import storage


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(prog='python -m tools.tokenize', description=__doc__)
  parser.add_argument('source', help=sources.list_forms((sources.TEXT,)))
  parser.add_argument('--out', required=True, metavar='FOLDER',
                      help='of the shards, on disk or gs://BUCKET/NAME')
  parser.add_argument('--tokenizer', default=base.base().data.tokenizer,
                      help='as data.tokenizer')
  parser.add_argument('--shard_mib', type=int,
                      default=sources.SHARD_BYTES >> 20, help='MiB of text '
                      'in a shard; a larger file is a shard of its own')
  parser.add_argument('--jobs', type=int, default=1,
                      help='how many commands share the work')
  parser.add_argument('--job', type=int, help='which of them this is, from 0; '
                      'default: as an array of SLURM says')
  parser.add_argument('--json', action='store_true', help='print one object')
  return parser


def main(argv: list[str] | None = None) -> int:
  args = _parser().parse_args(argv)
  if args.job is None:  # alone, or one of an array
    args.job = int(os.environ.get('SLURM_ARRAY_TASK_ID', 0))
    args.job = args.job if args.jobs > 1 else 0
  for name, least, most in (
      ('shard_mib', 1, 2**20), ('jobs', 1, 100_000), ('job', 0, args.jobs - 1)):
    check_number(f'--{name}', getattr(args, name),
                 (('>=', least), ('<=', most)))
  figures = tokenise(args)
  if args.json:
    print(json.dumps(figures))
  else:
    for key, value in figures.items():
      print(f'{key:>16}  {value}')
  return 0


class _Plain(conversations.Layout):
  """Refuses conversations, whose layout a run chooses.

  Args:
    spec: the source, for messages.
  """

  key = ''

  def __init__(self, spec: str):
    self._spec = spec

  def lay_out(self, document: Any) -> Any:
    require(isinstance(document, str), f'{self._spec!r} holds conversations, '
            'and tools.tokenize writes plain text: a run reads these from '
            'their own files')
    return document


def _source(spec: str) -> sources.Source:
  """Returns the one source of plain text that a spec names."""
  (_, source), *others = sources.parse_sources(spec, lambda: _Plain(spec))
  require(not others, f'data source {spec!r} is a mixture: tokenise each of '
          "its sources, and mix them in the run, '0.7*tokens:A,0.3*tokens:B'")
  require(sources.TEXT in source.holds and not source.tokens, 'data source '
          f'{source.name!r} holds {source.holds[0]}, and tools.tokenize takes '
          f'text: choose from {sources.list_forms((sources.TEXT,))}')
  return source


def tokenise(args: argparse.Namespace) -> dict[str, Any]:
  """Makes the shards that are this job's and not finished; returns figures."""
  started, out = time.monotonic(), storage.checked_path(args.out,
                                                        '--out').expanduser()
  storage.check_folder_is_writable(out, '--out')
  storage.refuse_folder_of_run(out, '--out', tokens.BEGUN_FILE)
  tokenizer, source = tokenizers.load(args.tokenizer), _source(args.source)
  parts, sizes = sources.plan_shards(source, args.shard_mib << 20)
  content = tokens.digest_json([source.reader, source.content, [
      [os.path.basename(path), size]
      for path, size, _ in sources.file_stats(source)]])
  begun = sources.begin_folder(out, source=source, parts=parts, content=content,
                               tokenizer=tokenizer)
  done = tokens.find_finished_shards(out, begun)
  # Each job has about as much to do.
  order = sorted(range(len(parts)), key=lambda i: -sizes[i])
  for i in order[args.job::args.jobs]:
    if not done[i]:
      sources.write_shard(out, i=i, part=parts[i], tokenizer=tokenizer,
                          begun=begun)
  done = tokens.find_finished_shards(out, begun)
  figures = {'shards': f'{sum(done)} of {len(done)}',
             'seconds': round(time.monotonic() - started, 1)}
  if all(done):
    whole = tokens.Split(tokens.load_tokens(str(out), f'tokens:{out}'),
                         every=None, split='train', part='', separator=0)
    figures |= {'documents': whole.documents, 'bytes': whole.num_bytes,
                'tokens': whole.num_tokens - whole.documents,
                'read_as': f'data.source=tokens:{out}'}
  return figures


if __name__ == '__main__':
  cli.run(main)
