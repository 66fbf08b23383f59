"""Tokenizers behind one small interface: text to ids, and back.

`load(spec)` takes data.tokenizer: `bytes`, `bytes:N`, a Hugging Face
tokenizer.json, a sentencepiece `.model`, or a folder that holds one (or GPT-2's
encoder.json + vocab.bpe, vocab.json + merges.txt, or BERT's vocab.txt).

No tokenizer adds special tokens by itself, and none reads them out of plain
text: '<|endoftext|>' typed inside a document is spelt, not obeyed. Whoever
lays out a sequence (packing, objectives, generation) places the special ids;
a chat template writes them as text, and `encode_placed` obeys it.
"""

import abc
from collections.abc import Callable, Iterable, Sequence
import difflib
import functools
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from configs.errors import RequestError, require
from training.data import added_tokens, tokenizer_files


class Tokenizer(abc.ABC):
  """What the rest of the project knows of a tokenizer.

  Attributes:
    name: the spec that it was loaded from.
    vocab_size: one more than the highest id. model.vocab_size=0 takes it.
    special_ids: {'bos' | 'eos' | 'pad' | 'mask' | 'cls' | 'sep': id}, of the
      special tokens that this vocabulary has.
    sentinel_ids: ids of <extra_id_0>, <extra_id_1>, ... in that order.
    fingerprint: changes when any text could be encoded otherwise.
    mask_pattern: a regular expression for a mask that is to be filled in: the
      vocabulary's own spelling, or [MASK].
    added_ids: what Hugging Face's tokenizer of this vocabulary puts before
      each text. None is put there here: lm_eval's conventions ask for it.
    more_ids: of special tokens that the vocabulary itself has not.
  """

  name: str
  vocab_size: int
  special_ids: dict[str, int]
  sentinel_ids: tuple[int, ...] = ()
  fingerprint: str
  mask_pattern = re.escape('[MASK]')
  added_ids: tuple[int, ...] = ()
  more_ids: frozenset[int] = frozenset()

  def __reduce__(self):
    return load, (self.name,)  # To a worker goes the name alone.

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns one int32 [T] array for each text."""

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 [T] ids of one text."""
    return self.encode_batch([text])[0]

  @abc.abstractmethod
  def encode_spans(self, texts: Sequence[str]
                   ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (ids int32 [T], spans int32 [T, 2]) of each text: the ids of
    `encode_batch`, and of each the first of the characters that it stands for,
    and the one after the last. A span may hold the space before a word."""

  def encode_placed(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns `encode_spans` of a text in which special tokens are obeyed."""
    return added_tokens.around(text, self._specials,
                               lambda piece: self.encode_spans([piece])[0])

  @property
  def _specials(self) -> list[added_tokens.Added]:
    """The special tokens that `encode_placed` obeys."""
    return [added_tokens.Added(self.piece(i), i)
            for i in sorted({*self.special_ids.values()})]

  @property
  def special_texts(self) -> tuple[str, ...]:
    """How these are written."""
    return tuple(token.content for token in self._specials)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text; special tokens spell nothing."""
    return self.decode_bytes(ids).decode('utf-8', errors='replace')

  @abc.abstractmethod
  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the UTF-8 bytes of the text, perhaps cut inside a character."""

  @abc.abstractmethod
  def piece(self, token: int) -> str:
    """Returns how the vocabulary writes an id, a special one too: [SEP]; or
    <NUMBER>, where it does not write it."""

  def num_bytes(self, ids: Iterable[int]) -> int:
    """Returns how many bytes of text the ids spell, for bits per byte."""
    return len(self.decode_bytes(ids))

  def special(self, name: str) -> int:
    """Returns the id of a special token.

    Raises:
      ValueError: if the vocabulary has none, naming those that it has.
    """
    if name not in self.special_ids:
      raise RequestError(
          f'tokenizer {self.name!r} has no {name!r} token: '
          f'it has {", ".join(self.special_ids) or "none"}.')
    return self.special_ids[name]

  @property
  def least_size(self) -> int:
    """How many ids a model must have: vocab_size, less special tokens at its
    end that are of no kind, such as Gemma 3's <image_soft_token>. Only
    `encode_placed` gives these, of a text that has them."""
    rare = self.more_ids - {*self.special_ids.values(), *self.sentinel_ids}
    size = self.vocab_size
    while size - 1 in rare:
      size -= 1
    return size

  @property
  def separator_id(self) -> int:
    """The id between documents, which also starts each: eos, or BERT's sep."""
    return self.special('eos' if 'sep' not in self.special_ids
                        or 'eos' in self.special_ids else 'sep')

  bos_id = property(lambda self: self.special('bos'))
  eos_id = property(lambda self: self.special('eos'))
  pad_id = property(lambda self: self.special('pad'))
  mask_id = property(lambda self: self.special('mask'))
  cls_id = property(lambda self: self.special('cls'))
  sep_id = property(lambda self: self.special('sep'))


class Bytes(Tokenizer):
  """UTF-8 bytes as ids 0 to 255, then 128 special ids: 384 = 3 x 128 in all.

  256 to 261 are pad, bos, eos, mask, cls and sep, 262 to 283 are free, and
  the last hundred are the sentinels. A multiple of 128 keeps the embedding
  and the logits divisible on every mesh; ByT5 has 384 for the same reason.

  `bytes:N` does with N ids, for weights of a small vocabulary that came
  without a tokenizer: where 256 and the six do not fit, a byte is spelt in
  2, 4 or 8 digits of base 16, 4 or 2, and the sentinels are what is left.
  """

  SPECIAL = ('pad', 'bos', 'eos', 'mask', 'cls', 'sep')
  LEAST, USUAL = 8, 384

  def __init__(self, size: int = USUAL):
    self.name = 'bytes' if size == self.USUAL else f'bytes:{size}'
    self.vocab_size = size
    bits = max(b for b in (1, 2, 4, 8) if 2 ** b + len(self.SPECIAL) <= size)
    self.special_ids = {name: 2 ** bits + i
                        for i, name in enumerate(self.SPECIAL)}
    left = size - 2 ** bits - len(self.SPECIAL)
    sentinels = min(tokenizer_files.SENTINELS, left)
    self.sentinel_ids = tuple(range(size - sentinels, size))
    self.fingerprint = f'bytes-{size}'
    self._base = 2 ** bits
    # The highest digit comes first.
    self._shifts = np.arange(8 - bits, -1, -bits).astype(np.uint8)

  def encode_batch(self, texts: Sequence[str]):
    rows = [np.frombuffer(text.encode('utf-8'), np.uint8) for text in texts]
    return [(row[:, None] >> self._shifts & self._base - 1).reshape(-1).astype(
        np.int32) for row in rows]

  def encode_spans(self, texts: Sequence[str]):
    sizes = [[len(c.encode('utf-8')) * len(self._shifts) for c in text]
             for text in texts]
    first = [np.repeat(np.arange(len(each)), each) for each in sizes]
    return [(ids, _spans(np.stack([places, places + 1], 1)))
            for ids, places in zip(self.encode_batch(texts), first)]

  def decode_bytes(self, ids: Iterable[int]):
    spelt, digits = bytearray(), []
    for i in ids:
      digits = [*digits, int(i)] if i < self._base else []
      if len(digits) == len(self._shifts):
        spelt.append(sum(d << int(s) for d, s in zip(digits, self._shifts)))
        digits = []
    return bytes(spelt)

  def piece(self, token):
    names = {i: f'[{name.upper()}]' for name, i in self.special_ids.items()}
    return names[token] if token in names else f'<{token}>'


class HuggingFace(Tokenizer):
  """A `tokenizers` pipeline: BPE, unigram or WordPiece."""

  def __init__(self, name: str, tokenizer: Any, special_ids: dict[str, int],
               framing: dict[str, int]):
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    self.name = name
    self._tokenizer = tokenizer
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    require(bool(vocab), f'tokenizer {name!r} has an empty vocabulary')
    self.vocab_size = 1 + max(vocab.values())
    self.special_ids = framing | special_ids
    self.sentinel_ids = tokenizer_files.sentinels(vocab.get)
    self.more_ids = tokenizer_files.more_ids(tokenizer)
    if 'mask' in special_ids:
      self.mask_pattern = tokenizer_files.mask_pattern(
          tokenizer, special_ids['mask'], self.mask_pattern)
    described = json.dumps([tokenizer.to_str(), special_ids])
    self.fingerprint = _digest(described.encode('utf-8'))
    self._bytes_of_id = tokenizer_files.byte_level_table(tokenizer, vocab)
    placed = tokenizer.encode('a')
    ends = [*placed.special_tokens_mask, 0].index(0)
    self.added_ids = tuple(placed.ids[:ends])

  def encode_batch(self, texts: Sequence[str]):
    encodings = self._tokenizer.encode_batch_fast(
        list(texts), add_special_tokens=False)
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def encode_spans(self, texts: Sequence[str]):
    encodings = self._tokenizer.encode_batch(
        list(texts), add_special_tokens=False)
    return [(np.asarray(encoding.ids, np.int32), _spans(encoding.offsets))
            for encoding in encodings]

  def encode_placed(self, text: str):
    encoding = self._obeying.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32), _spans(encoding.offsets)

  @property
  def special_texts(self):
    added = self._tokenizer.get_added_tokens_decoder()
    return tuple(token.content for token in added.values() if token.special)

  @functools.cached_property
  def _obeying(self) -> Any:
    """The pipeline that obeys special tokens; transformers' usual one."""
    import tokenizers
    pipeline = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    pipeline.encode_special_tokens = False
    return pipeline

  def decode_bytes(self, ids: Iterable[int]):
    ids = [int(i) for i in ids]
    if self._bytes_of_id is not None:
      return b''.join(self._bytes_of_id.get(i, b'') for i in ids)
    return self._tokenizer.decode(ids).encode('utf-8')

  def piece(self, token):
    return self._tokenizer.id_to_token(token) or f'<{token}>'


