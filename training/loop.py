"""The training loop: step n is dispatched before step n-1 is read."""

import math
import sys

from etils import epath
import jax
import numpy as np

from architectures.parts.moe import health
from training import evaluating
from training import outline
from training import profile
from training import runs
from training import watch
from training.costs import flops
from training.costs import peaks
from training.distributed import devices
from training.distributed import malloc
from training.distributed import signals
from training.step import make_eval_step, make_train_step
from training.workdir import metrics

STOPPED = 75  # what train() returns after a signal, before the last step
# And after too many bad steps: as for a wrong request, since the same command
# would end in the same way, and no launcher is to start it again.
DIVERGED = 2
BAD = ('the loss or a gradient was not finite, or there was nothing to '
       'predict')

def train(run: runs.Run, state, start: int, train_data, eval_data, saved,
          workdir: epath.Path, profile_steps: str = '') -> int:
  """Trains from step `start` to train.steps; returns the exit code.

  Order of a resumed run: (1) the state is restored, (2) metrics.jsonl loses
  the lines after it, (3) the data go on at batch `start`, (4) the step is
  compiled, all processes wait for each other, and the clock starts.
  """
  config = run.config
  steps = config.train.steps
  sides = lengths(train_data.batch(start))
  tokens = config.data.batch_size * sum(sides)
  meter = watch.Meter(
      tokens, tokens * flops.training_flops_per_token(run.model, *sides),
      peaks.total(run.mesh.devices.flat, run.model.dtype))
  writers = metrics.writers(workdir, config.to_dict(), start,
                            devices.primary())
  if devices.primary():
    print(outline.text(run, start, tokens, train_data, eval_data))
  with run.context(), signals.Stop() as stop:
    batches = train_data.iterate(start, steps)
    batch = devices.put(next(batches), run.place)
    malloc.trim()
    with meter.compiling(), watch.compiling(devices.primary()):
      step_fn = jax.jit(
          make_train_step(run.module, run.tx, config), donate_argnums=0,
          out_shardings=(run.shardings, None)).lower(state, batch).compile()
      if config.eval.every_steps:
        eval_fn = jax.jit(make_eval_step(run.module, config)).lower(
            state.params,
            devices.put(eval_data[0].batch(0), run.place)).compile()
    malloc.trim()
    devices.sync('compiled')
    bar = watch.progress(steps, start, devices.primary())
    profiler = profile.Profiler(profile_steps, workdir)
    held = watch.Deferred(meter.now)
    loads = []  # of the experts, since the last report
    bad = 0  # steps in a row, as far as read
    read_last = {}  # the figures of the last step that was read

    def report(read) -> None:
      """Shows and writes the figures of a step, where they are due."""
      nonlocal bad, read_last
      if read is None:
        return
      n, figures, done = read
      bad = bad if too_many() else figures['bad_in_row']
      read_last = figures
      if 'health/load_E' in figures:
        loads.append((figures['health/load_E'], figures['health/tokens']))
      if n % config.log.every_steps == 0 or n == steps:
        figures |= watch.slowest(meter.lap(n, done)) | over_window(loads)
        loads.clear()
        for writer in writers:
          writer.write(n, 'train', figures)
        bar.update(n, figures)

    def too_many() -> bool:
      return bad >= config.train.max_bad_steps

    def diverged() -> bool:
      return too_many() or n == steps and not is_sound(read_last)

    def save(n, state):
      report(held.flush())
      if not is_sound(read_last):
        bar.say(f'step {n} is not saved: its parameters are not finite')
        return
      with meter.paused():
        for writer in writers:
          writer.flush()
        saved.save(n, state, next_batch=n, tokens=n * tokens, config=config,
                   good=not read_last['bad_in_row'])

    def evaluate(n, state):
      report(held.flush())
      with meter.paused():
        # The last evaluation is what the run was for: it is finished.
        figures = evaluating.evaluate(
            eval_fn, state.params, eval_data, config.eval.batches, run.place,
            stop=lambda: stop.at_once and n < steps)
      if figures is None:
        return
      for writer in writers:
        writer.write(n, 'eval', figures)
      bar.say(f'step {n}  held-out ' + '  '.join(
          f'{name.replace("_", " ")} {evaluating.shown(value)}'
          for name, value in figures.items()))

    meter.begin(start)
    n, stopped = start, False
    while True:
      profiler.before(n, state)
      with profiler.annotate(n):
        state, figures = step_fn(state, batch)
      n += 1
      bar.step(n)
      with meter.waiting():
        if n < steps:
          batch = devices.put(next(batches), run.place)
      report(held.push(n, figures))
      stopped = stop.agreed(n)
      if config.eval.every_steps and (
          n % config.eval.every_steps == 0 or n == steps) and not stopped:
        evaluate(n, state)
        stopped = stop.at_once
      if n == steps or stopped or saved.due(n) or too_many():
        save(n, state)
      if n == steps or stopped or too_many():
        break
    batches.close()
    profiler.close(state)
    saved.wait()
    bar.close()
    for writer in writers:
      writer.close()
  if diverged():
    if devices.primary():
      print(f'error: {bad_sentence(n, bad, saved.newest)}', file=sys.stderr)
    return DIVERGED
  if stopped and n < steps:
    if devices.primary():
      print(f'stopped after step {n}, {saved_as(n, saved.newest)}')
    return STOPPED
  return 0


