"""One checkpoint through the tasks that were asked for."""

import json
import sys

from training import evals, runs
from training.data import tokenizers
from training.workdir import metrics, restoring, run_config, storage


def evaluate(workdir, tasks: dict, options, *, step: int | None, text: str,
             programs: dict) -> dict:
  """Returns the figures of each task, and prints them for a reader.

  Args:
    workdir: the run's folder.
    tasks: modules by name; see evals.task.
    options: values of the flags of eval_flags.
    step: which checkpoint; None: the newest.
    text: what to evaluate on, as data.source; '': what the run holds out.
    programs: what earlier evaluations of this process compiled; it is added to.

  Raises:
    RequestError: where a task cannot be done of this run.
  """
  config = runs.for_this_machine(
      runs.with_new_fields(run_config.load(workdir)))
  if text:
    config.data.eval_source = text
  for task in tasks.values():
    task.check(options, config, workdir)
  tokenizer = tokenizers.load(config.data.tokenizer)
  model, _ = runs.resolve(config, tokenizer)
  run = runs.build(config, model)
  restored = restoring.restore(
      restoring.directory(workdir), {'params': run.abstract.params}, step,
      partial=True)
  for sentence in restored.damaged:
    print(f'warning: {sentence}', file=sys.stderr)
  print(f'{workdir}, step {restored.step}')
  figures = {'step': restored.step}
  evaluation = evals.Evaluation(run, restored.state['params'], restored.step,
                                tokenizer, options, workdir, programs)
  with run.context():
    for name, task in tasks.items():
      figures[name] = task.run(evaluation)
  return figures


def write(file, figures: dict) -> None:
  """Writes what `evaluate` returned, in one piece; what is not finite is null.
  """
  storage.write(file, json.dumps(metrics.plain(figures), indent=2,
                                 allow_nan=False) + '\n')
