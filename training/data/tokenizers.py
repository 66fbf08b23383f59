"""Tokenizers behind one small interface: text to ids, and back.

`load(spec)` takes data.tokenizer: `bytes`, `bytes:N`, a Hugging Face
tokenizer.json, or a folder (or hf://ORG/NAME) with the files of FOLDERS. A
tokenizer.json is read by the package tokenizers; the other files by the class
of transformers that the folder names, whose pipelines are the same package's
(extra `hf`; without PyTorch). Both happen first in a process with limits
(limited.py).

No tokenizer adds special tokens by itself, and none reads them out of plain
text: '<|endoftext|>' typed inside a document is spelt, not obeyed. Whoever
lays out a sequence (objectives, generation) places the special ids;
a chat template writes them as text, and `encode_placed` obeys it.
"""

from collections.abc import Iterable, Sequence
import functools
import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np

from common.errors import RequestError, require
from training import hub
from training.workdir import storage

NUM_SENTINELS = 100  # T5's <extra_id_0> to <extra_id_99>

# Where a file's own tokenizer_config.json says nothing, the special tokens
# are the first of these that the vocabulary holds.
SPECIAL_NAMES = {
    'bos': ('<|begin_of_text|>', '<s>', '<bos>', '<|startoftext|>'),
    'eos': ('<|end_of_text|>', '<|endoftext|>', '</s>', '<eos>'),
    'pad': ('[PAD]', '<pad>', '<|pad|>', '<|finetune_right_pad_id|>'),
    'mask': ('[MASK]', '<mask>', '<|mask|>'),
    'cls': ('[CLS]', '<cls>'),
    'sep': ('[SEP]', '<sep>'),
}
# The files by which a folder is read; the first that are all there win.
FILES_OF_TOKENIZERS = (('tokenizer.json',), ('vocab.json', 'merges.txt'),
                       ('vocab.txt',), ('tokenizer.model',), ('spiece.model',))
CONFIG_FILE = 'tokenizer_config.json'