class SentencePiece(Tokenizer):
  """A sentencepiece model, such as LLaMA's tokenizer.model, with the tokens
  that the files beside it add."""

  def __init__(self, path: pathlib.Path):
    data = path.read_bytes()
    model = tokenizer_files.read_sentencepiece(path, data)
    self.name = str(path)
    self._model = model
    self._pieces = model.vocab_size()
    known = {model.id_to_piece(i): i for i in range(self._pieces)}
    self._added = tokenizer_files.added_to_pieces(path, known)
    self.vocab_size = 1 + max([self._pieces - 1, *self._added])
    hidden = {i for i in known.values() if model.is_control(i)}
    known |= {token.content: i for i, token in self._added.items()}
    ids = {'bos': model.bos_id(), 'eos': model.eos_id(),
           'pad': model.pad_id()}
    self.special_ids = tokenizer_files.named_specials(known.get)
    self.special_ids |= {name: i for name, i in ids.items() if i >= 0}
    usual = dict(self.special_ids)
    self.special_ids |= added_tokens.kinds(
        added_tokens.described(path.parent), known.get)
    self.sentinel_ids = tokenizer_files.sentinels(known.get)
    self.more_ids = frozenset(
        i for i, token in self._added.items() if token.special)
    if 'mask' in self.special_ids:
      own = re.escape(self.piece(self.special_ids['mask']))
      self.mask_pattern = f'(?:{own}|{self.mask_pattern})'
    # As LlamaTokenizer; T5's vocabulary has no bos.
    self.added_ids = tuple(i for i in (model.bos_id(),) if i >= 0)
    more = [list(self._added.values()), self.special_ids]
    self.fingerprint = _digest(data if more == [[], usual] else
                               data + json.dumps(more).encode('utf-8'))
    self._hidden = {*self.special_ids.values(), *hidden}
    self._shown = [t for t in self._added.values()
                   if not t.special and t.id not in self._hidden]
    self._letter = next(iter({*range(self._pieces)} - self._hidden))

  def encode_batch(self, texts: Sequence[str]):
    if self._shown:
      return [ids for ids, _ in self.encode_spans(texts)]
    return [np.asarray(ids, np.int32)
            for ids in self._model.encode(list(texts))]

  def encode_spans(self, texts: Sequence[str]):
    if self._shown:
      return [added_tokens.around(text, self._shown, self._between)
              for text in texts]
    return [self._between(text) for text in texts]

  @property
  def _specials(self):
    own = {token.id: token for token in super()._specials}
    return list((own | {i: token for i, token in self._added.items()
                        if token.special or i in own}).values())

  def _between(self, text: str):
    pieces = self._model.encode(text, out_type='proto').pieces
    ids = np.asarray([piece.id for piece in pieces], np.int32)
    return ids, tokenizer_files.piece_spans(text, pieces, self._model.is_byte)

  def decode_bytes(self, ids: Iterable[int]):
    known = {t.id for t in self._shown}
    ids = [int(i) for i in ids]
    ids = [i for i in ids if i in known or 0 <= i < self._pieces]
    return tokenizer_files.decode_around(
        [i for i in ids if i not in self._hidden], self._shown,
        self._model.decode, self._letter).encode('utf-8')

  def piece(self, token):
    if token in self._added:
      return self._added[token].content
    known = 0 <= token < self._pieces  # A model may have more.
    return self._model.id_to_piece(token) if known else f'<{token}>'


