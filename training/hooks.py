"""The hooks of every run: reporting, stopping, evaluating, saving, profiling.

`usual_hooks` returns them in the order in which the loop calls them. A step is
dispatched before the figures of the step before it are read, so that the device
has work while the host writes figures and fetches the next batch.
"""

from collections.abc import Sequence
from typing import Any

from etils import epath
import jax
import numpy as np

from architectures.parts.moe import routing
from training import progress
from training.data.tokenizers import Tokenizer
from training.distributed import signals
from training.evals import held_out, in_training
from training.hook import Hook, Loop
from training.objectives import pipeline
from training.workdir import storage
from training.writer import DIVERGED, ENDED_EARLY, RunWriter


def usual_hooks(stop: signals.Stop, tokenizer: Tokenizer,
                eval_data: Sequence[pipeline.Loader], profile_steps: str,
                workdir: epath.Path) -> list[Hook]:
  """Returns the hooks that every run has: objects whose methods the training
  loop calls between steps, for instance to evaluate or to save. The loop calls
  them in this order, so that metrics are written before the checkpoint.

  Args:
    stop: whether a signal has asked the run to stop.
    tokenizer: the tokenizer of the run.
    eval_data: a loader of evaluation batches for each held-out source.
    profile_steps: the steps to trace with a profiler, 'START:STOP'; '': none.
    workdir: the folder of the run, to which the trace is written.
  """
  report = Report()
  save = Save(report)
  return [
      Profile(profile_steps, workdir),
      report,
      ExpertPanel(),
      StopOnSignal(stop),
      Evaluate(stop, tokenizer=tokenizer, eval_data=eval_data, report=report,
               save=save),
      save,
  ]


class Report(Hook):
  """Reads the figures of a step one step late; writes and shows them if they
  are due, and the figures of a run that they end in any case."""

  def begin(self, loop: Loop) -> None:
    self._deferred = progress.DeferredFigures(loop.meter.now)

  def after_step(self, loop: Loop, figures: Any) -> None:
    self._report_figures(loop, self._deferred.push(loop.n, figures))

  def flush(self, loop: Loop) -> None:
    """Reports the last step, whose figures are still held back: before the runs
    are evaluated or saved."""
    self._report_figures(loop, self._deferred.flush())

  def _report_figures(self, loop: Loop, read: progress.StepFigures | None
                      ) -> None:
    """Gives each run the figures of a step, and writes and shows them where
    that is due.

    Args:
      loop: the state of the training loop.
      read: the step, its figures (loss, grad_norm, ...) and when it was done;
        None: there are none yet.
    """
    if read is None:
      return
    n = read.step  # not loop.n: figures are read one step late
    running = loop.running_writers

    # Each run takes its figures, out of arrays that hold those of all runs. A
    # run whose loss was not finite in too many steps in a row is ended by the
    # hook `Save`, later; these figures are its last, so they are written.
    ended = []
    for row, writer in running.items():
      had_too_many = writer.has_too_many_bad_steps
      writer.take_figures(loop.program.figures_of_run(read.figures, row))
      if writer.has_too_many_bad_steps and not had_too_many:
        ended.append(writer)
      for hook in loop.hooks:
        hook.on_figures(loop, writer, n, writer.last_figures)

    # A line of metrics: for all runs where it is due, else for those that end.
    # `lap` ends a lap of the timer, so that it is called once for each line.
    is_due = n % loop.config.log.every_steps == 0 or n == loop.steps
    reported = ended
    if is_due:
      reported = list(running.values())
    if not reported:
      return
    lap = loop.meter.lap(n, read.done) | loop.program.figures
    for writer in reported:
      figures = writer.last_figures | lap
      for hook in loop.hooks:
        figures |= hook.more_figures(loop, writer)
      writer.write_figures(n, 'train', figures)

    # The line that is shown: the mean loss of the runs.
    if running and is_due:
      losses = [writer.last_figures['loss'] for writer in running.values()]
      loop.bar.update(n, lap | {'loss': float(np.mean(losses))})


class ExpertPanel(Hook):
  """Adds to each line of metrics how evenly the experts were loaded over the
  steps since the last line."""

  def __init__(self):
    self._loads: dict[RunWriter, list[tuple]] = {}

  def on_figures(self, loop: Loop, writer: RunWriter, n: int,
                 figures: dict[str, Any]) -> None:
    if 'health/load_E' in figures:
      load = figures['health/load_E'], figures['health/tokens']
      self._loads.setdefault(writer, []).append(load)

  def more_figures(self, loop: Loop, writer: RunWriter) -> dict[str, Any]:
    """Returns figures about the load of the experts over all steps since the
    last line of metrics, health/window_NAME; {} for a model without experts.

    Args:
      loop: the training loop.
      writer: the writer of one run, to whose line of metrics the figures are
        added.
    """
    # Take the loads out, so that the next window begins empty. Each step is
    # weighted by its number of tokens.
    loads_and_tokens = self._loads.pop(writer, [])
    if not loads_and_tokens:
      return {}
    loads = np.asarray([load for load, _ in loads_and_tokens], np.float32)
    tokens = np.asarray([count for _, count in loads_and_tokens], np.float32)
    window = routing.summarize_window(loads, tokens)
    figures = {}
    for name, array in window.items():
      figures[f'health/window_{name}'] = np.asarray(array).tolist()
    return figures


