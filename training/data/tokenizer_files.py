"""Files of tokenizers that Hugging Face's library runs, read: each function
returns the pipeline, {kind: id} of its special tokens and, where their kinds
are not said, those between which the pipeline itself puts a text."""

from collections.abc import Callable, Sequence
import itertools
import json
import pathlib
import re
from typing import Any

import numpy as np

from configs.errors import RequestError, require, short
from training import schema
from training.data import added_tokens

SENTINELS = 100  # T5's <extra_id_0> to <extra_id_99>

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

# Classes of transformers whose vocab.json and merges.txt are read as GPT-2's.
GPT2 = ('GPT2Tokenizer', 'RobertaTokenizer', 'BartTokenizer', 'LEDTokenizer',
        'LongformerTokenizer', 'CodeGenTokenizer', 'PreTrainedTokenizer')
# And those of them that put a text between these tokens.
FRAMING = {'cls': '<s>', 'sep': '</s>'}
FRAMED = ('RobertaTokenizer', 'BartTokenizer', 'LEDTokenizer',
          'LongformerTokenizer')
# Which of these transformers takes for a model_type of config.json, where a
# folder says nothing else.
FRAMED_TYPES = {'roberta': 'RobertaTokenizer', 'bart': 'BartTokenizer',
                'led': 'LEDTokenizer', 'longformer': 'LongformerTokenizer'}


def read_json(spec: str, path: pathlib.Path):
  """Reads a tokenizer.json, and the tokenizer_config.json beside it."""
  import tokenizers
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # tokenizers raises bare Exception.
    raise RequestError(
        f'tokenizer {spec!r} is not a Hugging Face tokenizer.json: '
        f'{_said(error)}.') from error
  added = {token.content: i for i, token
           in tokenizer.get_added_tokens_decoder().items() if token.special}
  special_ids = named_specials(added.get) | added_tokens.kinds(
      _described(path), tokenizer.token_to_id)
  return tokenizer, special_ids, _framing(tokenizer)


def _framing(tokenizer: Any) -> dict[str, int]:
  """Returns cls and sep, where a pipeline puts texts between them as BERT and
  RoBERTa do: cls, a text, sep; cls, a text, one sep or two, another text, sep.
  """
  tokenizer.no_padding()
  tokenizer.no_truncation()
  found = []
  for texts, pattern in ((('a',), '10+1'), (('a', 'b'), '10+11?0+1')):
    row = tokenizer.encode(*texts)
    mask = row.special_tokens_mask
    if not re.fullmatch(pattern, ''.join(map(str, mask))):
      return {}
    first, *after = [i for i, special in zip(row.ids, mask) if special]
    found += [(first, i) for i in after]
  if len({*found}) > 1 or found[0][0] == found[0][1]:
    return {}
  return dict(zip(('cls', 'sep'), found[0]))


def _described(path: pathlib.Path) -> dict:
  """Returns the tokenizer_config.json beside `path`, if any."""
  config = path.parent / 'tokenizer_config.json'
  described = added_tokens.described(path.parent)
  for name in ('do_lower_case', 'strip_accents', 'tokenize_chinese_chars',
               'add_prefix_space'):
    if name in described:
      schema.check_shape(
          described[name], (bool, type(None)), f'{config}: {name}')
  return described


def read_wordpiece(spec: str, path: pathlib.Path):
  """Reads BERT's vocab.txt, a token a line (Devlin et al., tokenization.py);
  the tokenizer_config.json beside it says whether case counts."""
  import tokenizers
  try:
    model = tokenizers.models.WordPiece.from_file(str(path), unk_token='[UNK]')
  except Exception as error:  # tokenizers raises bare Exception.
    raise RequestError(f'tokenizer {spec!r}: {path.name} is no WordPiece '
                       f'vocabulary: {_said(error)}.') from error
  tokenizer = tokenizers.Tokenizer(model)
  if tokenizer.token_to_id('[UNK]') is None:
    raise RequestError(f'tokenizer {spec!r}: {path.name} is no WordPiece '
                       'vocabulary: it has no [UNK].')
  told = _described(path)
  tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
      lowercase=told.get('do_lower_case', True),
      strip_accents=told.get('strip_accents'),
      handle_chinese_chars=told.get('tokenize_chinese_chars', True))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = tokenizers.decoders.WordPiece()
  special_ids = named_specials(tokenizer.token_to_id) | added_tokens.kinds(
      told, tokenizer.token_to_id)
  tokenizer.add_special_tokens(
      [tokenizer.id_to_token(i) for i in special_ids.values()])
  return tokenizer, special_ids, {}