def load(spec: str) -> Tokenizer:
  """Returns the tokenizer that data.tokenizer names.

  Raises:
    ValueError: if there is no such file, or it is not a tokenizer.
  """
  if re.fullmatch(r'bytes(:\d{1,3})?', spec):
    size = int(spec.partition(':')[2] or Bytes.USUAL)
    if not Bytes.LEAST <= size <= Bytes.USUAL:
      raise RequestError(f'tokenizer {spec!r}: choose from bytes:{Bytes.LEAST} '
                         f'to bytes:{Bytes.USUAL}')
    return Bytes(size)
  path = pathlib.Path(os.path.expanduser(spec))
  if os.path.isdir(path):
    if names := found_in(path):
      return FOLDERS[names](spec, *(path / name for name in names))
    wanted = '; '.join(' + '.join(names) for names in FOLDERS)
    raise RequestError(f'tokenizer folder {spec!r} holds none of: {wanted}.')
  if os.path.isfile(path) and path.suffix in FILES:
    return FILES[path.suffix](spec, path)
  missing = '' if os.path.exists(path) else '; there is no such file or folder'
  near = difflib.get_close_matches(spec, ['bytes'])
  hint = " Did you mean 'bytes'?" if near else ''
  raise RequestError(
      f'unknown tokenizer {spec!r}: choose bytes, bytes:N, a tokenizer.json, a '
      'sentencepiece .model, or a folder with encoder.json + vocab.bpe'
      f'{missing}.{hint}')


def found_in(folder: pathlib.Path) -> tuple[str, ...]:
  """Returns the files by which `load` reads a folder; () if it does not."""
  return next((names for names in FOLDERS
               if all((folder / name).is_file() for name in names)), ())


def _spans(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
  return np.asarray(pairs, np.int32).reshape(-1, 2)


def _digest(data: bytes) -> str:
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def _hugging_face(read: Callable):
  return lambda spec, *files: HuggingFace(spec, *read(spec, *files))


# What a folder may hold; the first that it holds entirely wins.
FOLDERS = {
    ('tokenizer.json',): _hugging_face(tokenizer_files.read_json),
    ('encoder.json', 'vocab.bpe'): _hugging_face(tokenizer_files.read_gpt2),
    ('vocab.json', 'merges.txt'): _hugging_face(tokenizer_files.read_gpt2),
    ('vocab.txt',): _hugging_face(tokenizer_files.read_wordpiece),
    ('tokenizer.model',): lambda _, path: SentencePiece(path),
    ('spiece.model',): lambda _, path: SentencePiece(path),
}
FILES = {
    '.json': FOLDERS['tokenizer.json',],
    '.model': lambda _, path: SentencePiece(path),
}
