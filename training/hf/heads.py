"""Heads in a Hugging Face folder: that of a task in config.json, its class and
the names of its outputs; and those of a pre-training, of which a folder may
lack some, or have too many.

transformers tells heads by the class under `architectures`, and counts outputs
by id2label, whose names are LABEL_0, ... where a training gave none.

BertForMaskedLM has no pooler, BertModel no head; what fine-tuning or
sentence-transformers writes is one of them. So what a page calls optional may
be missing as a whole and is drawn, or be there without a place in the model and
is passed over. Both are told. A part of it that is missing is damage.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import re
from typing import Any

from architectures.parts import heads
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import tensor_map
from configs.errors import require, short

OUTPUTS = 2  # where a config.json says nothing of them


def read(reader: hf.Reader, page: hf.HuggingFace) -> dict[str, Any]:
  """Returns the fields of the model that say which head it has."""
  named = reader.listed('architectures')
  head = next((head for head, row in page.heads.items()
               if row.architecture in named), 'lm')
  if 'num_labels' not in heads.HEADS[head].fields:
    return dict(head=head)
  if head == 'sequence':
    reader.choose('problem_type', PROBLEMS[-1], dict(zip(PROBLEMS, PROBLEMS)))
  return dict(head=head, num_labels=len(reader('id2label', {})) or reader(
      'num_labels', OUTPUTS))


PROBLEMS = ('regression', 'single_label_classification')


def write(config: ModelConfig, labels: Sequence[str] = ()) -> dict[str, Any]:
  """Returns what a config.json says of the head of a task.

  Args:
    config: the model's.
    labels: what its outputs stand for; none: LABEL_0, ...
  """
  if config.head == 'lm':
    return {}
  fields: dict[str, Any] = dict(classifier_dropout=config.head_dropout)
  if config.num_labels:
    labels = labels or _default(config.num_labels)
    require(len(labels) == config.num_labels, f'{len(labels)} labels are of '
            f'another model than one of model.num_labels {config.num_labels}')
    fields |= dict(id2label={str(i): name for i, name in enumerate(labels)},
                   label2id={name: i for i, name in enumerate(labels)})
  if config.head == 'sequence':
    fields['problem_type'] = PROBLEMS[config.num_labels > 1]
  return fields


def labels(tree: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns what the outputs of the head of a config.json stand for, in their
  order; none where it does not say.

  Raises:
    RequestError: for a table that is none of names by number.
  """
  table = tree.get('id2label')
  if table is None:
    return ()
  said = f'config.json has id2label {short(table)}: it must be an object'
  require(isinstance(table, dict), said)
  numbers = [str(i) for i in range(len(table))]
  require(set(table) == set(numbers), f'{said} whose keys are 0, 1, ...')
  found = tuple(table[i] for i in numbers)
  require(all(isinstance(name, str) for name in found),
          f'{said} whose values are strings')
  require(len(set(found)) == len(found), f'{said} without a name twice')
  return told(found)


def told(names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns labels, or () where they are LABEL_0, ..., which say nothing."""
  return () if names == _default(len(names)) else names


def names(tree: Mapping[str, Any], count: int) -> tuple[str, ...]:
  """Returns the `labels` of a config.json, or LABEL_0, ... where there are
  several outputs and it does not say what they are."""
  return labels(tree) or (_default(count) if count > 1 else ())


def _default(count: int) -> tuple[str, ...]:
  return tuple(f'LABEL_{i}' for i in range(count))


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
