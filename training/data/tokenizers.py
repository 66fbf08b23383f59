"""Tokenizers behind one small interface: text to ids, and back.

`load(spec)` takes data.tokenizer: `bytes`, `bytes:N`, `sotu`, a Hugging Face
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

# The tokenizer of 1,024 tokens that comes with the package. It was made by
# `python -m tools.tokenizer train --vocab_size 1024 --out FILE`.
TOKENIZER_OF_SOTU = pathlib.Path(__file__).with_name('sotu_tokenizer.json')
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
    ids_before_text: what Hugging Face's tokenizer of this vocabulary puts
      before each text. None is put there here: lm_eval's conventions ask for
      it.
    ids_outside_vocabulary: the ids of special tokens that the vocabulary itself
      has not.
    id_of_added_text: {how it is written: id} of all tokens that `encode_placed`
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
    """Returns the token ids of each text, int32 [T]."""

  def encode(self, text: str) -> np.ndarray:
    """Returns the token ids of one text, int32 [T]."""
    return self.encode_batch([text])[0]

  def encode_spans(self, texts: Sequence[str]
                   ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the token ids of each text and where each token stands in it.

    Returns:
      For each text, int32 [T], the ids of `encode_batch`; and int32 [T, 2], the
      first character that each token stands for, and the one after its last. A
      span may hold the space before a word.
    """

  def encode_with_special_tokens(self, text: str) -> tuple[np.ndarray,
                                                           np.ndarray]:
    """Returns the ids and spans of a text, as `encode_spans` does, in which
    special tokens that are written out are obeyed."""

  def encode_without_special_tokens(self, text: str) -> tuple[np.ndarray,
                                                              np.ndarray]:
    """Returns the ids and spans of a text, as `encode_spans` does, in which
    every token that was added to the vocabulary is spelt, be it special or not.
    """
    return self.encode_spans([text])[0]

  @property
  def vocabulary(self) -> dict[str, int]:
    """Returns {how it is written: id} of all pieces of the vocabulary, without
    the tokens that were added to it."""
    return {self.piece(i): i for i in range(self.vocab_size)}

  @property
  def special_texts(self) -> tuple[str, ...]:
    """Returns how the special tokens that `encode_placed` obeys are written."""
    return tuple(self.id_of_added_text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of token ids; special tokens spell nothing."""
    return self.decode_bytes(ids).decode('utf-8', errors='replace')

  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """Returns the UTF-8 bytes of the text of token ids, perhaps cut inside a
    character."""

  def piece(self, token: int) -> str:
    """Returns how the vocabulary writes a token id, a special one too: [SEP];
    or <NUMBER>, where it does not write it."""

  def save(self, path: pathlib.Path) -> None:
    """Writes the tokenizer to a file, as a tokenizer.json."""

  def special(self, name: str) -> int:
    """Returns the id of a special token.

    Args:
      name: bos, eos, pad, mask, cls or sep.

    Raises:
      RequestError: if the vocabulary has none, naming those that it has.
    """
    require(name in self.special_ids, f'tokenizer {self.name!r} has no '
            f'{name!r} token: it has {", ".join(self.special_ids) or "none"}')
    return self.special_ids[name]

  @property
  def least_vocab_size(self) -> int:
    """The least number of ids that a model with this tokenizer must have.

    It is vocab_size without special tokens at the end of the vocabulary that
    are not used here, such as Gemma 3's <image_soft_token>. Only
    `encode_with_special_tokens` returns them, for a text that contains them.
    """
    used_ids = {*self.special_ids.values(), *self.sentinel_ids}
    unused_ids = self.ids_outside_vocabulary - used_ids
    size = self.vocab_size
    while size - 1 in unused_ids:
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
    """Divides the ids among the digits of bytes, special tokens and sentinels.

    With 256 ids for it, a byte is one token. With fewer, it is written in
    several digits: with 16 in two, with 4 in four, and with 2 in eight.

    Args:
      size: the number of ids.
    """
    self.name = 'bytes' if size == self.USUAL else f'bytes:{size}'
    self.vocab_size = size
    self.fingerprint = f'bytes-{size}'

    # Choose the most bits of a digit that leave room for the special tokens. A
    # digit of b bits needs 2 ** b ids.
    num_special = len(self.SPECIAL)
    bits = max(b for b in (1, 2, 4, 8) if 2 ** b + num_special <= size)
    self._base = 2 ** bits
    # By how many bits a byte is shifted for each digit, the highest first.
    self._shifts = np.arange(8 - bits, -1, -bits).astype(np.uint8)

    # Special tokens come after the digits. Sentinels, which stand for spans
    # that are cut out of a text, are the last ids.
    self.special_ids = {}
    for i, name in enumerate(self.SPECIAL):
      self.special_ids[name] = self._base + i
    self.id_of_added_text = {}
    for token in self.special_ids.values():
      self.id_of_added_text[self.piece(token)] = token
    num_sentinels = min(NUM_SENTINELS, size - self._base - num_special)
    self.sentinel_ids = tuple(range(size - num_sentinels, size))

  @property
  def is_bytewise(self) -> bool:
    """Whether a byte has one id, and not one for each of several digits."""
    return len(self._shifts) == 1

  def encode_batch(self, texts: Sequence[str]):
    """Returns the ids of each text, int32 [T * D]: D digits for each of its T
    bytes, the highest first."""
    rows = []
    for text in texts:
      # Each of the T bytes becomes D digits: shift the byte, keep the low bits.
      bytes_T = np.frombuffer(text.encode('utf-8'), np.uint8)
      digits_TD = bytes_T[:, None] >> self._shifts & self._base - 1
      rows.append(digits_TD.reshape(-1).astype(np.int32))
    return rows

  def encode_spans(self, texts: Sequence[str]):
    """Encodes texts, and tells to which character each token belongs.

    Args:
      texts: the texts.

    Returns:
      For each text its ids, int32 [T]; and the spans of its T tokens, int32
      [T, 2]: the index of the first character of each, and the one after its
      last.
    """
    encoded = []
    for text, ids in zip(texts, self.encode_batch(texts)):
      # Each character has as many ids as its bytes have digits, and all of them
      # have the character's span.
      ids_of_character = []
      for character in text:
        num_bytes = len(character.encode('utf-8'))
        ids_of_character.append(num_bytes * len(self._shifts))
      places = np.repeat(np.arange(len(text)), ids_of_character)
      spans_T2 = np.stack([places, places + 1], axis=1)
      encoded.append((ids, _array_of_spans(spans_T2)))
    return encoded

  def decode_bytes(self, ids: Iterable[int]):
    """Returns the bytes that ids stand for. Special tokens, and bytes of which
    some digits are missing, are left out.

    Args:
      ids: the token ids.
    """
    text = bytearray()
    # Add up the digits of a byte, the highest one first, until it is complete.
    byte = 0
    num_digits = 0
    for token in ids:
      if token >= self._base:
        # A special token or a sentinel drops the digits before it.
        byte = 0
        num_digits = 0
        continue
      byte = byte * self._base + int(token)
      num_digits += 1
      if num_digits == len(self._shifts):
        text.append(byte)
        byte = 0
        num_digits = 0
    return bytes(text)

  def piece(self, token):
    for name, i in self.special_ids.items():
      if i == token:
        return f'[{name.upper()}]'
    return f'<{token}>'

  def save(self, path):
    """Writes this tokenizer as a tokenizer.json: a byte-level BPE without
    merges. It must have one token for each byte.

    Args:
      path: the file to write.
    """
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
    """Encodes a text in which special tokens are read as such.

    Args:
      text: the text.

    Returns:
      The ids, int32 [T]; and the first character of each token and the one
      after its last, int32 [T, 2].
    """
    # Split the text into special tokens and the text between them. The brackets
    # of the pattern keep the special tokens among the pieces.
    patterns = [re.escape(written) for written in self.id_of_added_text]
    pieces = re.split(f'({"|".join(patterns)})', text)

    # Encode each piece, and note where it lies in the text.
    ids = []
    spans = []
    start = 0
    for piece in pieces:
      end = start + len(piece)
      if piece in self.id_of_added_text:
        ids.append([self.id_of_added_text[piece]])
        spans.append([(start, end)])
      else:
        # The spans of a piece count from its own start.
        [(piece_ids, piece_spans)] = self.encode_spans([piece])
        ids.append(piece_ids)
        spans.append(piece_spans + start)
      start = end
    return (np.concatenate(ids).astype(np.int32),
            np.concatenate(spans).astype(np.int32))


class HuggingFace(Tokenizer):
  """A tokenizer of the package tokenizers: BPE, unigram or WordPiece.

  Args:
    name: the spec that it was loaded from.
    tokenizer: the pipeline of the package.
    ids: {'bos' | 'eos' | 'pad' | 'mask' | 'cls' | 'sep': its id, or None}.
  """

  def __init__(self, name: str, tokenizer: Any, ids: dict[str, int | None]):
    """Reads the vocabulary of the pipeline, and finds its special tokens.

    Raises:
      RequestError: for a vocabulary that is empty or too large.
    """
    special_ids = {kind: i for kind, i in ids.items() if i is not None}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    self.name = name
    self._tokenizer = tokenizer

    # Read the vocabulary, and the tokens that were added to it. Ids are int32.
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    require(bool(vocab), f'tokenizer {name!r} has an empty vocabulary')
    self.vocab_size = 1 + max(vocab.values())
    require(self.vocab_size <= 2**31, f'tokenizer {name!r} has the id '
            f'{self.vocab_size - 1:,}: they must be below {2**31:,}')
    self._bytes_of_id = _bytes_of_byte_level_ids(tokenizer, vocab)
    self._added = tokenizer.get_added_tokens_decoder()
    self.id_of_added_text = {token.content: i for i,
                             token in self._added.items()}
    # Special tokens that plain text never gives need no row of the embedding,
    # unless they have a use. WordPiece's [UNK] is a piece besides, which text
    # does give.
    pieces = tokenizer.get_vocab(with_added_tokens=False)
    ids_outside_vocabulary = []
    for i, token in self._added.items():
      if token.special and token.content not in pieces:
        ids_outside_vocabulary.append(i)
    self.ids_outside_vocabulary = frozenset(ids_outside_vocabulary)

    # Find the special tokens that have a use, and T5's sentinels. What the
    # files name is later in the dict and wins.
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

    # Hash all that decides on the ids of a text.
    described = json.dumps([tokenizer.to_str(), special_ids])
    self.fingerprint = hashlib.blake2b(described.encode('utf-8'),
                                       digest_size=16).hexdigest()

  def _pattern_of_mask(self, mask_id: int) -> str:
    """Returns a regular expression that finds masks in a text. A mask may be
    written as in the vocabulary, or as [MASK].

    Args:
      mask_id: the id of the mask.
    """
    # Some masks include the spaces before (lstrip) or after them (rstrip), such
    # as RoBERTa's.
    added = self._added.get(mask_id)
    before = r'\s*' if getattr(added, 'lstrip', False) else ''
    after = r'\s*' if getattr(added, 'rstrip', False) else ''
    spelling = re.escape(self.piece(mask_id))
    return f'{before}(?:{spelling}|{self.mask_pattern}){after}'

  def encode_batch(self, texts: Sequence[str]):
    encodings = self._encode('encode_batch_fast', pipeline=self._tokenizer,
                             text=list(texts))
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def encode_spans(self, texts: Sequence[str]):
    encodings = self._encode('encode_batch', pipeline=self._tokenizer,
                             text=list(texts))
    return [*map(_ids_and_spans, encodings)]

  def encode_with_special_tokens(self, text: str):
    return _ids_and_spans(
        self._encode('encode', pipeline=self._obeying_pipeline, text=text))

  def encode_without_special_tokens(self, text: str):
    return _ids_and_spans(
        self._encode('encode', pipeline=self._spelling_pipeline, text=text))

  def _encode(self, method: str, pipeline: Any, text: str | list[str]) -> Any:
    """Calls an encoding method of the package, whose failures become refusals.

    Args:
      method: the name of the method of the pipeline.
      pipeline: the tokenizer of the package `tokenizers`.
      text: one text or several, as the method takes.

    Raises:
      RequestError: where the package fails at the text.
    """
    try:
      return getattr(pipeline, method)(text, add_special_tokens=False)
    except BaseException as error:
      # The package raises bare Exception, and a panic of Rust is not even that.
      # A user's Ctrl-C and an exit go on.
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
    """Returns a copy of the tokenizer that treats added tokens, such as special
    ones, differently.

    Args:
      spells: whether a token in a text is encoded letter by letter, like any
        other text. If not, it is read as the token, as in transformers.
    """
    import tokenizers
    pipeline = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    # encode_special_tokens concerns only special tokens. To spell all added
    # tokens, make them special in this copy.
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
  """Loads the tokenizer that data.tokenizer names.

  Args:
    spec: `bytes` or `bytes:N`, where tokens are bytes or parts of them; `sotu`;
      a tokenizer.json; a Hugging Face folder; or hf://ORG/NAME.

  Raises:
    RequestError: if there is no such file, or it is no tokenizer.
  """
  # `bytes` and `bytes:N` need no file.
  if re.fullmatch(r'bytes(:\d{1,3})?', spec):
    size = int(spec.partition(':')[2] or Bytes.USUAL)
    require(Bytes.LEAST <= size <= Bytes.USUAL, f'tokenizer {spec!r}: choose '
            f'from bytes:{Bytes.LEAST} to bytes:{Bytes.USUAL}')
    return Bytes(size)

  # A folder is read by its tokenizer.json; if it has none, by the class of
  # transformers that it names.
  path = find_path(spec)
  if hub.repository_of_name(spec):
    # The folder of the downloaded files is the tokenizer's name, because the
    # chat template, for example, is read from there.
    spec = str(path)
  if path.is_dir():
    names = find_tokenizer_files(path)
    if not names:
      readable = '; '.join(' + '.join(files) for files in FILES_OF_TOKENIZERS)
      raise RequestError(f'tokenizer folder {spec!r} holds none of: {readable}')
    if names != ('tokenizer.json',):
      return _read_with_transformers(spec, folder=path, names=names)
    path = path / 'tokenizer.json'

  # First try the tokenizer.json in another process, with limits of time and
  # memory: the package may crash at a damaged file, or take all memory, which
  # no `except` catches.
  if not path.is_file() or path.suffix != '.json':
    raise RequestError(
        f'unknown tokenizer {spec!r}, which is no such file or folder: choose '
        'bytes, bytes:N, sotu, a tokenizer.json, or a folder of Hugging Face '
        'with a tokenizer, of the hub hf://ORG/NAME')
  from training.data import limited
  limited.call_with_limits(
      f'tokenizer {spec!r} cannot be read as a Hugging Face ' 'tokenizer.json',
      'read_json', str(path.absolute()))
  return _read_tokenizer_json(spec, path)


def find_path(spec: str) -> pathlib.Path:
  """Returns where the file or the folder of a tokenizer is.

  Args:
    spec: `sotu`; a path; or hf://ORG/NAME, whose files this downloads.
  """
  if spec == 'sotu':
    return TOKENIZER_OF_SOTU
  path = hub.download_if_on_hub(spec, weights=False)
  return pathlib.Path(path).expanduser()


def find_tokenizer_files(folder: pathlib.Path) -> tuple[str, ...]:
  """Returns the names of the files by which `load` reads a folder; () if it has
  no tokenizer."""
  for names in FILES_OF_TOKENIZERS:
    if all((folder / name).is_file() for name in names):
      return names
  return ()


def read_special_tokens(folder: pathlib.Path) -> dict[str, str]:
  """Returns the special tokens that the files of a tokenizer's folder name, as
  {'bos_token': '<s>', ...}.

  They stand in tokenizer_config.json. Folders of earlier versions of
  transformers may also have a special_tokens_map.json, which is read for tokens
  that the other file does not name.

  Args:
    folder: the folder of a tokenizer. It need not have these files.
  """
  # Read tokenizer_config.json last, so that its tokens overwrite the others.
  special_tokens = {}
  for name in ('special_tokens_map.json', CONFIG_FILE):
    if not (folder / name).is_file():
      continue
    for key, value in storage.read_json(folder / name).items():
      # A token with properties is an object that has its text as `content`.
      if isinstance(value, dict):
        value = value.get('content')
      if key.endswith('_token') and isinstance(value, str):
        special_tokens[key] = value
  return special_tokens


def _read_tokenizer_json(spec: str, path: pathlib.Path) -> Tokenizer:
  """Reads a tokenizer from a tokenizer.json. Other files beside it may name its
  special tokens.

  Args:
    spec: the value of data.tokenizer, for messages.
    path: the path of the tokenizer.json.
  """
  # Find the special tokens of the tokenizer.json, {text: id}.
  import tokenizers
  pipeline = tokenizers.Tokenizer.from_file(str(path))
  id_of_special = {}
  for i, token in pipeline.get_added_tokens_decoder().items():
    if token.special:
      id_of_special[token.content] = i

  # For each kind, such as eos, take the token that the other files name, if it
  # is in the vocabulary. Else take the first of the usual names that is. None:
  # there is no token of this kind.
  token_of_key = read_special_tokens(path.parent)
  ids: dict[str, int | None] = {}
  for kind, usual_names in SPECIAL_NAMES.items():
    ids[kind] = pipeline.token_to_id(token_of_key.get(f'{kind}_token', ''))
    if ids[kind] is not None:
      continue
    for name in usual_names:
      if name in id_of_special:
        ids[kind] = id_of_special[name]
        break
  return HuggingFace(spec, tokenizer=pipeline, ids=ids)


def _read_with_transformers(
    spec: str, folder: pathlib.Path, names: tuple[str, ...]) -> Tokenizer:
  """Reads the tokenizer of a folder without a tokenizer.json, by the class of
  transformers that the folder names.

  Args:
    spec: the value of data.tokenizer, for messages.
    folder: the path of the folder.
    names: the names of the files that this class reads, for messages.

  Raises:
    RequestError: where transformers cannot read them.
  """
  import tokenizers
  from training.data import limited
  text, ids = limited.call_with_limits(
      f'tokenizer {spec!r}: transformers cannot read {" + ".join(names)}',
      'read_others', str(folder), [*SPECIAL_NAMES])
  return HuggingFace(spec, tokenizer=tokenizers.Tokenizer.from_str(text),
                     ids=ids)


def _find_cls_and_sep(tokenizer: Any) -> dict[str, int]:
  """Finds the special tokens [CLS] and [SEP] that a tokenizer puts around
  texts, by trying it on one text and on two.

  BERT and RoBERTa write one text as [CLS] text [SEP]. They write two texts as
  [CLS] text [SEP] text [SEP], or with two [SEP] between them.

  Args:
    tokenizer: the tokenizer, of the package tokenizers.

  Returns:
    {'cls': id, 'sep': id}; {} for a tokenizer that puts other tokens around
    texts.
  """
  # Encode one text and two. The mask is 1 at special tokens, so its digits must
  # fit '10+1' for [CLS] text [SEP], where 0+ is the text.
  frames = set()
  one_text = tokenizer.encode('a')
  two_texts = tokenizer.encode('a', 'b')
  for encoding, pattern in ((one_text, '10+1'), (two_texts, '10+11?0+1')):
    mask = encoding.special_tokens_mask
    if not re.fullmatch(pattern, ''.join(map(str, mask))):
      return {}
    special_ids = []
    for token, is_special in zip(encoding.ids, mask):
      if is_special:
        special_ids.append(token)
    cls, *separators = special_ids
    for separator in separators:
      frames.add((cls, separator))

  # They must be the same two tokens everywhere, and different ones.
  if len(frames) > 1:
    return {}
  [(cls, sep)] = frames
  if cls == sep:
    return {}
  return {'cls': cls, 'sep': sep}


def _find_ids_before_text(tokenizer: Any) -> tuple[int, ...]:
  """Returns the ids of the special tokens that a pipeline puts before a text.
  """
  encoding = tokenizer.encode('a')
  ids_before = []
  for token, is_special in zip(encoding.ids, encoding.special_tokens_mask):
    if not is_special:
      break
    ids_before.append(token)
  return tuple(ids_before)


def _byte_of_character() -> dict[str, int]:
  """Returns {character: byte} of a byte-level vocabulary, which writes each
  byte as one printable character (GPT-2's encoder.py, bytes_to_unicode)."""
  # Bytes that are printable characters of Latin-1 stand for themselves. The
  # others, such as the space, are the characters from 256 on, in their order.
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  other_bytes = sorted({*range(256)} - {*printable})
  byte_of = {chr(byte): byte for byte in printable}
  for i, byte in enumerate(other_bytes):
    byte_of[chr(256 + i)] = byte
  return byte_of


def _bytes_of_byte_level_ids(tokenizer: Any, vocab: dict[str, int]
                             ) -> dict[int, bytes] | None:
  """Returns the bytes that each token of a byte-level BPE stands for.

  Such a vocabulary writes each byte as one printable character. So the bytes of
  a token are known exactly, even if it ends in the middle of a character of the
  text.

  Args:
    tokenizer: the tokenizer, of the package tokenizers.
    vocab: {token: id}.

  Returns:
    {id: bytes}; None for a tokenizer of another kind. A token whose id is
    missing stands for no bytes.
  """
  import tokenizers
  if not isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
    return None
  byte_of = _byte_of_character()
  table = {}
  added = tokenizer.get_added_tokens_decoder()
  for token, i in vocab.items():
    # Added tokens are written as they are, and not byte by byte. Special ones
    # spell nothing.
    if i in added:
      table[i] = b'' if added[i].special else token.encode('utf-8')
    elif byte_of.keys() >= set(token):
      table[i] = bytes(byte_of[character] for character in token)
  return table


def _ids_and_spans(encoding: Any) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ids int32 [T] and the spans int32 [T, 2] of an encoding of the
  package tokenizers."""
  return np.asarray(encoding.ids, np.int32), _array_of_spans(encoding.offsets)


def _array_of_spans(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
  """Returns (first character, end) pairs as an array, int32 [T, 2]."""
  return np.asarray(pairs, np.int32).reshape(-1, 2)


# So many tokens of a prompt are decoded along with what follows it.
_TOKENS_OF_CONTEXT = 8


def decode_after_prompt(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray,
                        prompt: Sequence[int] | np.ndarray = ()) -> bytes:
  """Returns the bytes of text that tokens add to a prompt.

  In sentencepiece and WordPiece, a word has the space before it. If ids are
  decoded alone, this first space is lost. So the end of the prompt is decoded
  with them, and its text is removed from the result.

  Args:
    tokenizer: the tokenizer of the model.
    ids: the ids after the prompt.
    prompt: the ids of the prompt; () if there is none.

  Returns:
    UTF-8 bytes, which may end in the middle of a character.
  """
  # A few tokens of the prompt are enough to see whether a space comes next.
  end_of_prompt = [int(token) for token in prompt[-_TOKENS_OF_CONTEXT:]]
  text_of_prompt = tokenizer.decode_bytes(end_of_prompt)
  text = tokenizer.decode_bytes([*end_of_prompt, *ids])
  # A decoder may tidy up spaces, for instance before a full stop, and so change
  # the end of the prompt. Then decode the ids alone.
  if text.startswith(text_of_prompt):
    return text[len(text_of_prompt):]
  return tokenizer.decode_bytes(ids)
