r"""Evaluates a run's checkpoint; the run remembers its config.

  python eval.py --workdir runs/tiny
  python eval.py --workdir runs/tiny --tasks=loss,samples --samples=3 \
      --prompt="Fellow citizens" --temperature=0.8 --json runs/tiny/eval.json
  python eval.py --workdir runs/tiny --text='text:other/*.txt'

--prompt is given to the model as it was trained: to a chat run as a question,
to a prefix LM as the prefix, to an encoder-decoder as the source.

Exit code 2: a wrong request; 1: a failure.
"""

import json
import sys

from absl import flags

from configs.errors import RequestError
from training import cli, interrupts

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
flags.DEFINE_integer('samples', 1, 'Texts to write for each prompt.',
                     lower_bound=1, upper_bound=10_000)
flags.DEFINE_string('prompt', '', "What a text begins with; several: 'A|||B'.")
flags.DEFINE_integer('max_new_tokens', 0,
                     'Tokens to write; 0: what fits, 256 at most.',
                     lower_bound=0, upper_bound=2**24)
flags.DEFINE_float('temperature', 1.0, '0: the likeliest token.')
flags.DEFINE_integer('top_k', 0, 'Draw of the k likeliest tokens; 0: all.',
                     lower_bound=0, upper_bound=2**26)
flags.DEFINE_float('top_p', 1.0, 'Draw of the likeliest that reach p.')
flags.DEFINE_integer('sample_seed', 0, 'Of the draws.', lower_bound=0,
                     upper_bound=2**32 - 1)
flags.DEFINE_bool('interpolate', False, 'extrapolation: stretch learned '
                  'positions past max_len.')


def main():
  cli.parse(__doc__)
  args = flags.FLAGS
  if not args.workdir:
    raise RequestError('pass --workdir DIR, the folder of a run')

  # Imported late: `--help` and a wrong flag answer at once.
  from training import evals, host, metrics, restoring, run_config, runs
  from training import sources, storage, tokenizers
  workdir = storage.path(args.workdir)
  json_file = storage.output(args.json, '--json')
  asked = args['samples'].present or args['prompt'].present
  names = args.tasks + ['samples'] * (asked and 'samples' not in args.tasks)
  tasks = {name: evals.task(name) for name in names}
  if args.text:
    sources.parse(args.text)

  host.settle()
  config = runs.with_new_fields(run_config.load(workdir))
  config = runs.for_this_machine(config)
  if args.text:
    config.data.eval_source = args.text
  for task in tasks.values():
    task.check(args, config, workdir)
  tokenizer = tokenizers.load(config.data.tokenizer)
  model, _ = runs.resolve(config, tokenizer)
  run = runs.start(config, model)
  restored = restoring.restore(
      restoring.directory(workdir), {'params': run.abstract.params},
      args.step, partial=True)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  print(f'{workdir}, step {restored.step}')
  figures = {'step': restored.step}
  evaluation = evals.Evaluation(run, restored.state['params'], restored.step,
                                tokenizer, args, workdir)
  with run.context():
    for name, task in tasks.items():
      figures[name] = task.run(evaluation)
  if json_file:
    storage.write(json_file, json.dumps(
        metrics.plain(figures), indent=2, allow_nan=False) + '\n')


if __name__ == '__main__':
  cli.run(main, interrupts.EndAtOnce())
