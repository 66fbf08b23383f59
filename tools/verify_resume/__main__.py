r"""Kills, resumes and reshapes a run of your config, and compares.

  python -m tools.verify_resume --config configs/gpt.py
  python -m tools.verify_resume --config configs/mixtral.py --steps=12 \
      --mesh=data=1,fsdp=2,expert=2 --mesh=data=4 --json resume.json

Trains a few steps in one go; again, killed with SIGKILL half-way and resumed,
which must give the same bits: every loss, every array of the last checkpoint;
and from the half-way checkpoint on another mesh, which must give the same
losses to --tolerance. On the devices of this machine; on a CPU, on --devices
virtual ones. --processes=2: what goes on on another mesh does so as so many
processes, which share the devices. Exit code 1: it does not resume so.
"""

import json
import pathlib
import sys
import tempfile

from absl import flags

from configs.errors import RequestError, require
from training import cli

cli.define_config()
flags.DEFINE_integer('steps', 8, 'Of each run; it is killed half-way.',
                     upper_bound=2**31 - 1)
flags.DEFINE_multi_string('mesh', [], 'Another mesh, data=2,fsdp=2; axes that '
                          'are not named are 1. Default: one that fits.')
flags.DEFINE_integer('devices', 4, 'Virtual devices, on a CPU.',
                     lower_bound=1, upper_bound=1024)
flags.DEFINE_integer('processes', 1, 'Of the runs on another mesh.',
                     lower_bound=1, upper_bound=1024)
flags.DEFINE_float('tolerance', 1e-5, 'Of a loss on another mesh, relative.')
flags.DEFINE_string('folder', '', 'Keep the runs here; default: a temporary '
                    'folder that is removed.')
flags.DEFINE_string('json', '', 'A file to write the findings to.')


def main():
  cli.parse(__doc__)
  args = flags.FLAGS
  if args.config is None:
    raise RequestError('pass --config FILE.py:SIZE')
  if args.steps < 4:
    raise RequestError(f'--steps is {args.steps}: at least 4 are needed, two '
                       'before the checkpoint and two after')
  require(args.tolerance >= 0, f'--tolerance is {args.tolerance}: it must be '
          '>= 0')
  from tools.verify_resume import runs
  from training.workdir import storage
  json_file = storage.output(args.json, '--json')
  if args.folder:
    storage.try_folder(args.folder, '--folder')
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.folder or temporary)
    findings = runs.verify(
        args.config, cli.words(sys.argv, ['config']),
        folder, args.steps, args.mesh, args.devices, args.tolerance,
        args.processes)
  print(_text(args, findings))
  if json_file:
    storage.write(json_file, json.dumps(findings, indent=2) + '\n')
  return 0 if findings['resumes'] else 1


def _text(args, findings: dict) -> str:
  lines = [f'{args.steps} steps, killed once step {findings["killed_after"]} '
           f'was saved, {findings["devices"]} devices']
  for row in findings['comparisons']:
    lines.append(
        f'{row["what"]:<12}{row["mesh"]:<44}'
        f'{"ok" if row["ok"] else "DIFFERS":<9}{row["found"]}')
  lines.append('it resumes' if findings['resumes'] else
               'it does NOT resume as it should')
  return '\n'.join(lines)


if __name__ == '__main__':
  cli.run(main)
