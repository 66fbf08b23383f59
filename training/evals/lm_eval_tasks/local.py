"""The documents of the tasks beside this file, and what is counted of them."""

import functools
import os
import pathlib
from typing import Any

from common.errors import RequestError, require
from training.data import texts

# The environment variable that names the data folder.
DATA_VARIABLE = 'ARCHETYPE_DATA'


def blimp(folder: str = '', **_: Any):
  """Returns the pairs of sentences of BLiMP's files, as lm_eval reads them.

  Args:
    folder: the data folder, of which the folder blimp is read.
    **_: other metadata of the task.
  """
  return _load_documents(folder, 'blimp', (
      'sentence_good', 'sentence_bad', 'linguistics_term'))


def blimp_results(doc: dict, results: list[tuple[float, bool]]
                  ) -> dict[str, float]:
  """Scores a pair of sentences of BLiMP (Warstadt et al. 2020): is the
  grammatical sentence likelier to the model than the other one?

  Args:
    doc: the pair, with its phenomenon as `linguistics_term`.
    results: (log-probability, whether greedy) of the good sentence and of the
      bad one.

  Returns:
    {figure: 1 or 0}: 'acc', which lm_eval averages over all pairs, and 'acc
    PHENOMENON', which it averages over the pairs of this phenomenon.
  """
  (good, _), (bad, _) = results
  is_right = float(good > bad)
  return {'acc': is_right, f'acc {doc["linguistics_term"]}': is_right}


def cloze(folder: str = '', **_: Any):
  """Returns the texts of files as LAMBADA's, whose last words are asked for.

  Args:
    folder: the data folder, of which the folder cloze is read.
    **_: other metadata of the task.
  """
  return _load_documents(folder, 'cloze', ('text',))


def cloze_results(doc: dict, results: list[tuple[float, bool]]
                  ) -> dict[str, Any]:
  """Scores the last word of a text, as in LAMBADA.

  Args:
    doc: the text, as `text`.
    results: [(log-probability of the last word, whether it is the likeliest)].

  Returns:
    {figure: what lm_eval averages into it}: for the perplexity a
    log-probability, and for bits per byte also the number of bytes.
  """
  # The space before the word is predicted with it.
  [(log_prob, greedy)] = results
  word = ' ' + doc['text'].rsplit(' ', 1)[1]
  return {'acc': float(greedy), 'perplexity': log_prob,
          'bits_per_byte': (log_prob, len(word.encode()))}


@functools.lru_cache  # a run that is evaluated as it trains asks again
def _load_documents(folder: str, name: str, fields: tuple[str, ...]):
  """Loads the documents of an lm_eval task from a folder of *.jsonl files.

  Args:
    folder: the data folder; '': $ARCHETYPE_DATA.
    name: the name of the task's folder in it.
    fields: the fields with text that each object must have.

  Returns:
    {'validation': a data set of the package `datasets`, with a row for each
    line}.

  Raises:
    RequestError: where there is no such folder, or a line is wrong.
  """
  import datasets
  # Find the files. `datasets` is imported late, as it is an optional package.
  root = folder or os.environ.get(DATA_VARIABLE, '')
  require(bool(root), f'lm_eval reads the folder {name} of a data folder, and '
          f'none is named: pass --lm_eval_data=DIR, or set {DATA_VARIABLE}')
  data_folder = pathlib.Path(root) / name
  files = sorted(data_folder.glob('*.jsonl'))
  require(bool(files), f'{data_folder} holds no *.jsonl: lm_eval reads the '
          f'folder {name} of --lm_eval_data, or of {DATA_VARIABLE}')

  # Read the fields of each line.
  documents = []
  for file in files:
    for location, row in texts.read_rows(str(file)):
      document = {}
      for field in fields:
        text = texts.check_text(row.get(field), f'{location}, field {field!r},')
        document[field] = text.strip()
        if field == 'text' and ' ' not in document[field]:
          raise RequestError(f'{location}, has one word alone: the last word '
                             'of a text is asked for')
      documents.append(document)
  require(bool(documents), f'{data_folder} holds no line')
  return {'validation': datasets.Dataset.from_list(documents)}
