"""The training loop: it trains one run, or several runs as one program.

`train_runs` reads in the order in which things happen. What is done between two
steps are hooks (hook.py): hooks.py has those of every run, which report,
evaluate, save, stop and profile.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from common.errors import STOPPED
from training import description, hook, hooks, progress, runs
from training.distributed import cpu, devices, signals
from training.objectives import pipeline
from training.program import Program
from training.runs import TrainState
from training.steps import TrainingBatches, CompiledPerShape
from training.workdir import checkpoints
from training.writer import DIVERGED, ENDED_EARLY, RunWriter

NUM_REHEARSED_STEPS = 5  # steps that a dry run times


def train_run(run: runs.Run, state: TrainState, start: int,
              train_data: pipeline.Loader, eval_data: Sequence[pipeline.Loader],
              saved: checkpoints.Checkpoints, workdir: pathlib.Path,
              profile_steps: str = '') -> int:
  """Trains one run to its last step, and prints how it has ended.

  Args:
    run: the run, built on its devices.
    state: its training state after `start` steps.
    start: the number of steps done, and so the index of the next batch.
    train_data: the loader of training batches.
    eval_data: a loader of evaluation batches for each held-out source.
    saved: the checkpoints of the run.
    workdir: the folder of the run.
    profile_steps: the steps to trace with a profiler, 'START:STOP'; '': none.

  Returns:
    The exit code: 0, STOPPED or DIVERGED. A run that ends early because it does
    not improve any more has the code 0.
  """
  writer = RunWriter(config=run.config, workdir=workdir, saved=saved)
  program = Program(run, hook.load_hooks(run.config))
  train_runs(program, writers=[writer], state=state, start=start,
             loaders=[train_data], eval_data=eval_data,
             profile_steps=profile_steps)
  if devices.is_primary_process():
    _print_how_run_ended(writer)
  if writer.code == ENDED_EARLY:
    return 0
  return writer.code


def _print_how_run_ended(writer: RunWriter) -> None:
  """Prints how a run ended: an error where its loss was not finite, the reason
  why it ended before its last step, and its lowest held-out loss otherwise."""
  if writer.code == DIVERGED:
    print(f'error: {writer.sentence}', file=sys.stderr)
  elif writer.code:
    progress.print_result(writer.sentence)
  if writer.code in (0, ENDED_EARLY):
    for line in writer.describe_lowest_loss():
      progress.print_result(line)


def rehearse_run(run: runs.Run, train_data: pipeline.Loader,
                 eval_data: Sequence[pipeline.Loader]) -> list[str]:
  """Times some steps of a run that starts anew, without writing anything: a
  dry run.

  Args:
    run: the run, with its config, its model and its devices.
    train_data: the loader of training batches.
    eval_data: a loader for each held-out source.

  Returns:
    Lines that describe the run, and estimate its time and its memory.
  """
  config = run.config
  program = Program(run, hook.load_hooks(config))
  batches = TrainingBatches(program, loaders=[train_data], num_runs=1)
  train_step = CompiledPerShape(program.train_step, batches.meter)
  eval_step = CompiledPerShape(program.eval_step, batches.meter)

  # Some steps, and an evaluation on one batch. run_timed waits until the result
  # is there; each step is given the state of the one before it.
  seconds_of_steps = [0.0]
  eval_batch_seconds = 0.0
  with program.context():
    state = program.new_state()
    batches.start_streams(0)
    for n in range(min(NUM_REHEARSED_STEPS + 1, config.train.steps)):
      batch = batches.batch_after(n)
      (state, _), seconds = train_step.run_timed(state, batch)
      seconds_of_steps.append(seconds)
    batches.close()
    if config.eval.every_steps:
      batch = program.put(eval_data[0].batch(0))
      _, eval_batch_seconds = eval_step.run_timed(state.params, batch)

  # The time of a step is the median without the first step, which is slow,
  # unless there was only one. The list begins with a 0 that stands for no step.
  step_seconds = float(np.median(seconds_of_steps[2:] or seconds_of_steps[1:]))
  training = config.train.steps * step_seconds
  evaluating = eval_batch_seconds * _count_eval_batches(config, eval_data)
  compiling = batches.meter.compiled
  total = training + evaluating + compiling
  tokens_per_second = batches.most_tokens / step_seconds
  gib_per_device = train_step.bytes_per_device() / 2**30
  return [
      description.describe_run(
          run, start=0, tokens=batches.most_tokens, train_data=train_data,
          eval_data=eval_data),
      f'a step: {step_seconds:.3g} s, {tokens_per_second:,.0f} tokens/s, '
      f'{gib_per_device:,.2f} GiB on each device',
      f'about {total:,.0f} s in all, without saving and eval.tasks: steps '
      f'{progress.format_seconds(training)}, evaluating '
      f'{progress.format_seconds(evaluating)}, '
      f'compiling {progress.format_seconds(compiling)}']


def _count_eval_batches(config, eval_data: Sequence[pipeline.Loader]) -> int:
  """Returns the number of batches that a run evaluates on, in all of its
  evaluations together."""
  if not config.eval.every_steps:
    return 0
  num_evaluations = -(-config.train.steps // config.eval.every_steps)
  batches_each = sum(
      loader.first(config.eval.batches) for loader in eval_data)
  return num_evaluations * batches_each


def train_runs(program: Program, writers: Sequence[RunWriter],
               state: TrainState,
               start: int, loaders: Sequence[pipeline.Loader],
               eval_data: Sequence[pipeline.Loader],
               profile_steps: str = '') -> int:
  """Trains the runs of `program` from step `start` to train.steps.

  Args:
    program: the run, or the group of runs.
    writers: one of each run. Afterwards `code` and `sentence` say how it ended.
    state: the state of the program after `start` steps.
    start: the index of the next batch.
    loaders: the training batches: one loader for all, or one for each seed.
    eval_data: a loader for each held-out source; all runs share them.
    profile_steps: the steps to trace with a profiler, 'START:STOP'; '': none.

  Returns:
    How many steps are done.
  """
  # 1. A run that resumes drops the lines of metrics.jsonl after `start`, ...
  for writer in writers:
    writer.open_metrics(start)
  batches = TrainingBatches(program, loaders=loaders, num_runs=len(writers))
  if devices.is_primary_process():
    print(program.title + description.describe_run(
        program.run, start=start, tokens=batches.most_tokens,
        train_data=loaders[0],
        eval_data=eval_data))
  with program.context(), signals.Stop() as stop:
    loop = hook.Loop(program, writers=list(writers), batches=batches,
                     state=state, start=start)
    loop.hooks = [
        *hooks.usual_hooks(stop=stop, tokenizer=loaders[0].tokenizer,
                           eval_data=eval_data, profile_steps=profile_steps,
                           workdir=writers[0].workdir),
        *program.hooks]

    # 2. ... goes on with the data at batch `start`, ...
    batches.start_streams(start)
    batch = batches.batch_after(start)
    for each_hook in loop.hooks:
      each_hook.check(loop)

    # 3. ... and compiles, waits for the other processes, and starts the clock.
    _compile_step_and_hooks(loop, batch)
    devices.wait_for_all_processes('compiled')
    loop.bar = progress.make_run_progress(
        loop.steps, first_step=start, primary=devices.is_primary_process())
    loop.meter.begin(start)
    for each_hook in loop.hooks:
      each_hook.begin(loop)

    # 4. The steps.
    del state  # each step is given the state that the one before it returned
    while loop.running_writers and not loop.ends:
      for each_hook in loop.hooks:
        each_hook.before_step(loop)
      with jax.profiler.StepTraceAnnotation('train', step_num=loop.n):
        loop.state, figures = loop.train_step(loop.state, batch)
      loop.n += 1
      loop.bar.step(loop.n)
      if loop.n < loop.steps:
        with loop.meter.waiting():
          batch = batches.batch_after(loop.n)
      for each_hook in loop.hooks:
        each_hook.after_step(loop, figures)

    # 5. The end: after a signal, or where no run is left.
    if loop.n < loop.steps:
      for writer in loop.running_writers.values():
        writer.end(STOPPED, loop.n)
    batches.close()
    for each_hook in loop.hooks:
      each_hook.end(loop)
    for writer in writers:
      writer.saved.wait()
    loop.bar.close()
    for writer in writers:
      writer.close()
  return loop.n


def _compile_step_and_hooks(loop: hook.Loop, batch: Any) -> None:
  """Compiles the training step and what the hooks need, such as the evaluation,
  and shows that it takes a while.

  Compiling needs much memory of the host for a short time, so what earlier work
  has freed is given back to the system before it, and its own after it.

  Args:
    loop: the loop, before its first step.
    batch: the first batch, for its shapes.
  """
  cpu.release_free_memory()
  is_primary = devices.is_primary_process()
  with loop.meter.compiling(), progress.show_compilation(is_primary):
    loop.train_step.compile(loop.state, batch)
    for each_hook in loop.hooks:
      each_hook.compile(loop)
  cpu.release_free_memory()
