"""Makes the text of a study, prose and code, of packages in a folder.

It is the text of configs/studies/contradictions.py: prose.jsonl and code.jsonl.
The packages are those of PACKAGES, by version and hash. Their ordinary clients
fetch them, and nothing here does:

  apt-get download dict-gcide perl-doc linux-doc-6.12
  pip download --no-deps --only-binary=:all: django==5.2.8 networkx==3.5 \\
      nltk==3.9.2 sympy==1.14.0 transformers==4.57.1 twisted==25.5.0
  python -m tools.package_text --packages=FOLDER --out=FOLDER

A document is an entry of the dictionary, a page of a manual, or a file of
Python. Short ones are left out, and one that is written as an earlier one is,
but for spaces. They are in the order of their hashes, so that every part of
the text, and what is held out of it (data.holdout_every), has some of each.
"""

from collections.abc import Iterator
import gzip
import hashlib
import io
import json
import pathlib
import re
import subprocess
import tarfile
import zipfile

from common.errors import EnvironmentFailure, require
from training import cli

# For each package: the corpus, the beginning of its files' paths and their
# ending, and the hash of the package (SHA-256).
PACKAGES = {
    'dict-gcide_0.48.5+nmu4_all.deb': (
        'prose', 'usr/share/dictd/', '.dict',
        '7d6c11be209ca67fb4425b1e4d600e9dc9c5c67d919482e51b99b0cca179601b'),
    'linux-doc-6.12_6.12.118-1_all.deb': (
        'prose', 'usr/share/doc/linux-doc-6.12/Documentation/', '.rst',
        '6cdfeb9454a485eb7872402fed45f0f97539a8c1d3086da219756b4fea5551a5'),
    'perl-doc_5.40.1-6+deb13u1_all.deb': (
        'prose', 'usr/share/perl/', '.pod',
        '5199f0a0432ac3fac48d6e6a9e3a216d17977a49deff77dbdb958716fbe29b0c'),
    'django-5.2.8-py3-none-any.whl': (
        'code', 'django/', '.py',
        '37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f'),
    'networkx-3.5-py3-none-any.whl': (
        'code', 'networkx/', '.py',
        '0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec'),
    'nltk-3.9.2-py3-none-any.whl': (
        'code', 'nltk/', '.py',
        '1e209d2b3009110635ed9709a67a1a3e33a10f799490fa71cf4bec218c11c88a'),
    'sympy-1.14.0-py3-none-any.whl': (
        'code', 'sympy/', '.py',
        'e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5'),
    'transformers-4.57.1-py3-none-any.whl': (
        'code', 'transformers/', '.py',
        'b10d05da8fa67dc41644dbbf9bc45a44cb86ae33da6f9295f5fbf5b7890bd267'),
    'twisted-25.5.0-py3-none-any.whl': (
        'code', 'twisted/', '.py',
        '8559f654d01a54a8c3efe66d533d43f383531ebf8d81d9f9ab4769d91ca15df7'),
}
LEAST_CHARACTERS = 200


def main() -> int:
  """Writes the texts of the packages that were downloaded: two files, of prose
  and of code, with a line of JSON for each document. Returns the exit code."""
  parser = cli.Parser(prog='python -m tools.package_text', description=__doc__)
  parser.add_argument('--packages', default='.', help='the folder that the '
                      'packages lie in')
  parser.add_argument('--out', default='.', help='the folder to write in')
  args = parser.parse_args()

  # Collect the documents by their hash, so that each is there once.
  documents: dict[str, dict[str, str]] = {'prose': {}, 'code': {}}
  for name, (corpus, folder, ending, checksum) in PACKAGES.items():
    path = pathlib.Path(args.packages) / name
    check_package(path, checksum)
    for text in read_documents(path, folder=folder, ending=ending):
      add_document(documents[corpus], text)
  for corpus, text_of_hash in documents.items():
    path = pathlib.Path(args.out) / f'{corpus}.jsonl'
    size = write_corpus(path, text_of_hash)
    print(f'{path}: {len(text_of_hash):,} documents, {size:,} bytes of text')
  return 0


