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
  """Returns a run's config, with a small model.

  Args:
    system: the system of the model.
    objective: the objective of the run.
    tokenizer: data.tokenizer.
    **fields: other values of the model's fields.
  """
  config = base.base()
  config.objective = objective
  config.model = models.small_config(system, vocab_size=0, **fields)
  config.data.update(length=config.model.max_len, batch_size=4,
                     tokenizer=tokenizer)
  return config


def one_device_mesh() -> jax.sharding.Mesh:
  """Returns a mesh of the first device alone."""
  return devices.make_mesh(dict.fromkeys(tables.MESH_AXES, 1),
                           jax.devices()[:1])


def make_evaluation(config: ml_collections.ConfigDict,
                    workdir: pathlib.Path = pathlib.Path(), **options: Any
                    ) -> Evaluation:
  """Returns an evaluation of random parameters on one device.

  Args:
    config: the config of the run.
    workdir: its folder.
    **options: flags of the tasks.
  """
  tokenizer = tokenizers.load(config.data.tokenizer)
  model, _ = runs.resolve_model(config, tokenizer)
  run = runs.build(config, model, one_device_mesh())
  params = models.draw_parameters(run.abstract_state.params, 1)
  return Evaluation(
      run=run, params=params, step=0, tokenizer=tokenizer,
      options=types.SimpleNamespace(**options), workdir=workdir, programs={})


def run_and_check_task(task: str, evaluation: Evaluation) -> dict[str, Any]:
  """Does a task and returns its figures, after a check that they have the names
  that the task declares, and are the means of the scores of their items."""
  with evaluation.run.context():
    figures = evals.run_task(task, evaluation)

  # Each number has a name that one of the patterns matches.
  patterns = evals.get_task(task).figure_names
  if patterns is not None:
    for path in in_training.flatten_numbers(figures, task):
      name = path.partition('/')[2]
      assert any(fnmatch.fnmatchcase(name, x) for x in patterns), path

  for name, record in figures.get('items', {}).items():
    mean = np.average(record['scores'], weights=record.get('weights'))
    assert mean == pytest.approx(figures[name]), name
  return figures
