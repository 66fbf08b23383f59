"""Evaluations of small models that were never trained, for tests of tasks."""

import fnmatch
import pathlib
import types
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from configs import base
from configs import sharding as tables
from tests.helpers import models
from training import evals, runs
from training.data import tokenizers
from training.distributed import devices
from training.evals import Evaluation, in_training


def make_config(system: str, objective: str, tokenizer: str = 'bytes',
           **fields: Any) -> ml_collections.ConfigDict:
  """Returns a run's config, with a small model; `fields` are of the model."""
  c = base.base()
  c.objective = objective
  c.model = models.small_config(system, vocab_size=0, **fields)
  c.data.update(length=c.model.max_len, batch_size=4, tokenizer=tokenizer)
  return c


def one_device_mesh() -> jax.sharding.Mesh:
  return devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1),
                           jax.devices()[:1])


def make_evaluation(c: ml_collections.ConfigDict,
                    workdir: pathlib.Path = pathlib.Path(),
         **options: Any) -> Evaluation:
  """Returns an evaluation on one device; `options` are flags of the tasks."""
  tokenizer = tokenizers.load(c.data.tokenizer)
  run = runs.build(c, runs.resolve_model(c, tokenizer)[0], one_device_mesh())
  params = models.draw_parameters(run.abstract.params, 1)
  return Evaluation(run, params, 0, tokenizer, types.SimpleNamespace(**options),
                    workdir, {})


def run_and_check_task(task: str, evaluation: Evaluation) -> dict[str, Any]:
  """Returns the figures of a task, which are as its record says."""
  known = evals.get_task(task).figure_names
  with evaluation.run.context():
    figures = evals.run_task(task, evaluation)
  for name in in_training.flatten_numbers(figures, task):
    assert known is None or any(
        fnmatch.fnmatchcase(name.partition('/')[2], pattern)
        for pattern in known), name
  for name, item in figures.get('items', {}).items():  # of which it is the mean
    assert np.average(item['scores'], weights=item.get('weights')
                      ) == pytest.approx(figures[name]), name
  return figures
