"""Writers, the meter, deferred metrics and progress."""

import importlib.util
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from training import watch
from training.workdir import metrics


def log_config(**fields):
  config = base.base()
  config.log.update(fields)
  return config.to_dict()


def rows(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def jsonl(workdir, steps, resumed_step=0, **figures):
  writer = metrics.JsonlWriter(workdir, resumed_step)
  for step in steps:
    writer.write(step, 'train', {'loss': float(step), **figures})
  writer.close()


def test_a_line_is_an_object_that_any_json_reader_takes(tmp_path):
  jsonl(tmp_path, [10], norm=jnp.float32(0.5), bad=float('nan'), mfu=None,
        over=np.float32(np.inf), load=jnp.arange(3), tokens=7)
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert 'NaN' not in line and 'Infinity' not in line
  assert json.loads(line) == {
      'step': 10, 'split': 'train', 'loss': 10.0, 'norm': 0.5, 'bad': None,
      'mfu': None, 'over': None, 'load': [0, 1, 2], 'tokens': 7}
  assert list(json.loads(line))[:2] == ['step', 'split']


def test_a_line_is_on_disk_once_written(tmp_path):
  writer = metrics.JsonlWriter(tmp_path, 0)
  writer.write(1, 'train', {'loss': 2.0})
  assert rows(tmp_path) == [{'step': 1, 'split': 'train', 'loss': 2.0}]
  writer.close()


def test_after_a_resume_no_step_stands_twice(tmp_path):
  jsonl(tmp_path, [10, 20, 30, 40])
  jsonl(tmp_path, [30, 40, 50], resumed_step=20)
  assert [row['step'] for row in rows(tmp_path)] == [10, 20, 30, 40, 50]
  jsonl(tmp_path, [5], resumed_step=0)  # begun again before any checkpoint
  assert [row['step'] for row in rows(tmp_path)] == [5]


@pytest.mark.parametrize('torn', [
    b'{"step": 30, "split": "tr', b'{"step": 20, "split": "eval"}', b'\xe2',
    b'\x00\x00', b'30\n'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
  jsonl(tmp_path, [10, 20])
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(torn)
  # A reader of a run that is under way passes over it too.
  assert [row['step'] for row in metrics.read(tmp_path / 'metrics.jsonl')
          ][:2] == [10, 20]
  jsonl(tmp_path, [30], resumed_step=25)
  assert [row['step'] for row in rows(tmp_path)] == [10, 20, 30]


def test_what_need_not_change_is_not_rewritten(tmp_path):
  jsonl(tmp_path, [10, 20])
  before = (tmp_path / 'metrics.jsonl').stat().st_ino
  jsonl(tmp_path, [30], resumed_step=20)
  assert (tmp_path / 'metrics.jsonl').stat().st_ino == before


def read_events(workdir):
  accumulators = pytest.importorskip(
      'tensorboard.backend.event_processing.event_accumulator')
  events = accumulators.EventAccumulator(str(workdir / 'tensorboard'))
  events.Reload()
  return {tag: [(e.step, e.value) for e in events.Scalars(tag)]
          for tag in events.Tags()['scalars']}


def test_tensorboards_own_reader_reads_the_file(tmp_path):
  pytest.importorskip('tensorboard')
  config = log_config(tensorboard=True)
  for start, steps in ((0, [10, 20, 30]), (20, [30, 40])):
    files = metrics.writers(tmp_path, config, resumed_step=start)
    for step in steps:
      for writer in files:
        writer.write(step, 'train', {'loss': step + start, 'mfu': None,
                                     'load': [0.25, 0.75]})
    for writer in files:
      writer.close()
  scalars = read_events(tmp_path)
  # Step 30 of the first run is gone, as it is from metrics.jsonl.
  assert scalars['train/loss'] == [(10, 10), (20, 20), (30, 50), (40, 60)]
  assert scalars['train/load/1'][-1] == (40, 0.75)
  assert 'train/mfu' not in scalars
  assert [row['step'] for row in rows(tmp_path)] == [10, 20, 30, 40]


class FakeRun:

  def __init__(self):
    self.logged, self.axes, self.finished = [], [], False

  def define_metric(self, name, step_metric=None):
    self.axes.append((name, step_metric))

  def log(self, row):
    self.logged.append(row)

  def finish(self):
    self.finished = True


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
  calls, runs = [], []

  def init(**kwargs):
    calls.append(kwargs)
    runs.append(FakeRun())
    return runs[-1]

  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(
      init=init, __spec__=importlib.util.spec_from_loader('wandb', None)))
  config = log_config(wandb=True, wandb_project='p')
  for step in (10, 20):
    files = metrics.writers(tmp_path / 'a_run', config, resumed_step=step - 10)
    files[-1].write(step, 'eval', {'loss': 2.0, 'mfu': None, 'load': [1, 2]})
    files[-1].close()
  assert runs[0].logged == [
      {'step': 10, 'eval/loss': 2.0, 'eval/load/0': 1.0, 'eval/load/1': 2.0}]
  assert runs[1].logged[0]['step'] == 20
  assert ('*', 'step') in runs[0].axes and runs[0].finished
  assert calls[0]['id'] == calls[1]['id']
  assert calls[0]['project'] == 'p' and calls[0]['name'] == 'a_run'
  assert calls[0]['config']['optim']['name'] == 'adamw'


@pytest.mark.parametrize('name', metrics.EXTRAS)
def test_a_missing_extra_is_a_sentence(name, monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  config = log_config(**{name: True})
  with pytest.raises(ValueError, match=rf"log\.{name} is True.*pip install"):
    metrics.check(config['log'])
  with pytest.raises(ValueError):
    metrics.writers(tmp_path, config)
  assert not list(tmp_path.iterdir())
  metrics.check(log_config()['log'])


def test_only_the_first_process_writes(tmp_path):
  assert metrics.writers(tmp_path, log_config(), primary=False) == []
  assert not list(tmp_path.iterdir())
  out = io.StringIO()
  quiet = watch.progress(10, primary=False, stream=out)
  quiet.update(1, {'loss': 1.0})
  quiet.say('hello')
  quiet.close()
  assert not out.getvalue()


class Clock:

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_the_meter_by_hand():
  clock = Clock()
  meter = watch.Meter(tokens_per_step=1000, flops_per_step=6e9,
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


def test_without_a_peak_there_is_no_mfu():
  clock = Clock()
  meter = watch.Meter(1000, 6e9, None, clock)
  clock.now += 1
  assert meter.lap(1, meter.now())['mfu'] is None


def test_figures_come_one_step_late():
  held = watch.Deferred(lambda: 'now')
  assert held.flush() is None
  assert held.push(1, {'loss': jnp.float32(1.5)}) is None
  assert held.push(2, {'loss': jnp.float32(2.5), 'load': jnp.arange(2)}) == (
      1, {'loss': 1.5}, 'now')
  assert held.flush() == (2, {'loss': 2.5, 'load': [0, 1]}, 'now')
  assert held.flush() is None


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
  held = watch.Deferred(Clock())
  held.push(1, {'loss': Result('loss 1', asked)})
  assert asked == ['copy loss 1']
  held.push(2, {'loss': Result('loss 2', asked)})
  assert [call for call in asked if 'wait' in call] == ['wait loss 1']
  assert asked.index('copy loss 2') < asked.index('wait loss 1')


class Timed:
  """A result that is there when its step is done."""

  def __init__(self, clock, done):
    self.clock, self.done = clock, done

  def copy_to_host_async(self):
    pass

  def is_ready(self):
    return self.clock.now >= self.done

  def __array__(self, dtype=None, copy=None):
    self.clock.now = max(self.clock.now, self.done)
    return np.float32(0)


@pytest.mark.parametrize('waits', [False, True])
def test_each_step_has_its_own_seconds_around_what_flushes(waits):
  """Whether dispatch waits for the step, as on CPU, or not: saving and
  evaluating, which flush, neither lengthen nor shorten a step."""
  clock = Clock()
  meter = watch.Meter(1000, 6e9, None, clock)
  held = watch.Deferred(meter.now)
  seen, done = {}, clock.now

  def report(read):
    if read:
      seen[read.step] = meter.lap(read.step, read.done)['step_seconds']

  for n in range(1, 10):
    done = max(done, clock.now) + n  # step n takes n seconds
    clock.now = done if waits else clock.now
    report(held.push(n, {'loss': Timed(clock, done)}))
    if n in (3, 4, 7):
      report(held.flush())
      with meter.paused():
        clock.now += 100
  report(held.flush())
  assert seen == {n: pytest.approx(n) for n in range(1, 10)}


def test_one_process_is_its_own_slowest():
  figures = {'loss': 1.0, 'data_seconds': 0.5}
  assert watch.slowest(figures) == figures


_PROCESS = """
import sys, jax, jax.numpy as jnp
from training import watch
rank = int(sys.argv[1])
jax.distributed.initialize(
    f'127.0.0.1:{sys.argv[2]}', 2, rank, cluster_detection_method='deactivate',
    coordinator_bind_address=f'127.0.0.1:{sys.argv[2]}')
mesh = jax.make_mesh((2,), ('data',),
                     axis_types=(jax.sharding.AxisType.Auto,))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
held = watch.Deferred(lambda: 0)
held.push(1, jax.jit(lambda: {'loss': jnp.float32(2.5)},
                     out_shardings=whole)())
step, figures, _ = held.flush()
print(step, watch.slowest({**figures, 'data_seconds': rank + 0.5}), flush=True)
jax.distributed.shutdown()
"""


@pytest.mark.multihost
@pytest.mark.slow
def test_all_processes_report_the_slowest_of_them():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  root = pathlib.Path(__file__).parents[2]
  env = {**os.environ, 'PYTHONPATH': str(root), 'XLA_FLAGS':
         '--xla_force_host_platform_device_count=1'}
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', _PROCESS, str(rank), str(port)], env=env,
          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      for rank in range(2)]
  for process in processes:
    out, error = process.communicate(timeout=120)
    assert out.splitlines()[-1:] == [
        "1 {'loss': 2.5, 'data_seconds': 1.5}"], error


def test_plain_lines_without_a_terminal():
  out = io.StringIO()
  lines = watch.progress(1000, first=0, stream=out)
  lines.step(9)
  lines.update(10, {'loss': 3.14159, 'tokens_per_second': 12345.0,
                    'step_seconds': 4.0, 'mfu': None})
  lines.update(20, {'loss': 3.0, 'mfu': 0.4321})
  lines.say('saved step 20')
  lines.close()
  assert out.getvalue().splitlines() == [
      'step 10/1000  loss 3.1416  12.3k tokens/s  1:06:00 left',
      'step 20/1000  loss 3.0000  MFU 43.2%',
      'saved step 20']


class Terminal(io.StringIO):

  def isatty(self):
    return True


def test_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '100')
  out = Terminal()
  bar = watch.progress(1000, first=500, stream=out)
  bar.step(509)
  bar.update(510, {'loss': 3.14159, 'tokens_per_second': 950.0,
                   'step_seconds': 0.5})
  bar.say('saved [bold]step[/bold] 510')
  bar.close()
  text = out.getvalue()
  for wanted in ('510/1000', 'loss 3.1416', '950 tokens/s', '4:05 left',
                 'saved [bold]step[/bold] 510'):
    assert wanted in text, text
  assert '\x1b[?25l' not in text  # a killed run could not show the cursor again


def test_a_missing_loss_is_shown_as_such():
  out = io.StringIO()
  watch.progress(10, stream=out).update(1, {'loss': float('nan')})
  assert 'loss nan' in out.getvalue()
