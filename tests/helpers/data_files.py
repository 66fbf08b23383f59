"""Small files of texts, labels, questions and tokenizers, and configs of runs
that read them."""

import json
import pathlib
import string
from typing import Any

import numpy as np

from configs import base
from training.data import sources, tokenizers

BYTES = tokenizers.load('bytes')

TAGGED = (('Ana Ruiz', 'B-per I-per'), ('visited', 'O'), ('Rome', 'B-loc'),
          ('and', 'O'), ('Oslo', 'B-loc'), ('Bo', 'B-per'), ('.', 'O'))
CONTEXTS = (
    'Ana Ruiz saw 308 gulls in the bay of Oslo on Monday, and 12 terns.',
    'Bo ran to Rome. The road was closed, so that he ran to Lund.')
ASKED = ((('How many gulls?', '308'), ('Where?', 'the bay of Oslo'),
          ('Who swam?', '')), (('Where did Bo run?', 'Rome'),))
SPECIAL = ('<s>', '<pad>', '</s>', '<unk>')  # of roberta-base


def make_run_config(source: str, objective: str, length: int = 64,
                    arch: str = '',
                    **data: Any):
  """Returns the config of a run that trains on all of a source."""
  c = base.base()
  c.objective, c.model.arch = objective, arch or c.model.arch
  c.data.update(dict(source=source, length=length, batch_size=4,
                     holdout_every=0) | data)
  return c


def write_texts_of_letters(folder: pathlib.Path, monkeypatch) -> str:
  """Writes six texts of one letter each; returns them as a source."""
  monkeypatch.setenv('ARCHETYPE_CACHE', str(folder / 'cache'))
  for i, letter in enumerate('abcdef'):
    words = [letter * (1 + (i + j) % 5) for j in range(300)]
    (folder / f'{letter}.txt').write_text(' '.join(words))
  return f'text:{folder}/*.txt'


def make_batch_row(objective: Any, item: Any, rng: np.random.Generator | None,
                   config: Any,
                   tokenizer: Any) -> dict[str, np.ndarray]:
  """Returns what a batch has of one item."""
  batch = objective.batch([(item, rng)], config, tokenizer)
  return {key: rows[0] for key, rows in batch.items()}


def write_conll(path: pathlib.Path) -> str:
  """Writes random sentences with a label for each word; returns the path."""
  rng = np.random.default_rng(0)
  lines = []
  for _ in range(12):
    num_phrases = rng.integers(1, 9)
    for i in rng.integers(0, len(TAGGED), num_phrases):
      words, labels = TAGGED[i]
      for word, label in zip(words.split(), labels.split()):
        lines.append(f'{word}\t{label}')
    lines.append('')
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return str(path)


def write_squad(path: pathlib.Path) -> str:
  """Writes two paragraphs with questions, as SQuAD has them; returns the path.
  """
  paragraphs = []
  for number, (context, questions) in enumerate(zip(CONTEXTS, ASKED)):
    entries = []
    for i, (question, answer) in enumerate(questions):
      answers = []
      if answer:
        answers.append(dict(text=answer, answer_start=context.index(answer)))
      entries.append(dict(id=f'{number}-{i}', question=question,
                          is_impossible=not answer, answers=answers))
    paragraphs.append(dict(context=context, qas=entries))
  path.write_text(json.dumps(dict(data=[dict(paragraphs=paragraphs)])))
  return str(path)


def write_sources_with_and_without_labels(folder: pathlib.Path
                                          ) -> dict[str, tuple[str, str]]:
  """Writes data with labels, and the same data without them.

  Returns:
    {objective: (source with labels, source without)}.
  """
  # Words, of which the second file has no labels.
  tagged_file = write_conll(folder / 'a.conll')
  words = []
  for line in pathlib.Path(tagged_file).read_text().splitlines():
    words.append(line.partition('\t')[0])
  (folder / 'words.conll').write_text('\n'.join(words) + '\n')

  # Questions, of which the second file has no answers.
  answered_file = write_squad(folder / 'a.json')
  document = json.loads(pathlib.Path(answered_file).read_text())
  for paragraph in document['data'][0]['paragraphs']:
    for question in paragraph['qas']:
      del question['answers'], question['is_impossible']
  (folder / 'asked.json').write_text(json.dumps(document))

  # Texts of four lengths.
  lengths = (3, 28, 9, 17)
  labelled_lines = ['text,label']
  bare_lines = ['text']
  for i, letter in enumerate('abcdefghij'):
    text = letter * lengths[i % len(lengths)]
    labelled_lines.append(f'{text},{i % 3}')
    bare_lines.append(text)
  (folder / 'a.csv').write_text('\n'.join(labelled_lines) + '\n')
  (folder / 'new.csv').write_text('\n'.join(bare_lines) + '\n')

  tables = (f'labelled:{folder}/a.csv:text+label',
            f'labelled:{folder}/new.csv:text')
  return {
      'classification': tables, 'regression': tables,
      'token_classification': (
          f'conll:{tagged_file}', f'conll:{folder}/words.conll:0'),
      'question_answering': (
          f'squad:{answered_file}', f'squad:{folder}/asked.json')}