class Tokenizer:
  """The interface by which the project knows a tokenizer.

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
    more_ids: the ids of special tokens that the vocabulary itself has not.
    added_texts: {how it is written: id} of all tokens that `encode_placed`
      obeys.
  """

  name: str
  vocab_size: int
  special_ids: dict[str, int]
  sentinel_ids: tuple[int, ...] = ()
  fingerprint: str
  mask_pattern = re.escape('[MASK]')
  ids_before_text: tuple[int, ...] = ()
  ids_outside_vocabulary: frozenset[int] = frozenset()
  id_of_added_text: dict[str, int]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns one int32 [T] array for each text."""

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 [T] ids of one text."""
    return self.encode_batch([text])[0]

  def encode_spans(self, texts: Sequence[str]
                   ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (ids int32 [T], spans int32 [T, 2]) of each text: the ids of
    `encode_batch`, and of each the first of the characters that it stands for,
    and the one after the last. A span may hold the space before a word."""

  def encode_with_special_tokens(self, text: str) -> tuple[np.ndarray,
                                                           np.ndarray]:
    """Returns `encode_spans` of a text in which special tokens are obeyed."""

  def encode_without_special_tokens(self, text: str) -> tuple[np.ndarray,
                                                              np.ndarray]:
    """Returns `encode_spans` of a text in which no token is obeyed that was
    added to the vocabulary, be it special or not."""
    return self.encode_spans([text])[0]

  @property
  def vocabulary(self) -> dict[str, int]:
    """Returns {how it is written: id} of all pieces, without what was added to
    them."""
    return {self.piece(i): i for i in range(self.vocab_size)}

  @property
  def special_texts(self) -> tuple[str, ...]:
    """Returns how the special tokens that `encode_placed` obeys are written."""
    return tuple(self.id_of_added_text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text; special tokens spell nothing."""
    return self.decode_bytes(ids).decode('utf-8', errors='replace')

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the UTF-8 bytes of the text, perhaps cut inside a character."""

  def piece(self, token: int) -> str:
    """Returns how the vocabulary writes an id, a special one too: [SEP]; or
    <NUMBER>, where it does not write it."""

  def save(self, path: pathlib.Path) -> None:
    """Writes a tokenizer.json."""

  def special(self, name: str) -> int:
    """Returns the id of a special token.

    Raises:
      ValueError: if the vocabulary has none, naming those that it has.
    """
    require(name in self.special_ids, f'tokenizer {self.name!r} has no '
            f'{name!r} token: it has {", ".join(self.special_ids) or "none"}')
    return self.special_ids[name]

  @property
  def least_vocab_size(self) -> int:
    """How many ids a model must have: vocab_size, less special tokens at its
    end that are of no kind, such as Gemma 3's <image_soft_token>. Only
    `encode_placed` gives these, of a text that has them."""
    rare = self.ids_outside_vocabulary - {*self.special_ids.values(),
                                          *self.sentinel_ids}
    size = self.vocab_size
    while size - 1 in rare:
      size -= 1
    return size

  @property
  def separator_id(self) -> int:
    """The id between documents, which also starts each: eos, or BERT's sep."""
    if 'sep' in self.special_ids and 'eos' not in self.special_ids:
      return self.special('sep')
    return self.special('eos')

  @property
  def eos_id(self) -> int:
    return self.special('eos')

  @property
  def mask_id(self) -> int:
    return self.special('mask')

  @property
  def cls_id(self) -> int:
    return self.special('cls')

  @property
  def sep_id(self) -> int:
    return self.special('sep')


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
  LEAST = 8
  USUAL = 384

  def __init__(self, size: int = USUAL):
    """Divides the ids among the digits of bytes, special tokens and
    sentinels."""
    self.name = 'bytes' if size == self.USUAL else f'bytes:{size}'
    self.vocab_size = size
    self.fingerprint = f'bytes-{size}'

    # A digit of a byte has as many bits as leave room for the special tokens.
    special = len(self.SPECIAL)
    bits = max(b for b in (1, 2, 4, 8) if 2 ** b + special <= size)
    self._base = 2 ** bits
    # The highest digit comes first.
    self._shifts = np.arange(8 - bits, -1, -bits).astype(np.uint8)

    # Special tokens come after the digits, and the sentinels are the last.
    self.special_ids = {}
    for i, name in enumerate(self.SPECIAL):
      self.special_ids[name] = self._base + i
    self.id_of_added_text = {self.piece(i): i
                             for i in self.special_ids.values()}
    sentinels = min(NUM_SENTINELS, size - self._base - special)
    self.sentinel_ids = tuple(range(size - sentinels, size))

  @property
  def is_bytewise(self) -> bool:
    """Tells whether a byte has one id, and not one for each of some digits."""
    return len(self._shifts) == 1

  def encode_batch(self, texts: Sequence[str]):
    rows = []
    for text in texts:
      bytes_T = np.frombuffer(text.encode('utf-8'), np.uint8)
      digits_TD = bytes_T[:, None] >> self._shifts & self._base - 1
      rows.append(digits_TD.reshape(-1).astype(np.int32))
    return rows

  def encode_spans(self, texts: Sequence[str]):
    """Returns the ids of each text, and the character of each id."""
    encoded = []
    for text, ids in zip(texts, self.encode_batch(texts)):
      # Each character stands behind as many ids as its bytes have digits.
      sizes = [len(character.encode('utf-8')) * len(self._shifts)
               for character in text]
      places = np.repeat(np.arange(len(sizes)), sizes)
      encoded.append((ids, _array_of_spans(np.stack([places, places + 1], 1))))
    return encoded

  def decode_bytes(self, ids: Iterable[int]):
    """Returns the bytes of ids; special tokens spell nothing."""
    spelt = bytearray()
    byte, digits = 0, 0  # of a byte that is not whole yet
    for i in ids:
      if i >= self._base:  # a special token ends it
        byte = 0
        digits = 0
        continue
      byte = byte * self._base + int(i)
      digits += 1
      if digits == len(self._shifts):
        spelt.append(byte)
        byte = 0
        digits = 0
    return bytes(spelt)

  def piece(self, token):
    for name, i in self.special_ids.items():
      if i == token:
        return f'[{name.upper()}]'
    return f'<{token}>'

  def save(self, path):
    """Writes a byte-level BPE without merges, of bytes of one id each."""
    import tokenizers
    assert self.is_bytewise, self.name
    # Special tokens and sentinels keep the ids that they have here.
    special = {}
    for i in self.special_ids.values():
      special[self.piece(i)] = i
    for number, i in enumerate(self.sentinel_ids):
      special[f'<extra_id_{number}>'] = i
    vocab = _byte_of_character() | special

    # Each byte is a token: nothing is merged, and no text is cut up before.
    pipeline = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False)
    pipeline.decoder = tokenizers.decoders.ByteLevel()
    pipeline.add_special_tokens([*special])
    pipeline.save(str(path))

  def encode_with_special_tokens(self, text: str):
    """Returns the ids of a text in which special tokens are written, and the
    characters of each."""
    # Special tokens, and the text between them.
    names = [re.escape(name) for name in self.id_of_added_text]
    parts = re.split(f'({"|".join(names)})', text)
    ids = []
    spans = []
    place = 0
    for part in parts:
      end = place + len(part)
      if part in self.id_of_added_text:
        ids.append([self.id_of_added_text[part]])
        spans.append([(place, end)])
      else:
        [(part_ids, places)] = self.encode_spans([part])
        ids.append(part_ids)
        spans.append(places + place)
      place = end
    return (np.concatenate(ids).astype(np.int32),
            np.concatenate(spans).astype(np.int32))


