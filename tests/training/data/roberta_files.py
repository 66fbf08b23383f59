"""Tokenizers of RoBERTa's kind, small, in the files that folders have."""

import json
import pathlib
from typing import Any

SPECIAL = ('<s>', '<pad>', '</s>', '<unk>')


def write(folder: pathlib.Path, *, framing: Any = None, pair: bool = False,
          **described: Any) -> pathlib.Path:
  """Writes a byte-level BPE with the special tokens of roberta-base.

  Args:
    folder: into which it is written.
    framing: the post_processor of its tokenizer.json; None: RobertaProcessing.
    pair: whether it is written as vocab.json and merges.txt instead.
    **described: tokenizer_config.json.
  """
  import tokenizers as hf
  letters = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate(
      [*SPECIAL, *letters, 'an', 'Ġan', '<mask>'])}
  merges = [('a', 'n'), ('Ġ', 'an')]
  (folder / 'tokenizer_config.json').write_text(
      json.dumps(dict(model_max_length=512) | described))
  if pair:
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    (folder / 'merges.txt').write_text(
        '#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in merges))
    return folder
  tokenizer = hf.Tokenizer(hf.models.BPE(vocab, merges, unk_token='<unk>'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  tokenizer.add_special_tokens([
      *SPECIAL, hf.AddedToken('<mask>', lstrip=True)])
  tokenizer.post_processor = framing or hf.processors.RobertaProcessing(
      ('</s>', 2), ('<s>', 0), trim_offsets=True, add_prefix_space=False)
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


def template(single: str, pair: str) -> Any:
  """Returns a post_processor that writes the special tokens of a template."""
  import tokenizers as hf
  return hf.processors.TemplateProcessing(
      single=single, pair=pair,
      special_tokens=[('<s>', 0), ('</s>', 2)])