def write_wordpiece_tokenizer(folder: pathlib.Path) -> str:
  """Writes a tokenizer.json of letters and some words; returns its path."""
  import tokenizers as hf
  # The vocabulary: special tokens, all letters of the texts, and some words.
  texts = [*CONTEXTS, *(word for word, _ in TAGGED)]
  for questions in ASKED:
    texts += [question for question, _ in questions]
  letters = sorted({*''.join(texts)} - {*string.whitespace})
  pieces = [*letters, *(f'##{letter}' for letter in letters), 'ana', 'the',
            'ran', '##oad', '##ull', 'gull', 'ro', '##me']
  special_tokens = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  tokens = dict.fromkeys(
      [*special_tokens, *(piece.lower() for piece in pieces)])
  vocab = {token: i for i, token in enumerate(tokens)}

  # BERT's tokenizer.
  tokenizer = hf.Tokenizer(hf.models.WordPiece(vocab, unk_token='[UNK]'))
  tokenizer.normalizer = hf.normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = hf.decoders.WordPiece()
  tokenizer.post_processor = hf.processors.BertProcessing(
      ('[SEP]', vocab['[SEP]']), ('[CLS]', vocab['[CLS]']))
  tokenizer.add_special_tokens(special_tokens)
  tokenizer.save(str(folder / 'tokenizer.json'))
  return str(folder / 'tokenizer.json')


def read_corpus(run_config: Any) -> sources.Corpus:
  """Returns all records of the source of a run's data."""
  [(_, source)] = sources.parse_sources(run_config.data.source)
  records = []
  for path in source.files:
    records += source.read(path)
  return sources.Corpus(
      name=source.name, text=source.name, split='train',
      tokenizer=tokenizers.load(run_config.data.tokenizer), config=run_config,
      records=records)


def write_roberta_tokenizer(folder: pathlib.Path, *, framed: Any = None,
                            pair: bool = False, **described: Any
                            ) -> pathlib.Path:
  """Writes a byte-level BPE with the special tokens of roberta-base; returns
  the folder.

  Args:
    folder: into which it is written.
    framed: the post_processor of its tokenizer.json; None: RobertaProcessing.
    pair: whether it is written as vocab.json and merges.txt instead.
    **described: fields of tokenizer_config.json.
  """
  import tokenizers as hf
  letters = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
  tokens = [*SPECIAL, *letters, 'an', 'Ġan', '<mask>']
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = [('a', 'n'), ('Ġ', 'an')]
  (folder / 'tokenizer_config.json').write_text(
      json.dumps(dict(model_max_length=512) | described))

  # The two files of the slow tokenizer.
  if pair:
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    merge_lines = [f'{first} {second}\n' for first, second in merges]
    (folder / 'merges.txt').write_text('#version: 0.2\n' + ''.join(merge_lines))
    return folder

  # The file of the fast one.
  tokenizer = hf.Tokenizer(hf.models.BPE(vocab, merges, unk_token='<unk>'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = hf.decoders.ByteLevel()
  tokenizer.add_special_tokens([
      *SPECIAL, hf.AddedToken('<mask>', lstrip=True)])
  tokenizer.post_processor = framed or hf.processors.RobertaProcessing(
      ('</s>', 2), ('<s>', 0), trim_offsets=True, add_prefix_space=False)
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


def make_template_processing(single: str, pair: str) -> Any:
  """Returns a post_processor that writes the special tokens of a template."""
  import tokenizers as hf
  return hf.processors.TemplateProcessing(
      single=single, pair=pair,
      special_tokens=[('<s>', 0), ('</s>', 2)])
