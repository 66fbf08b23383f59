"""A model in Python: load one, look inside, change a part.

  import archetype

  model = archetype.load('runs/tiny')         # or a Hugging Face folder
  tokens = model.encode('My fellow citizens')
  logits = model(tokens)                      # [1, L, V]
  states = model.hidden_states(tokens)        # [N + 1, 1, L, D]
  weights = model.attention_weights(tokens)   # [N, 1, H, L, L]
  lens = model.inspect(tokens).lens           # what each layer would predict
  print(model.generate('My fellow', max_new_tokens=50))

docs/python.md is the guide. Whoever needs more than this takes `model.module`
and `model.params`: the module is a Flax module whose `init` and `apply` are
pure functions. The letters of the shapes are those of README.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import os
import pathlib
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import architectures
from architectures.parts import flat, paths
from architectures.parts.config import ModelConfig
from common.fields import PositiveSize, Seed, Size, check_argument_types
from common.errors import RequestError, require, shorten
from configs import base
from training import generate as generation, hub, objectives, parameters
from training import plugins, runs
from training.costs import totals
from training.data import inputs as inputs_of
from training.data import tokenizers
from training.data.texts import check_text
from training.evals import inspection, predicting
from training.hf import config as hf_config, generation as hf_generation
from training.hf import tokenizer as hf_tokenizer, weights
from training.workdir import checkpoints, run_config, storage

Tokens = jax.Array | np.ndarray | Sequence[int] | Sequence[Sequence[int]]
# An encoder-decoder has one array for each stack, by name. The arrays are in
# numpy, where a layer that there is not is an IndexError, and not the last one.
Layers = np.ndarray | dict[str, np.ndarray]


@check_argument_types
@dataclasses.dataclass(frozen=True)
class Model:
  """A model and its parameters. An argument of its methods, and of `load` and
  `build`, whose type its annotation does not have raises RequestError.

  Attributes:
    module: the Flax module; `module.apply({'params': params}, tokens)`.
    params: the parameters, a tree of arrays.
    tokenizer: the tokenizer; None where the weights came without one.
    run: the config of the run that the model is from; None where there is none.
    drawn: the paths of the parameters that `with_parts` drew anew.
    generation: the generation_config.json of the Hugging Face folder that the
      weights are from, if there is one; a run that was imported has it too.
    labels: the names of the outputs of a task's head; (): not known.
  """
  module: nn.Module
  params: Mapping[str, Any]
  tokenizer: tokenizers.Tokenizer | None = None
  run: ml_collections.ConfigDict | None = None
  drawn: tuple[str, ...] = ()
  generation: hf_generation.Generation | None = None
  labels: tuple[str, ...] = ()

  def __repr__(self) -> str:
    count = runs.count_parameters(self.params)
    return (f'Model({self.config.arch}, {count:,} parameters of '
            f'{self.config.param_dtype}, computed in {self.config.dtype})')

  @property
  def config(self) -> ModelConfig:
    """The frozen `config.model`, with every derived field filled in."""
    return self.module.config  # type: ignore[attr-defined]

  @property
  def stack(self) -> str:
    """'decoder', 'encoder' or 'encoder-decoder'."""
    return architectures.stack(self.config)

  def encode(self, text: str) -> jax.Array:
    """Returns the tokens of a text, [1, L]; a document's start is not added."""
    ids = self._require_tokenizer().encode(check_text(text, 'text'))
    return jnp.asarray(ids)[None]

  def decode(self, tokens: Tokens) -> str:
    """Returns the text of the tokens of one row, [L] or [1, L]."""
    ids = inputs_of.array_of_rows('tokens', tokens).reshape(-1)
    inputs_of.check_ids('tokens', tokens=ids, vocab_size=self.config.vocab_size)
    return self._require_tokenizer().decode(ids)

  def __call__(self, tokens: Tokens, decoder_tokens: Tokens | None = None,
               **inputs: Tokens) -> jax.Array:
    """Returns the logits, float32 [B, L, V]: for each of L tokens in B rows, V
    numbers, one for each id of the vocabulary.

    Args:
      tokens: the tokens, [B, L], or [L] for one row; in an encoder-decoder
        those of the source.
      decoder_tokens: the tokens that the decoder of an encoder-decoder is
        shown, [B, L]; default: the source.
      **inputs: `mask` and `decoder_mask`, [B, L], are 1 on tokens and 0 on
        padding at the end of a row; `types`, [B, L], are BERT's segments.

    Raises:
      RequestError: for an input that this model does not take.
    """
    return self._compute('logits', tokens=tokens, decoder_tokens=decoder_tokens,
                         inputs=inputs)

  def hidden_states(self, tokens: Tokens, decoder_tokens: Tokens | None = None,
                    **inputs: Tokens) -> Layers:
    """Returns the input of the first layer and the output of each layer: the
    states [N + 1, B, L, D] of N layers, B rows, L tokens and D numbers for each
    token (d_model). An encoder-decoder has {'encoder': ..., 'decoder': ...}.

    They are float32, in numpy. The last is what the last layer returns, before
    the final norm if there is one. (transformers' `hidden_states` end with the
    normalised one.)

    Args:
      tokens: the tokens, [B, L], or [L] for one row; in an encoder-decoder
        those of the source.
      decoder_tokens: the tokens that the decoder of an encoder-decoder is
        shown, [B, L]; default: the source.
      **inputs: the other inputs of a call, such as `mask` and `types`.
    """
    states = self._compute('layers', tokens=tokens,
                           decoder_tokens=decoder_tokens, inputs=inputs)
    return self._split_by_stack(states, num_extra=1)

  def attention_weights(self, tokens: Tokens,
                        decoder_tokens: Tokens | None = None,
                        **inputs: Tokens) -> Layers:
    """Returns the weight that each query gives each key, in each layer and
    head: float32 [N, B, H, L, M], for N layers, B rows, H heads, L queries and
    M keys. In a decoder or an encoder, M is L.

    An encoder-decoder has {'encoder': [N, B, H, M, M], 'decoder':
    [N, B, H, L, L], 'cross': [N, B, H, L, M]}, with M tokens of the source. The
    arrays are numpy's, and layers count from 0. The weights of a query sum to
    1, less the share of an attention sink; a hidden key has weight 0. They are
    worked out by plain products, whichever kernel computes the attention.

    Args:
      tokens: the tokens, [B, L], or [L] for one row; in an encoder-decoder
        those of the source.
      decoder_tokens: the tokens that the decoder of an encoder-decoder is
        shown, [B, L]; default: the source.
      **inputs: the other inputs of a call, such as `mask` and `types`.
    """
    attention, cross_attention = self._compute('attention', tokens=tokens,
                                               decoder_tokens=decoder_tokens,
                                               inputs=inputs)
    result = self._split_by_stack(attention, num_extra=0)
    if cross_attention is not None:
      result['cross'] = _as_numpy_float32(cross_attention)
    return result

  def inspect(self, tokens: Tokens, decoder_tokens: Tokens | None = None, *,
              top: Size = inspection.NUM_LENS_TOKENS, **inputs: Tokens
              ) -> inspection.Inspection:
    """Returns what the model computes, in numpy: attention and its entropy,
    the residual stream, the logit lens (`top` tokens) and the experts' choices,
    as inspection.Inspection has them.

    Args:
      tokens: the tokens, [B, L], or [L] for one row; in an encoder-decoder
        those of the source.
      decoder_tokens: the tokens that the decoder of an encoder-decoder is
        shown, [B, L]; default: the source.
      top: the number of tokens of the logit lens.
      **inputs: the other inputs of a call, such as `mask` and `types`.
    """
    arrays = self._as_arguments(tokens, decoder_tokens=decoder_tokens,
                                inputs=inputs)
    return inspection.inspect_model(self.module, params=self.params,
                                    arrays=arrays, top=top)

  def generate(self, prompts: str | Sequence[str], *,
               max_new_tokens: PositiveSize = 64, temperature: float = 1.0,
               top_k: Size = 0, top_p: float = 1.0, min_p: float = 0.0,
               repetition_penalty: float = 1.0,
               stop: str | Sequence[str] = (), seed: Seed = 0) -> Any:
    """Returns the text with which the model continues a prompt, or which an
    encoder-decoder writes when it has read the prompt.

    A text ends where the model writes the tokenizer's separator (or, in a run
    with a chat template, the token with which that ends an answer), or before
    one of the strings `stop`. A decoder from a Hugging Face folder begins with
    the bos and ends with the eos of its generation_config.json, if it has them.

    Args:
      prompts: one text, or several, which are continued together.
      max_new_tokens: the most tokens that are written.
      temperature: the number that divides the logits; 0: the likeliest token
        is taken.
      top_k: the number of the likeliest tokens that are drawn from; 0: all.
      top_p: the probability that the tokens which are drawn from reach
        together, the likeliest first.
      min_p: the least probability of a token that may be drawn, as a share of
        the likeliest one's.
      repetition_penalty: the number that divides the logits above 0 of tokens
        that the text has already, and multiplies those below 0.
      stop: a string, or several.
      seed: the seed of the draws.

    Returns:
      A text for a text, and a list of texts for several.

    Raises:
      RequestError: for a model that writes no text, for what is no text, and
        for more tokens than the positions that the model has learned.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    require(bool(texts), 'prompts is empty: pass a text, or a list of texts')
    for text in texts:
      check_text(text, 'the prompt')
    stops = [stop] if isinstance(stop, str) else list(stop)
    require('' not in stops, f'stop is {shorten(stop)}: every text begins with '
            "''")
    config = self._config_of_run()
    tokenizer = self._require_tokenizer()
    objective = objectives.find_objective(config)
    require(objective.writes and self.config.head == 'lm',
            'this model writes no text: its objective is '
            f'{config.objective} and its head {self.config.head!r}')

    # The prompts as the model was trained to read them.
    shown, end = hf_generation.encode_prompts(
        texts, config, tokenizer=tokenizer, generation=self.generation)
    inputs_of.check_ids('the prompt', tokens=shown.tokens,
                        vocab_size=self.config.vocab_size)
    sampling = generation.Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty)
    new_BT = np.asarray(generation.generate(
        self.module, self.params, jnp.asarray(shown.tokens),
        jnp.asarray(shown.lengths), jax.random.key(seed),
        max_new_tokens=max_new_tokens, stop_token=end, sampling=sampling,
        **shown.arguments))

    # The texts of the tokens, up to where they end.
    written = []
    for i, row in enumerate(new_BT):
      text = shown.text(i, generation.tokens_before_stop(row, end), tokenizer)
      written.append(generation.text_before_stop(text, stops))
    if isinstance(prompts, str):
      return written[0]
    return written

  def predict(self, rows: str | Sequence[Any], *,
              max_answer_length: PositiveSize = 30,
              null_threshold: float = 0.0) -> Any:
    """Returns what a model with the head of a task says of each row, which is
    laid out as in training and cut to data.length.

    Args:
      rows: several rows, or one text. A classifier or a regression takes texts
        or pairs of texts; token classification takes sentences, whose words
        spaces part, or lists of words; question answering takes pairs of a
        question and the text that may have the answer.
      max_answer_length: the most tokens of an answer.
      null_threshold: how much more likely than the best answer, in nats, it has
        to be that there is none.

    Returns:
      A list of predicting.TextLabel, with the probability of each label; of
      floats; of predicting.WordLabels, or of predicting.QuestionAnswer. For one
      text, its own alone.

    Raises:
      RequestError: for a model whose head is of no such task, and for a row
        that is not of the kinds above, or has no token.
    """
    # The labels come from the run or the import; without names, they are
    # numbers.
    config = self._config_of_run().copy_and_resolve_references()
    require(config.objective in predicting.OBJECTIVES, 'this model predicts no '
            f'labels, numbers or answers: its objective is {config.objective}')
    if objectives.find_objective(config).has_labels:
      numbers = tuple(map(str, range(self.config.num_labels)))
      config.data.labels = self.labels or config.data.labels or numbers
    is_single = isinstance(rows, str)
    require(is_single or len(rows) > 0,
            'rows is empty: pass a text, or a list')
    # The options of the task, as its flags have them.
    options = types.SimpleNamespace(
        max_answer_length=max_answer_length, n_best=20,
        null_threshold=null_threshold)
    predictions = predicting.predict_rows(
        module=self.module, params=self.params, config=config,
        tokenizer=self._require_tokenizer(), rows=[rows] if is_single else rows,
        options=options)
    if is_single:
      return predictions[0]
    return predictions

  def count(self, length: Size = 0) -> dict[str, Any]:
    """Returns the costs of the model by name: its parameters, in all and active
    for a token, also by part; the FLOPs per token; and the bytes of the
    parameters and of the key-value cache.

    Args:
      length: the number of tokens of a sequence; 0: max_len of the model.
    """
    length = length or self.config.max_len
    return totals.count_costs(self._config_of_run(), length=length,
                              model=self.config)

  def with_parts(self, *, seed: Seed = 0, **fields: Any) -> 'Model':
    """Returns the model with other fields of `config.model`, for example
    `norm='rmsnorm'` or `moe=dict(top_k=1)`.

    Parameters whose name and shape stay the same keep their values. The others
    are drawn at random, as at the start of a run; the attribute `drawn` names
    them.

    Args:
      seed: the seed of the parameters that are drawn.
      **fields: the fields and their new values.

    Raises:
      RequestError: for an unknown field, and for a value or a combination that
        is not possible.
    """
    module = architectures.build(changed_model(self.config, fields))
    old_params = paths.flatten_by_path(self.params)
    new_params = _draw_parameters(module, seed)
    drawn = []
    for path, new_value in paths.flatten_by_path(new_params).items():
      if path not in old_params or old_params[path].shape != new_value.shape:
        drawn.append(path)

    def old_or_drawn(keys: tuple, new_value: jax.Array) -> jax.Array:
      """Returns the value of a parameter in the new model: its old value if it
      keeps that, and else the one that was drawn.

      Args:
        keys: jax's path of the parameter.
        new_value: the value that was drawn.
      """
      path = paths.path_to_string(keys)
      if path in drawn:
        return new_value
      return old_params[path]

    params = jax.tree_util.tree_map_with_path(old_or_drawn, new_params)
    # Keep the names of the labels if there are as many as before.
    labels = self.labels
    if module.config.num_labels != self.config.num_labels:
      labels = ()
    return dataclasses.replace(self, module=module, params=params,
                               drawn=tuple(drawn), labels=labels)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes a Hugging Face folder: config.json, the weights, the tokenizer,
    and the generation_config.json that came with the model.

    Bytes are written as a byte-level BPE without merges. Not written are bytes
    that stand in for the tokenizer of imported weights, whose ids mean
    something else, and those with more than one id for a byte (bytes:N).

    Args:
      folder: the folder, which is made if it is not there.

    Raises:
      RequestError: for a folder that cannot be one, or holds a run or files of
        another model; and for a model that transformers does not have.
    """
    storage.check_folder_is_writable(folder, 'folder')
    folder = pathlib.Path(folder)
    config = self._config_of_run()
    generation = self.generation

    # Find out whether the tokenizer can be written. Only imported weights have
    # a generation_config.json, so a byte tokenizer beside one stands in for
    # theirs.
    tokenizer = self.tokenizer
    if isinstance(tokenizer, tokenizers.Bytes):
      stands_in = generation is not None
      if stands_in or not tokenizer.is_bytewise:
        tokenizer = None
    if tokenizer is not None:
      hf_tokenizer.refuse_other_tokenizer(tokenizer, config, folder=folder)
      generation = generation or hf_generation.generation_of_run(
          config, model=self.config, tokenizer=tokenizer)

    # Write the weights with their configs, and the tokenizer.
    weights.to_hf(self.module, self.params, folder, generation=generation,
                  labels=self.labels)
    if tokenizer is not None:
      hf_tokenizer.save_tokenizer(tokenizer, config, folder=folder)

  def _require_tokenizer(self) -> tokenizers.Tokenizer:
    """Returns the tokenizer; raises RequestError where the model has none."""
    if self.tokenizer is None:
      raise RequestError('this model came without a tokenizer: load it with '
                         "tokenizer='FILE'")
    return self.tokenizer

  def _config_of_run(self) -> ml_collections.ConfigDict:
    """Returns the config of the run that the model is from; for a model from
    elsewhere the default config, in which the objective, the architecture and
    the length of a row are made to suit the model."""
    if self.run is not None:
      return self.run
    config = base.base()
    config.objective = objectives.find_objective_of_head(self.config)
    config.model.arch = self.config.arch
    config.data.length = self.config.max_len
    return config

  def _compute(self, wanted: str, tokens: Tokens, decoder_tokens: Tokens | None,
               inputs: Mapping[str, Tokens]) -> Any:
    """Returns one part of what the model computes for some tokens.

    Args:
      wanted: the part to return: 'logits', 'layers' or 'attention'.
      tokens: the tokens, [B, L] or [L]; in an encoder-decoder the source.
      decoder_tokens: the tokens that the decoder of an encoder-decoder is
        shown; None: the source.
      inputs: the other inputs of the call by name, such as `mask`.

    Returns:
      The part, as `_compute_output` describes it.
    """
    arguments = self._as_arguments(tokens, decoder_tokens=decoder_tokens,
                                   inputs=inputs)
    return _compute_output(self.module, self.params, arguments, wanted)

  def _as_arguments(self, tokens: Tokens, decoder_tokens: Tokens | None,
                    inputs: Mapping[str, Tokens]) -> dict[str, jax.Array]:
    """Checks the arguments of a call of the model, and returns them as int32
    arrays [B, L], by the names that the module has for them.

    Args:
      tokens: the tokens, [B, L] or [L]; in an encoder-decoder the source.
      decoder_tokens: the tokens that the decoder of an encoder-decoder is
        shown, or None.
      inputs: the other inputs of the call by name, such as `mask`.

    Raises:
      RequestError: for an input that this model does not take, and for ids
        that are not in its vocabulary.
    """
    arguments = dict(inputs, tokens=tokens)
    if decoder_tokens is not None:
      arguments['decoder_tokens'] = decoder_tokens
    return inputs_of.arguments_of_module(self.stack, values=arguments,
                                         vocab_size=self.config.vocab_size)

  def _split_by_stack(self, by_layer: Any, num_extra: int) -> Any:
    """Converts what was computed for each layer to numpy. In an
    encoder-decoder, the layers are split into {'encoder': ..., 'decoder': ...}.

    Args:
      by_layer: an array for each layer, those of the encoder first.
      num_extra: the number of arrays that each stack has beside those of its
        layers, such as 1 for the input of the first layer.

    Returns:
      One array whose first dimension is the layers, or a dict of two.
    """
    if self.stack != 'encoder-decoder':
      return _as_numpy_float32(by_layer)
    num_encoder_layers = len(self.config.layer_kinds(self.config.num_layers))
    decoder_start = num_extra + num_encoder_layers
    of_encoder = jnp.stack(by_layer[:decoder_start])
    of_decoder = jnp.stack(by_layer[decoder_start:])
    return dict(encoder=_as_numpy_float32(of_encoder),
                decoder=_as_numpy_float32(of_decoder))


