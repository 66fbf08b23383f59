"""Weights in another type than that of the files, in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import architectures
from tests.helpers import models
from tests.parity import exports
from training import weights


@pytest.fixture
def written(tmp_path):
  """Returns (parameters, their folder)."""
  module = architectures.build(models.config('gpt'))
  params = exports.random(module)
  weights.to_hf(module, params, tmp_path)
  return params, tmp_path


def _equal(found, params):
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_an_export_in_bfloat16(written):
  params, folder = written
  module, _ = weights.from_hf(folder)
  weights.to_hf(module, params, folder, dtype='bfloat16')
  assert json.loads((folder / 'config.json').read_text())['dtype'] == (
      'bfloat16')
  _equal(weights.from_hf(folder)[1], jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))


def test_an_import_in_bfloat16(written):
  params, folder = written
  module, found = weights.from_hf(folder, dtype='bfloat16')
  assert module.config.param_dtype == 'bfloat16'
  _equal(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