def pair_class(folder: pathlib.Path) -> str:
  """Returns the class of transformers that reads a folder's vocab.json and
  merges.txt; where its tokenizer_config.json names none, the one that follows
  from the model's config.json, if that puts a text between tokens."""
  kind = added_tokens.described(folder).get('tokenizer_class')
  if not kind:
    model = added_tokens.read_object(folder / 'config.json')
    kind = model.get('tokenizer_class') or FRAMED_TYPES.get(
        str(model.get('model_type')))
    kind = kind if str(kind).removesuffix('Fast') in FRAMED else GPT2[0]
  return str(kind).removesuffix('Fast')


def read_gpt2(spec: str, encoder: pathlib.Path, merges: pathlib.Path):
  """Reads GPT-2's pair of files (Radford et al., 2019, encoder.py), and what
  the files beside them say of it."""
  import tokenizers
  told = _described(encoder)
  kind = pair_class(encoder.parent)
  require(kind in GPT2, f'tokenizer {spec!r}: its tokenizer_config.json says '
          f'{short(kind)}, which may cut text elsewhere than GPT-2 does: it '
          'needs a tokenizer.json, as transformers saves it')
  try:
    vocab = json.loads(encoder.read_text(encoding='utf-8'))
    lines = merges.read_text(encoding='utf-8').split('\n')
    lines = lines[1:] if lines[0].startswith('#version') else lines
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    model = tokenizers.models.BPE(vocab, pairs)
  except Exception as error:  # tokenizers raises bare Exception.
    raise RequestError(
        f'tokenizer {spec!r}: {encoder.name} and {merges.name} are not a '
        f'byte-level BPE vocabulary and its merges: {_said(error)}.') from error
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=told.get('add_prefix_space', False) or False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  added = {token.id: token for token in added_tokens.read(encoder.parent)}
  known = vocab | {token.content: i for i, token in added.items()}
  special_ids = named_specials(known.get) | added_tokens.kinds(told, known.get)
  token_of = {i: token for token, i in known.items()}
  for i in special_ids.values():
    added[i] = added.get(i, added_tokens.Added(token_of[i], i))._replace(
        special=True)
  for i, token in sorted(added.items()):
    tokenizer.add_tokens([tokenizers.AddedToken(
        token.content, special=token.special, lstrip=token.lstrip,
        rstrip=token.rstrip, normalized=False)])
    require(tokenizer.token_to_id(token.content) == i, f'tokenizer {spec!r}: '
            f'its files say that {short(token.content)} has the id {i}, and it '
            f'has the id {tokenizer.token_to_id(token.content)}')
  framing = {name: known[token] for name, token in FRAMING.items()
             if kind in FRAMED and token in known}
  return tokenizer, special_ids, framing


def read_sentencepiece(path: pathlib.Path, data: bytes) -> Any:
  """Returns the processor of a file that holds `data`."""
  try:
    import sentencepiece
  except ImportError as error:
    raise RequestError(
        f'tokenizer {str(path)!r} needs the package sentencepiece: '
        "pip install 'archetype[data]'.") from error
  refused = f'tokenizer {str(path)!r} is not a sentencepiece model.'
  require(bool(data), refused)
  try:
    return sentencepiece.SentencePieceProcessor(model_proto=data)
  except RuntimeError as error:
    raise RequestError(refused) from error


def _said(error: Exception) -> str:
  """What a library has against a file, in one line."""
  return short(' '.join(str(error).split()))


def named_specials(id_of: Callable[[str], int | None]) -> dict[str, int]:
  """Returns the special tokens that a vocabulary has by their usual names."""
  found = {}
  for kind, names in SPECIAL_NAMES.items():
    ids = [id_of(name) for name in names if id_of(name) is not None]
    if ids:
      found[kind] = ids[0]
  return found