def check_package(path: pathlib.Path, checksum: str) -> None:
  """Raises RequestError where a package is missing or another one."""
  require(path.is_file(), f'{path} is missing: download it as '
          'python -m tools.package_text --help says')
  actual = hashlib.sha256(path.read_bytes()).hexdigest()
  require(actual == checksum, f'{path} has the SHA-256 {actual}, and '
          f'{checksum} is expected: download the version that PACKAGES names')


def read_documents(path: pathlib.Path, folder: str, ending: str
                   ) -> Iterator[str]:
  """Yields the documents of a package, in the order of its files' names.

  Args:
    path: the package, a wheel or a Debian package.
    folder: the beginning of the names of the files to read.
    ending: their ending. A file may be packed by gzip, with .gz or .dz at last.
  """
  content_of_file = (
      _read_wheel(path) if path.suffix == '.whl' else _read_deb(path))
  for name, content in sorted(content_of_file.items()):
    if not name.startswith(folder):
      continue
    # A .dz of a dictionary (dictzip) is a gzip file with an index.
    unpacked_name = re.sub(r'\.[gd]z$', '', name)
    if not unpacked_name.endswith(ending):
      continue
    if unpacked_name != name:
      content = gzip.decompress(content)
    text = content.decode('utf-8', errors='replace')
    # An entry of a dictionary begins at the margin, after an empty line.
    if ending == '.dict':
      yield from re.split(r'\n\n(?=\S)', text)
    else:
      yield text


def _read_wheel(path: pathlib.Path) -> dict[str, bytes]:
  """Returns the content of each file of a wheel, by its name."""
  with zipfile.ZipFile(path) as archive:
    return {name: archive.read(name) for name in archive.namelist()}


def _read_deb(path: pathlib.Path) -> dict[str, bytes]:
  """Returns the content of each file of a Debian package, by its name, without
  its folders and links.

  Raises:
    EnvironmentFailure: where dpkg-deb is missing, or fails.
  """
  # dpkg-deb writes the files of the package to its output, as a tar archive.
  command = ['dpkg-deb', '--fsys-tarfile', str(path)]
  try:
    tar = subprocess.run(command, check=True, capture_output=True).stdout
  except (OSError, subprocess.CalledProcessError) as error:
    raise EnvironmentFailure(f'{path} cannot be unpacked by dpkg-deb: {error}'
                             ) from error
  content_of_file = {}
  with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
    for member in archive:
      file = archive.extractfile(member) if member.isfile() else None
      if file is not None:
        content_of_file[member.name.removeprefix('./')] = file.read()
  return content_of_file


def add_document(text_of_hash: dict[str, str], text: str) -> None:
  """Adds a document to those of a corpus, unless it is short or there already.

  Args:
    text_of_hash: the documents of the corpus, by the hash of their words; it is
      changed.
    text: the document.
  """
  words = ' '.join(text.split())
  if len(words) < LEAST_CHARACTERS:
    return
  text_of_hash.setdefault(hashlib.sha256(words.encode()).hexdigest(), text)


def write_corpus(path: pathlib.Path, text_of_hash: dict[str, str]) -> int:
  """Writes the documents of a corpus in the order of their hashes.

  Args:
    path: the file to write, with a line of JSON, {"text": ...}, for each
      document.
    text_of_hash: the documents, by the hash of their words.

  Returns:
    The number of bytes of their texts in UTF-8.
  """
  num_bytes = 0
  with path.open('w', encoding='utf-8') as file:
    for _, text in sorted(text_of_hash.items()):
      file.write(json.dumps({'text': text}) + '\n')
      num_bytes += len(text.encode())
  return num_bytes


if __name__ == '__main__':
  cli.run(main)