class HuggingFace(Tokenizer):
  """A pipeline of the package tokenizers: BPE, unigram or WordPiece."""

  def __init__(self, name: str, tokenizer: Any, ids: dict[str, int | None]):
    """Reads the vocabulary of a tokenizer, and what its special tokens are
    for."""
    special_ids = {kind: i for kind, i in ids.items() if i is not None}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    self.name = name
    self._tokenizer = tokenizer

    # The vocabulary, and the tokens that were added to it.
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    require(bool(vocab), f'tokenizer {name!r} has an empty vocabulary')
    self.vocab_size = 1 + max(vocab.values())
    require(self.vocab_size <= 2**31, f'tokenizer {name!r} has the id '
            f'{self.vocab_size - 1:,}: they must be below {2**31:,}')
    self._bytes_of_id = _bytes_of_byte_level_ids(tokenizer, vocab)
    self._added = tokenizer.get_added_tokens_decoder()
    self.id_of_added_text = {token.content: i for i,
                             token in self._added.items()}
    # Some, as WordPiece's [UNK], are pieces besides, which plain text gives.
    pieces = tokenizer.get_vocab(with_added_tokens=False)
    more = []
    for i, token in self._added.items():
      if token.special and token.content not in pieces:
        more.append(i)
    self.ids_outside_vocabulary = frozenset(more)

    # The tokens that have a use.
    self.special_ids = _find_cls_and_sep(tokenizer) | special_ids
    sentinel_ids = []
    for number in range(NUM_SENTINELS):
      sentinel = f'<extra_id_{number}>'
      if sentinel in vocab:
        sentinel_ids.append(vocab[sentinel])
    self.sentinel_ids = tuple(sentinel_ids)
    if 'mask' in special_ids:
      self.mask_pattern = self._pattern_of_mask(special_ids['mask'])
    self.ids_before_text = _find_ids_before_text(tokenizer)

    described = json.dumps([tokenizer.to_str(), special_ids])
    self.fingerprint = hashlib.blake2b(described.encode('utf-8'),
                                       digest_size=16).hexdigest()

  def _pattern_of_mask(self, mask_id: int) -> str:
    """Returns the pattern of a mask. RoBERTa's takes the space before it
    along."""
    added = self._added.get(mask_id)
    before = r'\s*' if getattr(added, 'lstrip', False) else ''
    after = r'\s*' if getattr(added, 'rstrip', False) else ''
    spelling = re.escape(self.piece(mask_id))
    return f'{before}(?:{spelling}|{self.mask_pattern}){after}'

  def encode_batch(self, texts: Sequence[str]):
    encodings = self._encode('encode_batch_fast', self._tokenizer, list(texts))
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def encode_spans(self, texts: Sequence[str]):
    encodings = self._encode('encode_batch', self._tokenizer, list(texts))
    return [*map(_ids_and_spans, encodings)]

  def encode_with_special_tokens(self, text: str):
    return _ids_and_spans(self._encode('encode', self._obeying_pipeline, text))

  def encode_without_special_tokens(self, text: str):
    return _ids_and_spans(self._encode('encode', self._spelling_pipeline, text))

  def _encode(self, how: str, pipeline: Any, text: str | list[str]) -> Any:
    """Returns what a method of the library makes of a text or several, which
    raises bare Exception, and where it panics what is none."""
    try:
      return getattr(pipeline, how)(text, add_special_tokens=False)
    except BaseException as error:
      if isinstance(error, KeyboardInterrupt | SystemExit):
        raise
      raise RequestError(f'tokenizer {self.name!r} fails at a text: {error}'
                         ) from error

  @property
  def special_texts(self):
    return tuple(token.content for token in self._added.values()
                 if token.special)

  @property
  def vocabulary(self):
    return self._tokenizer.get_vocab(with_added_tokens=False)

  def _copy_pipeline(self, spells: bool) -> Any:
    """Returns the pipeline as it obeys all added tokens, transformers' usual
    one, or as it spells them all."""
    import tokenizers
    pipeline = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    # The library spells special tokens alone on request.
    pipeline.add_special_tokens([*self.id_of_added_text] if spells else [])
    pipeline.encode_special_tokens = spells
    return pipeline

  @functools.cached_property
  def _obeying_pipeline(self) -> Any:
    return self._copy_pipeline(spells=False)

  @functools.cached_property
  def _spelling_pipeline(self) -> Any:
    return self._copy_pipeline(spells=True)

  def decode_bytes(self, ids: Iterable[int]):
    ids = [int(i) for i in ids]
    if self._bytes_of_id is not None:
      return b''.join(self._bytes_of_id.get(i, b'') for i in ids)
    return self._tokenizer.decode(ids).encode('utf-8')

  def piece(self, token):
    return self._tokenizer.id_to_token(token) or f'<{token}>'

  def save(self, path):
    self._tokenizer.save(str(path))


