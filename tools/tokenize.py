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


def _make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command line of this program."""
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
  """Writes the shards that the command line asks for, and prints figures.

  Args:
    argv: the words of the command line; None: those of this process.
  """
  args = _make_parser().parse_args(argv)

  # Without --job, the number of the job is that in an array of SLURM; a job
  # that shares its work with no other is job 0.
  if args.job is None:
    args.job = 0
    if args.jobs > 1:
      args.job = int(os.environ.get('SLURM_ARRAY_TASK_ID', 0))

  # Check the numbers.
  bounds_of_option = {
      'shard_mib': (1, 2**20),
      'jobs': (1, 100_000),
      'job': (0, args.jobs - 1),
  }
  for name, (lowest, highest) in bounds_of_option.items():
    check_number(f'--{name}', getattr(args, name),
                 (('>=', lowest), ('<=', highest)))

  figures = write_shards_of_job(args)
  if args.json:
    print(json.dumps(figures))
  else:
    for key, value in figures.items():
      print(f'{key:>16}  {value}')
  return 0


class _PlainText(conversations.Layout):
  """A layout of documents that takes plain text and refuses conversations,
  whose layout a run chooses.

  Args:
    spec: the source as it was written, for messages.
  """

  key = ''

  def __init__(self, spec: str):
    self._spec = spec

  def lay_out(self, document: Any) -> Any:
    """Returns a document that is a text as it is.

    Raises:
      RequestError: for a conversation.
    """
    require(isinstance(document, str), f'{self._spec!r} holds conversations, '
            'and tools.tokenize writes plain text: a run reads these from '
            'their own files')
    return document


def _parse_text_source(spec: str) -> sources.Source:
  """Returns the one source of plain text that a spec names.

  Args:
    spec: the source as it was written on the command line.

  Raises:
    RequestError: for a mixture of sources, or a source of something else than
      text, such as tokens or images.
  """
  # A spec lists sources, each with its weight. Only a mixture has more than
  # one. The layout refuses conversations.
  weighted_sources = sources.parse_sources(spec, lambda: _PlainText(spec))
  (_, source), *others = weighted_sources
  require(not others, f'data source {spec!r} is a mixture: tokenise each of '
          "its sources, and mix them in the run, '0.7*tokens:A,0.3*tokens:B'")
  require(sources.TEXT in source.holds and not source.tokens, 'data source '
          f'{source.name!r} holds {source.holds[0]}, and tools.tokenize takes '
          f'text: choose from {sources.list_forms((sources.TEXT,))}')
  return source


def write_shards_of_job(args: argparse.Namespace) -> dict[str, Any]:
  """Writes those shards of a source that this job is to write and that are not
  finished yet.

  Args:
    args: the options of the command line.

  Returns:
    Figures by name: the number of finished shards, and the seconds; once all
    shards are finished, also their documents, bytes and tokens, and how a run
    reads them.
  """
  # Check the folder, and read the source and the tokenizer.
  started = time.monotonic()
  out = storage.checked_path(args.out, '--out').expanduser()
  storage.check_folder_is_writable(out, '--out')
  storage.refuse_folder_of_run(out, '--out', tokens.BEGUN_FILE)
  tokenizer = tokenizers.load(args.tokenizer)
  source = _parse_text_source(args.source)

  # Cut the source into shards, and begin the folder. If it was begun before, it
  # must be for the same source: names and sizes of files tell that.
  shards, shard_bytes = sources.plan_shards(source, args.shard_mib << 20)
  files = [[os.path.basename(path), size]
           for path, size, _ in sources.file_stats(source)]
  content = tokens.digest_json([source.reader, source.content, files])
  begun = sources.begin_folder(
      out, source=source, shards=shards, content=content, tokenizer=tokenizer)

  # Write the shards of this job. The jobs take turns, from the largest shard to
  # the smallest, so that each has about as much to do.
  is_finished = tokens.find_finished_shards(out, begun)
  largest_first = sorted(range(len(shards)), key=lambda i: -shard_bytes[i])
  for i in largest_first[args.job::args.jobs]:
    if not is_finished[i]:
      sources.write_shard(
          out, i=i, shard=shards[i], tokenizer=tokenizer, begun=begun)

  # Other jobs may have finished theirs meanwhile.
  is_finished = tokens.find_finished_shards(out, begun)
  seconds = round(time.monotonic() - started, 1)
  figures = {
      'shards': f'{sum(is_finished)} of {len(is_finished)}',
      'seconds': seconds,
  }
  if all(is_finished):
    loaded = tokens.load_tokens(str(out), f'tokens:{out}')
    everything = tokens.Split(
        loaded, holdout_every=None, split='train', part='', separator=0)
    # Split counts a separator for each document, which is no token of the text.
    figures |= {
        'documents': everything.documents,
        'bytes': everything.num_bytes,
        'tokens': everything.num_tokens - everything.documents,
        'read_as': f'data.source=tokens:{out}',
    }
  return figures


if __name__ == '__main__':
  cli.run(main)
