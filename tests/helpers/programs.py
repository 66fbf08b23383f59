"""Programs that run in the process of a test, which takes a tenth of the time
of a fork. They may change nothing that other tests read."""

import contextlib
import importlib
import io
import sys
from unittest import mock

from absl import flags
import pytest

from training import cli

# Where the flags of our programs are defined.
ROOMS = ('train', 'eval', 'tools', 'training', 'tests', 'benchmarks',
         '__main__')


def run(name: str, words: list[str]) -> tuple[int, str]:
  """Runs the main function of a program, while absl knows the flags of no other
  one.

  Args:
    name: the name of its module, such as 'train' or 'tools.plan.__main__'.
    words: its arguments.

  Returns:
    Its exit code, and what it wrote to stderr.
  """
  known = vars(flags.FLAGS)
  flags_of_others = {}
  for flag_name, flag in known['__flags'].items():
    module = flags.FLAGS.find_module_defining_flag(flag_name)
    if module.split('.')[0] not in ROOMS:
      flags_of_others[flag_name] = flag
  tables = {'__flags': flags_of_others}
  for table in ('__flags_by_module', '__flags_by_module_id'):
    tables[table] = dict(known[table])

  errors = io.StringIO()
  with (mock.patch.dict(known, tables), mock.patch('sys.argv', [name, *words]),
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())),
        contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end):
    # Anew, so that it defines its flags.
    sys.modules.pop(name, None)
    module = importlib.import_module(name)
    cli.run(module.main)
  return end.value.code, errors.getvalue()
