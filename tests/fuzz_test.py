"""Damaged files make no traceback and no wrong weights: what is read from a
folder is what was written, or one sentence says why not (configs/errors.py)."""

import json
import shutil

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from configs import base
from configs.errors import EnvironmentFailure, RequestError
from tests.helpers import models
from training.hf import weights
from training.workdir import checkpoints

JUNK = st.sampled_from([None, True, 0, -1, 2.5, 1e300, float('nan'), '', 'x',
                        [], {}, [[1]], {'a': 1}])
CASES = settings(max_examples=12, deadline=None, derandomize=True,
                 database=None)


def damage(draw, file) -> None:
  """Flips a bit of a file, cuts it off, or takes it away."""
  data = bytearray(file.read_bytes())
  place = int(draw(st.floats(0, 1, exclude_max=True)) * len(data))
  what = draw(st.sampled_from(['flip', 'cut', 'delete']))
  file.unlink()
  if what == 'flip' and data:
    data[place] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(data)
  elif what == 'cut':
    file.write_bytes(data[:place])


def runs_or_refuses(call) -> None:
  """Runs `call`, which may end with a sentence."""
  try:
    call()
  except (RequestError, EnvironmentFailure, OSError) as error:
    assert str(error).strip() and 'Traceback' not in str(error)


@pytest.fixture(name='folder', scope='module')
def _folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('hf')
  weights.to_hf(*models.make('mixtral'), folder)
  return folder


@CASES
@given(data=st.data())
def test_model_folders(folder, tmp_path_factory, data):
  copy = tmp_path_factory.mktemp('case') / 'folder'
  shutil.copytree(folder, copy)
  if data.draw(st.booleans()):
    config = copy / 'config.json'
    tree = json.loads(config.read_text())
    tree[data.draw(st.sampled_from([*tree, 'other']))] = data.draw(JUNK)
    config.write_text(json.dumps(tree))
  else:
    damage(data.draw, data.draw(st.sampled_from(sorted(copy.iterdir()))))
  runs_or_refuses(lambda: weights.from_hf(copy))


def _state(step: int):
  return {'w': jax.numpy.arange(600.0) + step, 'n': jax.numpy.int32(7 + step)}


@pytest.fixture(name='saved', scope='module')
def _saved(tmp_path_factory):
  """A workdir with the checkpoints 10 and 20 of a small state."""
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  with checkpoints.Checkpoints(workdir, every_steps=10, every_minutes=0.0,
                               keep=3, keep_every=0) as store:
    for step in (10, 20):
      store.save(step, _state(step), next_batch=step, tokens=step,
                 config=base.base().lock())
  return workdir


@CASES
@given(data=st.data())
def test_checkpoints(saved, tmp_path_factory, data):
  """What is restored is what was saved, or nothing is."""
  workdir = tmp_path_factory.mktemp('case') / 'run'
  shutil.copytree(saved, workdir)
  every = sorted(path for path in workdir.rglob('*') if path.is_file())
  for file in data.draw(st.sets(st.sampled_from(every), min_size=1,
                                max_size=3)):
    damage(data.draw, file)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding), _state(0))

  def restore():
    restored = checkpoints.restore(checkpoints.directory(workdir), abstract)
    jax.tree.map(np.testing.assert_array_equal, restored.state,
                 _state(restored.step))

  runs_or_refuses(restore)