def load(spec: str) -> Tokenizer:
  """Returns the tokenizer that data.tokenizer names.

  Args:
    spec: see the head of this file.

  Raises:
    ValueError: if there is no such file, or it is not a tokenizer.
  """
  # Bytes.
  if re.fullmatch(r'bytes(:\d{1,3})?', spec):
    size = int(spec.partition(':')[2] or Bytes.USUAL)
    require(Bytes.LEAST <= size <= Bytes.USUAL, f'tokenizer {spec!r}: choose '
            f'from bytes:{Bytes.LEAST} to bytes:{Bytes.USUAL}')
    return Bytes(size)

  # A folder.
  spec = str(hub.download_if_on_hub(spec, weights=False))
  path = pathlib.Path(spec).expanduser()
  if path.is_dir():
    names = find_tokenizer_files(path)
    if not names:
      readable = '; '.join(' + '.join(files) for files in FILES_OF_TOKENIZERS)
      raise RequestError(f'tokenizer folder {spec!r} holds none of: {readable}')
    if names != ('tokenizer.json',):
      return _read_with_transformers(spec, path, names)
    path = path / 'tokenizer.json'

  # A tokenizer.json.
  if not path.is_file() or path.suffix != '.json':
    raise RequestError(
        f'unknown tokenizer {spec!r}, which is no such file or folder: choose '
        'bytes, bytes:N, a tokenizer.json, or a folder of Hugging Face with a '
        'tokenizer, of the hub hf://ORG/NAME')
  from training.data import limited
  limited.call_with_limits(
      f'tokenizer {spec!r} cannot be read as a Hugging Face ' 'tokenizer.json',
      'read_json', str(path.absolute()))
  return _read_tokenizer_json(spec, path)


def find_tokenizer_files(folder: pathlib.Path) -> tuple[str, ...]:
  """Returns the files by which `load` reads a folder; () if it does not."""
  for names in FILES_OF_TOKENIZERS:
    if all((folder / name).is_file() for name in names):
      return names
  return ()


def read_special_tokens(folder: pathlib.Path) -> dict[str, str]:
  """Returns {'bos_token': '<s>', ...} as the files of a folder name them: its
  tokenizer_config.json and, for what that leaves out, a
  special_tokens_map.json, as folders of earlier versions of transformers have
  one."""
  named = {}
  for name in ('special_tokens_map.json', CONFIG_FILE):
    if not (folder / name).is_file():
      continue
    for key, value in storage.read_json(folder / name).items():
      if isinstance(value, dict):
        value = value.get('content')
      if key.endswith('_token') and isinstance(value, str):
        named[key] = value
  return named


def _read_tokenizer_json(spec: str, path: pathlib.Path) -> Tokenizer:
  """Returns the tokenizer of a tokenizer.json, and of what stands beside it."""
  import tokenizers
  pipeline = tokenizers.Tokenizer.from_file(str(path))
  special = {}
  for i, token in pipeline.get_added_tokens_decoder().items():
    if token.special:
      special[token.content] = i

  # The files beside it name the special tokens, or else usual names do.
  named = read_special_tokens(path.parent)
  ids: dict[str, int | None] = {}
  for kind, names in SPECIAL_NAMES.items():
    ids[kind] = pipeline.token_to_id(named.get(f'{kind}_token', ''))
    if ids[kind] is not None:
      continue
    for name in names:
      if name in special:
        ids[kind] = special[name]
        break
  return HuggingFace(spec, pipeline, ids)


