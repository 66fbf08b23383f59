"""The request of both sides of a comparison: the same model, the same batch.

The model is described by the config.json that an export of it would have, which
names the class of transformers too. So every system that transformers has can
be compared. The batch is the first one of the run's data.source, with the
arrays, shapes and masks of training. Nothing here imports PyTorch.
"""

import importlib.util
from typing import Any

import numpy as np

import architectures
from common.errors import RequestError, require
from configs import base
from training import objectives, runs
from training.costs import totals
from training.data import sources, tokenizers
from training.hf import config as hf_config
from training.objectives import Config
from training.objectives import pipeline

IGNORED = -100  # a label that transformers' losses leave out
# The names that transformers gives our arrays. Its `labels` are made of two of
# ours.
NAMES = dict(
    tokens='input_ids', types='token_type_ids', segment_ids='attention_mask',
    decoder_tokens='decoder_input_ids',
    decoder_segment_ids='decoder_attention_mask',
    nsp_targets='next_sentence_label')


def alike(config: Config) -> Config:
  """Returns the config without what the other side does not have: AdamW with
  clipping is the optimiser, nothing is dropped or made noisy, no expert has a
  capacity, and the loss has neither label smoothing nor a z-loss of its own."""
  config = config.copy_and_resolve_references()
  model = config.model
  for group in (model, model.moe):
    for name in group:
      if name.endswith('dropout'):
        group[name] = 0.0
  model.moe.update(jitter=0.0, logit_noise=0.0, capacity_factor=0.0,
                   eval_capacity_factor=0.0, dispatch='auto')
  config.train.update(z_loss=0.0, label_smoothing=0.0)
  config.optim.update(base.base().optim)
  return config


def check(config: Config) -> None:
  """Raises RequestError for a config that has no other side."""
  architectures.hugging_face(config.model.arch)
  objective = objectives.of(config)
  others = sorted({*objective.arrays(config)} - {*NAMES, 'targets', 'weights'})
  if objective.head != 'lm' or objective.bound or others:
    beside = ''
    if others:
      beside = f' with {" and ".join(others)}'
    raise RequestError('--compare=pytorch: no class of transformers has the '
                       f'loss of objective {config.objective!r}{beside}')
  missing = [name for name in ('torch', 'transformers')
             if importlib.util.find_spec(name) is None]
  require(not missing, f'--compare=pytorch needs {" and ".join(missing)}: '
          "pip install 'archetype[verify]'")


def request(config: Config) -> dict[str, Any]:
  """Returns the model and the batch of the other side, as JSON has them.

  Args:
    config: the config of a run, as `alike` returns it.

  Returns:
    config_json; inputs, the arguments of a training step by name; parameters,
    how many there are; and decoder, whether it is one.

  Raises:
    RequestError: for a model that no config.json describes.
  """
  ids = tokenizer(config)
  model, _ = runs.resolve(config, ids)
  tree = hf_config.write(model)
  decoder = architectures.stack(model) == 'decoder'
  batch = pipeline.training_loader(config, ids).batch(0)
  inputs = arguments(batch, causal=decoder)
  both = 'next_sentence_label' in inputs
  named, = tree['architectures']
  require(both or not named.endswith('ForPreTraining'), f'{named} of '
          'transformers has no loss without next sentences: take objective '
          "'mlm_nsp', or --config.model.next_sentence=False")
  return dict(
      config_json=tree, parameters=totals.parameters(model)[0], decoder=decoder,
      inputs={name: array.tolist() for name, array in inputs.items()})


def arguments(made: dict[str, np.ndarray], causal: bool
              ) -> dict[str, np.ndarray]:
  """Returns a batch as transformers' classes take it.

  Args:
    made: a batch of ours.
    causal: whether the class looks for the label of a token one place later.
  """
  inputs = {}
  for key, name in NAMES.items():
    if key in made:
      inputs[name] = made[key]
  labels = np.where(made['weights'] > 0, made['targets'], IGNORED)
  if causal:
    labels = np.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=IGNORED)
  for name in ('attention_mask', 'decoder_attention_mask'):
    mask = inputs.pop(name, np.ones(1)) != 0
    if not mask.all():  # otherwise there is nothing to mask
      inputs[name] = mask.astype(np.int32)
  return inputs | dict(labels=labels)


def tokenizer(config: Config) -> tokenizers.Tokenizer:
  """Returns a tokenizer of bytes with as many ids as the model has, where the
  objective reads plain text; otherwise that of the run."""
  if sources.TEXT in objectives.of(config).holds and config.model.vocab_size:
    return tokenizers.Bytes(config.model.vocab_size)
  return tokenizers.load(config.data.tokenizer)
