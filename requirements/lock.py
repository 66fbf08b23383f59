"""Turns pip's report of what it would install into a constraints file.

`make lock` calls it. Torch is left to the range in setup.cfg, and so is what
it brings for GPUs: its builds differ by machine.
"""

import json
import re
import sys

_UNPINNED = re.compile(r'archetype|torch|triton|(nvidia|cuda)-.*')


def pins(report: dict) -> list[str]:
  """Returns 'name==version' for each package of the report, sorted.

  Args:
    report: the report of `pip install --dry-run --report`, in which `install`
      lists the packages.
  """
  versions = {}
  for package in report['install']:
    metadata = package['metadata']
    # A name may be spelt in several ways, which PEP 503 brings to this one.
    name = re.sub(r'[-_.]+', '-', metadata['name']).lower()
    if not _UNPINNED.fullmatch(name):
      versions[name] = metadata['version']
  return [f'{name}=={version}' for name, version in sorted(versions.items())]


def main(report: str, lock: str) -> None:
  """Writes the versions that pip would install into a file of requirements.

  Args:
    report: the file that `pip install --dry-run --report` wrote.
    lock: the file to write.
  """
  with open(report) as file:
    lines = pins(json.load(file))
  version = sys.version_info
  head = (f'# Exact versions for Python {version.major}.{version.minor}, '
          'written by `make lock`.')
  with open(lock, 'w') as file:
    for line in (head, *lines):
      file.write(f'{line}\n')
  print(f'{lock}: {len(lines)} packages')


if __name__ == '__main__':
  main(*sys.argv[1:])
