"""The meter, and figures that are read a step late."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import timing


class Clock:

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_the_meter_by_hand():
  clock = Clock()
  meter = timing.Meter(tokens_per_step=1000, flops_per_step=6e9,
                      peak_flops=1e10, clock=clock)
  with meter.compiling():
    clock.now += 30
  meter.begin(0)
  for _ in range(4):
    with meter.waiting():
      clock.now += 0.5
    clock.now += 1.5
  with meter.paused():
    clock.now += 99
  assert meter.lap(4, meter.now()) == pytest.approx(dict(
      step_seconds=2.0, tokens_per_second=500.0, data_seconds=0.5, mfu=0.3,
      compile_seconds=30.0))
  clock.now += 8
  with meter.compiling():
    clock.now += 7
  assert meter.lap(6, meter.now()) == pytest.approx(dict(
      step_seconds=4.0, tokens_per_second=250.0, data_seconds=0.0, mfu=0.15,
      compile_seconds=7.0))


@pytest.mark.parametrize('every, at_last, last', [
    (3, True, 10), (3, True, 9), (3, False, 10), (0, True, 10), (0, False, 10),
    (20, True, 10)])
def test_what_recurs_takes_as_long_each_time_that_it_is_due(
    every, at_last, last):
  clock = Clock()
  recurring = timing.Recurring(every, last, at_last, clock)
  assert recurring.left(0) == 0
  for seconds in (90, 7):  # the first one compiled
    with recurring.timed():
      clock.now += seconds
  due = [n for n in range(1, last + 1) if recurring.due(n)]
  assert due == [n for n in range(1, last + 1) if (every and n % every == 0)
                 or (at_last and n == last)]
  for step in range(last + 1):
    assert recurring.left(step) == 7 * sum(n > step for n in due)


def test_figures_come_one_step_late():
  held = timing.Deferred(lambda: 'now')
  assert held.flush() is None
  assert held.push(1, {'loss': jnp.float32(1.5)}) is None
  assert held.push(2, {'loss': jnp.float32(2.5), 'load': jnp.arange(2)}) == (
      1, {'loss': 1.5}, 'now')
  assert held.flush() == (2, {'loss': 2.5, 'load': [0, 1]}, 'now')
  assert held.flush() is None


def test_a_step_is_done_before_the_one_after_it():
  """Where a step is still under way when it is pushed, and done with the next
  one when that is pushed, no step takes no time, or less."""
  clock = Clock()
  meter = timing.Meter(1000, 6e9, None, clock)
  held = timing.Deferred(meter.now)
  laps = []

  def push(n, ready):
    clock.now += 1
    result = Result(n, [])
    result.is_ready = lambda: ready
    read = held.push(n, {'loss': result})
    if read:
      laps.append(meter.lap(read.step, read.done)['step_seconds'])

  meter.begin(0)
  for n, ready in enumerate((False, True, False, False, True, True), 1):
    push(n, ready)
  clock.now += 5
  read = held.flush()
  laps.append(meter.lap(read.step, read.done)['step_seconds'])
  # By hand: step 1 halfway between its push at 1 and that of step 2 at 2; step
  # 3 when it is waited for, at 4; step 4 halfway from there to 5.
  assert laps == [1.5, 0.5, 2.0, 0.5, 0.5, 1.0]


class Result:
  """An array on a device that notes when the host asks for it."""

  def __init__(self, name, asked):
    self.name, self.asked = name, asked

  def copy_to_host_async(self):
    self.asked.append(f'copy {self.name}')

  def is_ready(self):
    return False

  def __array__(self, dtype=None, copy=None):
    self.asked.append(f'wait {self.name}')
    return np.float32(1.0)


def test_no_result_is_waited_for_before_the_next_step_is_dispatched():
  asked = []
  held = timing.Deferred(Clock())
  held.push(1, {'loss': Result('loss 1', asked)})
  assert asked == ['copy loss 1']
  held.push(2, {'loss': Result('loss 2', asked)})
  assert [call for call in asked if 'wait' in call] == ['wait loss 1']
  assert asked.index('copy loss 2') < asked.index('wait loss 1')


_PROCESS = """
import sys, jax, jax.numpy as jnp
from training import timing
rank = int(sys.argv[1])
jax.distributed.initialize(
    f'127.0.0.1:{sys.argv[2]}', 2, rank, cluster_detection_method='deactivate',
    coordinator_bind_address=f'127.0.0.1:{sys.argv[2]}')
mesh = jax.make_mesh((2,), ('data',),
                     axis_types=(jax.sharding.AxisType.Auto,))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
held = timing.Deferred(lambda: 0)
held.push(1, jax.jit(lambda: {'loss': jnp.float32(2.5)},
                     out_shardings=whole)())
step, figures, _ = held.flush()
print(step, timing.slowest({**figures, 'data_seconds': rank + 0.5}), flush=True)
jax.distributed.shutdown()
"""


@pytest.mark.parametrize('steps', ['10', 'a:b', '13:10', '3:3'])
def test_profile_steps_that_mean_nothing(steps):
  with pytest.raises(ValueError, match='--profile_steps is'):
    timing.profiled_steps(steps)


def fake_trace(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace',
                      lambda folder: calls.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace',
                      lambda: calls.append('stop'))
  return calls


@pytest.mark.parametrize('first, last, wanted', [
    (0, 20, ['start 10', 'stop 13']),
    (11, 20, ['start 11', 'stop 13']),  # resumed inside the range
    (0, 11, ['start 10', 'stop end']),  # the run ends inside the range
    (13, 20, []),  # resumed past it
])
def test_when_the_trace_starts_and_stops(first, last, wanted, monkeypatch,
                                         tmp_path):
  calls, seen = fake_trace(monkeypatch), []
  profiler = timing.Profiler('10:13', tmp_path)
  for step in range(first, last):
    profiler.before(step, jnp.zeros(()))
    seen += [f'{call} {step}' for call in calls[len(seen):]]
  profiler.close(jnp.zeros(()))
  seen += [f'{call} end' for call in calls[len(seen):]]
  assert seen == wanted
