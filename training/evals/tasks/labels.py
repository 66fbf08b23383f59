"""The measures of labelled data: what the model answers to every record that is
held out, and how good that is.

Which figures there are is the objective's own: `Objective.measure`. What it is
given are the scores of the model's head or, of a model without one, the texts
that the model wrote.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.errors import require
from training.measures import classes, words
from training.evals.task import Evaluation, Flag, Task


def run(evaluation: Evaluation) -> dict[str, Any]:
  """Measures the answers to all that is held out, each source on its own."""
  from training.evals import held_out
  from training.objectives import pipeline
  from training.evals.tasks import exact
  from training.workdir import storage
  config = evaluation.run.config
  loaders = pipeline.held_out(config, evaluation.tokenizer, in_order=True)
  _check_held_out(evaluation, loaders)
  objective, found = loaders[0].objective, []
  for loader in loaders:
    answers = (exact.written(evaluation, loader, loader.num_batches)
               if objective.head == 'lm' else scores(evaluation, loader))
    found.append(objective.measure(loader.views[0], answers, config,
                                   evaluation.options))
    print('\n'.join([f'{loader.text}:', *found[-1].lines]))
  if evaluation.options.predictions:
    for kind in found[0].files:
      file = _file(evaluation.options.predictions, kind)
      storage.write(file, ''.join(one.files[kind] for one in found))
      print(f'written: {file}')
  if len(found) == 1:
    return found[0].figures
  # Not those of questions without answers, which some sources do not have.
  names = [name for name, value in found[0].figures.items()
           if isinstance(value, float)
           and all(name in one.figures for one in found)]
  figures = {name: held_out.mix([one.figures[name] for one in found], loaders)
             for name in names}
  shares = ', '.join(f'{loader.share:.3g} {loader.name}' for loader in loaders)
  print(f'the mean by weight, {shares}:')
  for name, value in figures.items():
    print(f'  {name.replace("_", " "):<22} {held_out.shown(value)}')
  return figures | {'sources': {loader.name: one.figures
                                for loader, one in zip(loaders, found)}}


def _check_held_out(evaluation: Evaluation, loaders: Sequence[Any]) -> None:
  """Raises RequestError for records whose answers could not be written, before
  there is any answer."""
  from training.measures import questions
  objective = loaders[0].objective
  if objective.head == 'span' and evaluation.options.predictions:
    require(len(loaders) == 1, '--predictions is one file, and '
            f'{len(loaders)} sources are evaluated: evaluate one by --text')
    questions.check_ids(loaders[0].views[0])


def scores(evaluation: Evaluation, loader: Any) -> list[np.ndarray]:
  """Returns the scores of each row of a loader's view, in its order: [K], or
  of each token [L, K], where L is the length that its batch was padded to."""
  import jax

  from training import progress
  objective, module = loader.objective, evaluation.run.module

  def program():
    return lambda params, batch: objective.apply(
        module, params, batch).extra['scores']

  step, found = evaluation.program(program, 'labels'), []
  for batch in progress.each(loader.iterate(), 'answering',
                             loader.num_batches):
    found += [*jax.device_get(
        step(evaluation.params, evaluation.run.put(batch)))]
  return found[:loader.num_windows]


def _file(name: str, kind: str) -> Any:
  """Returns the path of one of the files of predictions: of FILE.json and
  `nbest` FILE.nbest.json."""
  from training.workdir import storage
  path = storage.path(name, '--predictions')
  return path.with_name(f'{path.stem}.{kind}{path.suffix}') if kind else path


def _unfit(config: Any) -> str:
  from training import objectives
  from training.data import sources
  objective = objectives.of(config)
  if objective.measure is None:
    return f'objective {config.objective!r} learns no labels'
  spec = config.data.eval_source or config.data.source
  if all(source.records for _, source in sources.parse(spec)):
    return ''
  return f'data source {spec!r} has no labels'


def _check(options: Any) -> None:
  from training.workdir import storage
  classes.check_installed()
  words.check_package()
  if options.predictions:
    storage.output(options.predictions, '--predictions')


def _fits(config: Any, options: Any) -> None:
  """Raises RequestError for flags that only answers to questions are read by,
  where there are none, or none are written."""
  from training import objectives
  answers = objectives.of(config).head == 'span'
  for flag in ANSWERS:
    value = getattr(options, flag.name)
    require(answers or value == flag.default, f'--{flag.name} is {value}, '
            f'which is read of answers to questions alone, and objective '
            f'{config.objective!r} has none: leave it out')
  require(bool(options.predictions) or options.n_best == ANSWERS[0].default,
          f'--n_best is {options.n_best}, which is read with --predictions '
          'alone')


def _figures(config: Any) -> tuple[str, ...]:
  from training import objectives
  return *objectives.of(config).measured, 'sources/*'


# Of answers to questions alone.
ANSWERS = (
    Flag('n_best', 20, 'How many of the best answers to a question are '
         'written.', 1, 1000),
    Flag('max_answer_length', 30, 'The most tokens of an answer.', 1, 10_000),
    Flag('null_threshold', 0.0, 'How much more likely than the best answer '
         '(in nats) it has to be that there is none.', -1e6, 1e6))
TASKS = {'labels': Task(
    'accuracy, F1, correlations: what labelled data say', run, _unfit, _check,
    _fits, figures=_figures,
    flags=(
        Flag('predictions', '', 'A file for what is predicted of each record: '
             'words with labels, or answers as JSON.', asks=True),
        *ANSWERS))}