class StopOnSignal(Hook):
  """Ends the loop after the step on which all processes agree, once a signal
  has come."""

  def __init__(self, stop: signals.Stop):
    self._stop = stop

  def after_step(self, loop: Loop, figures: Any) -> None:
    loop.stopped = self._stop.should_stop(loop.n)

  def end(self, loop: Loop) -> None:
    for writer in loop.writers:
      writer.stop_requested = self._stop.stop_requested


class Evaluate(Hook):
  """Evaluates all runs by what is due, held-out data and eval.tasks; writes and
  shows the figures.

  Where a signal cuts an evaluation short nothing is written, and the run does
  it again when it is resumed.
  """

  def __init__(self, stop: signals.Stop, tokenizer: Tokenizer,
               eval_data: Sequence[pipeline.Loader], report: Report,
               save: 'Save'):
    """Keeps what the evaluations need.

    Args:
      stop: whether a signal has asked the run to stop.
      tokenizer: the tokenizer of the runs.
      eval_data: the held-out data of each run.
      report: the hook that shows figures.
      save: the hook that saves runs, which may keep the best checkpoint.
    """
    self._stop = stop
    self._tokenizer = tokenizer
    self._eval_data = eval_data
    self._report = report
    self._save = save

  def check(self, loop: Loop) -> None:
    """Checks, before the first step, that the evaluations will have the figure
    by which the best checkpoint is chosen (eval.best).

    The names of the figures of held-out data are found by tracing an
    evaluation, without computing it. A task that does not declare its figures
    is run once.

    Args:
      loop: the training loop, before its first step.

    Raises:
      RequestError: for an eval.best that is none of these figures.
    """
    self._tasks = in_training.TasksInTraining(loop.program.run, self._tokenizer)
    program = loop.program
    # All runs of the program have the same eval.best. If the run has been
    # evaluated before, the figure exists.
    best = loop.writers[0].best
    if best is None or best.seen:
      return

    # The figure is that of a task, TASK/FIGURE, or one of the held-out data.
    task, is_task, _ = best.figure.partition('/')
    if is_task:
      params = next(iter(program.split_by_run(loop.state.params)))
      names = self._tasks.list_figure_names(
          task, params, loop.writers[0].workdir,
          lambda: self._stop.can_stop_at_once)
    else:
      names = held_out.list_figure_names(
          program.eval_step, params=loop.state.params, loaders=self._eval_data,
          put=program.put, sums_of_run=program.figures_of_run)
    # If no names were found, any figure is accepted.
    best.check_is_among(names or [best.figure])

  def compile(self, loop: Loop) -> None:
    if loop.config.eval.every_steps:
      batch = loop.program.put(self._eval_data[0].batch(0))
      loop.eval_step.compile(loop.state.params, batch)

  def begin(self, loop: Loop) -> None:
    """Does the evaluation after the step at which a run is resumed, where a
    signal had kept it from being done."""
    unevaluated = [writer for writer in loop.running_writers.values()
                   if self._lacks_evaluation(loop, writer)]
    if unevaluated and self._is_due(loop):
      loop.stopped = not self._evaluate(loop)
    for writer in unevaluated:
      if writer.best is not None and writer.best.is_over:
        writer.end(ENDED_EARLY, loop.n)

  def after_step(self, loop: Loop, figures: Any) -> None:
    """Evaluates the runs, if that is due after this step.

    Args:
      loop: the training loop.
      figures: the metrics of the step, which are not read.
    """
    is_last = loop.n == loop.steps
    if not self._is_due(loop) or loop.stopped and not is_last:
      return
    try:
      self._evaluate(loop)
    except Exception:
      # A task may fail for reasons of its own. Save first, so that the training
      # is not lost. Saving here is safe, as runs of several processes do no
      # tasks: no other process would wait for this one.
      if self._are_tasks_due(loop):
        self._save.save_after_failed_evaluation(loop)
      raise
    loop.stopped = self._stop.can_stop_at_once

  def _lacks_evaluation(self, loop: Loop, writer: RunWriter) -> bool:
    """Whether a run lacks the evaluation after the steps that are done."""
    if not writer.has_evaluation:
      return True
    return writer.best is not None and writer.best.seen < loop.n

  def _is_due(self, loop: Loop) -> bool:
    return self._is_held_out_due(loop) or self._are_tasks_due(loop)

  def _is_held_out_due(self, loop: Loop) -> bool:
    every = loop.config.eval.every_steps
    if not every:
      return False
    return loop.n % every == 0 or loop.n == loop.steps

  def _are_tasks_due(self, loop: Loop) -> bool:
    every = loop.config.eval.tasks_every_steps
    if not loop.config.eval.tasks:
      return False
    if loop.n == loop.steps:
      return True
    return every > 0 and loop.n % every == 0

  def _is_cut_short(self, loop: Loop) -> bool:
    """Whether a signal ends an evaluation. The last one goes on: the run was
    for it."""
    return self._stop.can_stop_at_once and loop.n < loop.steps

  def _evaluate(self, loop: Loop) -> bool:
    """Runs the evaluations that are due, of all runs, and writes their figures.

    Args:
      loop: the training loop, after a step at which an evaluation is due.

    Returns:
      False if a signal cut the evaluation short; then nothing is written.
    """
    # Write the metrics of the last training step before those of the
    # evaluation.
    self._report.flush(loop)
    running = loop.running_writers
    figures_of_row: dict[int, dict] = {row: {} for row in running}
    # The time of an evaluation must not count as that of training.
    with loop.meter.paused():
      if self._is_held_out_due(loop):
        if not self._evaluate_held_out(loop, figures_of_row):
          return False
      if self._are_tasks_due(loop):
        if not self._evaluate_tasks(loop, figures_of_row):
          return False
    # Write the figures of all evaluations of a run as one row.
    for row, writer in running.items():
      figures = figures_of_row[row]
      if figures:
        writer.evaluate(loop.n, figures)
        for hook in loop.hooks:
          hook.on_evaluation(loop, writer, loop.n, figures)
    return True

  def _evaluate_held_out(self, loop: Loop, figures_of_row: dict[int, dict]
                         ) -> bool:
    """Evaluates all runs on the held-out data, and prints their figures.

    Args:
      loop: the training loop, with its program, its state and its step.
      figures_of_row: {index of the run: figures}, to which those of held-out
        data are added. The index is along the axis of runs that arrays have
        where several runs train as one program.

    Returns:
      False where a signal cut the evaluation short.
    """
    program = loop.program
    # If the run keeps an average of its parameters (optim.ema), that is
    # evaluated; with eval.live the parameters themselves are evaluated as well.
    params_of_prefix = {'': program.run.parameters_to_evaluate(loop.state)}
    if loop.config.eval.live:
      params_of_prefix['live/'] = loop.state.params
    for prefix, params in params_of_prefix.items():
      sums = held_out.sum_held_out(
          loop.eval_step, params=params, loaders=self._eval_data,
          batches=loop.config.eval.batches, put=program.put,
          stop=lambda: self._is_cut_short(loop))
      if sums is None:
        return False
      # `sums` has a dict of arrays for each held-out source. Take each run's
      # part of the arrays.
      for row, writer in loop.running_writers.items():
        sums_of_run = [program.figures_of_run(sums_of_source, row)
                       for sums_of_source in sums]
        means = held_out.average_figures(sums_of_run, self._eval_data)
        for name, value in means.items():
          figures_of_row[row][prefix + name] = value
        self._print_held_out_figures(loop, writer=writer, prefix=prefix,
                                     means=means)
    return True

  def _print_held_out_figures(self, loop: Loop, writer: RunWriter, prefix: str,
                              means: dict[str, float]) -> None:
    """Prints a line with the held-out figures of a run. If several runs train
    together, only its loss is printed.

    Args:
      loop: the training loop, with its program, its state and its step.
      writer: the writer of the run.
      prefix: 'live/' for the parameters beside their average, else ''.
      means: the figures of the run, {name: value}.
    """
    # Only a run that trains together with others has a label.
    label = ''
    if writer.label:
      means = {'loss': means['loss']}
      label = f'  {writer.label}'
    # Print the names with spaces in place of underscores.
    parts = []
    for name, value in means.items():
      words = name.replace('_', ' ')
      parts.append(f'{words} {held_out.format_figure(value)}')
    text = '  '.join(parts)
    which_parameters = prefix.replace('/', ' ')
    loop.bar.say(f'step {loop.n}  held-out {which_parameters}{text}{label}')

  def _evaluate_tasks(self, loop: Loop, figures_of_row: dict[int, dict]
                      ) -> bool:
    """Evaluates each run by the tasks of eval.tasks, and prints the results.

    Args:
      loop: the training loop, with its program, its state and its step.
      figures_of_row: {index of the run: figures}, to which those of the tasks
        are added. The index is along the axis of runs that arrays have where
        several runs train as one program.

    Returns:
      False where a signal cut the evaluation short.
    """
    program = loop.program
    running = loop.running_writers
    # Do the tasks of all runs before any result is shown, as a signal may cut
    # this short. Skip runs that have ended, which still are in the arrays.
    result_of_row = {}
    params = program.run.parameters_to_evaluate(loop.state)
    params_of_runs = program.split_by_run(params)
    for row, params in enumerate(params_of_runs):
      if row not in running:
        continue
      result = self._tasks.run_for_member(
          params, loop.n, running[row].workdir,
          stop=lambda: self._is_cut_short(loop))
      if result is None:
        return False
      result_of_row[row] = result
    for row, result in result_of_row.items():
      figures_of_row[row] |= result.figures
      for text in result.lines:
        loop.say(running[row], f'step {loop.n}  {text}')
    return True


