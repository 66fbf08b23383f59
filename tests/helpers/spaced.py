"""A tokenizer whose words carry the space before them, as sentencepiece's."""

import pathlib

import tokenizers as library

from training.data import tokenizers

WORDS = ('the', 'model', 'reads', 'a', 'line')


def make(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns it; its file is written into a folder."""
  pipeline = library.Tokenizer(library.models.WordLevel(
      {'?': 0, **{f'▁{word}': i + 1 for i, word in enumerate(WORDS)}}, '?'))
  pipeline.pre_tokenizer = library.pre_tokenizers.Metaspace()
  pipeline.decoder = library.decoders.Metaspace()
  pipeline.add_special_tokens(['<s>', '</s>'])
  pipeline.save(str(folder / 'tokenizer.json'))
  return tokenizers.load(str(folder))
