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
from typing import Any

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
    """Returns the field `name`, or transformers' default for it.

    Args:
      name: the name of the field in config.json.
      default: the value that transformers takes where the field is missing,
        whose type the field must have.

    Raises:
      RequestError: if the field is of another type than the default, or a
        number below 1 where the default is none.
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
    """Raises RequestError for a field that has another value than the one that
    `only` has for it, which is transformers' default."""
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
    """Returns the value in `choices` by the word that the field `name` holds.

    Args:
      name: the name of the field.
      default: transformers' default, a word too.
      choices: our value, by each word that is known here.

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
    """Refuses the fields that nobody has read and that may change the model;
    returns the names of those that nobody has read and that change nothing.

    Args:
      known_names: the names that transformers declares or reads; None: that is
        not recorded, and any may matter.

    Raises:
      RequestError: for a known field that was not read and may matter.
    """
    unread = []
    refused = []
    for name, value in self._tree.items():
      # A field that was read, or that never changes what a model computes.
      has_no_effect = FIELDS_WITHOUT_EFFECT.fullmatch(name)
      if name in self.names_read or has_no_effect or value is None:
        continue
      if known_names is None or name in known_names:
        refused.append(f'{self._full(name)} {shorten(value)}')
      else:
        unread.append(self._full(name))
    # The objects in it, such as text_config, have fields of their own.
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
  """Returns the value of a field, as a float where its default is one.

  Args:
    subject: the field in words, with which a message begins.
    value: the value of the field.
    default: transformers' default, whose type the value must have; where it is
      a size above 0, so must be the value.

  Raises:
    RequestError: for a value of another type, or 0 for a size.
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


def model_of_config_json(tree: dict[str, Any],
                         files: Collection[str] | None = None) -> ModelConfig:
  """Returns the config of the model that a config.json describes; its arguments
  and errors are those of `read_fields_and_notes`."""
  model, _ = read_fields_and_notes(tree, files)
  return architectures.resolve(model)


def read_fields_and_notes(tree: dict[str, Any],
                          files: Collection[str] | None = None
                          ) -> tuple[ml_collections.ConfigDict, list[str]]:
  """Reads a config.json of Hugging Face.

  Args:
    tree: the content of the config.json, as json.load returns it.
    files: the names of the tensors beside it, which tell some things that it
      does not; None: they are not known.

  Returns:
    The fields of config.model, and a sentence for each thing that the file says
    and an import does not do.

  Raises:
    RequestError: naming what it has that is not known here.
  """
  # The reader notes each name that is read, to find those that nobody reads.
  reader = Reader(tree)
  _refuse_quantised(reader)
  model = read_model_fields(reader)
  page = architectures.hugging_face(model.arch)
  # Old files have this field in a decoder, whose module (`page`, of the
  # system's Hugging Face format) does not ask for it.
  if 'is_encoder_decoder' not in reader.names_read:
    reader.require_values(is_encoder_decoder=False)

  # The fields that nobody read.
  unread = reader.refuse_unread_fields(known_fields(page.model_type))
  if unread:
    reader.notes.append(
        f'config.json has {", ".join(unread)}, {NOTE_OF_UNREAD_FIELDS} in a '
        f'{reader.model_type}: what the model computes does not depend on it')

  # The names of the tensors tell the rest.
  if files is not None:
    model.update(page.read_tensor_names(files))
  _check_model(architectures.resolve(model))
  return model, reader.notes


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


# The class that asks transformers to unpack weights as it loads them, by
# quant_method.
UNPACKING_CLASS_OF_METHOD = {'fp8': 'FineGrainedFP8Config',
                             'mxfp4': 'Mxfp4Config'}


def _refuse_quantised(reader: Reader) -> None:
  """Raises RequestError for a config.json whose weights a quantisation has
  packed, saying how to unpack them.

  Args:
    reader: the reader of the config.json.
  """
  for name in ('quantization_config', 'compression_config'):
    quantisation = reader(name, {})
    if not quantisation:
      continue
    method = quantisation.get('quant_method', 'of no name')
    unpacking_class = UNPACKING_CLASS_OF_METHOD.get(str(method))

    # Some formats can be unpacked by transformers.
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
  """Returns the fields of config.model by a config.json, as the page (the
  module of the system) of its model_type reads it.

  Args:
    reader: the reader of the config.json, which notes the fields that are read.
  """
  arch = reader.read_choice('model_type', '',
                            architectures.arch_of_model_type())
  page = architectures.hugging_face(arch)
  fields = _read_table(reader, page)
  reader.require_values(**page.only)
  reader.ignore_fields(*page.fields_without_effect)
  fields |= _read_head(reader, page)

  # The defaults, what the system always has, what the table has read, and what
  # the page reads in its own way; a later one goes before an earlier one.
  model = ml_collections.ConfigDict(flat.default_tree())
  model.update(architectures.system(arch).PARTS, arch=arch)
  model.update_from_flattened_dict(fields)
  fields_of_page = page.read(reader, fields)
  if 'kinds' in fields_of_page:
    model.kinds = {}
  model.update(fields_of_page)

  # A page need not read the fields of biases: they must say what it has.
  for hf_name, our_name in hf.BIAS_FIELDS.items():
    if hf_name not in reader.names_read:
      reader.require_values(**{hf_name: model[our_name]})
  return model


