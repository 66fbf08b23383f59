r"""Trains a tokenizer on a source of text, or shows what one does.

  python -m tools.tokenizer train --kind bpe --source sotu --vocab_size 8192 \
      --out runs/bpe.json
  python -m tools.tokenizer info --tokenizer runs/bpe.json --source sotu
  python -m tools.tokenizer encode --tokenizer runs/bpe.json --text 'We, the'

What `train` writes is a Hugging Face tokenizer.json, which a run takes as
--config.data.tokenizer=FILE. Documents held out for evaluation are left out.
"""

import argparse
from collections.abc import Iterator
import itertools
import json
import os
import sys

from configs import base
from configs.errors import RequestError, require
from training import cli, limits, progress
from training.data import holdout, sources
from training.data import texts, tokenizer_files, tokenizers
from training.workdir import storage


def _bpe():
  """GPT-2's byte-level BPE: every text round-trips, nothing is unknown."""
  import tokenizers as hf
  tokenizer = hf.Tokenizer(hf.models.BPE())
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  return tokenizer, hf.trainers.BpeTrainer, dict(
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())


def _unigram():
  """T5's unigram language model over words with their leading space."""
  import tokenizers as hf
  tokenizer = hf.Tokenizer(hf.models.Unigram())
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
  tokenizer.decoder = hf.decoders.Metaspace()
  return tokenizer, hf.trainers.UnigramTrainer, dict(unk_token='<unk>')


def _wordpiece():
  """BERT's uncased WordPiece: lower case, no accents, punctuation apart."""
  import tokenizers as hf
  tokenizer = hf.Tokenizer(hf.models.WordPiece(unk_token='[UNK]'))
  tokenizer.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = hf.decoders.WordPiece()
  return tokenizer, hf.trainers.WordPieceTrainer, {}


KINDS = {'bpe': _bpe, 'unigram': _unigram, 'wordpiece': _wordpiece}
# Sources of text, by prefix.
TEXT = [usage for prefix, usage in sources.USAGE.items()
        if prefix not in ('conll', 'squad', 'probe', 'tokens')]
# The special tokens of each kind's family, in the order of their ids.
SPECIALS = {
    'bpe': ['<|endoftext|>'],
    'unigram': ['<pad>', '</s>', '<unk>'],
    'wordpiece': ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'],
}


def train(kind: str, source: str, vocab_size: int, out: str,
          holdout_every: int, extra_specials: list[str]) -> dict:
  """Trains a tokenizer, writes it to `out`, and returns its description.

  Raises:
    ValueError: if vocab_size does not even hold the special tokens and the
      alphabet, or if the text does not suffice for it.
  """
  specials = [*SPECIALS[kind], *extra_specials]
  tokenizer, trainer, options = KINDS[kind]()
  if vocab_size <= len(specials):
    raise RequestError(f'--vocab_size={vocab_size} does not hold the '
                       f'{len(specials)} special tokens.')
  documents = _texts(source, holdout_every)
  storage.try_file(out, '--out')
  try:
    with progress.during(f'training {kind}'):
      tokenizer.train_from_iterator(documents, trainer(
          vocab_size=vocab_size, special_tokens=specials, show_progress=False,
          **options))
  except (RequestError, OSError):
    raise  # Of the source: it says itself what is wrong.
  except Exception as error:  # tokenizers raises bare Exception.
    raise RequestError(f'training {kind} on {source!r} failed: {error}.'
                       ) from error
  made = tokenizer.get_vocab_size(with_added_tokens=True)
  if made > vocab_size:
    raise RequestError(
        f'--vocab_size={vocab_size} is too small: the special tokens and the '
        f'alphabet of {source!r} alone are {made}.')
  temporary = f'{out}.{os.getpid()}'
  os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
  tokenizer.save(temporary)
  os.replace(temporary, out)
  return describe(out) | {'asked_for': vocab_size}


def describe(name: str, source: str = '', holdout_every: int = 0) -> dict:
  """Returns what tokenizer `name` is and, on a source, how short its text is.
  """
  documents = _texts(source, holdout_every) if source else ()
  tokenizer = tokenizers.load(name)
  described = dict(
      tokenizer=name, vocab_size=tokenizer.vocab_size,
      special_ids=tokenizer.special_ids,
      sentinels=len(tokenizer.sentinel_ids),
      fingerprint=tokenizer.fingerprint)
  if source:
    tokens = num_bytes = 0
    for text in progress.each(documents, 'texts encoded'):
      tokens += len(tokenizer.encode(text))
      num_bytes += len(text.encode('utf-8'))
    require(tokens > 0, f'data source {source!r} holds no text of which '
            f'--tokenizer={name} makes a token: choose another of either')
    described |= dict(source=source, tokens=tokens, bytes=num_bytes,
                      bytes_per_token=num_bytes / tokens)
  return described


