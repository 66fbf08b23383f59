"""What of a pre-training a Hugging Face folder may lack, or have too much.

BertForMaskedLM has no pooler, BertModel no head; what fine-tuning or
sentence-transformers writes is one of them. So what a page calls optional may
be missing as a whole and is drawn, or be there without a place in the model and
is passed over. Both are told. A part of it that is missing is damage.
"""

from collections.abc import Collection, Sequence
import dataclasses
import re

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import tensor_map


def lacking(page: hf.HuggingFace, tensors: Sequence[tensor_map.Tensor],
            held: Collection[str]) -> dict[str, list[tensor_map.Tensor]]:
  """Returns {what it is called: its tensors} of what the model has and the
  files do not.

  Args:
    page: the record of the system.
    tensors: of the model.
    held: the names in the files.
  """
  found = {words: [t for t in tensors if re.fullmatch(pattern, t.name)]
           for words, pattern in page.optional.items()
           if not _of(pattern, held)}
  return {words: those for words, those in found.items() if those}


def spare(page: hf.HuggingFace, tensors: Sequence[tensor_map.Tensor],
          held: Collection[str]) -> dict[str, list[str]]:
  """Returns {what it is called: its names in the files} of what the files have
  and the model does not; see `lacking`."""
  names = [tensor.name for tensor in tensors]
  found = {words: _of(pattern, held)
           for words, pattern in page.optional.items()
           if not _of(pattern, names)}
  return {words: those for words, those in found.items() if those}


def is_new(words: str, tensors: Sequence[tensor_map.Tensor]) -> str:
  """Returns the sentence on what is drawn."""
  paths = dict.fromkeys(path for tensor in tensors for path in tensor.paths)
  return (f'the files have no {words}, so these parameters are new, drawn from '
          f'the seed: {", ".join(paths)}')


def is_passed_over(words: str, names: Sequence[str]) -> str:
  """Returns the sentence on what has no place."""
  return (f'the model has no {words}, so these of the files are passed over: '
          f'{", ".join(names)}')


def is_bare(page: hf.HuggingFace, config: ModelConfig,
            held: Collection[str]) -> bool:
  """Whether a folder holds the stack of a language model without its head."""
  return bool(page.bare) and config.head == 'lm' and not _of(
      page.optional[hf.MASKED_WORDS], held)


def as_in(ours: ModelConfig, theirs: ModelConfig) -> ModelConfig:
  """Returns `theirs` with the optional heads of `ours`."""
  return dataclasses.replace(theirs, next_sentence=ours.next_sentence)


def _of(pattern: str, names: Collection[str]) -> list[str]:
  return [name for name in names if re.fullmatch(pattern, name)]