class Save(Hook):
  """Saves the runs when that is due, and ends those that diverged and those
  that stop early."""

  def __init__(self, report: Report):
    self._report = report

  def after_step(self, loop: Loop, figures: Any) -> None:
    self._save_runs(loop, all_end=loop.ends)

  def _save_runs(self, loop: Loop, all_end: bool) -> None:
    """Saves the runs for which a checkpoint is due, and ends runs that have
    diverged or do not improve any more.

    Args:
      loop: the training loop.
      all_end: whether no run trains any further, so that all are saved.
    """
    n = loop.n
    writer_of_row = self._runs_to_save(loop, all_end)
    if not writer_of_row:
      return

    # Read the metrics of the last step first: they tell whether the parameters
    # are finite. Parameters that are not must not be saved.
    self._report.flush(loop)
    with loop.meter.paused():
      for row, state in enumerate(loop.program.split_by_run(loop.state)):
        if row not in writer_of_row:
          continue
        writer = writer_of_row[row]
        if writer.is_sound:
          writer.save(n, state, loop.batches.tokens_before(n))
        else:
          loop.say(writer, f'step {n} is not saved: its parameters are not '
                   'finite')

    # End runs only after their last save.
    for writer in writer_of_row.values():
      has_diverged = n == loop.steps and not writer.is_sound
      if writer.has_too_many_bad_steps or has_diverged:
        writer.end(DIVERGED, n)
      elif writer.best is not None and writer.best.is_over and n < loop.steps:
        writer.end(ENDED_EARLY, n)
      if writer.code and writer.label:  # the others go on
        loop.say(writer, writer.sentence)

  def _runs_to_save(self, loop: Loop, all_end: bool) -> dict[int, RunWriter]:
    """Returns the runs that are to be saved after this step.

    Args:
      loop: the training loop.
      all_end: whether no run trains any further, so that all are saved.

    Returns:
      {index of the run: its writer}, with the index along the axis of runs that
      arrays have where several train as one program. If a regular checkpoint is
      due, all runs are saved; else those that need it, for instance after their
      best evaluation.
    """
    running = loop.running_writers
    if all_end:
      return running
    # is_due lets all processes agree, so each of them must call it at the same
    # steps.
    if any(writer.saved.is_due(loop.n) for writer in running.values()):
      return running
    return {row: writer for row, writer in running.items()
            if writer.needs_save(loop.n)}

  def save_after_failed_evaluation(self, loop: Loop) -> None:
    """Saves all runs, so that nothing is lost where an evaluation fails."""
    self._save_runs(loop, all_end=True)
    for writer in loop.writers:
      writer.saved.wait()
    loop.bar.say(f'step {loop.n} is saved, without all that eval.tasks names')


class Profile(Hook):
  """Traces some steps into WORKDIR/profile.

  The trace is xprof's: pip install xprof, then xprof --logdir WORKDIR/profile,
  or TensorBoard's profile plugin.
  """

  def __init__(self, steps: str, workdir: epath.Path):
    self._start, self._stop = progress.parse_profiled_steps(steps) or (0, 0)
    folder = storage.checked_path(workdir) / 'profile'
    self._files = storage.BucketUploads(folder)
    self._tracing = False

  def before_step(self, loop: Loop) -> None:
    """Starts the trace before the first step to be traced, and ends it after
    the last one."""
    if self._tracing and loop.n >= self._stop:
      self.end(loop)
    # A run that resumes inside the range traces what is left of it.
    elif not self._tracing and self._start <= loop.n < self._stop:
      # Earlier steps must have ended, so that none of them is in the trace.
      jax.block_until_ready(loop.state)
      jax.profiler.start_trace(str(self._files.local))
      self._tracing = True

  def end(self, loop: Loop) -> None:
    if not self._tracing:
      return
    jax.block_until_ready(loop.state)
    jax.profiler.stop_trace()
    self._files.push()
    self._tracing = False
