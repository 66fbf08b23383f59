"""The name of `python -m tools.compare` for a sweep."""

from tools.compare import __main__ as compare
from training import cli

if __name__ == '__main__':
  cli.run(compare.main)