def sentinels(id_of: Callable[[str], int | None]) -> tuple[int, ...]:
  """Returns the ids of <extra_id_0>, <extra_id_1>, ... of a vocabulary."""
  ids = [id_of(f'<extra_id_{i}>') for i in range(SENTINELS)]
  return tuple(i for i in ids if i is not None)


def more_ids(tokenizer: Any) -> frozenset[int]:
  """Returns the ids of the special tokens that are no pieces of a vocabulary
  besides, as WordPiece's [UNK] is one, which plain text gives."""
  own = tokenizer.get_vocab(with_added_tokens=False)
  return frozenset(
      i for i, token in tokenizer.get_added_tokens_decoder().items()
      if token.special and token.content not in own)


def byte_level_table(tokenizer: Any, vocab: dict[str, int]
                     ) -> dict[int, bytes] | None:
  """Returns {id: the bytes it spells} of a byte-level BPE, or None.

  Such a vocabulary writes each byte as one printable character, so a token's
  bytes are known exactly even where a window cuts a character in two.
  """
  import tokenizers
  if not isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
    return None
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in set(printable)]
  byte_of = {chr(b): b for b in printable}
  byte_of |= {chr(256 + i): b for i, b in enumerate(others)}
  table = {}
  added = tokenizer.get_added_tokens_decoder()
  for token, i in vocab.items():
    if i in added:
      table[i] = b'' if added[i].special else token.encode('utf-8')
    elif byte_of.keys() >= set(token):
      table[i] = bytes(byte_of[c] for c in token)
  return table


def mask_pattern(tokenizer: Any, mask_id: int, usual: str) -> str:
  """Returns the pattern of a mask as `tokenizers` reads it, or of the usual
  one: RoBERTa's takes the space before it along."""
  own = re.escape(tokenizer.id_to_token(mask_id))
  token = tokenizer.get_added_tokens_decoder().get(mask_id)
  before = r'\s*' if token and token.lstrip else ''
  after = r'\s*' if token and token.rstrip else ''
  return f'{before}(?:{own}|{usual}){after}'


def added_to_pieces(path: pathlib.Path, known: dict[str, int]
                    ) -> dict[int, added_tokens.Added]:
  """Returns {id: token} of what the files beside a sentencepiece model add to
  its pieces.

  Raises:
    RequestError: where they have another token for the id of a piece.
  """
  piece_of = {i: piece for piece, i in known.items()}
  found = {}
  for token in added_tokens.read(path.parent):
    piece = piece_of.get(token.id)
    require(piece in (None, token.content), f'tokenizer {str(path)!r}: the '
            f'files beside it say that id {token.id} is {short(token.content)},'
            f' and it has {short(piece)} there')
    if piece is None:
      found[token.id] = token
  return found


def decode_around(ids: list[int], shown: Sequence[added_tokens.Added],
                  decode: Callable[[list[int]], str], letter: int) -> str:
  """Returns the text of a sentencepiece model's ids and of added tokens.

  Args:
    ids: the ids.
    shown: the added tokens among them.
    decode: of the model, which leaves out the space before a text.
    letter: an id before which nothing is left out of what follows it.
  """
  content = {token.id: token.content for token in shown}
  texts, first = [], decode([letter])
  for is_added, run in itertools.groupby(ids, lambda i: i in content):
    run = list(run)
    if is_added:
      texts.append(''.join(content[i] for i in run))
    elif texts:
      texts.append(decode([letter, *run])[len(first):])
    else:
      texts.append(decode(run))
  return ''.join(texts)


def piece_spans(text: str, pieces: Sequence, is_byte: Callable[[int], bool]
                ) -> np.ndarray:
  """Returns the characters [T, 2] that sentencepiece's pieces stand for. A
  piece tells the bytes; of the pieces that spell one character's bytes only the
  last does."""
  spans = np.asarray([(piece.begin, piece.end) for piece in pieces],
                     np.int32).reshape(-1, 2)
  for i in range(len(pieces) - 2, -1, -1):
    if is_byte(pieces[i].id) and spans[i, 0] == spans[i, 1]:
      spans[i] = spans[i + 1]
  sizes = [len(c.encode('utf-8')) for c in text]
  character = np.repeat(np.arange(len(text)), sizes)
  return np.append(character, len(text))[spans].astype(np.int32)
