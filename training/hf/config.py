"""Hugging Face's config.json: read field by field, nothing passed over.

A page (architectures/parts/hf) asks for each field that it honours, and says of
others which value alone it knows. The default with which a field is asked for
says of what type it must be. Of the fields that are left, those that
transformers declares for a configuration of this model_type, or reads in its
model, are refused by name, unless they never change what a model computes.
transformers keeps all others as attributes that no model reads: they change
nothing, and a note names them. known_fields.json has the names that
transformers knows; tests/parity/known_fields.py writes that file.

transformers tells heads by the class under `architectures`, and counts the
outputs of the head of a task by id2label, whose names are LABEL_0, ... where a
training gave none.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import functools
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import ml_collections

import architectures
from architectures.parts import blocks, flat, heads, hf
from architectures.parts.config import ModelConfig
from architectures.parts.moe import routing
from architectures.parts.moe.routing import MoEConfig
from common import fields as declared
from common.errors import RequestError, require, shorten
from training import hub
from training.hf import files as hf_files
from training.workdir import run_config, storage

# Fields by which text is generated: an export writes those of its import.
GENERATION_FIELDS = re.compile('|'.join((
    r'.*_token_ids?', 'task_specific_params', 'prefix', 'tokenizer_class',
    'max_length', 'min_length', 'do_sample', 'early_stopping', 'num_beams',
    'temperature', 'top_k', 'top_p', 'typical_p', 'repetition_penalty',
    'length_penalty', 'no_repeat_ngram_size', 'num_return_sequences',
    'num_beam_groups', 'bad_words_ids', 'diversity_penalty',
    'encoder_no_repeat_ngram_size', 'begin_suppress_tokens',
    'suppress_tokens', 'remove_invalid_values',
    'exponential_decay_length_penalty')))

# Fields without a bearing on what a trained model computes.
FIELDS_WITHOUT_EFFECT = re.compile('|'.join((
    GENERATION_FIELDS.pattern,
    r'_.*', 'architectures', 'model_type', 'torch_dtype', 'dtype',
    'transformers_version', r'.*dropout.*', r'.*_pdrop',
    r'initializer_.*', 'init_std', 'use_cache', 'gradient_checkpointing',
    'pretraining_tp', r'summary_.*', 'output_attentions',
    'output_hidden_states', 'output_router_logits', 'return_dict',
    'id2label', 'label2id', 'problem_type', 'attn_implementation',
    'chunk_size_feed_forward')))


class Reader:
  """A reader of the fields of a config.json, which remembers those that were
  read. A null is a default, and so is what the file leaves out.

  Attributes:
    names_read: the names of the fields that were asked for.
    notes: sentences of the page on what the file says and this import does
      not do.
  """

  def __init__(self, tree: Mapping[str, Any], name: str = ''):
    """Reads `tree`; `name` is that of the object in config.json, '' for the
    file itself."""
    self.names_read: set[str] = set()
    self.notes: list[str] = []
    self._tree = tree
    self._name = name
    self._parts: list[Reader] = []

  def __call__(self, name: str, default: Any) -> Any:
    """Reads a field of the config.json, and records that it was read.

    Args:
      name: the name of the field.
      default: what transformers takes if the field is missing. The field must
        have the same type.

    Returns:
      The value of the field, or the default if it is missing or null.

    Raises:
      RequestError: if the field has another type than the default, or is below
        1 where the default is 1 or more.
    """
    self.names_read.add(name)
    value = self._tree.get(name)
    if value is None:
      return default
    return _check_type(f'config.json has {self._full(name)}', value=value,
                       default=default)

  def read_list(self, name: str) -> list[Any]:
    """Returns the list that the field `name` holds; an empty one if it holds
    none."""
    self.names_read.add(name)
    value = self._tree.get(name)
    return value if isinstance(value, list) else []

  def has(self, name: str) -> bool:
    """Whether the field `name` is there and not null."""
    return self._tree.get(name) is not None

  def is_null(self, name: str) -> bool:
    """Whether the field `name` is there and null."""
    return name in self._tree and self._tree[name] is None

  def read_count(self, name: str, default: int) -> int:
    """Returns the field `name`, a whole number of which 0 is a choice and not a
    size that is missing."""
    return self(name, 0 if self.has(name) else default)

  def ignore_fields(self, *names: str) -> None:
    """Says that what these fields hold does not change the model."""
    self.names_read.update(names)

  def __bool__(self) -> bool:
    return bool(self._tree)

  def read_object(self, name: str) -> 'Reader':
    """Returns a reader of the object that the field `name` holds; of an empty
    one if there is none."""
    part = Reader(self(name, {}), self._full(name))
    self._parts.append(part)
    return part

  def require_values(self, **only: Any) -> None:
    """Checks that fields have the only value that is known here, or are
    missing, and records that they were read.

    Args:
      **only: the only known value of each field, which is transformers'
        default.

    Raises:
      RequestError: for a field with another value.
    """
    for name, known in only.items():
      self.names_read.add(name)
      value = self._tree.get(name)
      if value is None:
        continue
      same_type = isinstance(value, bool) == isinstance(known, bool)
      if value != known or not same_type:
        raise RequestError(f'config.json has {self._full(name)} '
                           f'{shorten(value)}: only {known!r} is known here')

  def read_choice(self, name: str, default: str,
                  choices: dict[str, Any]) -> Any:
    """Reads a field that holds a word, and returns our value for this word.

    Args:
      name: the name of the field.
      default: the word that transformers takes if the field is missing.
      choices: {word: our value} of the words that are known here.

    Raises:
      RequestError: for another word.
    """
    value = self(name, default)
    require(value in choices, f'config.json has {self._full(name)} '
            f'{shorten(value)}: choose from {", ".join(map(str, choices))}')
    return choices[value]

  @property
  def model_type(self) -> str:
    """The name of the system in config.json."""
    return self('model_type', '')

  def refuse_unread_fields(self, known_names: Collection[str] | None
                           ) -> list[str]:
    """Checks, once a config.json has been read, that no field was overlooked
    that may change what the model computes.

    Args:
      known_names: the fields that transformers knows for this model_type; None:
        they are not recorded, so any field may matter.

    Returns:
      The names of fields that were not read and have no effect, as transformers
      does not know them.

    Raises:
      RequestError: for a field that was not read and may matter.
    """
    unread = []
    refused = []
    for name, value in self._tree.items():
      # Skip fields that were read, or never change what a model computes.
      has_no_effect = FIELDS_WITHOUT_EFFECT.fullmatch(name)
      if name in self.names_read or has_no_effect or value is None:
        continue
      if known_names is None or name in known_names:
        refused.append(f'{self._full(name)} {shorten(value)}')
      else:
        unread.append(self._full(name))
    # Check the objects in the file, such as text_config, which have fields too.
    for part in self._parts:
      unread += part.refuse_unread_fields(known_names)
    require(not refused, 'config.json has fields that transformers knows and '
            f'this architecture does not, {", ".join(refused[:9])}: remove '
            'those that do not change what the model computes')
    return unread

  def _full(self, name: str) -> str:
    """Returns the name of a field with that of its object before it."""
    if not name.isidentifier():
      name = shorten(name)
    if self._name:
      return f'{self._name}.{name}'
    return name


LARGEST_INTEGER = 2**31 - 1  # what an index of 32 bits counts
# The words for the type that a field must have, by that of its default, and a
# test of it.
CHECK_OF_TYPE: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ('true or false', lambda value: isinstance(value, bool)),
    int: (f'an integer from 0 to {LARGEST_INTEGER}',
          lambda value: type(value) is int and 0 <= value <= LARGEST_INTEGER),
    float: ('a number', lambda value: type(value) in (int, float)
            and abs(value) < 1e30 and math.isfinite(value)),
    str: ('a string', lambda value: isinstance(value, str)),
    dict: ('an object', lambda value: isinstance(value, dict)),
}


def _check_type(subject: str, value: Any, default: Any) -> Any:
  """Checks that a field of a config.json has the type of transformers' default
  for it, and returns its value: as a float if the default is one.

  Args:
    subject: the field in words, with which a message begins.
    value: the value of the field.
    default: transformers' default. If it is an integer above 0, which is a
      size, the value must be above 0 too.

  Raises:
    RequestError: for a value of another type, or a size of 0.
  """
  expected_type = type(default)
  words, is_valid = CHECK_OF_TYPE[expected_type]
  if not is_valid(value):
    raise RequestError(f'{subject} {shorten(value)}: it must be {words}')
  if expected_type is int and default and not value:
    raise RequestError(f'{subject} {shorten(value)}: it must be 1 or more')
  if expected_type is float:
    return float(value)
  return value


class ContentOfConfigJson(NamedTuple):
  """The content of a config.json, as it is read here.

  Attributes:
    fields: the fields of our config.model.
    model: the complete config of the model that they describe.
    notes: sentences about what the file says and has no effect on an import.
  """
  fields: ml_collections.ConfigDict
  model: ModelConfig
  notes: list[str]


def model_of_config_json(tree: dict[str, Any],
                         files: Collection[str] | None = None) -> ModelConfig:
  """Returns the config of the model that a config.json describes; its arguments
  and errors are those of `read_config_json`."""
  return read_config_json(tree, files).model


def read_config_json(tree: dict[str, Any], files: Collection[str] | None = None
                     ) -> ContentOfConfigJson:
  """Reads a model's config.json in the Hugging Face format.

  Args:
    tree: the content of the file, as json.load returns it.
    files: the names of the tensors in the weight files beside it, which tell
      some things that a config.json does not; None: they are not known.

  Raises:
    RequestError: for anything in the file that may change what the model
      computes and is not known here.
  """
  # The reader records the name of each field that is read. At the end, those
  # that were not read are found by this.
  reader = Reader(tree)
  _refuse_quantised(reader)
  fields = read_model_fields(reader)
  hf_format = architectures.hugging_face(fields.arch)
  # A decoder alone does not read is_encoder_decoder, which old files have.
  if 'is_encoder_decoder' not in reader.names_read:
    reader.require_values(is_encoder_decoder=False)

  # Refuse fields that were not read and may matter, and note the others.
  unread = reader.refuse_unread_fields(known_fields(hf_format.model_type))
  if unread:
    reader.notes.append(
        f'config.json has {", ".join(unread)}, {NOTE_OF_UNREAD_FIELDS} in a '
        f'{reader.model_type}: what the model computes does not depend on it')

  # Some fields follow only from the names of the tensors.
  if files is not None:
    fields.update(hf_format.read_tensor_names(files))
  model = architectures.resolve(fields)
  _check_model(model)
  return ContentOfConfigJson(fields=fields, model=model, notes=reader.notes)


# In the note of fields that nobody reads.
NOTE_OF_UNREAD_FIELDS = 'which transformers does not read'


def known_fields(model_type: str) -> frozenset[str] | None:
  """Returns the names of the fields of a config.json that transformers declares
  for a model_type or that its model reads; None of a type that is not recorded,
  as that of a system from outside the tree."""
  names = _known_fields()
  if model_type not in names:
    return None
  return frozenset(names[''] + names[model_type])


@functools.cache
def _known_fields() -> dict[str, Any]:
  return json.loads(pathlib.Path(__file__).with_name(
      'known_fields.json').read_text(encoding='utf-8'))


def _check_model(config: ModelConfig) -> None:
  """Raises RequestError for a model that transformers does not run."""
  architectures.hugging_face(config.arch).check(flat.with_all_parts(config))
  # Where a recurrence can be without convolutions, transformers' cannot.
  for layer in config.distinct_layers:
    if layer.mixer == 'attention':
      continue
    settings = blocks.mixer_of_layers(layer).settings
    require(not settings or getattr(layer.part(settings), 'conv', None) != 0,
            f'model.{layer.mixer}.conv is 0, and a {config.arch} of '
            'transformers has convolutions: choose 1 or more')


# The class that asks transformers to unpack weights as it loads them, by
# quant_method.
UNPACKING_CLASS_OF_METHOD = {'fp8': 'FineGrainedFP8Config',
                             'mxfp4': 'Mxfp4Config'}


def _refuse_quantised(reader: Reader) -> None:
  """Refuses a config.json whose weights are stored in a quantised format, with
  advice on how to unpack them.

  Args:
    reader: the reader of the config.json.

  Raises:
    RequestError: for quantised weights.
  """
  for name in ('quantization_config', 'compression_config'):
    quantisation = reader(name, {})
    if not quantisation:
      continue
    method = quantisation.get('quant_method', 'of no name')
    unpacking_class = UNPACKING_CLASS_OF_METHOD.get(str(method))

    # transformers can unpack some formats.
    remedy = 'Take the folder of the model that was quantised'
    if unpacking_class:
      remedy = (
          'Unpack them with transformers, AutoModelForCausalLM.from_pretrained('
          f'FOLDER, dtype="bfloat16", quantization_config={unpacking_class}('
          'dequantize=True)).save_pretrained(NEW), and take NEW')
    raise RequestError(
        f'config.json has {name}: these weights are quantised '
        f'({shorten(method)}), and weights are read from '
        f'{", ".join(hf_files.DTYPES)}. {remedy}')


def read_model_fields(reader: Reader) -> ml_collections.ConfigDict:
  """Returns the fields of our config.model that a config.json of Hugging Face
  describes. Its model_type names the architecture, whose module in
  architectures/ says how to read it.

  Args:
    reader: the reader of the config.json, which records the fields that are
      read.
  """
  arch = reader.read_choice('model_type', '',
                            architectures.arch_of_model_type())
  hf_format = architectures.hugging_face(arch)
  fields = _read_table(reader, hf_format)
  reader.require_values(**hf_format.only)
  reader.ignore_fields(*hf_format.fields_without_effect)
  fields |= _read_head(reader, hf_format)

  # Begin with the defaults. They are overwritten by what the architecture
  # always has (PARTS), then by the fields of its table, then by those that its
  # function `read` finds.
  model = ml_collections.ConfigDict(flat.default_tree())
  model.update(architectures.system(arch).PARTS, arch=arch)
  model.update_from_flattened_dict(fields)
  more_fields = hf_format.read(reader, fields)
  if 'kinds' in more_fields:
    model.kinds = {}  # else `update` would keep the kinds of PARTS beside them
  model.update(more_fields)

  # Fields about biases that were not read must agree with the model.
  for hf_name, our_name in hf.BIAS_FIELDS.items():
    if hf_name not in reader.names_read:
      reader.require_values(**{hf_name: model[our_name]})
  return model


def _read_table(reader: Reader, hf_format: hf.HuggingFace) -> dict[str, Any]:
  """Returns the fields of our config.model that are read by the table of an
  architecture (HuggingFace.fields).

  An entry of the table is {our field: (their field, its default)}. If the
  values are words, it has a third item, {their word: our value}. A field with
  two names in the Hugging Face format is written 'a|b'; the first one in the
  file counts.

  Args:
    reader: the reader of the config.json, which records the fields that are
      read.
    hf_format: how the architecture is written in the Hugging Face format.
  """
  fields: dict[str, Any] = {}
  for our_name, (hf_names, default, *choices) in hf_format.fields.items():
    # A default may be a function of the fields that were read before.
    value = default
    if callable(default):
      value = default(fields)
    # Read the names from the last to the first, each with the value so far as
    # its default. So the first name in the file counts, and all of them are
    # recorded as read.
    for hf_name in reversed(hf_names.split('|')):
      if choices:
        value = reader.read_choice(hf_name, value, choices[0])
      else:
        value = reader(hf_name, value)
    fields[our_name] = value
  return fields


REGRESSION = 'regression'
CLASSIFICATION = 'single_label_classification'


def _read_head(reader: Reader, hf_format: hf.HuggingFace) -> dict[str, Any]:
  """Returns the fields of our config.model that say which head a model has. A
  config.json names the class of transformers, such as
  BertForSequenceClassification, from which this follows.

  Args:
    reader: the reader of the config.json, which records the fields that are
      read.
    hf_format: how the architecture is written in the Hugging Face format. It
      has the class of transformers for each head.

  Returns:
    {'head': name}, with 'lm' if the class has no head of a task; and
    'num_labels' for a head that scores labels.
  """
  class_names = reader.read_list('architectures')
  head = 'lm'
  for name, task_head in hf_format.heads.items():
    if task_head.architecture in class_names:
      head = name
      break
  if 'num_labels' not in heads.HEADS[head].fields:
    return dict(head=head)
  # A sequence has one class or one number. transformers also has sequences with
  # several classes, which are refused.
  if head == 'sequence':
    reader.read_choice('problem_type', CLASSIFICATION, {
        REGRESSION: REGRESSION, CLASSIFICATION: CLASSIFICATION})
  # Where a config.json names no labels, transformers takes two.
  num_labels = len(reader('id2label', {}))
  if not num_labels:
    num_labels = reader('num_labels', 2)
  return dict(head=head, num_labels=num_labels)


def read_labels(tree: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the names of the labels that the head of a model scores, from the
  field id2label of its config.json.

  Args:
    tree: the content of the config.json, as json.load returns it.

  Returns:
    The names in their order; () where they are not given, or only LABEL_0, ...

  Raises:
    RequestError: for an id2label that does not give each number one name.
  """
  table = tree.get('id2label')
  if table is None:
    return ()
  if not _is_numbered(table):
    raise RequestError(
        f'config.json has id2label {shorten(table)}: it must be an object with '
        'the keys 0, 1, ..., whose values are strings, none of them twice')
  # In JSON the numbers are texts, and may be in any order.
  names = [table[str(i)] for i in range(len(table))]
  return meaningful_labels(tuple(names))


