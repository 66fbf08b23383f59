"""Small files of words with labels and of questions, and a WordPiece tokenizer
of them, for tests."""

import json
import pathlib
from typing import Any

import numpy as np

from configs import base
from training.data import sources, tokenizers

TAGGED = (('Ana Ruiz', 'B-per I-per'), ('visited', 'O'), ('Rome', 'B-loc'),
          ('and', 'O'), ('Oslo', 'B-loc'), ('Bo', 'B-per'), ('.', 'O'))
CONTEXTS = (
    'Ana Ruiz saw 308 gulls in the bay of Oslo on Monday, and 12 terns.',
    'Bo ran to Rome. The road was closed, so that he ran to Lund.')
ASKED = ((('How many gulls?', '308'), ('Where?', 'the bay of Oslo'),
          ('Who swam?', '')), (('Where did Bo run?', 'Rome'),))


def row(objective: Any, item: Any, rng: np.random.Generator | None, config: Any,
        tokenizer: Any) -> dict[str, np.ndarray]:
  """Returns what a batch has of one item."""
  batch = objective.batch([(item, rng)], config, tokenizer)
  return {key: rows[0] for key, rows in batch.items()}


def conll(path: pathlib.Path, sentences: int = 12, most: int = 9,
          seed: int = 0) -> str:
  """Writes random sentences; returns the path."""
  rng = np.random.default_rng(seed)
  lines = []
  for _ in range(sentences):
    for i in rng.integers(0, len(TAGGED), rng.integers(1, most)):
      lines += [f'{word}\t{label}' for word, label in zip(
          *(side.split() for side in TAGGED[i]))]
    lines.append('')
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return str(path)


def squad(path: pathlib.Path, impossible: bool = True) -> str:
  """Writes two paragraphs; returns the path."""
  paragraphs = []
  for number, (context, asked) in enumerate(zip(CONTEXTS, ASKED)):
    qas: list[dict[str, Any]] = []
    for question, answer in asked:
      if answer or impossible:
        qas.append(dict(
            id=f'{number}-{len(qas)}', question=question,
            is_impossible=not answer, answers=[dict(
                text=answer, answer_start=context.index(answer))] * bool(
                    answer)))
    paragraphs.append(dict(context=context, qas=qas))
  path.write_text(json.dumps(dict(data=[dict(paragraphs=paragraphs)])))
  return str(path)


def wordpiece(folder: pathlib.Path) -> str:
  """Writes a tokenizer.json of letters and some words; returns its path."""
  import tokenizers as hf
  texts = [*CONTEXTS, *(word for word, _ in TAGGED),
           *(question for asked in ASKED for question, _ in asked)]
  letters = sorted({c for text in texts for c in text if not c.isspace()})
  pieces = [*letters, *(f'##{c}' for c in letters), 'ana', 'the', 'ran',
            '##oad', '##ull', 'gull', 'ro', '##me']
  vocab = {name: i for i, name in enumerate(dict.fromkeys(
      ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]',
       *(piece.lower() for piece in pieces)]))}
  tokenizer = hf.Tokenizer(hf.models.WordPiece(vocab, unk_token='[UNK]'))
  tokenizer.normalizer = hf.normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = hf.decoders.WordPiece()
  tokenizer.post_processor = hf.processors.BertProcessing(
      ('[SEP]', vocab['[SEP]']), ('[CLS]', vocab['[CLS]']))
  tokenizer.add_special_tokens(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  return str(folder / 'tokenizer.json')


def config(source: str, tokenizer: str, objective: str, **data: Any):
  """Returns a run's config."""
  config = base.base()
  config.objective = objective
  config.model.arch = 'bert'
  config.data.update(source=source, eval_source=source, tokenizer=tokenizer,
                    **data)
  return config


def corpus(config_: Any) -> sources.Corpus:
  """Returns all records of data.source."""
  (_, source), = sources.parse(config_.data.source)
  records = [record for path in source.files for record in source.read(path)]
  return sources.Corpus(source.name, source.name, 'train',
                        tokenizers.load(config_.data.tokenizer), config_,
                        records=records)
