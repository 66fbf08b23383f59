"""Files of pairs for sequence to sequence, one a line: source, a tab, target;
or in a file that ends in .jsonl an object with `source` and `target`."""

from collections.abc import Iterator

from configs.errors import RequestError
from training.data import texts

PAIR = ('source', 'target')


def read(path: str) -> Iterator[list[tuple[str, str]]]:
  """Yields the (kind, text) parts of each pair of a file."""
  pair = _of_json if path.endswith('.jsonl') else _of_tsv
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      where = f'{path}, line {number},'
      text = texts.decoded(line, where).rstrip('\r\n')
      text = text.removeprefix('\ufeff') if number == 1 else text
      if text.strip():
        yield list(zip(PAIR, pair(text, where)))


def _of_tsv(line: str, where: str) -> list[str]:
  fields = line.split('\t')
  if len(fields) != 2:
    raise RequestError(f'{where} has {len(fields)} fields: a pair is a source, '
                       'one tab and a target.')
  return fields


def _of_json(line: str, where: str) -> list[str]:
  record = texts.parsed(line, where)
  pair = [record.get(kind) if isinstance(record, dict) else None
          for kind in PAIR]
  if not all(isinstance(text, str) for text in pair):
    raise RequestError(f'{where} is no pair: an object with source and target.')
  return [texts.checked(text, where) for text in pair]