def _as_numpy_float32(x: jax.Array) -> Any:
  """Returns an array in numpy, in float32 (in bfloat16, numpy's sums would be
  in it too). An array that is being traced stays as it is."""
  if isinstance(x, jax.core.Tracer):
    return x
  return np.asarray(x, np.float32)


@functools.partial(jax.jit, static_argnames=('module', 'wanted'))
def _compute_output(module: nn.Module, params: Any,
                    arguments: dict[str, jax.Array], wanted: str) -> Any:
  """Runs a model and returns one part of its output. Whatever the other parts
  need is left out of the compiled program.

  Args:
    module: the Flax module of the model.
    params: its parameters, a tree of arrays.
    arguments: the arguments of the model's call, by name.
    wanted: the part to return: 'logits', 'layers' or 'attention'.

  Returns:
    For 'logits', float32 [B, L, V]. For 'layers', the states of all layers. For
    'attention', the weights of attention and, in an encoder-decoder, those of
    attention to the encoder's output, else None.
  """
  options: dict[str, Any] = dict(
      arguments, keep_layers=wanted == 'layers',
      keep_attention=wanted == 'attention')
  output: Any = module.apply({'params': params}, **options)
  if wanted == 'logits':
    return output.logits
  if wanted == 'layers':
    return output.aux['layers']
  return output.aux['attention'], output.aux.get('cross_attention')


