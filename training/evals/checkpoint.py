"""One checkpoint through the tasks that were asked for."""

from collections.abc import Sequence
import contextlib
import json
import sys
from typing import Any

from etils import epath

from configs.errors import RequestError
from training import evals, parameters, runs
from training.data import tokenizers
from training.evals import Evaluation
from training.objectives import pipeline
from training.workdir import checkpoints, metrics, provenance, run_config
from training.workdir import storage


def load(workdir: epath.Path, names: Sequence[str], options: Any, *,
         step: int | str | checkpoints.Mean | None, text: str = '',
         programs: dict | None = None, live: bool = False) -> Evaluation:
  """Returns a run's checkpoint as tasks are given it, when it has been checked
  that they can be done; arguments and errors are those of `evaluate`."""
  config = runs.for_this_machine(runs.config_of(workdir))
  if text:
    config.data.eval_source = text
    config.eval.part = ''  # all of it
  for name in names:
    evals.check_task(name, options, config)
  tokenizer = tokenizers.load(config.data.tokenizer)
  if not text:
    # A task that reads no data is done where they are not there.
    with contextlib.suppress(RequestError, OSError):
      for line in provenance.check_data(
          run_config.starts(workdir), pipeline.contents(config, tokenizer),
          allowed=True):
        print(f'warning: {line}', file=sys.stderr)
  model, _ = runs.resolve(config, tokenizer)
  run = runs.build(config, model)
  restored = parameters.of_run(run, workdir, step, live)
  return Evaluation(run, restored.state, restored.step, tokenizer, options,
                    workdir, {} if programs is None else programs,
                    restored.what)


def evaluate(workdir: epath.Path, names: Sequence[str], options: Any,
             **how: Any) -> dict[str, Any]:
  """Returns the figures of each task, and prints them for a reader.

  Args:
    workdir: the run's folder.
    names: the tasks, as evals.TASKS has them.
    options: values of the flags of evals.define_flags.
    **how: of `load`.
      step: which checkpoint; 'best'; several, for their mean; None: the newest.
      text: what to evaluate on, as data.source; '': what the run holds out.
      programs: what earlier evaluations of this process compiled; it is added
        to.
      live: with optim.ema, evaluate the parameters and not their average.

  Raises:
    RequestError: where a task cannot be done of this run.
  """
  evaluation = load(workdir, names, options, **how)
  figures: dict[str, Any] = {'step': evaluation.step}
  if evaluation.what:
    figures['parameters'] = evaluation.what
  with evaluation.run.context():
    for name in names:
      figures[name] = evals.run(name, evaluation)
  return figures


def write(file: epath.Path, figures: dict[str, Any]) -> None:
  """Writes what `evaluate` returned, in one piece; what is not finite is null.
  """
  storage.write(file, json.dumps(metrics.plain(figures), indent=2,
                                 allow_nan=False) + '\n')
