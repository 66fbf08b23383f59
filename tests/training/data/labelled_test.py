"""Labelled data in files: what is read, and which line is refused."""

import collections
import copy
import json
import types

import numpy as np
import pytest
import tokenizers as hf

from common.errors import RequestError
from tests.helpers import data_files as files
from training import objectives
from training.data import labelled, records, sources, tokenizers
from training.objectives import labelled as labelled_rows, pipeline

BYTES = tokenizers.load('bytes')


def _read(spec):
  (_, source), = sources.parse_sources(spec)
  return list(source.records())


def _config(source, objective='classification', arch='bert', **fields):
  return files.make_run_config(source, objective,
                               **dict(length=16, arch=arch) | fields)


def _loader(*args, **fields):
  return pipeline.make_training_loader(_config(*args, **fields), BYTES)


# Texts with labels.


def test_records_stand_where_they_say(tmp_path):
  for name, text in {
      'a.tsv': 'a "quoted text\t1\n\na second\t 0\r\nthe last\t1',
      'b.csv': 'id,first,second,gold\n7,"one, two",three,yes\n'
               f'8,"of ""two""\nlines",{"x" * 200_000},no\n',
      'c.jsonl': '{"text": "p", "label": 1}\n\n{"text": "q", "label": "0"}\n',
      'd.tsv': 'one\ttwo\t0.5\nthree\tfour\t-2\n'}.items():
    (tmp_path / name).write_text(text)
  read = lambda rest: [(r.texts, r.label, r.names)
                       for r in _read(f'labelled:{tmp_path}/{rest}')]
  assert read('a.tsv') == [(('a "quoted text',), '1', ('text',)),
                           (('a second',), '0', ('text',)),
                           (('the last',), '1', ('text',))]
  assert _read(f'labelled:{tmp_path}/a.tsv')[1].where == (
      f'{tmp_path}/a.tsv, line 3,')
  assert read('b.csv:first+second+gold') == [
      (('one, two', 'three'), 'yes', ('first', 'second')),
      (('of "two"\nlines', 'x' * 200_000), 'no', ('first', 'second'))]
  assert read('c.jsonl') == [(('p',), '1', ('text',)),
                             (('q',), '0', ('text',))]
  assert read('d.tsv:1+2')[0] == (('two',), '0.5', ('text',))
  assert read('d.tsv')[1][0] == ('three', 'four')


PANDAS = [('Nice, and "new"', 'good'), ('Two\nlines', 'bad'), ('So', 'good')]


@pytest.mark.parametrize('index', [False, True])
@pytest.mark.parametrize('names', [
    ('text', 'label'), ('label', 'Text'), ('review', 'sentiment'),
    ('sentence1', 'sentence2', 'label')])
def test_the_line_of_names_of_pandas_is_no_record(tmp_path, names, index):
  pandas = pytest.importorskip('pandas')
  is_label = [name in labelled.NAMES_OF_LABEL_COLUMNS for name in names]
  rows = [{name: label if of_label else text
           for name, of_label in zip(names, is_label)}
          for text, label in PANDAS]
  pandas.DataFrame(rows).to_csv(tmp_path / 'a.csv', index=index)
  read = _read(f'labelled:{tmp_path}/a.csv')
  assert [r.texts for r in read] == [
      (text,) * (len(names) - 1) for text, _ in PANDAS]
  assert [r.label for r in read] == [label for _, label in PANDAS]
  assert {r.names for r in read} == {
      tuple(name for name, of_label in zip(names, is_label) if not of_label)}
  if not index:
    numbers = [str(i) for i in np.argsort(is_label, kind='stable')]
    assert read == _read(f'labelled:{tmp_path}/a.csv:{"+".join(numbers)}')
    bare = _read(f'labelled:{tmp_path}/a.csv:{"+".join([*numbers[:-1], ""])}')
    assert [r.texts for r in bare] == [r.texts for r in read]


def test_a_first_line_that_names_no_columns_is_a_record(tmp_path):
  for line in 'text,good', 'fine,label', 'a text,a label', 'text,text':
    (tmp_path / 'a.csv').write_text(f'{line}\nb,bad\n')
    assert len(_read(f'labelled:{tmp_path}/a.csv')) == 2
  (tmp_path / 'a.csv').write_text('text,label,source\na,b,c\n')
  with pytest.raises(RequestError, match='line 1, names the columns text, la'):
    _read(f'labelled:{tmp_path}/a.csv')
  assert len(_read(f'labelled:{tmp_path}/a.csv:text+label')) == 1


