r"""Trains a tokenizer on a source of text, by the package tokenizers.

  python -m tools.tokenizer train --kind bpe --source sotu --vocab_size 8192 \
      --out runs/bpe.json

It writes a Hugging Face tokenizer.json, which a run takes as
--config.data.tokenizer=FILE. Documents held out for evaluation are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers as hf

from common.errors import RequestError, require
from configs import base
from training import cli, progress
from training.data import sources, tokens
from training.workdir import storage


class Algorithm(NamedTuple):
  """How the package tokenizers trains one kind of tokenizer.

  Attributes:
    model: the model of the tokenizer, without a vocabulary.
    pre_tokenizer: it cuts a text into words.
    decoder: it joins words to a text.
    trainer: the class of the trainer.
    special: the special tokens, in the order of their ids.
    options: further options of the trainer.
    normalizer: it changes a text before it is cut; None: the text stays.
  """
  model: Any
  pre_tokenizer: Any
  decoder: Any
  trainer: Callable[..., Any]
  special: Sequence[str]
  options: dict[str, Any] = {}
  normalizer: Any = None


ALGORITHMS = {
    # GPT-2's: every text round-trips, nothing is unknown.
    'bpe': Algorithm(
        model=hf.models.BPE(),
        pre_tokenizer=hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=hf.decoders.ByteLevel(), trainer=hf.trainers.BpeTrainer,
        special=['<|endoftext|>'],
        options=dict(initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())),
    # T5's: words with the space before them.
    'unigram': Algorithm(
        model=hf.models.Unigram(), pre_tokenizer=hf.pre_tokenizers.Metaspace(),
        decoder=hf.decoders.Metaspace(), trainer=hf.trainers.UnigramTrainer,
        special=['<pad>', '</s>', '<unk>',
                 *(f'<extra_id_{i}>' for i in range(100))],
        options=dict(unk_token='<unk>')),
    # BERT's uncased: lower case, no accents, punctuation apart.
    'wordpiece': Algorithm(
        model=hf.models.WordPiece(unk_token='[UNK]'),
        pre_tokenizer=hf.pre_tokenizers.BertPreTokenizer(),
        decoder=hf.decoders.WordPiece(), trainer=hf.trainers.WordPieceTrainer,
        special=['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'],
        normalizer=hf.normalizers.BertNormalizer(lowercase=True)),
}


def train_tokenizer(kind: str, documents: Iterator[str], size: int,
                    more_special_tokens: list[str]) -> hf.Tokenizer:
  """Trains a tokenizer on documents.

  Args:
    kind: the algorithm, a key of ALGORITHMS.
    documents: the texts.
    size: the number of ids, special tokens included.
    more_special_tokens: special tokens in addition to those of the algorithm,
      after which they are numbered.

  Returns:
    The trained tokenizer.

  Raises:
    RequestError: if the training fails, or `size` is too small.
  """
  # Put the parts of the algorithm together.
  algorithm = ALGORITHMS[kind]
  tokenizer = hf.Tokenizer(algorithm.model)
  tokenizer.pre_tokenizer = algorithm.pre_tokenizer
  tokenizer.decoder = algorithm.decoder
  if algorithm.normalizer is not None:
    tokenizer.normalizer = algorithm.normalizer

  # Train it. The source of the documents raises errors of its own, which say
  # what is wrong; tokenizers raises bare Exception.
  try:
    trainer = algorithm.trainer(
        vocab_size=size,
        special_tokens=[*algorithm.special, *more_special_tokens],
        show_progress=False, **algorithm.options)
    tokenizer.train_from_iterator(documents, trainer)
  except (RequestError, OSError):
    raise
  except Exception as error:
    raise RequestError(f'training {kind} failed: {error}.') from error

  # The trainer exceeds a size that is too small without an error.
  least_size = tokenizer.get_vocab_size(with_added_tokens=True)
  require(least_size <= size, f'--vocab_size={size} is too small: the special '
          f'tokens and the alphabet alone are {least_size}')
  return tokenizer


def _training_texts(spec: str, holdout_every: int) -> Iterator[str]:
  """Yields the texts of a data source, except the documents that a run would
  hold out for evaluation.

  Args:
    spec: the source, as data.source names it.
    holdout_every: data.holdout_every; one of so many documents is held out.

  Raises:
    RequestError: if a source holds something other than text, such as images.
  """
  for _, source in sources.parse_sources(spec):
    require(sources.TEXT in source.holds, f'data source {source.name!r} holds '
            f'{source.holds[0]}, and no text: choose another')

    # A run selects its documents by these functions too, so that the tokenizer
    # learns from no text that a run is evaluated on. The first one makes two
    # documents of a source that is a single text, of which document 0 is the
    # held-out end. The second one says whether a document is trained on.
    training_source = sources.hold_out_end_of_text(source, holdout_every)
    for i, document in enumerate(training_source.documents()):
      is_selected = tokens.select_documents(
          np.array([i]), holdout_every=holdout_every, split='train')
      if not is_selected.any():
        continue
      # A conversation is a list of pairs, in which the text comes second.
      if isinstance(document, str):
        yield document
      else:
        for _, text in document:
          yield text


def main(argv: list[str] | None = None) -> None:
  """Trains the tokenizer that the command line asks for, and writes it.

  Args:
    argv: the words of the command line; None: those of this process.
  """
  parser = cli.Parser(prog='python -m tools.tokenizer', description=__doc__)
  parser.add_argument('command', choices=['train'])
  parser.add_argument('--kind', choices=ALGORITHMS, default='bpe',
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

  # Refuse a file that cannot be written before anything is trained.
  require(args.out.endswith('.json'), f'--out={args.out} must end in .json')
  storage.check_file_is_writable(args.out, '--out')
  with progress.show_task(f'training {args.kind}'):
    tokenizer = train_tokenizer(
        args.kind, documents=_training_texts(args.source, args.holdout_every),
        size=args.vocab_size, more_special_tokens=args.special)
  storage.write_file(storage.checked_path(args.out, '--out'),
                     tokenizer.to_str(pretty=True))


if __name__ == '__main__':
  cli.run(main)
