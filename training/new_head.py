"""Where fine-tuning starts: a language model's weights, the head of a task.

A run whose model has the head of a task starts from the weights of a language
model as from those of its own kind: the head of the task is drawn, and what
only the language model's head needed is passed over. Both are listed. Anything
else that differs is refused as ever.
"""

import dataclasses

import flax.linen as nn

import architectures
from architectures.parts.config import ModelConfig
from architectures.parts.hf import tensor_map
from training import paths
from training.step import parameter_shapes

TASK = 'task/'  # of the paths of a task's head


def is_put_on(ours: ModelConfig, theirs: ModelConfig) -> bool:
  """Whether `ours` has the head of a task, and `theirs` predicts tokens."""
  return ours.head != 'lm' and theirs.head == 'lm'


def put_on(ours: ModelConfig, theirs: ModelConfig) -> ModelConfig:
  """Returns `theirs` with the head of `ours`, where that is put on."""
  if not is_put_on(ours, theirs):
    return theirs
  return dataclasses.replace(theirs, head=ours.head, num_labels=ours.num_labels,
                             pooling=ours.pooling)


def left_out(module: nn.Module) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the parameters, by path, that the language model has
  and `module`, with its head of a task, has not."""
  ours = _shapes(module)
  lm = architectures.build(dataclasses.replace(
      module.config, head='lm', num_labels=0, head_dropout=0.0,
      pooling='cls'))
  return {path: shape for path, shape in _shapes(lm).items()
          if path not in ours}


def names_left_out(module: nn.Module) -> set[str]:
  """Returns their names in Hugging Face's format."""
  lm = dataclasses.replace(module.config, head='lm')
  page = architectures.hugging_face(lm.arch)
  shapes = left_out(module)
  rows = [row for row in page.rows(lm) if row[0] in shapes]
  return {tensor.name for tensor in tensor_map.expand(rows, shapes)} | set(
      page.tied)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
  return {path: x.shape for path, x in paths.flatten(
      parameter_shapes(module)).items()}
