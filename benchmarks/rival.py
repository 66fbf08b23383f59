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
# The names that transformers gives the arrays of our batches. Its `labels` are
# made of two of ours: targets and weights.
HF_NAME_OF_ARRAY = dict(
    tokens='input_ids', types='token_type_ids', segment_ids='attention_mask',
    decoder_tokens='decoder_input_ids',
    decoder_segment_ids='decoder_attention_mask',
    nsp_targets='next_sentence_label')


def keep_what_pytorch_has(config: Config) -> Config:
  """Returns a config without the parts that PyTorch's side of a comparison
  lacks, so that both sides take the same training steps.

  The optimiser becomes AdamW with clipping. There is no dropout, no noise in
  routers and no capacity of experts, and the loss has neither label smoothing
  nor a z-loss.

  Args:
    config: the config of a run.
  """
  config = config.copy_and_resolve_references()
  model = config.model
  for fields in (model, model.moe):
    for name in fields:
      if name.endswith('dropout'):
        fields[name] = 0.0
  model.moe.update(jitter=0.0, logit_noise=0.0, capacity_factor=0.0,
                   eval_capacity_factor=0.0, dispatch='auto')
  config.train.update(z_loss=0.0, label_smoothing=0.0)
  config.optim.update(base.base().optim)
  return config


def check_pytorch_has(config: Config) -> None:
  """Checks that PyTorch can train the model of a config.

  Args:
    config: the config of a run.

  Raises:
    RequestError: if transformers has no such model or loss, or if it or PyTorch
      is not installed.
  """
  # transformers must have a class for the model.
  architectures.hugging_face(config.model.arch)

  # The loss must be over the vocabulary, of arrays that transformers takes.
  objective = objectives.find_objective(config)
  unknown_arrays = sorted(
      {*objective.arrays(config)} - {*HF_NAME_OF_ARRAY, 'targets', 'weights'})
  if objective.head != 'lm' or objective.bound or unknown_arrays:
    with_arrays = ''
    if unknown_arrays:
      with_arrays = f' with {" and ".join(unknown_arrays)}'
    raise RequestError('--compare=pytorch: no class of transformers has the '
                       f'loss of objective {config.objective!r}{with_arrays}')

  # The libraries must be installed. Most readers of the messages above are
  # without them, so this comes last.
  missing = [name for name in ('torch', 'transformers')
             if importlib.util.find_spec(name) is None]
  require(not missing, f'--compare=pytorch needs {" and ".join(missing)}: '
          "pip install 'archetype[verify]'")


def request_of_pytorch(config: Config) -> dict[str, Any]:
  """Returns the model and the batch that PyTorch trains, as JSON has them.

  Args:
    config: the config of a run, as `keep_what_pytorch_has` returns it.

  Returns:
    config_json: the config.json of an export of the model.
    inputs: the arguments of a training step, as lists by name.
    parameters: the number of the model's parameters.
    decoder: whether the model is a decoder alone.

  Raises:
    RequestError: for a model that no config.json describes.
  """
  # Describe the model.
  tokenizer = load_tokenizer(config)
  model, _ = runs.resolve_model(config, tokenizer)
  config_json = hf_config.config_json_of_model(model)
  is_decoder = architectures.stack(model) == 'decoder'

  # Draw the first batch of the run, and name its arrays as transformers does.
  batch = pipeline.make_training_loader(config, tokenizer).batch(0)
  inputs = arguments_of_transformers(batch, causal=is_decoder)

  # The class of BERT with two losses has none for masked words alone.
  class_name, = config_json['architectures']
  has_next_sentences = 'next_sentence_label' in inputs
  if class_name.endswith('ForPreTraining') and not has_next_sentences:
    raise RequestError(f'{class_name} of transformers has no loss without next '
                       "sentences: take objective 'mlm_nsp', or "
                       '--config.model.next_sentence=False')
  return dict(
      config_json=config_json, parameters=totals.count_parameters(model)[0],
      decoder=is_decoder,
      inputs={name: array.tolist() for name, array in inputs.items()})


def arguments_of_transformers(batch: dict[str, np.ndarray], causal: bool
                              ) -> dict[str, np.ndarray]:
  """Returns a batch as the arguments of a model class of transformers.

  Args:
    batch: the arrays of a training step, [batch, ...] each; `targets` and
      `weights` are [batch, length].
    causal: whether the class itself shifts the labels: it compares what it
      predicts at a token with the label of the next one.

  Returns:
    The arguments by name, with `labels` [batch, length]: -100 where a token
    does not count.
  """
  # Rename the arrays.
  arguments = {}
  for our_name, hf_name in HF_NAME_OF_ARRAY.items():
    if our_name in batch:
      arguments[hf_name] = batch[our_name]

  # Make the labels. Our targets stand at the token that predicts them. A causal
  # class of transformers shifts labels itself, so they move one position to the
  # right.
  labels = np.where(batch['weights'] > 0, batch['targets'], IGNORED)
  if causal:
    labels = np.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=IGNORED)

  # A mask that hides nothing is left out, as it costs time.
  for name in ('attention_mask', 'decoder_attention_mask'):
    mask = arguments.pop(name, np.ones(1)) != 0
    if not mask.all():
      arguments[name] = mask.astype(np.int32)
  return arguments | dict(labels=labels)


def load_tokenizer(config: Config) -> tokenizers.Tokenizer:
  """Returns the tokenizer whose ids both sides are trained on.

  It is one of bytes with as many ids as the model has, where the objective
  reads plain text, so that any vocabulary can be timed; otherwise that of the
  run.
  """
  if sources.TEXT in objectives.find_objective(
      config).holds and config.model.vocab_size:
    return tokenizers.Bytes(config.model.vocab_size)
  return tokenizers.load(config.data.tokenizer)
