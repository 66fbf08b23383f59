"""The training loop of a group of runs (training/vectorised.py); it does for
all of them what training/loop.py does for one, in the same order."""

import jax
import jax.numpy as jnp
import numpy as np

from training import evaluating, loop, outline
from training import watch
from training.costs import flops, peaks
from training.data import pipeline
from training.distributed import signals
from training.workdir import metrics


def train(group, tokenizer) -> dict[int, str]:
  """Trains a vectorised.Group to its last step.

  Returns:
    Why a run did not reach it, by the run's place in the whole group.
  """
  with signals.Stop() as stop:
    return _Loop(group, tokenizer).run(stop)


class _Loop:
  """What the loop holds; `run` is the loop."""

  def __init__(self, group, tokenizer):
    config, start = group.config, group.start
    self.group, self.config = group, config
    self.loaders = [pipeline.load(group.seeded(seed), tokenizer)
                    for seed in group.seeds]
    self.eval_data = pipeline.held_out(config, tokenizer)
    sides = loop.lengths(self.loaders[0].batch(start))
    count = len(group.members)
    self.tokens = config.data.batch_size * sum(sides)
    self.meter = watch.Meter(
        self.tokens, count * self.tokens * flops.training_flops_per_token(
            group.run.model, *sides),
        peaks.total(group.mesh.devices.flat, group.run.model.dtype))
    print(f'{count} runs at once, each of them:')
    print(outline.text(group.run, start, self.tokens, self.loaders[0],
                       self.eval_data))
    self.writers = [metrics.writers(m.workdir, m.config.to_dict(), start)
                    for m in group.members]
    self.live = dict(enumerate(group.members))  # by row of the joint arrays
    self.ended = {}
    self.loads = {row: [] for row in self.live}
    self.bad_in_row = {}
    self.read_last = {}  # by row: the figures of the last step that was read
    self.held = watch.Deferred(self.meter.now)

  def run(self, stop) -> dict[int, str]:
    config, group, meter = self.config, self.group, self.meter
    steps, n = config.train.steps, group.start
    streams = [loader.iterate(n, steps) for loader in self.loaders]
    batch = group.batch([next(stream) for stream in streams])
    with meter.compiling(), watch.compiling():
      state = group.state()
      step_fn = jax.jit(group.train_step(), donate_argnums=0).lower(
          state, batch, group.values).compile()
      self.eval_fn = jax.jit(group.eval_step())
    self.bar = watch.progress(steps, n)
    meter.begin(n)
    while self.live:
      state, figures = step_fn(state, batch, group.values)
      n += 1
      self.bar.step(n)
      with meter.waiting():
        if n < steps:
          batch = group.batch([next(stream) for stream in streams])
      self._report(self.held.push(n, figures))
      self._end_bad(n, state)
      stopped = stop.agreed(n)
      if config.eval.every_steps and (
          n % config.eval.every_steps == 0 or n == steps) and not stopped:
        self._evaluate(n, state)
      # The same answer for all that still save: their clocks began together.
      due = any(m.saved.due(n) for m in self.live.values())
      if n == steps or stopped or due:
        self._save(n, state, self.live)
        self._end_bad(n, state)
      if n == steps or stopped:
        break
    self._close(streams)
    if n < steps and self.live:
      print(f'stopped after step {n}: the same request goes on.')
      self.ended |= {m.place: f'stopped after step {n} of {steps}, '
                     + loop.saved_as(n, m.saved.newest)
                     for m in self.live.values()}
    return self.ended

  def _report(self, read) -> None:
    """Writes the figures of a step where they are due."""
    if read is None:
      return
    n, figures, done = read
    each = {row: {name: x[row] for name, x in figures.items()}
            for row in self.live}
    for row, own in each.items():
      if 'health/load_E' in own:
        self.loads[row].append((own['health/load_E'], own['health/tokens']))
    if n % self.config.log.every_steps == 0 or n == self.config.train.steps:
      lap = self.meter.lap(n, done) | {'runs_at_once': len(self.group.members)}
      for row, own in each.items():
        self._write(row, n, 'train', own | lap | loop.over_window(
            self.loads[row]))
        self.loads[row].clear()
      if each:
        self.bar.update(n, lap | {'loss': float(np.mean(
            [own['loss'] for own in each.values()]))})
    self.bad_in_row = {row: own['bad_in_row'] for row, own in each.items()}
    self.read_last = each

  def _end_bad(self, n, state) -> None:
    """Ends the runs whose loss was not finite for too long, or whose last
    parameters are not."""
    last = n == self.config.train.steps
    bad = {row: count for row, count in self.bad_in_row.items()
           if row in self.live and (
               count >= self.config.train.max_bad_steps
               or last and not loop.is_sound(self.read_last[row]))}
    if bad:
      self._save(n, state, bad)
    for row, count in bad.items():
      member = self.live.pop(row)
      self.ended[member.place] = loop.bad_sentence(
          n, count, member.saved.newest)
      self.bar.say(f'{member.workdir}: {self.ended[member.place]}')

  def _evaluate(self, n, state) -> None:
    self._report(self.held.flush())
    with self.meter.paused():
      sums = []
      for loader in self.eval_data:
        total = None
        for batch in loader.iterate(
            0, loader.first(self.config.eval.batches)):
          total = evaluating.add(total, self.eval_fn(
              state.params, self.group.batch([batch])))
        sums.append(total)
    for row, member in self.live.items():
      figures = evaluating.means(
          jax.tree.map(lambda x, row=row: x[row], sums), self.eval_data)
      self._write(row, n, 'eval', figures)
      loss = evaluating.shown(figures['loss'])
      self.bar.say(f'step {n}  held-out loss {loss}  {member.workdir}')

  def _save(self, n, state, rows) -> None:
    self._report(self.held.flush())
    with self.meter.paused():
      states = self.group.split(state)
      for row in rows:
        member = self.group.members[row]
        if not loop.is_sound(self.read_last[row]):
          self.bar.say(f'{member.workdir}: step {n} is not saved: its '
                       'parameters are not finite')
          continue
        for writer in self.writers[row]:
          writer.flush()
        member.saved.save(n, jax.tree.map(jnp.asarray, states[row]),
                          next_batch=n, tokens=n * self.tokens,
                          config=member.config,
                          good=not self.read_last[row]['bad_in_row'])

  def _write(self, row, n, split, figures) -> None:
    for writer in self.writers[row]:
      writer.write(n, split, figures)

  def _close(self, streams) -> None:
    for stream in streams:
      stream.close()
    for member in self.group.members:
      member.saved.wait()
    self.bar.close()
    for writers in self.writers:
      for writer in writers:
        writer.close()