@check_argument_types
def load(path: str | os.PathLike, *, step: int | str | None = None,
         tokenizer: str | None = None) -> Model:
  """Returns the model of a run, or of a Hugging Face folder or file.

  Args:
    path: the folder of a run (`--workdir`); or a folder with a config.json and
      weights in Hugging Face's format, a file of weights in one, or
      hf://ORG/NAME.
    step: the checkpoint of a run: the number of a step; 'best', in a run with
      eval.best; or '100,200' or 'last:5' for the mean of several; default: the
      newest.
    tokenizer: a tokenizer in place of the model's own, written as
      data.tokenizer is.

  Raises:
    RequestError: where there is no such model, or one that is not supported.
    EnvironmentFailure: where the checkpoint cannot be read.
  """
  require(str(path) != '', "path is '': name the folder of a run or of weights")
  step_choice: parameters.StepChoice = step
  if isinstance(step, str):
    step_choice = checkpoints.parse_step(step, 'step')

  # The folder of a run is known by its checkpoints.
  path = hub.download_if_on_hub(path)
  folder = storage.checked_path(path)
  if storage.has_checkpoints(folder):
    return _load_run(folder, step=step_choice, tokenizer=tokenizer)
  require(step is None, f'{path} is no run: it has no step {step}')

  # A folder of Hugging Face, or a file of weights in one. Its tokenizer is
  # loaded if it has one, and its labels if the model is a classifier.
  module, params = weights.from_hf(path)
  if folder.is_file():
    folder = folder.parent
  if tokenizer is None and tokenizers.find_tokenizer_files(folder):
    tokenizer = str(folder)
  loaded_tokenizer = None
  if tokenizer:
    loaded_tokenizer = tokenizers.load(tokenizer)
  labels: tuple[str, ...] = ()
  if module.config.num_labels:
    labels = hf_config.read_labels(hf_config.load_config_json(folder))
  return Model(
      module=module, params=params, tokenizer=loaded_tokenizer,
      generation=hf_generation.read_generation(folder), labels=labels)


