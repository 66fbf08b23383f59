"""What is written of a run: lines, TensorBoard's events, W&B's."""

import json
import sys
from unittest import mock

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import RequestError
from configs import base
from training.workdir import metrics, storage


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


def test_what_is_written_is_uploaded_once_a_minute():
  seconds = iter([1000, 1030, 1059, 1060, 1062, 1121, 1122, 1123, 1124])
  clock = mock.Mock(side_effect=seconds)
  uploads = mock.Mock()
  writer = metrics.UploadWriter(uploads, clock)  # reads it, as each push does
  pushed = []
  for step in range(5):
    writer.write(step, 'train', {})
    pushed.append(uploads.push.call_count)
  assert pushed == [0, 0, 1, 1, 2]
  writer.close()
  assert uploads.push.call_count == 3


def test_a_bucket_has_all_figures_once_they_are_flushed(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, 'is_in_bucket', lambda path: True)
  monkeypatch.setattr(storage, 'checked_path', epath.Path)
  for start, step in ((0, 10), (10, 20)):
    writers = metrics.open_writers(tmp_path, log_config(), resumed_step=start)
    for writer in writers:
      writer.write(step, 'train', {'loss': 1.0})
    for writer in writers:
      writer.flush()
    assert [row['step'] for row in rows(tmp_path)] == [10, 20][:step // 10]


def test_a_line_is_an_object_that_any_json_reader_takes(tmp_path):
  jsonl(tmp_path, [10], norm=jnp.float32(0.5), bad=float('nan'), mfu=None,
        over=np.float32(np.inf), load=jnp.arange(3), tokens=7)
  line = (tmp_path / 'metrics.jsonl').read_text()
  assert 'NaN' not in line and 'Infinity' not in line
  assert json.loads(line) == {
      'step': 10, 'split': 'train', 'loss': 10.0, 'norm': 0.5, 'bad': None,
      'mfu': None, 'over': None, 'load': [0, 1, 2], 'tokens': 7}
  assert list(json.loads(line))[:2] == ['step', 'split']


def test_after_a_resume_no_step_stands_twice(tmp_path):
  jsonl(tmp_path, [10, 20, 30, 40])
  jsonl(tmp_path, [30, 40, 50], resumed_step=20)
  assert [row['step'] for row in rows(tmp_path)] == [10, 20, 30, 40, 50]
  jsonl(tmp_path, [5], resumed_step=0)  # begun again before any checkpoint
  assert [row['step'] for row in rows(tmp_path)] == [5]


def test_an_evaluation_that_is_made_again_is_not_written_again(tmp_path):
  for loss in (1.0, 2.0):
    writer = metrics.JsonlWriter(tmp_path, 10 if loss > 1 else 0)
    writer.write(10, 'eval', dict(loss=loss))
    writer.write(11, 'eval', dict(loss=loss))
    writer.close()
  assert [(row['step'], row['loss']) for row in metrics.read_metrics(
      tmp_path / metrics.METRICS_FILE)] == [(10, 1.0), (11, 2.0)]


@pytest.mark.parametrize('torn', [
    b'{"step": 30, "split": "tr', b'\xe2', b'30\n'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
  jsonl(tmp_path, [10, 20])
  with (tmp_path / 'metrics.jsonl').open('ab') as file:
    file.write(torn)
  # A reader of a run that is under way passes over it too.
  under_way = metrics.read_metrics(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in under_way][:2] == [10, 20]
  jsonl(tmp_path, [30], resumed_step=25)
  assert [row['step'] for row in rows(tmp_path)] == [10, 20, 30]


def test_a_step_that_does_not_rise_is_named(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  jsonl(tmp_path, [10, 20, 30])
  whole = file.read_text()
  assert len(metrics.read_metrics(file)) == 3
  for step, words in ((1, 'step is 1, and'), (10, 'step is 10, and'),
                      ('', 'is no JSON')):
    file.write_text(whole.replace('"step": 20', f'"step": {step}'))
    with pytest.raises(RequestError, match=f'line 2, .*{words}'):
      metrics.read_metrics(file)


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
    files = metrics.open_writers(tmp_path, config, resumed_step=start)
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


@pytest.mark.parametrize('module', metrics.TRACKERS)
def test_a_tracker_goes_on_with_the_run_of_the_folder(tmp_path, module,
                                                      monkeypatch):
  tracker = mock.MagicMock()
  monkeypatch.setitem(sys.modules, module, tracker)
  config = log_config(**{module: True, f'{module}_project': 'p'})
  for start in (0, 20):
    writer = metrics.open_writers(tmp_path, config, resumed_step=start)[1]
    writer.write(30, 'train', {'loss': 2.0, 'mfu': None})
  first, second = tracker.init.call_args_list
  assert first == second
  assert first.kwargs['project'] == 'p' and first.kwargs['resume'] == 'allow'
  assert first.kwargs.get('dir', str(tmp_path)) == str(tmp_path)
  row, how = tracker.init().log.call_args
  assert row[0]['train/loss'] == 2.0 and 'train/mfu' not in row[0]
  assert how.get('step', row[0].get('step')) == 30
  # Another folder of the same name is another run.
  other = tmp_path / 'other' / tmp_path.name
  other.mkdir(parents=True)
  metrics.open_writers(other, config, resumed_step=0)
  kwargs = tracker.init.call_args.kwargs
  assert (kwargs.get('id'), kwargs['name']) != (
      first.kwargs.get('id'), first.kwargs['name'])