def over_window(loads) -> dict:
  """Returns the experts' panel over the steps since the last report, given
  (load, tokens) of each."""
  if not loads:
    return {}
  figures = health.window(*(np.asarray(x, np.float32) for x in zip(*loads)))
  return {f'health/window_{name}': np.asarray(x).tolist()
          for name, x in figures.items()}


def lengths(batch) -> tuple[int, ...]:
  """Tokens of a row, the decoder's apart where there is an encoder too."""
  return tuple(batch[name].shape[1] for name in ('tokens', 'decoder_tokens')
               if name in batch)


def is_sound(figures) -> bool:
  """Whether the parameters are finite after a step. Where they are not, no
  later step can mend them, and they are not saved."""
  return math.isfinite(figures['param_norm'])


def saved_as(n: int, newest: int | None) -> str:
  """Says what a run that was stopped after step `n` goes on from."""
  if newest == n:
    return 'saved: the same command goes on from it.'
  return ('not saved: the same command goes on from '
          + ('the beginning.' if newest is None else f'step {newest}.'))


def ended_badly(state, config) -> str:
  """Returns why a run is not gone on with from `state` unless its config is
  another: it ended there after too many bad steps. '': it did not."""
  bad, step = int(state.bad_in_row), int(state.step)
  if bad < config.train.max_bad_steps:
    return ''
  return (f'the run in this workdir ended at step {step}: {BAD}, in {bad} '
          'steps in a row (train.max_bad_steps), and the same config would end '
          'in the same way. Change what made it so, such as a smaller '
          'optim.lr, with --allow_config_change; raise train.max_bad_steps to '
          'go on '
          'unchanged; or move the latest folders out of checkpoints to go on '
          'from an earlier step.')


def bad_sentence(n: int, bad: int, newest: int | None) -> str:
  """Why a run ends after step `n`, the last `bad` of them not finite; `newest`
  is the checkpoint that it has."""
  what = (f'{BAD}, in {bad} steps in a row (train.max_bad_steps); no update '
          'was made in them' if bad else
          f'the parameters are not finite after the last step, {n}')
  if newest == n:
    kept = (f'The parameters before them are saved as step {n}, beside the '
            'last good checkpoints')
  else:
    kept = ('Parameters that are not finite are not saved: '
            + ('there is no checkpoint' if newest is None else
               f'the newest checkpoint is of step {newest}'))
  return (f'{what}. {kept}. Try a smaller optim.lr, a longer '
          'optim.warmup_steps, optim.clip_norm=1, or model.dtype=float32, with '
          '--allow_config_change.')
