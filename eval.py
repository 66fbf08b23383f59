r"""Evaluates a run's checkpoint; the run remembers its config.

  python eval.py --workdir runs/tiny
  python eval.py --workdir runs/tiny --tasks=loss,samples --samples=3 \
      --prompt="Fellow citizens" --temperature=0.8 --json runs/tiny/eval.json
  python eval.py --workdir runs/tiny --step=last:5
  python eval.py --workdir runs/loops --passes=8
  python eval.py --workdir runs/tiny --text='text:other/*.txt' --stride=64
  python eval.py --workdir runs/tiny --tasks=lm_eval:blimp_files \
      --lm_eval_data=DIR
  python eval.py --workdir runs/bert --tasks=fill_mask \
      --prompt='Paris is the [MASK] of France'
  python eval.py --workdir runs/bert --tasks=embed --texts=FILE \
      --vectors=OUT.npy

--prompt is given to the model as it was trained: to a chat run as a question,
to a prefix LM as the prefix, to an encoder-decoder as the source.

Exit code 2: a wrong request; 1: a failure.
"""

import signal

from common.errors import RequestError  # first, for its sentence

from absl import flags

from training import cli, evals
from training.data import sources
from training.distributed import cpu
from training.workdir import checkpoints, storage

cli.define_workdir()
flags.DEFINE_string('step', None, 'Which checkpoint: the number of a step, or '
                    'best, of a run with eval.best; or the mean of the '
                    'parameters of several: 100,200 or last:5; default: the '
                    'newest.')
flags.DEFINE_bool('live', False, 'Evaluate the parameters themselves, of a run '
                  'that keeps their average (optim.ema).')
flags.DEFINE_integer('passes', 0, 'Run the layers that loop so often, in place '
                     'of the model.loops.passes of the run; 0: as often.',
                     lower_bound=0)
flags.DEFINE_list('tasks', ['loss'],
                  f'Comma-separated; after lm_eval:NAME, names that are none '
                  f'of these are lm_eval\'s too. {evals.describe_tasks()}.')
flags.DEFINE_string('text', '', 'What to evaluate on in place of '
                    'data.eval_source, all of it: text:other/*.txt, '
                    'labelled:FILE or another form of data.source; default: '
                    'what the run holds out.')
flags.DEFINE_string('json', '', 'A file to write all figures to.')
evals.define_flags()


def main():
  """Evaluates one or several runs by the tasks of --tasks, and prints or writes
  their figures.
  """
  cli.parse(__doc__)
  args = flags.FLAGS
  if not args.workdir:
    raise RequestError('pass --workdir DIR, the folder of a run')
  workdir = storage.checked_path(args.workdir)
  json_file = storage.checked_output_file(args.json, '--json')
  step = checkpoints.parse_step(args.step)
  tasks = evals.choose_tasks(evals.parse_task_names(args.tasks), args,
                             args.text)
  if args.text:
    sources.parse_sources(args.text)

  cpu.configure_cpu()
  figures = evals.evaluate_run(workdir, names=tasks, options=args, step=step,
                               text=args.text, live=args.live,
                               passes=args.passes)
  evals.write_figures(json_file, figures)


if __name__ == '__main__':
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # as SIGTERM: in a compiler, too
  cli.run(main)
