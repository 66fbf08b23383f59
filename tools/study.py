"""Plans, runs and reports a study: tools.compare, whose `check` is `plan`."""

import sys

from tools.compare import __main__ as compare
from training import cli

if __name__ == '__main__':
  if sys.argv[1:2] == ['plan']:
    sys.argv[1] = 'check'
  cli.run(compare.main)