def _read_table(reader: Reader, page: hf.HuggingFace) -> dict[str, Any]:
  """Returns the fields of config.model that a page reads by its table
  (HuggingFace.fields).

  An entry of the table is {our field: (their field, its default)}. A third item
  is there for fields whose values are words: {their word: our value}. 'a|b' are
  two names for a field.

  Args:
    reader: the config.json, whose names that are read it notes.
    page: the module of a system that says how Hugging Face names its parts.
  """
  fields: dict[str, Any] = {}
  for our_name, (hf_names, default, *choices) in page.fields.items():
    # A default may follow from the fields that were read before.
    value = default
    if callable(default):
      value = default(fields)
    # The first of several names that is there counts: names are read from the
    # last to the first, each with what was read before as its default.
    for hf_name in reversed(hf_names.split('|')):
      if choices:
        value = reader.read_choice(hf_name, value, choices[0])
      else:
        value = reader(hf_name, value)
    fields[our_name] = value
  return fields


REGRESSION = 'regression'
CLASSIFICATION = 'single_label_classification'


def _read_head(reader: Reader, page: hf.HuggingFace) -> dict[str, Any]:
  """Returns the fields of config.model that say which head a model has, by the
  class of transformers that its config.json names.

  Args:
    reader: the reader of the config.json, which notes the fields that are read.
    page: the module of its system, with the class of transformers by each head.

  Returns:
    `head`, 'lm' where no head of a task is named; and `num_labels` for a head
    that scores labels.
  """
  class_names = reader.read_list('architectures')
  head = 'lm'
  for name, task_head in page.heads.items():
    if task_head.architecture in class_names:
      head = name
      break
  if 'num_labels' not in heads.HEADS[head].fields:
    return dict(head=head)
  # A sequence has one label, or a number; other problems are refused.
  if head == 'sequence':
    reader.read_choice('problem_type', CLASSIFICATION, {
        REGRESSION: REGRESSION, CLASSIFICATION: CLASSIFICATION})
  # transformers has two labels where a config.json names none.
  num_labels = len(reader('id2label', {}))
  if not num_labels:
    num_labels = reader('num_labels', 2)
  return dict(head=head, num_labels=num_labels)


