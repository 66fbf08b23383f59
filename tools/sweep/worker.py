"""Trains several runs of a sweep as one program; the runner starts it.

  python -m tools.sweep.worker --workdir W --runs=NAME/0,NAME/1
"""

import argparse

from training import cli, interrupts

UNFINISHED = 3  # exit code: the log of each run that did not end says why


def main() -> int:
  parser = argparse.ArgumentParser(
      prog='python -m tools.sweep.worker', description=__doc__,
      allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  parser.add_argument('--workdir', required=True, help='of the sweep')
  parser.add_argument('--runs', required=True, help='POINT/SEED,POINT/SEED')
  args = parser.parse_args()
  from tools.sweep import layout
  from training import host, vectorised
  host.settle()
  description = layout.load(args.workdir)
  runs = [(point, int(seed)) for point, seed in (
      run.split('/') for run in args.runs.split(','))]
  folders = [layout.run_folder(args.workdir, *run) for run in runs]
  try:
    vectorised.train([layout.config(description, *run) for run in runs],
                     folders)
  except vectorised.Unfinished as unfinished:
    for place, sentence in unfinished.sentences.items():
      layout.log(folders[place], f'error: {sentence}')
    return UNFINISHED
  return 0


if __name__ == '__main__':
  cli.run(main, interrupts.EndAtOnce())
