"""Files with a word a line: what is read, and what is refused where."""

import glob
import os
import types

import pytest

from configs.errors import RequestError
from training.data import conll

TAGGED = ('# id 1\n-DOCSTART-\tO\n\n'
          'Empire\tB-loc\nState\tI-loc\n#tag\tO\n\t\n\n'
          '# another one\r\nana\tB-per\r\nbo\tB-per\n')


def _file(folder, text):
  path = folder / 'a.conll'
  path.write_text(text, encoding='utf-8')
  return str(path)


@pytest.mark.parametrize('text', [
    TAGGED, TAGGED.replace('\t', ' '),
    TAGGED.replace('\t\n', '\n').replace('\t', '\tx y\t')])
def test_sentences(text, tmp_path):
  path = _file(tmp_path, text)
  first, second = conll.read(path)
  assert first.words == ['Empire', 'State', '#tag']
  assert first.labels == ['B-loc', 'I-loc', 'O']
  assert first.lines == [f'{path}, line {n}' for n in (4, 5, 6)]
  assert second[:2] == (['ana', 'bo'], ['B-per', 'B-per'])


def test_a_hashtag_may_begin_a_sentence(tmp_path):
  path = _file(tmp_path, 'a b\n\n# O\n#x O\n')
  assert [s.words for s in conll.read(path)] == [['a'], ['#', '#x']]


def test_a_word_may_hold_spaces_that_are_no_blanks(tmp_path):
  path = tmp_path / 'x.conll'
  path.write_text('10\u00a0000  O\n \nnew\u3000york B-LOC \r\n', 'utf-8')
  assert [(s.words, s.labels) for s in conll.read(str(path))] == [
      (['10\u00a0000'], ['O']), (['new\u3000york'], ['B-LOC'])]


def test_a_set_of_the_hub_has_names_of_labels():
  row = dict(w=['a', 'b'], l=[1, 0])
  def read(names=('O', 'B-x'), **changes):
    dataset = types.SimpleNamespace(
        features=dict.fromkeys('wl', types.SimpleNamespace(
            feature=types.SimpleNamespace(names=names))),
        select_columns=lambda _: [row, row | changes])
    return list(conll.reader_of_rows('hf:x', ('w', 'l'), dataset)(''))
  assert [s.labels for s in read()] == [['B-x', 'O']] * 2
  assert read()[1].lines[1] == 'hf:x, row 2, word 2'
  assert read(None)[0].labels == ['1', '0']
  for wrong in (-1, 2, -100):
    with pytest.raises(ValueError, match=f'row 2, word 2, has the label {wrong}'
                       ', and the set has 2: one whose labels are kept back'):
      read(l=[0, wrong])
  for names in (('O', 'B-x'), None):
    with pytest.raises(ValueError, match='word 1, has the label None: a label'):
      read(names, l=[None, 1])
  with pytest.raises(ValueError, match='row 2, has 2 words and 0 labels'):
    read(l=None)


@pytest.mark.parametrize('scalar', ['w', 'l'])
def test_a_column_of_the_hub_that_holds_no_lists_is_refused(scalar):
  lists, text = types.SimpleNamespace(feature=None), types.SimpleNamespace()
  dataset = types.SimpleNamespace(features=dict(w=lists, l=lists) | {
      scalar: text})
  with pytest.raises(RequestError, match=f'field {scalar!r} holds no lists: '
                     'write one of lists of words and one of lists of labels'):
    conll.reader_of_rows('hf:x', ('w', 'l'), dataset)


def test_columns(tmp_path):
  path = _file(tmp_path, 'EU NNP B-NP B-ORG\n')
  sentence, = conll.read(path, (0, 1))
  assert (sentence.words, sentence.labels) == (['EU'], ['NNP'])
  sentence, = conll.read(path)
  assert sentence.labels == ['B-ORG']


@pytest.mark.parametrize('text, columns, message', [
    ('a O\nb\n', (0, -1), 'line 2, has one column: a line is a word and'),
    ('a O\n', (0, 2), r'line 1, has 2 columns, and none with the label \(col'),
    ('a\tO\n\tO\n', (0, -1), 'line 2, column 0, is empty: it should hold a wo'),
    ('a\tO\nb\t\n', (0, -1), 'line 2, column -1, is empty'),
    ('a\t\tO\n', (0, 1), 'line 1, column 1, is empty: it should hold a label')])
def test_a_line_that_is_no_word_is_refused(text, columns, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    list(conll.read(_file(tmp_path, text), columns))


def test_what_is_not_utf8_is_refused(tmp_path):
  (tmp_path / 'a').write_bytes(b'a\tO\n\xff\tO\n')
  with pytest.raises(ValueError, match='line 2, is not UTF-8'):
    list(conll.read(str(tmp_path / 'a')))


@pytest.mark.parametrize('labels, message', [
    ('O I-x', "line 2, has the label 'I-x' after 'O': an entity begins with "
     "'B-x'"),
    ('I-x', "line 1, has the label 'I-x' after 'O'"),
    ('B-x I-y', "line 2, has the label 'I-y' after 'B-x'"),
    ('B-x E-x', "line 2, has the label 'E-x' among labels of entities"),
    ('B-x B-', "has the label 'B-' among"),
    ('B-x I-x I-x B-x B-y O', '')])
def test_labels_that_mark_no_entities_are_refused(labels, message, tmp_path):
  path = _file(tmp_path, ''.join(f'w\t{label}\n' for label in labels.split()))
  sentence, = conll.read(path)
  if not message:
    conll.check_entities(sentence)
    return
  with pytest.raises(ValueError, match=message):
    conll.check_entities(sentence)


def test_which_labels_are_of_entities():
  assert conll.marks_entities(['O', 'B-x', 'I-x'])
  assert not conll.marks_entities(['O', 'NOUN', 'B-x'])
  assert not conll.marks_entities(['O'])
  assert conll.marks_entities(['I-x', 'O'])  # wrongly: check_entities says so


def test_columns_that_a_source_names():
  assert conll.columns_of('', '') == (0, -1)
  assert conll.columns_of('', '0+3') == (0, 3)
  assert conll.columns_of('', '1+-2') == (1, -2)
  for wrong in '0', '0+', '0,3', 'word+label', '0+1+2':
    with pytest.raises(ValueError, match='write the number of the words and'):
      conll.columns_of('conll:a', wrong)


@pytest.mark.skipif(not os.environ.get('ARCHETYPE_DATA'),
                    reason='ARCHETYPE_DATA names no folder with WNUT-17')
def test_wnut17_has_the_sentences_and_entities_that_are_published():
  """Derczynski et al. 2017, table 2."""
  folder = os.environ['ARCHETYPE_DATA']
  counts = {}
  for path in glob.glob(f'{folder}/wnut17/*'):
    sentences = list(conll.read(path))
    for sentence in sentences:
      conll.check_entities(sentence)
    labels = [label for s in sentences for label in s.labels]
    counts[os.path.basename(path)] = (
        len(sentences), len(labels), sum(x.startswith('B') for x in labels))
  assert counts == {'wnut17train.conll': (3394, 62730, 1975),
                    'emerging.dev.conll': (1009, 15733, 836)}
