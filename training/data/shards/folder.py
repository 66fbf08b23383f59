"""The files of a folder of shards that say what it is, and whether it is whole.
"""

import hashlib
import json
import re
import shlex
from typing import Any, NamedTuple

from etils import epath

from configs.errors import EnvironmentFailure, RequestError, require, short
from training.data.shards import files
from training.data.tokenizers import Tokenizer
from training.workdir import storage

FORMAT = 1  # raise it when the layout changes
BEGUN, INDEX = 'begun.json', 'index.json'
SHARD = '.arrayrecord'


class Index(NamedTuple):
  """A folder that is whole.

  Attributes:
    folder: where it is.
    described: what index.json holds.
    digest: a hash of that.
  """
  folder: epath.Path
  described: dict[str, Any]
  digest: str

  @property
  def shards(self) -> list[dict[str, Any]]:
    """What there is to know of each shard."""
    return self.described['shards']


def number(i: int) -> str:
  """Returns the name of a shard, without the ending of one of its files."""
  return f'{i:05}'


def split_name(every: int) -> str:
  """Returns what the files begin with that say what is held out."""
  return f'split-{every}'


def load(text: str, name: str) -> Index:
  """Returns the index of a folder of shards.

  Args:
    text: the folder, on disk or in a bucket.
    name: of the source, for messages.

  Raises:
    RequestError: where there is none, or one that is half finished.
    EnvironmentFailure: where its index is damaged.
  """
  require(bool(text), f'data source {name!r} names no folder: write '
          'tokens:FOLDER or tokens:gs://BUCKET/NAME')
  folder = storage.path(text, f'the folder of data source {name!r}'
                        ).expanduser()
  if not (folder / INDEX).exists():
    begun = parsed(folder / BEGUN) if (folder / BEGUN).exists() else None
    require(begun is not None, f'data source {name!r} has no {INDEX}, so it is '
            'no folder that tools.tokenize has written')
    done = sum(name[0].isdigit() for name in files.sizes(folder, '.json'))
    raise RequestError(
        f'data source {name!r} is half finished, {done} of '
        f'{begun["shards"]} shards: go on with '
        + command(begun, text, begun.get('holdout_every')))
  data = (folder / INDEX).read_bytes()
  index = Index(folder, parsed(folder / INDEX, data),
                hashlib.blake2b(data, digest_size=16).hexdigest())
  check_format(index.described, folder)
  return index


def command(described: dict[str, Any], folder: Any, every: int | None) -> str:
  """Returns the command that goes on with a folder.

  Args:
    described: what begun.json or index.json holds.
    folder: where it is.
    every: --holdout_every; None: of an earlier version, and not known.
  """
  words = ['python', '-m', 'tools.tokenize', described['source'], '--out',
           str(folder), '--tokenizer', described['tokenizer']['name']]
  if described.get('shard_bytes'):  # 0: of a dataset of Hugging Face
    words += ['--shard_mib', str(described['shard_bytes'] >> 20)]
  if every is not None:
    words += ['--holdout_every', str(every)]
  unknown = '' if 'shard_bytes' in described else (
      ' and the --shard_mib that it was begun with, if that was given')
  return shlex.join(words) + unknown


def check_format(described: dict[str, Any], folder: epath.Path) -> None:
  found = described.get('format')
  require(found == FORMAT, f'{folder} has the format {short(found)} of shards, '
          f'and this program reads {FORMAT}: tokenise into another folder')


def check_tokenizer(index: Index, tokenizer: Tokenizer, name: str) -> None:
  """Raises RequestError for a tokenizer other than the one of the tokens."""
  made = index.described['tokenizer']
  require(made['fingerprint'] == tokenizer.fingerprint,
          f'data source {name!r} was tokenised with {made["name"]!r}, '
          f'{made["vocab_size"]:,} ids, and data.tokenizer is '
          f'{tokenizer.name!r}, which is another one: choose that of the '
          'tokens, or tokenise into another folder')


def splits(folder: epath.Path) -> list[int]:
  """Returns the data.holdout_every for which it is known what is held out."""
  found = [re.fullmatch(r'split-(\d+)\.json', name)
           for name in files.sizes(folder, '.json')]
  return sorted(int(match[1]) for match in found if match)


def check_shards(index: Index) -> None:
  """Raises EnvironmentFailure naming a shard that is missing or cut short."""
  found = files.sizes(index.folder, SHARD)
  for shard in index.shards:
    name = shard['name'] + SHARD
    if name not in found:
      raise files.missing(f'{index.folder}/{name}')
    if found[name] != shard['size']:
      raise files.damaged(f'{index.folder}/{name}', f'{found[name]:,} bytes, '
                          f'and not {shard["size"]:,}')


def parsed(path: epath.Path, data: bytes | None = None) -> Any:
  """Returns what a file of JSON holds; EnvironmentFailure: it is damaged."""
  try:
    return json.loads(path.read_bytes() if data is None else data)
  except (ValueError, RecursionError) as error:
    raise EnvironmentFailure(
        f'{path} is damaged, it is no JSON: delete it, and the command of '
        'tools.tokenize that made the folder makes it again') from error