@check_argument_types
def build(config: str | ml_collections.ConfigDict | ModelConfig, *,
          seed: Seed = 0, **fields: Any) -> Model:
  """Builds a model with the parameters that a training run begins with.

  Args:
    config: 'llama:tiny', for a file of configs/ and a size, or the path of such
      a file; or the config of a run, as get_config in such a file returns it;
      or a complete model config.
    seed: the seed of the parameters.
    **fields: fields of `config.model` to set, as `norm='layernorm'`.

  Raises:
    RequestError: for a wrong field, value or combination.
  """
  # A model config alone does not name a tokenizer.
  if isinstance(config, ModelConfig):
    module = architectures.build(changed_model(config, fields))
    return Model(module=module, params=_draw_parameters(module, seed))
  if isinstance(config, str):
    config = plugins.load_config_file(config)

  # Set the fields in a copy of the run's config. Its tokenizer gives the size
  # of the vocabulary. Fields that the model would not read are refused.
  plugins.check_config(config, 'config')
  config = config.copy_and_resolve_references()
  base.set_model_fields(config.model, fields)
  tokenizer = tokenizers.load(config.data.tokenizer)
  model, _ = runs.resolve_model(config, tokenizer)
  _refuse_unread_fields(model, fields=fields, tree=config.model)
  module = architectures.build(model)
  return Model(module=module, params=_draw_parameters(module, seed),
               tokenizer=tokenizer, run=config)


