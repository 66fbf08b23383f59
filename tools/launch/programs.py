"""The programs of a cluster that a launcher calls: sbatch, gcloud."""

import shutil
import subprocess

from configs.errors import EnvironmentFailure, require


def need(*names: str) -> None:
  """Raises RequestError where a program is not on this machine."""
  for name in names:
    require(shutil.which(name) is not None, f'{name} is not on the PATH of '
            'this machine: launch where the cluster\'s programs are installed, '
            'or only look at what would be done with --dry_run')


def ask(words: list[str], text: str = '', hint: str = '') -> str:
  """Returns what a program prints.

  Args:
    words: the command.
    text: what it reads on its standard input.
    hint: how to go on where it refuses.

  Raises:
    EnvironmentFailure: where it refuses, with what it said.
  """
  result = subprocess.run(words, input=text, capture_output=True, text=True,
                          check=False)
  if result.returncode:
    said = ' '.join(result.stderr.split()) or 'it said nothing'
    raise EnvironmentFailure(f'{words[0]} ended with exit code '
                             f'{result.returncode}: {said}'
                             + (f'; {hint}' if hint else ''))
  return result.stdout