def _read_with_transformers(
    spec: str, folder: pathlib.Path, names: tuple[str, ...]) -> Tokenizer:
  """Returns the tokenizer of a folder, whose files the class of transformers
  that it names reads."""
  import tokenizers
  from training.data import limited
  text, ids = limited.call_with_limits(
      f'tokenizer {spec!r}: transformers cannot read {" + ".join(names)}',
      'read_others', str(folder), [*SPECIAL_NAMES])
  return HuggingFace(spec, tokenizers.Tokenizer.from_str(text), ids)


def _find_cls_and_sep(tokenizer: Any) -> dict[str, int]:
  """Returns cls and sep, where a pipeline puts texts between them as BERT and
  RoBERTa do: cls, a text, sep; cls, a text, one sep or two, another text, sep.
  """
  frames = set()
  for row, pattern in ((tokenizer.encode('a'), '10+1'),
                       (tokenizer.encode('a', 'b'), '10+11?0+1')):
    # The mask is 1 at special tokens: around one text, and between two.
    mask = row.special_tokens_mask
    if not re.fullmatch(pattern, ''.join(map(str, mask))):
      return {}
    first, *after = [i for i, special in zip(row.ids, mask) if special]
    frames |= {(first, i) for i in after}
  if len(frames) > 1:
    return {}
  [(cls, sep)] = frames
  if cls == sep:
    return {}
  return {'cls': cls, 'sep': sep}


def _find_ids_before_text(tokenizer: Any) -> tuple[int, ...]:
  """Returns the ids that a pipeline puts before each text."""
  row = tokenizer.encode('a')
  before = []
  for i, special in zip(row.ids, row.special_tokens_mask):
    if not special:
      break
    before.append(i)
  return tuple(before)


def _byte_of_character() -> dict[str, int]:
  """Returns the byte that each character of a byte-level vocabulary stands for
  (GPT-2's encoder.py, bytes_to_unicode)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = sorted({*range(256)} - {*printable})
  byte_of = {chr(byte): byte for byte in printable}
  for i, byte in enumerate(others):
    byte_of[chr(256 + i)] = byte
  return byte_of


def _bytes_of_byte_level_ids(tokenizer: Any, vocab: dict[str, int]
                     ) -> dict[int, bytes] | None:
  """Returns {id: the bytes it spells} of a byte-level BPE, or None.

  Such a vocabulary writes each byte as one printable character, so a token's
  bytes are known exactly even where a window cuts a character in two.
  """
  import tokenizers
  if not isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
    return None
  byte_of = _byte_of_character()
  table = {}
  added = tokenizer.get_added_tokens_decoder()
  for token, i in vocab.items():
    # Added tokens are written as they are, special ones spell nothing.
    if i in added:
      table[i] = b'' if added[i].special else token.encode('utf-8')
    elif byte_of.keys() >= set(token):
      table[i] = bytes(byte_of[character] for character in token)
  return table


def _ids_and_spans(encoding: Any) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids and the spans of an encoding of the package tokenizers."""
  return np.asarray(encoding.ids, np.int32), _array_of_spans(encoding.offsets)


def _array_of_spans(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
  return np.asarray(pairs, np.int32).reshape(-1, 2)


# How many tokens of a prompt are decoded with what follows.
_TOKENS_OF_CONTEXT = 8


def decode_after_prompt(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray,
                        prompt: Sequence[int] | np.ndarray = ()) -> bytes:
  """Returns the bytes that ids add to the text of a prompt.

  Where words carry the space before them, as sentencepiece and WordPiece have
  it, what is decoded alone begins without one: so the end of the prompt is
  decoded along, and cut off.
  """
  end = [int(token) for token in prompt[-_TOKENS_OF_CONTEXT:]]
  before = tokenizer.decode_bytes(end)
  whole = tokenizer.decode_bytes([*end, *ids])
  # A decoder that tidies up may change the end of the prompt.
  if whole.startswith(before):
    return whole[len(before):]
  return tokenizer.decode_bytes(ids)
