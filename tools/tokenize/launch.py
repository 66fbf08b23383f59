"""The same command as an array of jobs on SLURM."""

import hashlib
import pathlib
import re
import shlex
import sys
from typing import Any

from configs.errors import require
from tools.compare import slurm_array
from training.workdir import storage


def slurm(args: Any) -> int:
  """Submits an array through submitit, as sweeps do."""
  require(not storage.in_bucket(args.logs), f'--logs is {args.logs!r}: choose '
          'a folder that the nodes share')
  commands = [_words(args, [sys.executable], ['--job', str(i)])
              for i in range(args.jobs)]
  print('each job of the array:', shlex.join(commands[0]))
  if not args.dry_run:
    slurm_array.submit(commands, pathlib.Path(
        args.logs or f'logs/{_name(args.out)}'), args.slurm, 'tokenize')
  return 0


def _words(args: Any, python: list[str], more: list[str]) -> list[str]:
  """Returns the command of a job; which one it is, the array tells it."""
  return [*python, '-m', 'tools.tokenize', args.source, '--out', args.out,
          '--tokenizer', args.tokenizer, '--holdout_every',
          str(args.holdout_every), '--shard_mib', str(args.shard_mib),
          '--processes', str(args.processes), '--jobs', str(args.jobs), *more]


def _name(out: str) -> str:
  """Returns a DNS label, another one for each folder."""
  label = re.sub('[^a-z0-9]+', '-', out.rstrip('/').rpartition('/')[2].lower())
  digest = hashlib.sha256(out.encode()).hexdigest()[:8]
  return f'tokenize-{label.strip("-")[:30]}-{digest}'.replace('--', '-')