def test_a_run_says_how_many_records_have_each_label(tmp_path):
  (tmp_path / 'a.csv').write_text('remark,mood\na,good\nb,bad\nc,bad\nd,good\n')
  source = f'labelled:{tmp_path}/a.csv'
  loader = _loader(source, labels=('good', 'bad', 'mood', 'odd'))
  counts, warning = records.describe_labels(loader.views)
  assert counts == 'labels: 4, in training good 2, bad 2, mood 1, odd 0'
  assert f"has the label 'mood' ({tmp_path}/a.csv, line 1), 'odd' (none)" in (
      warning) and 'name the columns' in warning
  named = _loader(f'{source}:remark+mood')
  assert records.describe_labels(named.views) == [
      'labels: 2, in training bad 2, good 2']
  (tmp_path / 'a.conll').write_text('an O\nant B-x\n\nan O\nelk B-x\n')
  words = _loader(f'conll:{tmp_path}/a.conll', 'token_classification')
  assert records.describe_labels(words.views) == [
      'labels: 2, in training B-x 2, O 2']
  # Rows of text, and rows without labels, stand before and behind those.
  windows = [object()]
  others = [windows, records.Rows()]
  assert records.describe_labels(others) == []
  assert records.describe_labels([*others, *words.views, *others]) == [
      'labels: 2, in training B-x 2, O 2']


@pytest.mark.parametrize('name, text, fields, message', [
    ('a.tsv', 'a\t1\nb\n', '', 'line 2, has 1 columns: name those'),
    ('a.tsv', 'a\t1\nb\t1\t2\n', '', 'line 2, has 3 columns: name those'),
    ('a.tsv', 'a\tb\tc\t1\n', '', 'line 1, has 4 columns: name those'),
    ('a.tsv', 'a\t1\n \t0\n', '', "line 2, column 'text', is empty"),
    ('a.tsv', 'a\t1\nb\t2\n', ':text+label', "line 2, has no field 'text'"),
    ('a.csv', 'a,1\n"b,0\n', '', 'line 2, is broken CSV: unexpected end'),
    ('a.jsonl', '{"text": "a"}', '', "line 1, has no field 'label': it has"),
    ('a.jsonl', '{"text": 1, "label": 1}', '', "field 'text', is 1, not a"),
    ('a.jsonl', '{"text": "a", "label": null}', '', 'has the label None'),
    ('a.tsv', 'a\t1\n', ':0+b', "names the fields '0.b': write the columns"),
])
def test_a_bad_line_is_named(tmp_path, name, text, fields, message):
  (tmp_path / name).write_bytes(
      text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ValueError, match=message):
    _read(f'labelled:{tmp_path}/{name}{fields}')


def _source(tmp_path, *rows, name='a'):
  (tmp_path / f'{name}.tsv').write_text(
      ''.join('\t'.join(row) + '\n' for row in rows))
  return f'labelled:{tmp_path}/{name}.tsv'


def test_labels_are_those_of_training_in_order(tmp_path):
  source = _source(tmp_path, ('a', '10'), ('b', '9'), ('c', '-1'), ('d', '9'))
  assert records.find_labels(_config(source)) == ('-1', '9', '10')
  # The first of four is held out.
  assert records.find_labels(_config(source, holdout_every=4)) == ('-1', '9')
  words = _source(tmp_path, ('a', 'no'), ('b', 'No'), ('c', '1'))
  assert records.find_labels(_config(words)) == ('1', 'No', 'no')
  config = _config(words, labels=('no', 'No', '1'))
  assert objectives.fill_in_labels(config) is config
  other = _source(tmp_path, ('a', '1'), ('b', 'z'), name='other')
  with pytest.raises(ValueError, match="other.tsv, line 2: 'z': choose from 1"):
    pipeline.make_evaluation_loaders(_config(words, eval_source=other), BYTES)


@pytest.mark.parametrize('labels', [
    ('a',), ('a', 'a'), ('a', 'b', 'a'), ('a', ''), ('a', 1), (1, 2)])
