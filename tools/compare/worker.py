"""Trains several runs of a sweep as one program, or evaluates them in one
process; the runner starts it.

  python -m tools.compare.worker --workdir W --runs=NAME/0,NAME/1
  python -m tools.compare.worker --workdir W --runs=NAME/0 --evaluate=loss
"""

import argparse
import contextlib

from configs.errors import EnvironmentFailure, RequestError
from training import cli
from training.distributed import interrupts

UNFINISHED = 3  # exit code: the log of each run that did not end says why


def main() -> int:
  parser = argparse.ArgumentParser(
      prog='python -m tools.compare.worker', description=__doc__,
      allow_abbrev=False,
      formatter_class=cli.HelpFormatter)
  parser.add_argument('--workdir', required=True, help='of the sweep')
  parser.add_argument('--runs', required=True, help='POINT/SEED,POINT/SEED')
  parser.add_argument('--evaluate', default='', metavar='TASK,TASK',
                      help='what to evaluate instead of training')
  args = parser.parse_args()
  from tools.compare import layout
  from training import vectorised
  from training.distributed import cpu
  cpu.prepare()
  description = layout.load_description(args.workdir)
  runs = [(point, int(seed)) for point, seed in (
      run.split('/') for run in args.runs.split(','))]
  folders = [layout.run_folder(args.workdir, *run) for run in runs]
  if args.evaluate:
    return _evaluate(folders, args.evaluate.split(','))
  try:
    vectorised.train([layout.config(description, *run) for run in runs],
                     folders)
  except vectorised.Unfinished as unfinished:
    for place, sentence in unfinished.sentences.items():
      layout.log(folders[place], f'error: {sentence}')
    return UNFINISHED
  return 0


def _evaluate(folders, tasks: list[str]) -> int:
  """Evaluates runs one after the other, each into its own log; those of one
  model and data share what was compiled."""
  from absl import flags
  from training import evals
  from training.workdir import storage
  from training.evals import checkpoint
  evals.define_flags()
  flags.FLAGS(['worker'])  # the defaults of eval.py
  code, programs = 0, {}
  for folder in folders:
    with (folder / 'log.txt').open('a') as log, contextlib.redirect_stdout(
        log), contextlib.redirect_stderr(log):
      try:
        figures = checkpoint.evaluate(
            storage.path(folder), tasks, flags.FLAGS, step=None, text='',
            programs=programs)
      except (RequestError, EnvironmentFailure, OSError) as error:
        print(f'error: {error}')  # of this run: the others go on
        code = UNFINISHED
      else:
        checkpoint.write(storage.path(folder / 'eval.json'), figures)
  return code


if __name__ == '__main__':
  cli.run(main, interrupts.EndAtOnce())
