"""Turns pip's report of what it would install into a constraints file.

`make lock` calls it. Torch is left to the range in setup.cfg, and so is what
it brings for GPUs: its builds differ by machine.
"""

import json
import re
import sys

_UNPINNED = re.compile(r'archetype|torch|triton|(nvidia|cuda)-.*')


def pins(report: dict) -> list[str]:
  """Returns 'name==version' for each package of the report, sorted."""
  versions = {}
  for item in report['install']:
    name = re.sub(r'[-_.]+', '-', item['metadata']['name']).lower()
    if not _UNPINNED.fullmatch(name):
      versions[name] = item['metadata']['version']
  return [f'{name}=={version}' for name, version in sorted(versions.items())]


def main(report: str, lock: str) -> None:
  with open(report) as file:
    lines = pins(json.load(file))
  python = '{}.{}'.format(*sys.version_info[:2])
  with open(lock, 'w') as file:
    file.write(
        f'# Exact versions for Python {python}, written by `make lock`.\n'
        + '\n'.join(lines) + '\n')
  print(f'{lock}: {len(lines)} packages')


if __name__ == '__main__':
  main(*sys.argv[1:])