def encode(name: str, text: str) -> dict:
  """Returns the ids of a text, the piece of text of each, and it decoded."""
  tokenizer = tokenizers.load(name)
  ids = tokenizer.encode(text).tolist()
  return dict(ids=ids, pieces=[tokenizer.decode([i]) for i in ids],
              decoded=tokenizer.decode(ids))


def _texts(spec: str, holdout_every: int) -> Iterator[str]:
  """Returns the texts of a source that are not held out.

  Raises:
    RequestError: for a source that holds no text; and, as its end is read, for
      one of which all is held out.
  """
  parsed = [source for _, source in sources.parse(spec)]
  for source in parsed:
    require(not source.drawn and (not source.records or bool(
        source.as_document)), f'data source {source.name!r} holds '
            f'{source.records}, and no text that tools.tokenizer could read: '
            'choose from ' + ', '.join(TEXT))
  return itertools.chain.from_iterable(
      _read(source, holdout_every) for source in parsed)


def _read(source: sources.Source, holdout_every: int) -> Iterator[str]:
  taken = i = 0
  for i, document in enumerate(
      holdout.split(source, holdout_every).documents(), 1):
    if holdout.held_out(i - 1, holdout_every):
      continue
    taken += 1
    if isinstance(document, str):
      yield document
    else:
      yield from (text for _, text in document)
  require(taken > 0, f'data source {source.name!r} has {i} document(s), of '
          f'which --holdout_every={holdout_every} leaves none: choose 0, or '
          'another source')


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m tools.tokenizer', description=__doc__,
      allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True)

  trainer = commands.add_parser(
      'train', help='train one and write its file', allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  trainer.add_argument('--kind', choices=KINDS, default='bpe',
                       help='the algorithm')
  trainer.add_argument('--source', default='sotu',
                       help=', '.join(TEXT))
  trainer.add_argument('--vocab_size', type=int, required=True,
                       help='special tokens included')
  trainer.add_argument('--out', required=True, metavar='FILE.json',
                       help='the file to write')
  trainer.add_argument('--special', action='append', default=[],
                       metavar='TOKEN', help='one more special token, such '
                       'as [MASK]; may be repeated')
  trainer.add_argument('--sentinels', type=int, metavar='N',
                       help="add T5's <extra_id_0> to <extra_id_N-1> "
                       '(default: 100 for unigram, else 0)')

  info = commands.add_parser(
      'info', help='vocabulary and special tokens', allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  info.add_argument('--source', default='',
                    help='also count the tokens and bytes of its documents')
  encoder = commands.add_parser(
      'encode', help='the ids of a text', allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  encoder.add_argument('--text', help='default: what is on standard input')
  for command in info, encoder:
    command.add_argument('--tokenizer', required=True,
                         help='bytes, a file or a folder, as data.tokenizer')
  for command in trainer, info:
    command.add_argument(
        '--holdout_every', type=int, default=base.base().data.holdout_every,
        help='leave out what data.holdout_every holds out of training')
  for command in trainer, info, encoder:
    command.add_argument('--json', action='store_true', help='print one object')
  return parser


def main(argv: list[str] | None = None):
  args = _parser().parse_args(argv)
  if args.command != 'encode':
    limits.number('--holdout_every', args.holdout_every, (('>=', 0),))
  if args.command == 'train':
    if not args.out.endswith('.json'):
      raise RequestError(f'--out={args.out} must end in .json.')
    limits.number('--vocab_size', args.vocab_size,
                  (('>=', 1), ('<=', 2**26)))
    count = args.sentinels
    if count is None:
      count = tokenizer_files.SENTINELS if args.kind == 'unigram' else 0
    limits.number('--sentinels', count, (('>=', 0), ('<=', 10_000)))
    specials = args.special + [f'<extra_id_{i}>' for i in range(count)]
    result = train(args.kind, args.source, args.vocab_size, args.out,
                   args.holdout_every, specials)
  elif args.command == 'info':
    result = describe(args.tokenizer, args.source, args.holdout_every)
  else:
    text = (texts.decoded(sys.stdin.buffer.read(), 'standard input')
            if args.text is None else texts.checked(args.text, '--text'))
    result = encode(args.tokenizer, text)
  if args.json:
    print(json.dumps(result))
  else:
    for key, value in result.items():
      print(f'{key:>16}  {value}')


if __name__ == '__main__':
  cli.run(main)
