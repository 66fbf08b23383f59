r"""Evaluates a run's checkpoint; the run remembers its config.

  python eval.py --workdir runs/tiny
  python eval.py --workdir runs/tiny --tasks=loss,samples --samples=3 \
      --prompt="Fellow citizens" --temperature=0.8 --json runs/tiny/eval.json
  python eval.py --workdir runs/tiny --text='text:other/*.txt'

--prompt is given to the model as it was trained: to a chat run as a question,
to a prefix LM as the prefix, to an encoder-decoder as the source.

Exit code 2: a wrong request; 1: a failure.
"""

from absl import flags

from configs.errors import RequestError
from training import cli
from training.distributed import interrupts
from training.evals import flags as eval_flags

cli.define_workdir()
flags.DEFINE_integer('step', None, 'Which checkpoint; default: the newest.',
                     lower_bound=0, upper_bound=2**31 - 1)
flags.DEFINE_list('tasks', ['loss'], 'Comma-separated, of loss, samples, '
                  'extrapolation, routing, exact (held-out targets written '
                  'right), translation (BLEU as well); --samples or --prompt '
                  'adds samples.')
flags.DEFINE_string('text', '', 'What to evaluate on, written as data.source '
                    "is, such as 'text:other/*.txt', all of it; default: what "
                    'the run holds out.')
flags.DEFINE_string('json', '', 'A file to write all figures to.')
eval_flags.define()


def main():
  cli.parse(__doc__)
  args = flags.FLAGS
  if not args.workdir:
    raise RequestError('pass --workdir DIR, the folder of a run')

  # Imported late: `--help` and a wrong flag answer at once.
  from training import evals
  from training.data import sources
  from training.distributed import cpu_memory
  from training.workdir import storage
  from training.evals import checkpoint
  workdir = storage.path(args.workdir)
  json_file = storage.output(args.json, '--json')
  asked = args['samples'].present or args['prompt'].present
  names = args.tasks + ['samples'] * (asked and 'samples' not in args.tasks)
  tasks = {name: evals.task(name) for name in names}
  if args.text:
    sources.parse(args.text)

  cpu_memory.reuse()
  figures = checkpoint.evaluate(workdir, tasks, args, step=args.step,
                                text=args.text, programs={})
  if json_file:
    checkpoint.write(json_file, figures)


if __name__ == '__main__':
  cli.run(main, interrupts.EndAtOnce())
