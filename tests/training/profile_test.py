"""--profile_steps, and when a trace starts and stops."""


import jax
import jax.numpy as jnp
import pytest

from training import profile


@pytest.mark.parametrize('steps', ['10', '10:', 'a:b', '13:10', '3:3', '-1:2',
                                   '1:2:3'])
def test_profile_steps_that_mean_nothing(steps):
  with pytest.raises(ValueError, match='--profile_steps is'):
    profile.parse(steps)


def test_profile_steps_are_a_slice():
  assert profile.parse('10:13') == (10, 13)
  assert profile.parse('') is None


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
  profiler = profile.Profiler('10:13', tmp_path)
  for step in range(first, last):
    profiler.before(step, jnp.zeros(()))
    seen += [f'{call} {step}' for call in calls[len(seen):]]
  profiler.close(jnp.zeros(()))
  seen += [f'{call} end' for call in calls[len(seen):]]
  assert seen == wanted


def test_a_trace_is_written(tmp_path):
  profiler = profile.Profiler('1:2', tmp_path)
  step = jax.jit(lambda x: x * 2)
  state = jnp.ones(3)
  for i in range(3):
    profiler.before(i, state)
    with profiler.annotate(i):
      state = step(state)
  profiler.close(state)
  traces = list((tmp_path / 'profile').rglob('*.xplane.pb'))
  assert len(traces) == 1 and b'train' in traces[0].read_bytes()