def _load_run(workdir: Any, step: parameters.StepChoice, tokenizer: str | None
              ) -> Model:
  """Loads the model of a training run, with its tokenizer and its labels.

  Args:
    workdir: the folder of the run.
    step: the step of the checkpoint; 'best'; several, for the mean of their
      parameters; None: the newest good one.
    tokenizer: another tokenizer than the run's, written as in data.tokenizer;
      None: the run's.

  Raises:
    RequestError: where there is no such run or step.
    EnvironmentFailure: where the checkpoint cannot be read.
  """
  config = runs.load_run_config(workdir)
  module = architectures.build(runs.load_run_model_config(workdir, config))
  checkpoint = parameters.read_parameters_on_one_device(workdir, module=module,
                                                        step=step)
  if tokenizer:
    loaded_tokenizer = tokenizers.load(tokenizer)
  else:
    loaded_tokenizer = runs.load_run_tokenizer(workdir, config)
  return Model(
      module=module, params=checkpoint.state, tokenizer=loaded_tokenizer,
      run=config,
      generation=hf_generation.load_if_published(workdir, checkpoint.step),
      labels=run_config.load_labels(workdir))


def _draw_parameters(module: nn.Module, seed: int) -> Any:
  """Draws the parameters with which a training run of this seed begins.

  Args:
    module: the Flax module of the model.
    seed: the seed of the run.

  Returns:
    The parameters, a tree of arrays without flax's boxes of axis names.

  Raises:
    RequestError: if they are larger than all memory of a device.
  """
  init = jax.jit(module.init)
  # The parameters do not depend on the input, so one token is enough.
  key = jax.random.key(seed)
  token = jnp.zeros((1, 1), jnp.int32)

  # Check their size before anything is allocated. The program that is traced
  # here for the shapes is traced only once, as it is the one that runs below.
  shapes = nn.meta.unbox(init.eval_shape(key, token)['params'])
  num_bytes = 0
  for parameter in jax.tree.leaves(shapes):
    num_bytes += math.prod(parameter.shape) * parameter.dtype.itemsize
  runs.check_bytes_fit(num_bytes, device=jax.local_devices()[0],
                       what='the parameters')
  return nn.meta.unbox(init(key, token)['params'])