def test_labels_are_two_different_strings_or_more(labels):
  records.check_labels(('a', 'b'))
  with pytest.raises(RequestError, match='^data.labels is .* write two'):
    records.check_labels(labels)


@pytest.mark.parametrize('rows, fields, message', [
    ([('a', '1'), ('b', '1')], {}, 'has 1 label.* in 2 training records'),
    ([(f'{i}', f'{i}') for i in range(101)], {}, 'has 101 label.* in 101 trai'),
    *(([('a', '1'), ('b', '2')], dict(class_weights=weights),
       "write 'balanced'") for weights in ('1,2,3', '1,0', 'even')),
    ([('a', '1'), ('b', '2')], dict(labels=('1', '2', '3'),
                                    class_weights='balanced'),
     "no training record has the label '3'"),
    ([('a', '1'), ('b', '2')], dict(length=2), 'needs 3 or more'),
])
def test_what_is_no_classification_is_refused(tmp_path, rows, fields, message):
  with pytest.raises(ValueError, match=message):
    _loader(_source(tmp_path, *rows), **fields)


def test_regression_reads_numbers(tmp_path):
  source = _source(tmp_path, ('a', '1.5'), ('b', '-2'), ('c', '1e3'))
  batch = _loader(source, 'regression', batch_size=3).batch(0)
  assert batch['targets'].dtype == np.float32
  assert sorted(batch['targets']) == [-2, 1.5, 1000]
  with pytest.raises(ValueError, match="has the label 'nan', which is"):
    _loader(_source(tmp_path, ('a', '1'), ('b', 'nan')), 'regression')


def test_balanced_weights_are_scikit_learns(tmp_path):
  rows = [(f'{i}', 'abc'[min(i, 2)]) for i in range(9)]
  source = _source(tmp_path, *rows)
  batch = _loader(source, class_weights='balanced', batch_size=9).batch(0)
  # n / (labels * n of the label)
  np.testing.assert_allclose(
      batch['weights'], np.array([3, 3, 9 / 21])[batch['targets']])
  ours = _loader(source, class_weights='1,2,0.5', batch_size=9).batch(0)
  np.testing.assert_allclose(
      ours['weights'], np.array([1, 2, 0.5])[ours['targets']])
  # An evaluation weighs all rows alike.
  loader, = pipeline.make_evaluation_loaders(_config(source,
                                                     class_weights='balanced',
                                                     eval_source=source), BYTES)
  assert {*loader.batch(0)['weights']} == {1.0}


def test_a_source_and_its_objective_must_fit(tmp_path):
  source = _source(tmp_path, ('a', '1'), ('b', '0'))
  pipeline.check_sources(_config(source))
  for spec, objective, message in (
      ('sotu', 'classification', "'classification' reads labelled texts, but"),
      (source, 'causal', 'reads text, but .* holds labelled texts: choose from '
       'sotu, text:GLOB, jsonl:GLOB:FIELD'),
      (source, 'chat', 'choose from jsonl:GLOB:FIELD, parquet')):
    with pytest.raises(ValueError, match=message):
      pipeline.check_sources(
          _config(spec, objective, 'gpt', cache_dir=str(tmp_path)))


def test_records_are_pairs_for_text_to_text(tmp_path):
  (tmp_path / 'a.jsonl').write_text(''.join(
      json.dumps(dict(premise='p q', hypothesis='h', label=x)) + '\n'
      for x in ('yes', 'no')))
  source = f'labelled:{tmp_path}/a.jsonl:premise+hypothesis+label'
  batch = _loader(source, 'seq2seq', 't5', length=40, batch_size=2,
                  cache_dir=str(tmp_path)).batch(0)
  assert {(BYTES.decode(row[row < 256]), BYTES.decode(target[target < 256]))
          for row, target in zip(batch['tokens'], batch['targets'])} == {
              ('premise: p q hypothesis: h', 'yes'),
              ('premise: p q hypothesis: h', 'no')}


# Sentences.


TAGGED = ('# id 1\n-DOCSTART-\tO\n\n'
          'Empire\tB-loc\nState\tI-loc\n#tag\tO\n\t\n\n'
          '# another one\r\nana\tB-per\r\nbo\tB-per\n')


def _sentences(folder, text, columns=(0, -1)):
  path = folder / 'a.conll'
  path.write_text(text, encoding='utf-8')
  return list(labelled.read_sentences(columns, str(path)))


