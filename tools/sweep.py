"""Checks, runs and reports a sweep: tools.compare by another name."""

from tools.compare import __main__ as compare
from training import cli

if __name__ == '__main__':
  cli.run(compare.main)
