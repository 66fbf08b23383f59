"""The Hugging Face side of benchmarks.finetune: the Trainer, on PyTorch.

Examples are made as transformers' own scripts of these tasks make them
(run_glue.py, run_ner.py, run_qa.py), and batches are padded to their longest
row.
"""

import contextlib
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import finetune_tasks
from training.data import conll, labelled, squad
from training.measures import entities, squad_rules


class Rows(list):
  """A data set of torch: rows by number."""


class Classes:
  """A text and its label."""

  def __init__(self, tokenizer: Any, task: Any, train: str, dev: str):
    read = labelled.reader('', (), [train, dev])
    self.tokenizer, self.task = tokenizer, task
    self.train, self.dev = list(read(train)), list(read(dev))
    self.labels = sorted({record.label for record in self.train})

  def model(self, folder: str):
    import transformers
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(self.labels))

  def collator(self):
    import transformers
    return transformers.DataCollatorWithPadding(self.tokenizer)

  def rows(self, records: list) -> Rows:
    return Rows(
        dict(self.tokenizer(*record.texts, truncation=True,
                            max_length=self.task.length),
             labels=self.labels.index(record.label)) for record in records)

  def score(self, predict) -> float:
    scores = predict(self.rows(self.dev)).predictions
    right = [self.labels.index(record.label) for record in self.dev]
    return 100 * float((scores.argmax(-1) == right).mean())


class Words(Classes):
  """A label of each word, which its first token carries."""

  def __init__(self, tokenizer: Any, task: Any, train: str, dev: str):
    self.tokenizer, self.task = tokenizer, task
    self.train, self.dev = list(conll.read(train)), list(conll.read(dev))
    self.labels = sorted({x for sent in self.train for x in sent.labels})

  def model(self, folder: str):
    import transformers
    return transformers.AutoModelForTokenClassification.from_pretrained(
        folder, num_labels=len(self.labels))

  def collator(self):
    import transformers
    return transformers.DataCollatorForTokenClassification(self.tokenizer)

  def rows(self, records: list) -> Rows:
    rows = Rows()
    for sentence in records:
      row = self.tokenizer(sentence.words, is_split_into_words=True,
                           truncation=True, max_length=self.task.length)
      words = row.word_ids()
      rows.append(dict(row, labels=[
          -100 if word is None or word == before
          else self._number(sentence.labels[word])
          for before, word in zip([None, *words], words)]))
    return rows

  def _number(self, label: str) -> int:
    return self.labels.index(label) if label in self.labels else -100

  def score(self, predict) -> float:
    scores = predict(self.rows(self.dev)).predictions.argmax(-1)
    found = []
    for best, sentence in zip(scores, self.dev):
      words = self.tokenizer(
          sentence.words, is_split_into_words=True, truncation=True,
          max_length=self.task.length).word_ids()
      labels = ['O'] * len(sentence.words)  # of words that were cut off, too
      for before, word, k in zip([None, *words], words, best):
        if word is not None and word != before:
          labels[word] = self.labels[k]
      found.append(labels)
    right = [sentence.labels for sentence in self.dev]
    return 100 * entities.measures(right, found)['f1']