@pytest.mark.parametrize('text', [
    TAGGED, TAGGED.replace('\t', ' '),
    TAGGED.replace('\r', '').replace('\n', '\r\n'),
    TAGGED.replace('\t\n', '\n').replace('\t', '\tx y\t')])
def test_sentences(text, tmp_path):
  first, second = _sentences(tmp_path, text)
  assert first == (['Empire', 'State', '#tag'], ['B-loc', 'I-loc', 'O'],
                   [f'{tmp_path}/a.conll, line {n}' for n in (4, 5, 6)])
  assert second[:2] == (['ana', 'bo'], ['B-per', 'B-per'])
  if 'x y' not in text:
    assert _sentences(tmp_path, text, (-2, -1)) == [first, second]


@pytest.mark.parametrize('text, columns, message', [
    ('a O\nb\n', (0, -1), 'line 2, has 1 columns, and no word and label in 0'),
    ('a O\n', (0, 2), 'line 1, has 2 columns, and no word'),
    ('a\tO\n\tO\n', (0, -1), 'line 2, has 2 columns, and no word')])
def test_a_line_that_is_no_word_is_refused(text, columns, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    _sentences(tmp_path, text, columns)


@pytest.mark.parametrize('labels, message', [
    ('O I-x', "line 2, has the label 'I-x' after 'O': an entity begins with "
     "'B-x'"),
    ('B-x I-y', "line 2, has the label 'I-y' after 'B-x'"),
    ('B-x E-x', "line 2, has the label 'E-x' among labels of entities")])
def test_labels_that_mark_no_entities_are_refused(labels, message, tmp_path):
  good, bad = (_sentences(tmp_path, ''.join(
      f'w\t{label}\n' for label in each.split()))[0]
               for each in ('B-x I-x I-x B-x B-y O', labels))
  labelled.check_entities(good)
  with pytest.raises(ValueError, match=message):
    labelled.check_entities(bad)
  assert labelled.marks_entities(['O', 'B-x', 'I-x'])
  assert not labelled.marks_entities(['O', 'NOUN', 'B-x'])
  assert not labelled.marks_entities(['O'])


# Questions.


CONTEXT = 'Ana saw 308 gulls in the bay.'
FILE = dict(version='v2.0', data=[dict(title='t', paragraphs=[dict(
    context=CONTEXT, qas=[
        dict(id='q1', question='How many?', answers=[
            dict(text='308', answer_start=8),
            dict(text='308 gulls', answer_start=8)]),
        dict(id='q2', question='Why?', is_impossible=True, answers=[],
             plausible_answers=[dict(text='x', answer_start=9)])])])])


def _questions(folder, document):
  (folder / 'a.json').write_text(json.dumps(document))
  return list(labelled.read_questions(str(folder / 'a.json')))


def test_questions(tmp_path):
  (context, (first, second)), = _questions(tmp_path, FILE)
  assert context == CONTEXT
  assert first == labelled.Question(
      'q1', 'How many?', (('308', 8), ('308 gulls', 8)),
      f"{tmp_path}/a.json, question 'q1'")
  assert second.answers == () and second.id == 'q2'


@pytest.mark.parametrize('fields, message', [
    (dict(answers=[dict(text='308', answer_start=9)]), "question 'q1', has the "
     "answer '308', but its context has '08 ' at answer_start=9"),
    (dict(answers=[]), 'has no answer, and is_impossible is not'),
    (dict(id='q2'), 'has an id of two questions'),
    (dict(answers=None), 'a.json is no file of SQuAD'),
    (None, 'a.json is no file of SQuAD')])
def test_what_is_no_question_is_refused(fields, message, tmp_path):
  file = copy.deepcopy(FILE)
  if fields is None:
    file = []
  else:
    file['data'][0]['paragraphs'][0]['qas'][0].update(fields)
  with pytest.raises(ValueError, match=message):
    _questions(tmp_path, file)


def test_sets_of_the_hub():
  """Columns that are lists are words and their labels, whose names the data set
  knows; SQuAD's columns are questions, those of a paragraph together."""
  def read(fields, rows, **features):
    dataset = type('Dataset', (list,), dict(
        features=features, select_columns=lambda self, names: self,
        column_names=(*features,)))(rows)
    _, of_rows = labelled.choose_reader_of_rows('hf:x', fields, features)
    return list(of_rows(labelled.read_dataset_rows('hf:x', fields, dataset)))

  named = types.SimpleNamespace(names=['O', 'B-x'])
  lists = dict(w=types.SimpleNamespace(feature=None),
               l=types.SimpleNamespace(feature=named))
  (_, labels, lines), = read(
      ('w', 'l'), [dict(w=['a', 'b'], l=[1, 0])], **lists)
  assert (labels, lines[1]) == (['B-x', 'O'], 'hf:x, row 1, word 2')
  assert [(r.texts, r.label) for r in read(
      ('s', 'l'), [dict(s='a', l=1)], s=None, l=named)] == [(('a',), 'B-x')]
  for row, features, message in (
      (dict(w=['a'], l=[-1]), lists, 'has the label -1, and the'),
      (dict(w=['a'], l=None), lists, 'has 1 words and 0 labels'),
      (dict(w=['a'], l=1), lists | dict(l=named), 'write one of lists'),
      (dict(s='a', l=2), dict(s=None, l=named), 'has the label 2, and')):
    with pytest.raises(RequestError, match=message):
      read((*features,), [row], **features)
  asked = [dict(id=f'q{i}', context=context, question='?', answers=dict(
      text=['a'] * (i != 1), answer_start=[0] * (i != 1)))
           for i, context in enumerate(['ab', 'ab', 'ac'])]
  parts = read(labelled.SQUAD_FIELDS, asked)
  assert [(p.context, [q.id for q in p.questions]) for p in parts] == [
      ('ab', ['q0', 'q1']), ('ac', ['q2'])]
  assert [q.answers for q in parts[0].questions] == [(('a', 0),), ()]


# Rows without labels.


@pytest.mark.parametrize('objective', [
    'classification', 'regression', 'token_classification',
    'question_answering'])
def test_rows_without_labels_are_the_same_rows(objective, tmp_path):
  """Where they are allowed; a run neither learns from them nor measures."""
  sources = files.write_sources_with_and_without_labels(tmp_path)
  source, bare = sources[objective]
  view = lambda spec: pipeline.make_evaluation_loaders(
      _config(source, objective, length=64, eval_source=spec), BYTES,
      in_order=True, bare=True)[0].views[0]
  ours, theirs = view(bare), view(source)
  assert ours.bare and not theirs.bare and len(ours) == len(theirs) > 3
  config = _config(source, objective, length=64)
  for a, b in zip(ours, theirs):
    rows = [files.make_batch_row(objectives.find_objective(config), item, None,
                                 config,
                                 BYTES) for item in (a, b)]
    np.testing.assert_array_equal(*(row['tokens'] for row in rows))
  for wrong in (dict(source=bare), dict(source=source, eval_source=bare)):
    with pytest.raises(RequestError, match='has no labels or answers'):
      config = _config(**dict(wrong, objective=objective, length=64))
      pipeline.make_training_loader(config, BYTES)
      pipeline.make_evaluation_loaders(config, BYTES)


def test_two_texts_without_a_label_and_columns_by_number(tmp_path):
  (tmp_path / 'a.tsv').write_text('one\ttwo\nthree\tfour\n')
  read = lambda rest: [(r.texts, r.label, r.names)
                       for r in _read(f'labelled:{tmp_path}/a.tsv:{rest}')]
  assert read('0+1+')[1] == (('three', 'four'), '', ('first', 'second'))
  assert read('one+two+') == [(('three', 'four'), '', ('one', 'two'))]
  assert read('1') == [(('two',), '', ('text',)), (('four',), '', ('text',))]
  assert read('two') == [(('four',), '', ('two',))]
  with pytest.raises(RequestError, match='has no label, and the target'):
    _read(f'labelled:{tmp_path}/a.tsv:1')[0].written()


def test_questions_of_which_some_have_answers_are_refused(tmp_path):
  path = files.write_squad(tmp_path / 'a.json')
  document = json.loads((tmp_path / 'a.json').read_text())
  question = document['data'][0]['paragraphs'][1]['qas'][0]
  del question['answers'], question['is_impossible']
  (tmp_path / 'a.json').write_text(json.dumps(document))
  with pytest.raises(RequestError, match='of some of its questions'):
    list(labelled.read_questions(path))


# Cut into rows: against the package tokenizers, which cuts them itself.


WORDS = ['Ångström', "isn't", '#1', '日本', '😀!', 'naïve', '.', '5,0']
TEXT = ' '.join(WORDS)


@pytest.fixture(scope='module')
def every(tmp_path_factory):
  """A tokenizer of each kind."""
  folder = tmp_path_factory.mktemp('tokenizers')
  pieces = [c for word in WORDS for c in word.lower()] + ['is', 'na']
  pieces += [f'##{piece}' for piece in pieces]
  wordpiece = hf.Tokenizer(hf.models.WordPiece(
      {'[UNK]': 0} | {piece: 1 + i for i, piece in enumerate(
          dict.fromkeys(pieces))}, unk_token='[UNK]'))
  wordpiece.normalizer = hf.normalizers.BertNormalizer(strip_accents=False)
  wordpiece.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
  wordpiece.save(str(folder / 'wordpiece.json'))
  for name, trim in ('bpe', True), ('untrimmed', False):
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=trim)
    bpe.post_processor = hf.processors.ByteLevel(trim_offsets=trim)
    bpe.decoder = hf.decoders.ByteLevel()
    bpe.train_from_iterator([TEXT] * 3, hf.trainers.BpeTrainer(
        vocab_size=300, show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(folder / f'{name}.json'))
  return {name: tokenizers.load(str(folder / f'{name}.json')) for name in (
      'wordpiece', 'bpe', 'untrimmed')} | {
          spec: tokenizers.load(spec) for spec in ('bytes', 'bytes:30')}


@pytest.mark.parametrize('kind', [
    'bytes', 'bytes:30', 'wordpiece', 'bpe', 'untrimmed'])
def test_tokens_and_the_characters_that_they_stand_for(kind, every):
  tokenizer = every[kind]
  texts = [TEXT, '', 'a', ' a  b ']
  for text, ids, (ids_alone, spans) in zip(
      texts, tokenizer.encode_batch(texts), tokenizer.encode_spans(texts)):
    assert ids.tolist() == ids_alone.tolist() and spans.shape == (len(ids), 2)
    covered = np.zeros(len(text), bool)
    for first, end in spans:
      covered[first:end] = True
    assert all(covered[i] for i, c in enumerate(text) if not c.isspace())
  # Each word alone gives the tokens that begin in it.
  words, = records.tokenize_words([WORDS], tokenizer)
  between = {'bpe': ' ', 'untrimmed': ' '}.get(kind, '')
  for i, word in enumerate(WORDS):
    alone = tokenizer.encode(between * (i > 0) + word).tolist()
    assert words.ids[words.words_T == i].tolist() == alone, word
  firsts = np.flatnonzero(words.first_T)
  assert words.words_T[firsts].tolist() == list(range(len(WORDS)))
  for place in firsts:  # no earlier token is of the word
    assert words.words_T[place] not in words.words_T[:place]
  # And the tokens of a part spell it.
  (_, spans), = tokenizer.encode_spans([TEXT])
  for word in WORDS:
    start = TEXT.index(word)
    first, last = records.find_tokens(spans, start, start + len(word))
    assert TEXT[spans[first, 0]:spans[last, 1]].strip() == word
  assert records.find_tokens(spans, len(TEXT), len(TEXT)) is None


@pytest.mark.parametrize('size, room, stride', [
    (0, 4, 1), (4, 4, 3), (5, 4, 3), (10, 4, 0), (100, 7, 5), (383, 382, 127)])
def test_strides_cover_each_token(size, room, stride):
  windows = records.cut_into_windows(size, room, stride)
  assert windows[0][0] == 0 and windows[-1][1] == size
  for (first, end), (next_, end_) in zip(windows, windows[1:]):
    assert end - first == room and end - next_ == stride and end < end_
  for token, owner in enumerate(records.find_owners(windows, size)):
    # BERT's rule, written as in its code.
    scores = [min(token - first, end - 1 - token) + 0.01 * (end - first)
              if first <= token < end else -9 for first, end in windows]
    assert owner == scores.index(max(scores))


def test_what_is_too_long_is_cut_as_tokenizers_does_it():
  tokenizer = hf.Tokenizer(hf.models.WordLevel({'a': 0, 'b': 1}, unk_token='a'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  for room in range(2, 9):
    tokenizer.enable_truncation(room, strategy='longest_first')
    for n in range(1, 9):
      for m in range(1, 9):
        ids = tokenizer.encode('a ' * n, 'b ' * m).ids
        assert records.cut_sizes([n, m], room) == [ids.count(0), ids.count(1)]
      assert records.cut_sizes([n], room) == [min(n, room)]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return tmp_path_factory.mktemp('records')


@pytest.fixture(scope='module')
def wordpiece(place):
  return files.write_wordpiece_tokenizer(place)


def _rows_of(place, tokenizer, **data):
  source = f'conll:{files.write_conll(place / "a.conll")}'
  return records.Sentences(files.read_corpus(files.make_run_config(
      source, 'token_classification', arch='bert', tokenizer=tokenizer,
      **data)))


@pytest.mark.parametrize('length, stride', [(64, 0), (12, 9), (3, 0), (7, 4)])
@pytest.mark.parametrize('kind', ['', 'bytes'])
def test_each_label_counts_once(kind, length, stride, place, wordpiece):
  view = _rows_of(place, kind or wordpiece, length=length, stride=stride)
  counted = collections.Counter()
  for item in view.items:
    assert len(item.ids) == len(item.targets) == len(item.weights) <= length - 2
    assert ((item.weights > 0) == (item.words != records.NO_WORD)).all()
    for place in np.flatnonzero(item.weights):
      word = item.words[place]
      counted[item.sentence, word] += 1
      assert view.labels[item.targets[place]] == (
          view.records[item.sentence].labels[word])
  assert set(counted.values()) == {1}
  assert len(counted) == sum(len(s.words) for s in view.records)


def test_first_tokens_equal_those_of_the_package_tokenizers(place, wordpiece):
  """Its words are given one by one, as transformers' is_split_into_words."""
  theirs = hf.Tokenizer.from_file(wordpiece)
  view = _rows_of(place, wordpiece, length=128)
  for item in view.items:
    encoded = theirs.encode(view.records[item.sentence].words,
                            is_pretokenized=True, add_special_tokens=False)
    assert encoded.ids == item.ids.tolist()
    firsts = [i for i, word in enumerate(encoded.word_ids)
              if word not in encoded.word_ids[:i]]
    assert np.flatnonzero(item.weights).tolist() == firsts


def _asked(place, tokenizer, **data):
  """Returns the config and the view of questions."""
  config = files.make_run_config(f'squad:{files.write_squad(place / "a.json")}',
                        'question_answering', arch='bert', tokenizer=tokenizer,
                        **data)
  return config, records.Questions(files.read_corpus(config))


@pytest.mark.parametrize('length, stride', [(128, 16), (36, 10), (30, 3)])
def test_rows_equal_those_of_the_package_tokenizers(
    length, stride, place, wordpiece):
  """Its truncation `only_second` with a stride is what transformers uses; the
  ends of the answer are then found as in its run_qa.py."""
  config, view = _asked(place, wordpiece, length=length, stride=stride)
  theirs = hf.Tokenizer.from_file(wordpiece)
  theirs.enable_truncation(length, stride=stride, strategy='only_second')
  expected = []
  for question, (context, _) in zip(view.questions, view.contexts):
    encoded = theirs.encode(question.question, context)
    for part in [encoded, *encoded.overflowing]:
      places = [i for i, side in enumerate(part.sequence_ids) if side == 1]
      ends = 0, 0
      if question.answers:
        text, start = question.answers[0]
        inside = [i for i in places if part.offsets[i][0] < start + len(text)
                  and part.offsets[i][1] > start]
        whole = (part.offsets[places[0]][0] <= start
                 and part.offsets[places[-1]][1] >= start + len(text))
        ends = (inside[0], inside[-1]) if whole else ends
      expected.append((part.ids, part.type_ids, *ends))
  ours = tokenizers.load(wordpiece)
  objective = labelled_rows.QuestionAnswering()
  rows = [objective.example(item, None, config, ours) for item in view.items]
  assert [(row['tokens'].tolist(), row['types'].astype(int).tolist(),
           row['starts'], row['ends']) for row in rows] == expected
  assert len(rows) > len(view.questions) or length == 128
