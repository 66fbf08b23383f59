r"""Trains an architecture on a suite of probes, and gives its score card.

  python -m tools.probes run configs/gpt.py:tiny --workdir runs/card
  python -m tools.probes run configs/llama.py:tiny --workdir runs/llama \
      --suite=configs/probes/small.py --config.model.num_layers=2

A suite is a file of configs/probes/: tasks, learning rates, seeds. Of each task
every learning rate and seed is trained, as one program where that can be, into
WORKDIR/TASK/lr_RATE/seed_SEED, which train.py and eval.py read too. The card is
WORKDIR/card.json and card.png: for each task the figures of the learning rate
whose mean accuracy over the seeds is highest, of those at which no run
diverged. What is trained already is kept, so a suite that was stopped goes on
when it is started again.
"""

import sys

from absl import flags

from common.errors import require
from training import cli

cli.define_config()
cli.define_workdir()
flags.DEFINE_string('suite', 'configs/probes/small.py',
                    'A file of configs/probes/.')
flags.DEFINE_list('only', [], 'Tasks of the suite to do; none: all.')
flags.DEFINE_integer('seeds', 0, 'How many; 0: as the suite says.',
                     lower_bound=0, upper_bound=1000)


def flags_of_command(argv: list[str]) -> list[str]:
  """Rewrites a command of the form `PROGRAM run CONFIG --flag ...` as
  `PROGRAM --config=CONFIG --flag ...`, because absl knows only flags.

  Args:
    argv: the words of the command line, the program first.

  Returns:
    The words of the new command, or the same words if `run` is not there.
  """
  words = argv[1:]
  if words[:1] == ['run']:
    words = words[1:]
    if words and not words[0].startswith('-'):
      words = [f'--config={words[0]}', *words[1:]]
  return [argv[0], *words]


def main() -> int:
  """Trains small models on a suite of probes, which are synthetic tasks such as
  recall, and prints and writes their score card."""
  cli.parse(__doc__, flags_of_command(sys.argv))
  args = flags.FLAGS
  require(args.config is not None and bool(args.workdir),
          'write run CONFIG --workdir DIR, with a CONFIG such as '
          'configs/gpt.py:tiny')

  # Refuse a folder that cannot be written, or that holds something else.
  from tools.probes import suites
  from training.workdir import storage
  workdir = storage.checked_path(args.workdir)
  storage.check_folder_is_writable(workdir)
  storage.refuse_folder_of_run(workdir, '--workdir', suites.CARD_FILE)

  # Train what is not trained yet, and make the card.
  suite = suites.load_suite(args.suite, base=args.config, only=args.only,
                            seeds=args.seeds, overrides=cli.overridden_fields())
  suites.train_suite(suite, workdir)
  card = suites.make_card(suite, workdir)
  suites.write_card(card, workdir)
  print(suites.card_as_text(card))
  card_file = workdir / suites.CARD_FILE
  print(f'written: {card_file}, {workdir / suites.PICTURE_FILE}')
  return 0


if __name__ == '__main__':
  cli.run(main)
