"""Tokens that a folder adds to a vocabulary: added_tokens.json, and what its
tokenizer_config.json has under added_tokens_decoder; and which are special.

transformers looks for them in a text before anything else is done with it, so
that none is split, and encodes what stands between them on its own.
"""

from collections.abc import Callable, Sequence
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from configs.errors import require, short
from training import schema

KINDS = ('bos', 'eos', 'pad', 'mask', 'cls', 'sep', 'unk')


class Added(NamedTuple):
  """A token that is looked for in a text.

  Attributes:
    content: how it is written.
    id: its id.
    special: whether it spells nothing.
    lstrip, rstrip: whether it takes the space before or after it along.
  """
  content: str
  id: int
  special: bool = True
  lstrip: bool = False
  rstrip: bool = False

  @property
  def pattern(self) -> str:
    return (r'\s*' * self.lstrip + re.escape(self.content)
            + r'\s*' * self.rstrip)


def described(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the tokenizer_config.json of a folder; {} if there is none. Tokens
  of which it says nothing are those of a special_tokens_map.json, as folders of
  earlier versions of transformers have one."""
  names = {*(f'{kind}_token' for kind in KINDS), 'additional_special_tokens'}
  more = {name: value for name, value in read_object(
      folder / 'special_tokens_map.json').items() if name in names}
  return more | read_object(folder / 'tokenizer_config.json')


def read(folder: pathlib.Path) -> list[Added]:
  """Returns the tokens that a folder describes, by their ids: of those of its
  vocabulary too."""
  told = described(folder)
  special = {_content(told.get(f'{kind}_token')) for kind in KINDS}
  more = told.get('additional_special_tokens')
  special |= {_content(token) for token in more or ()} if isinstance(
      more, list) else set()
  file = folder / 'added_tokens.json'
  found = {}
  for content, i in read_object(file).items():
    require(bool(content) and _is_id(i), f'{file} has {short(content)}: '
            f'{short(i)}, which is no token with its id')
    found[i] = Added(content, i, content in special)
  file = folder / 'tokenizer_config.json'
  where = f'{file}: added_tokens_decoder'
  table = told.get('added_tokens_decoder') or {}
  schema.check_shape(table, {}, where)
  for i, token in table.items():
    content = _content(token)
    require(i.isdecimal() and isinstance(token, dict) and content,
            f'{where} has {short(i)}: {short(token)}, which is no token with '
            'its id')
    flags = {name: token.get(name, False)
             for name in ('special', 'lstrip', 'rstrip')}
    require(all(isinstance(x, bool) for x in flags.values())
            and token.get('single_word') in (None, False),
            f'{where} has {short(token)}: special, lstrip and rstrip are true '
            'or false, and single_word is not done here')
    found[int(i)] = Added(content, int(i), **flags)
  return [found[i] for i in sorted(found)]


def kinds(told: dict[str, Any], id_of: Callable[[str], int | None]
          ) -> dict[str, int]:
  """Returns {kind: id} of the special tokens that a tokenizer_config.json
  names, of those that the vocabulary has."""
  named = {kind: _content(told.get(f'{kind}_token')) for kind in KINDS[:-1]}
  return {kind: id_of(token) for kind, token in named.items()
          if token and id_of(token) is not None}


def around(text: str, tokens: Sequence[Added],
           encode: Callable[[str], tuple[np.ndarray, np.ndarray]]
           ) -> tuple[np.ndarray, np.ndarray]:
  """Returns (ids, spans) of a text in which `tokens` stand for themselves.

  Args:
    text: the text.
    tokens: what is looked for in it; of two that begin at the same place the
      longer one is found.
    encode: gives the ids and spans of what is between them.
  """
  tokens = sorted(tokens, key=lambda token: -len(token.content))
  pattern = '|'.join(f'({token.pattern})' for token in tokens) or '(?!)'
  parts, start = [], 0
  def between(stop):
    ids, spans = encode(text[start:stop])
    parts.append((ids, spans + start))
  for match in re.finditer(pattern, text):
    between(match.start())
    parts.append(([tokens[match.lastindex - 1].id], [match.span()]))
    start = match.end()
  between(len(text))
  return (np.concatenate([ids for ids, _ in parts]).astype(np.int32),
          np.concatenate([np.reshape(spans, (-1, 2)) for _, spans in parts]
                         ).astype(np.int32))


def read_object(file: pathlib.Path) -> dict[str, Any]:
  """Returns the object that a JSON file holds; {} if there is no file."""
  if not file.is_file():
    return {}
  tree = schema.parse(file.read_bytes(), str(file))
  schema.check_shape(tree, {}, str(file))
  return tree


def _content(token: Any) -> str:
  """A token's spelling, of both ways in which a file has it; '' for none."""
  token = token.get('content') if isinstance(token, dict) else token
  return token if isinstance(token, str) else ''


def _is_id(value: Any) -> bool:
  return type(value) is int and value >= 0
