"""The command line of lm_eval, with the runs of this project as a model.

  python -m tools.lm_eval run --model_args workdir=runs/tiny --tasks blimp_files
  python -m tools.lm_eval run --help

lm_eval has no plugins: this registers the model `archetype`, which is then what
--model says by default, adds training/evals/lm_eval_tasks to where tasks are
looked for unless --include_path names another folder, adds --log_samples to an
--output_path, so that each item's score is kept, and hands every word on.
--model_args takes workdir=DIR, step=N, add_bos_token=True or False,
prefix_token_id=ID, max_length=N and max_gen_toks=N. All else is lm_eval's, but
for batch sizes and devices, which follow from the texts' lengths and the run's
mesh. `eval.py --tasks=lm_eval:NAME,NAME` does the same beside the other tasks.
"""

import importlib.util
import sys

from common.errors import RequestError, require
from training import cli
from training.evals.tasks import lm_eval as task


def main() -> None:
  """Registers the runs of this project as a model of lm_eval, and hands the
  command line over to it."""
  words = sys.argv[1:]
  if set(words) <= {'-h', '--help'}:
    print(__doc__.strip())
    return
  require(importlib.util.find_spec('lm_eval') is not None, 'tools.lm_eval '
          "needs the package lm_eval: pip install -e '.[lm-eval]'")

  # Add the defaults of this project, right after the word `run`. lm_eval reads
  # sys.argv, in which that is word 1. An option is written --NAME=VALUE or as
  # two words.
  if words[0] == 'run' and not {'-h', '--help'} & set(words):
    from training.distributed import cpu
    cpu.configure_cpu()
    options = {word.partition('=')[0] for word in words}
    sys.argv[2:2] = _default_options(options)

  # The import of `models` fills lm_eval's registry, which must come first.
  from lm_eval import models
  from lm_eval.__main__ import cli_evaluate
  from lm_eval.api.registry import model_registry
  del models
  model_registry.register('archetype', target='training.evals.harness:Model')
  with task.report_failures('the command'):
    cli_evaluate()


def _default_options(options: set[str]) -> list[str]:
  """Returns the words that are added to a command `lm_eval run ...`, for
  options that it does not have.

  Args:
    options: the names of the options that the command has, long or short, such
      as '--tasks' or '-t'.

  Raises:
    RequestError: if the command names no run, or no tasks.
  """
  # A file of options is complete by itself.
  if options & {'--config', '-C'}:
    return []
  if not options & {'--model_args', '-a'}:
    raise RequestError('pass --model_args workdir=DIR')
  if not options & {'--tasks', '-t'}:
    raise RequestError('pass --tasks NAME,NAME')

  # Where results are written, the score of each item is written too.
  defaults = []
  if not options & {'--model', '-M'}:
    defaults += ['--model', 'archetype']
  if options & {'--output_path', '-o'}:
    defaults.append('--log_samples')
  if '--include_path' not in options:
    defaults += ['--include_path', str(task.OWN_TASKS_FOLDER)]
  return defaults


if __name__ == '__main__':
  cli.run(main)