def read_labels(tree: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the names of the labels that the head of a model scores, in their
  order, by id2label of a config.json; none where it does not say.

  Args:
    tree: the content of a config.json, as json.load returns it.

  Raises:
    RequestError: for a table that is none of names by number.
  """
  table = tree.get('id2label')
  if table is None:
    return ()
  if not _is_numbered(table):
    raise RequestError(
        f'config.json has id2label {shorten(table)}: it must be an object with '
        'the keys 0, 1, ..., whose values are strings, none of them twice')
  # JSON has the numbers as texts, in any order.
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
  """Returns the config.json of a model, from which the same config is read.

  Args:
    config: the config of the model.
    labels: what the outputs of the head of a task stand for; none: LABEL_0, ...

  Raises:
    RequestError: naming a field that a config.json cannot say.
  """
  page = architectures.hugging_face(config.arch)
  _check_model(config)
  architecture = page.architecture
  if config.head in page.heads:
    architecture = page.heads[config.head].architecture
  # The fields that the page's table has, then those that it writes itself.
  tree = dict(model_type=page.model_type, architectures=[architecture])
  tree |= _write_table(config, page)
  tree |= page.write(flat.with_all_parts(config))
  tree |= _write_head(config, labels)
  # A field for which a config.json has no words is found by reading the result
  # again, and comparing the two models.
  check_same_function(config, their_model=model_of_config_json(tree),
                      why=f'a {page.model_type} config.json cannot say that')
  return tree


def _write_table(config: ModelConfig, page: hf.HuggingFace) -> dict[str, Any]:
  """Returns the fields of the config.json of a model that its page writes by
  its table (HuggingFace.fields): the inverse of `_read_table`.

  Args:
    config: the config of the model.
    page: the module of its system that says how Hugging Face names its parts.
  """
  tree = {}
  for our_name, (hf_names, _, *choices) in page.fields.items():
    group = our_name.rpartition('.')[0]
    if group and config.find_part(flat.GROUPS[group]) is None:
      continue  # No layer reads it, so the default of its readers does.
    value = flat.get_field(config, our_name)
    if choices:
      value = hf.find_hf_word(choices[0], value=value, field=our_name)
    # The last of several names for a field is written.
    last_name = hf_names.split('|')[-1]
    tree[last_name] = value
  return tree


def _write_head(config: ModelConfig, labels: Sequence[str]) -> dict[str, Any]:
  """Returns the fields of the config.json of a model for the head of a task:
  its dropout, its labels, and whether they are classes or a number.

  Args:
    config: the config of the model, with its `head`.
    labels: the names of the labels, in their order; none: LABEL_0, LABEL_1, ...
  """
  if config.head == 'lm':
    return {}
  fields: dict[str, Any] = dict(classifier_dropout=config.head_dropout)
  # The names of the labels, both ways.
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
  """Raises RequestError where two models compute different functions.

  Args:
    our_model: the config of one model.
    their_model: the config of the other.
    why: the end of the message, which says why they should be the same.
  """
  lines = [*describe_differences(our_model, their_model).values()]
  if _capacity_in_evaluation(our_model) != _capacity_in_evaluation(their_model):
    lines.append('model.moe.eval_capacity_factor and model.moe.group_size drop '
                 'other tokens (`tools.convert export --dropless` writes a '
                 'model that drops none)')
  require(not lines, f'{"; ".join(lines)}: {why}')


def _capacity_in_evaluation(config: ModelConfig) -> tuple | None:
  """Returns the two numbers that decide which tokens an expert drops in
  evaluation: the size of a group, and how many tokens of a group an expert
  takes. Without groups, they are 0 and the share of a batch that it takes.
  None: no token is dropped.

  Args:
    config: the config of a model, with experts or without.
  """
  moe = config.find_part(MoEConfig)
  if moe is None or not config.has_experts:
    return None
  # An expert with room for all tokens drops none; a factor of 0 is no limit.
  share = moe.eval_capacity_factor * moe.top_k / moe.num_experts
  if not 0 < share < 1:
    return None
  # Without groups, the capacity is that of a whole batch.
  if not moe.group_size:
    return 0, round(share, 6)
  return moe.group_size, routing.expert_capacity(
      moe.eval_capacity_factor, tokens=moe.group_size, choices=moe.top_k,
      experts=moe.num_experts)


def describe_differences(our_model: ModelConfig, their_model: ModelConfig
                         ) -> dict[str, str]:
  """Returns a sentence for each field in which two models compute different
  functions, by the field's dotted name.

  Args:
    our_model: the config of one model; the sentence says of it that it `is` a
      value.
    their_model: the config of the other, of which it says `not`.
  """
  # A field of layers is named once, with the first layer in which it differs.
  # The number of the layer is told only where layers may be of several kinds.
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

  # Two fields are read outside of the layers too.
  for name in ('position', 'block'):
    value = getattr(our_model, name)
    other = getattr(their_model, name)
    if value != other and name not in lines:
      lines[name] = f'model.{name} is {value!r}, not {other!r}'
  return lines


def _first_layer_of_each_pair_of_kinds(
    our_model: ModelConfig, their_model: ModelConfig
) -> dict[int, tuple[ModelConfig, ModelConfig]]:
  """Returns the configs of the first layer, in both models, at which a pair of
  kinds of layer meets, by the number of this layer.

  Two layers of the same pair of kinds differ in the same fields, so that these
  layers tell all differences.

  Args:
    our_model: the config of one model.
    their_model: the config of the other.

  Returns:
    {the number of the layer: (its config in our model, its config in theirs)}.
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
  """Returns the fields, by dotted name, that decide what a model computes whose
  layers are all alike: all but those of how it is trained or run.

  Args:
    config: the config of a layer, or of a model without kinds of layer.
  """
  # A field that nothing reads, or that says where the values come from, does
  # not change the function.
  unused = {*flat.fields_that_are_unread(config),
            *blocks.mixer_of_layers(config).sources}
  fields = {}
  for name, value in run_config.flatten(flat.to_dict(config)).items():
    if name in unused:
      continue
    field = flat.FIELDS.get(name)
    # The rule of a field says what it is about: how one run computes (RUN) and
    # how a system is trained (RECIPE) do not count.
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
