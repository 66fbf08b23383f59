"""The name of `python -m tools.compare` for a study; `plan` is its `check`."""

import sys

from tools.compare import __main__ as compare
from training import cli

if __name__ == '__main__':
  if sys.argv[1:2] == ['plan']:
    sys.argv[1] = 'check'
  cli.run(compare.main)
