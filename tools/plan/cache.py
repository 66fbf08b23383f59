"""Reports by content: of the lowered program, the devices, the compiler and
the code that figures come from. (JAX's own cache cannot be read for absent
devices.)"""

import hashlib
import json
import os
import pathlib
import sys
from typing import Optional

from training.data import token_cache

_ROOT = pathlib.Path(__file__).parents[2]
# What reports depend on, besides the program.
CODE = ('tools/plan/*.py', 'training/costs/*.py', 'architectures/**/*.py',
        'training/distributed/devices.py', 'training/objectives/*.py')


def key(lowered_text: str, *facts) -> str:
  """Returns the name of a report."""
  digest = hashlib.sha256(lowered_text.encode())
  digest.update(json.dumps(facts, default=str).encode())
  for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_OPTIMIZATION_LEVEL'):
    digest.update(os.environ.get(name, '').encode())
  for pattern in CODE:
    for path in sorted(_ROOT.glob(pattern)):
      digest.update(path.read_bytes())
  return digest.hexdigest()[:32]


def _path(name: str) -> pathlib.Path:
  return token_cache.default_dir() / 'plans' / f'{name}.json'


def load_report(name: str) -> Optional[dict]:
  path = _path(name)
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    print(f'warning: {path} is damaged ({error}): compiling anew',
          file=sys.stderr)
    return None


def save_report(name: str, report: dict) -> None:
  path = _path(name)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f'.{os.getpid()}')
  partial.write_text(json.dumps(report))
  partial.replace(path)