def _is_numbered(table: Any) -> bool:
  """Whether a value of a JSON file is an object of distinct names by the keys
  '0', '1', ..."""
  if not isinstance(table, dict):
    return False
  numbers = {str(i) for i in range(len(table))}
  names = table.values()
  return (set(table) == numbers
          and all(isinstance(name, str) for name in names)
          and len(set(names)) == len(names))


def meaningful_labels(names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns labels, or () where they are LABEL_0, ..., which say nothing."""
  if names == default_labels(len(names)):
    return ()
  return names


def default_labels(count: int) -> tuple[str, ...]:
  """Returns the names that transformers gives to outputs without any."""
  return tuple(f'LABEL_{i}' for i in range(count))


def config_json_of_model(config: ModelConfig,
                         labels: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the content of the config.json of a model in the Hugging Face
  format. Reading it again gives the same model.

  Args:
    config: the config of the model.
    labels: the names of the labels that the head of a task scores; (): they are
      called LABEL_0, LABEL_1, and so on.

  Raises:
    RequestError: for a field of the model that a config.json cannot express.
  """
  hf_format = architectures.hugging_face(config.arch)
  _check_model(config)
  architecture = hf_format.architecture
  if config.head in hf_format.heads:
    architecture = hf_format.heads[config.head].architecture
  # Write the fields of the architecture's table, those that its function
  # `write` returns, and those of the head.
  tree = dict(model_type=hf_format.model_type, architectures=[architecture])
  tree |= _write_table(config, hf_format)
  tree |= hf_format.write(flat.with_all_parts(config))
  tree |= _write_head(config, labels)
  # Read the result again and compare the two models. This finds each field that
  # the config.json does not express.
  check_same_function(config, their_model=model_of_config_json(tree),
                      why=f'a {hf_format.model_type} config.json cannot say '
                          'that')
  return tree


def _write_table(config: ModelConfig, hf_format: hf.HuggingFace
                 ) -> dict[str, Any]:
  """Returns the fields of a model's config.json that are written by the table
  of its architecture (HuggingFace.fields). It is the inverse of `_read_table`.

  An entry of the table is {our field: (their field, its default)}. If the
  values are words, it has a third item, {their word: our value}. A field with
  two names in the Hugging Face format is written 'a|b'.

  Args:
    config: the config of the model.
    hf_format: how the architecture is written in the Hugging Face format.
  """
  tree = {}
  for our_name, (hf_names, _, *choices) in hf_format.fields.items():
    # Leave out a field such as moe.top_k if no layer of the model reads the
    # fields of this group.
    group = our_name.rpartition('.')[0]
    if group and config.find_part(flat.GROUPS[group]) is None:
      continue
    value = flat.get_field(config, our_name)
    if choices:
      value = hf.find_hf_word(choices[0], value=value, field=our_name)
    # Where a field has two names, write the last one.
    last_name = hf_names.split('|')[-1]
    tree[last_name] = value
  return tree


def _write_head(config: ModelConfig, labels: Sequence[str]) -> dict[str, Any]:
  """Returns the fields of a model's config.json that describe the head of a
  task: its dropout, the names of its labels, and whether it predicts classes or
  a number.

  Args:
    config: the config of the model, with its `head`.
    labels: the names of the labels, in their order; (): LABEL_0, LABEL_1, ...

  Raises:
    RequestError: for more or fewer labels than the model has.
  """
  if config.head == 'lm':
    return {}
  fields: dict[str, Any] = dict(classifier_dropout=config.head_dropout)
  # transformers wants the names by number, and the numbers by name.
  if config.num_labels:
    labels = labels or default_labels(config.num_labels)
    require(len(labels) == config.num_labels, f'{len(labels)} labels are of '
            f'another model than one of model.num_labels {config.num_labels}')
    fields['id2label'] = {str(i): name for i, name in enumerate(labels)}
    fields['label2id'] = {name: i for i, name in enumerate(labels)}
  if config.head == 'sequence':
    several = config.num_labels > 1
    fields['problem_type'] = CLASSIFICATION if several else REGRESSION
  return fields


def check_same_function(our_model: ModelConfig, their_model: ModelConfig,
                        why: str) -> None:
  """Checks that two models compute the same function of their parameters.

  Args:
    our_model: the config of one model.
    their_model: the config of the other.
    why: the end of the message, which says why they should be the same.

  Raises:
    RequestError: with each field in which they differ.
  """
  lines = [*describe_differences(our_model, their_model).values()]
  if _capacity_in_evaluation(our_model) != _capacity_in_evaluation(their_model):
    lines.append('model.moe.eval_capacity_factor and model.moe.group_size drop '
                 'other tokens (`tools.convert export --dropless` writes a '
                 'model that drops none)')
  require(not lines, f'{"; ".join(lines)}: {why}')


def _capacity_in_evaluation(config: ModelConfig) -> tuple | None:
  """Returns what decides which tokens the experts of a model drop in
  evaluation, when more tokens choose an expert than it has room for.

  Args:
    config: the config of a model, with experts or without.

  Returns:
    None: no token is dropped. Else two numbers: the size of a group of tokens,
    and how many tokens of a group an expert takes. Without groups they are 0
    and the share of a batch that an expert takes.
  """
  moe = config.find_part(MoEConfig)
  if moe is None or not config.has_experts:
    return None
  # No token is dropped if an expert has room for all tokens (a share of 1 or
  # more), or if there is no limit (a factor of 0).
  share = moe.eval_capacity_factor * moe.top_k / moe.num_experts
  if not 0 < share < 1:
    return None
  # Without groups, all tokens of a batch share the capacity.
  if not moe.group_size:
    return 0, round(share, 6)
  return moe.group_size, routing.expert_capacity(
      moe.eval_capacity_factor, tokens=moe.group_size, choices=moe.top_k,
      experts=moe.num_experts)


def describe_differences(our_model: ModelConfig, their_model: ModelConfig
                         ) -> dict[str, str]:
  """Describes each field in which two models differ and which changes what they
  compute.

  Args:
    our_model: the config of one model. A sentence has its value after `is`.
    their_model: the config of the other, whose value follows `not`.

  Returns:
    {dotted name of the field: a sentence}.
  """
  # Describe a field of the layers once, for the first layer in which it
  # differs. Give the number of the layer only if not all layers are alike.
  lines: dict[str, str] = {}
  has_kinds = bool(our_model.kinds or their_model.kinds)
  layers = _first_layer_of_each_pair_of_kinds(our_model, their_model)
  for n, (our_layer, their_layer) in layers.items():
    location = f' of layer {n}' if has_kinds else ''
    their_fields = fields_of_function(their_layer)
    for name, value in fields_of_function(our_layer).items():
      other = their_fields.get(name)
      if value != other and name not in lines:
        lines[name] = f'model.{name}{location} is {value!r}, not {other!r}'

  # These two fields matter outside of the layers, too.
  for name in ('position', 'block'):
    value = getattr(our_model, name)
    other = getattr(their_model, name)
    if value != other and name not in lines:
      lines[name] = f'model.{name} is {value!r}, not {other!r}'
  return lines


def _first_layer_of_each_pair_of_kinds(
    our_model: ModelConfig, their_model: ModelConfig
) -> dict[int, tuple[ModelConfig, ModelConfig]]:
  """Returns the layers that are enough to find all differences between two
  models: the first layer for each pair of a kind of layer in one model and the
  kind of the same layer in the other.

  A kind of layer is a named set of fields. Two layers with the same pair of
  kinds differ in the same fields.

  Args:
    our_model: the config of one model.
    their_model: the config of the other.

  Returns:
    {number of the layer: (its config in our model, its config in theirs)}.
  """
  num_layers = max(our_model.num_layers, our_model.num_decoder_layers)
  pairs = zip(_kind_of_each_layer(our_model, num_layers),
              _kind_of_each_layer(their_model, num_layers))
  seen: set[tuple[str, str]] = set()
  first_layers = {}
  for n, (our_kind, their_kind) in enumerate(pairs):
    if (our_kind, their_kind) not in seen:
      seen.add((our_kind, their_kind))
      first_layers[n] = (_config_of_kind(our_model, our_kind),
                         _config_of_kind(their_model, their_kind))
  return first_layers


def _kind_of_each_layer(config: ModelConfig, num_layers: int) -> list[str]:
  """Returns the name of the kind of each layer; '' where there are no kinds."""
  if not config.kinds:
    return [''] * num_layers
  return [kind.name for kind in config.layer_kinds(num_layers)]


def _config_of_kind(config: ModelConfig, name: str) -> ModelConfig:
  """Returns the config of the layers of one kind; `config` itself where `name`
  is '', as all layers are alike."""
  if not name:
    return config
  return config.layer_config(name)


def fields_of_function(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that decide what a layer computes. Fields of how it is
  trained or run, such as its dropout or its kernel, are left out.

  Args:
    config: the config of a layer, or of a model whose layers are all alike.

  Returns:
    {dotted name: value}.
  """
  # Leave out fields that the layer does not read, and those that only say which
  # layer its values come from.
  unused = {*flat.fields_that_are_unread(config),
            *blocks.mixer_of_layers(config).sources}
  fields = {}
  for name, value in run_config.flatten(flat.to_dict(config)).items():
    if name in unused:
      continue
    field = flat.FIELDS.get(name)
    # Each field is declared to be about how one run computes (RUN), how a model
    # is trained (RECIPE), or the model itself.
    about = field.rule.about if field is not None else ''
    if about not in (declared.RUN, declared.RECIPE):
      fields[name] = value
  return fields


def load_config_json(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the content of the config.json in a Hugging Face folder."""
  hub.check_exists(folder)
  path = folder / 'config.json'
  require(not storage.has_config(folder), f'{folder} is the folder of a run, '
          'which --workdir takes, and none in the Hugging Face format, which '
          'python -m tools.convert export makes of it')
  require(path.is_file(), f'{path} is missing: it says what the weights are')
  return hf_files.read_json_object(path)