# Fields from which others are derived when a run's config is resolved: they
# cannot be changed in a model config, which is resolved.
_FIELDS_BEHIND_OTHERS = ('arch', 'd_model', 'num_heads', 'head_dim', 'kinds',
                         'parametrization', 'mup_base_width',
                         'mup_base_head_dim')


@check_argument_types
def changed_model(config: ModelConfig, fields: Mapping[str, Any]
                  ) -> ModelConfig:
  """Returns a model config with some fields changed, and checks it. Values that
  were derived from other fields are derived again: if lora.rank is set alone,
  lora.alpha follows it.

  Args:
    config: the config of the model.
    fields: {name: new value}, with names without `model.`.

  Raises:
    RequestError: for a wrong value, a field that the model would not read, and
      a field that decides the sizes of other parts.
  """
  for name in fields:
    require(name not in _FIELDS_BEHIND_OTHERS,
            f'model.{name} decides the sizes of other '
            'parts: build a model with it, from a file of configs/')
  # Turn the config back into fields that a user may set. Reset those that were
  # derived, so that they are derived again: lora.alpha is derived as lora.rank,
  # so a value equal to it counts as derived, and only an encoder-decoder has a
  # number of decoder layers of its own.
  tree = ml_collections.ConfigDict(flat.default_tree())
  with tree.ignore_type():
    tree.update(flat.to_dict(config))
    if config.lora.alpha == config.lora.rank:
      tree.lora.alpha = 0
    if architectures.stack(config) != 'encoder-decoder':
      tree.num_decoder_layers = fields.get('num_layers', config.num_layers)
    base.set_model_fields(tree, fields)
  # Derive the other fields and check all.
  changed = architectures.resolve(tree)
  _refuse_unread_fields(changed, fields=fields, tree=tree)
  return changed


def _refuse_unread_fields(config: ModelConfig, fields: Mapping[str, Any],
                          tree: Mapping[str, Any]) -> None:
  """Raises RequestError for a field that a user sets and the model does not
  read.

  Args:
    config: the model's resolved config.
    fields: the fields that the user sets, by name.
    tree: the config.model, with these fields, that `config` was resolved from.
  """
  if not fields:
    return
  unread_fields = flat.fields_that_are_unread(config, tree)
  for name in flat.flatten_groups(fields):
    if name in unread_fields:
      raise RequestError(f'model.{name} is not read by this model: it is read '
                         f'where {unread_fields[name].where}')