class Answers(Classes):
  """A stretch of a paragraph, which is shown in windows."""

  def __init__(self, tokenizer: Any, task: Any, train: str, dev: str):
    self.tokenizer, self.task = tokenizer, task
    self.train, self.dev = ([(paragraph.context, question)
                             for paragraph in squad.read(path)
                             for question in paragraph.questions]
                            for path in (train, dev))

  def model(self, folder: str):
    import transformers
    return transformers.AutoModelForQuestionAnswering.from_pretrained(folder)

  def _windows(self, context: str, question: Any):
    """Yields (inputs, the characters of each token of the context)."""
    found = self.tokenizer(
        question.question.strip(), context, truncation='only_second',
        max_length=self.task.length, stride=self.task.stride,
        return_overflowing_tokens=True, return_offsets_mapping=True)
    for i in range(len(found['input_ids'])):
      spans = [place if of == 1 else None for place, of in zip(
          found['offset_mapping'][i], found.sequence_ids(i))]
      yield {key: found[key][i] for key in (
          'input_ids', 'token_type_ids', 'attention_mask')}, spans

  def rows(self, records: list) -> Rows:
    rows = Rows()
    for context, question in records:
      for row, spans in self._windows(context, question):
        text, start = question.answers[0]
        places = [i for i, span in enumerate(spans) if span]
        first = last = 0  # [CLS]: the window does not show the answer
        if spans[places[0]][0] <= start and (
            spans[places[-1]][1] >= start + len(text)):
          inside = [i for i in places if spans[i][0] < start + len(text)
                    and spans[i][1] > start]
          first, last = inside[0], inside[-1]
        rows.append(dict(row, start_positions=first, end_positions=last))
    return rows

  def score(self, predict) -> float:
    windows = [(*asked, row, spans) for asked in self.dev
               for row, spans in self._windows(*asked)]
    starts, ends = predict(Rows(row for _, _, row, _ in windows)).predictions
    best: dict[str, tuple[float, str]] = {}
    for (context, asked, _, spans), start, end in zip(windows, starts, ends):
      for i in np.argsort(-start)[:finetune_tasks.N_BEST]:
        for j in np.argsort(-end)[:finetune_tasks.N_BEST]:
          if j < i or j - i >= finetune_tasks.ANSWER or j >= len(spans) or (
              not spans[i] or not spans[j]):
            continue
          text = context[spans[i][0]:spans[j][1]]
          found = (float(start[i] + end[j]), text)
          best[asked.id] = max(best.get(asked.id, found), found)
    return squad_rules.measures(
        {asked.id: best.get(asked.id, (0.0, ''))[1] for _, asked in self.dev},
        {asked.id: tuple(text for text, _ in asked.answers)
         for _, asked in self.dev})['f1']


KINDS = {'classification': Classes, 'token_classification': Words,
         'question_answering': Answers}


def _to_stderr(job):
  """The Trainer prints, and what a worker prints is its answer."""
  def quiet():
    with contextlib.redirect_stdout(sys.stderr):
      return job()
  return quiet


class Side:
  """A task as the Trainer trains it."""

  def __init__(self, request: dict):
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    self.request = request
    self.task = finetune_tasks.Task(**request['task'])
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(
        request['weights'])
    kind = KINDS[self.task.objective]
    self.data = kind(self.tokenizer, self.task, request['train'],
                     request['dev'])
    self.rows = self.data.rows(self.data.train)

  def settings(self, steps: int, seed: int, **more: Any):
    """Returns the arguments of a Trainer: the recipe, and `more`."""
    import transformers
    task = self.task
    return transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(), max_steps=steps, seed=seed,
        per_device_train_batch_size=task.batch,
        per_device_eval_batch_size=4 * task.batch, learning_rate=task.lr,
        weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
        max_grad_norm=1.0, lr_scheduler_type='linear',
        warmup_steps=steps // 10, use_cpu=True, report_to=[],
        save_strategy='no', eval_strategy='no', logging_strategy='no',
        disable_tqdm=True, **more)

  def _trainer(self, steps: int, seed: int):
    import transformers
    transformers.set_seed(seed)
    settings = self.settings(steps, seed)
    return transformers.Trainer(
        self.data.model(self.request['weights']), settings,
        train_dataset=self.rows, data_collator=self.data.collator())

  def trained(self) -> dict:
    """Returns the score of a run, and its mean training loss."""
    trainer = self._trainer(self.task.steps, self.request['seed'])
    found = trainer.train()
    return dict(score=self.data.score(trainer.predict),
                loss=found.training_loss)

  def score(self, folder: str | pathlib.Path) -> float:
    """Returns the score of the weights in `folder`."""
    import transformers
    trainer = transformers.Trainer(
        self.data.model(str(folder)), self.settings(1, 0),
        data_collator=self.data.collator())
    return self.data.score(trainer.predict)

  def warm(self) -> None:
    self._trainer(2, 0).train()

  def timed(self) -> dict:
    """Returns the steps that it makes in a second, and in one of CPU time."""
    trainer, start = self._trainer(self.task.timed, 0), time.process_time()
    found = trainer.train()
    cpu = time.process_time() - start
    return dict(steps=found.metrics['train_steps_per_second'],
                cpu_steps=self.task.timed / cpu)


def jobs(request: dict) -> dict:
  """Returns what a worker can be asked to do, by name."""
  side = Side(request)
  return {name: _to_stderr(job) for name, job in dict(
      trained=side.trained, warm=side.warm, timed=side.timed).items()}
