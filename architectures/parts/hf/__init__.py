"""How a page (the module of a system) says what its system is in the Hugging
Face format.

A page ends with `class HF(hf.HuggingFace)`, which gives values to the fields of
HuggingFace and replaces the methods that differ. training/hf/ reads an instance
of that class and nothing else of a page. A system that transformers does not
have has no `HF`. tests/architectures/pages_test.py checks each of them.
parts/hf/tensor_map.py finds the tensors of a model by its rows, and
parts/hf/rope_fields.py has what a config.json says of rotary positions, and
parts/hf/layer_types.py what it says of the type of each layer.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Any

from architectures.parts.config import ModelConfig
from common.errors import RequestError, require

# A row of a page: the path of a parameter of ours and its axes, the name of the
# tensor in a Hugging Face file and its axes (tensor_map.py has their language).
Row = tuple[str, str, str, str]
# The reader of a config.json, which is in a room above (training/hf/config.py).
Reader = Any
MASKED_WORD_HEAD = 'head of masked words'  # a name in `HuggingFace.optional`


@dataclasses.dataclass(frozen=True)
class TaskHead:
  """How a model with a head for a task, such as the classification of a
  sequence, stands in a Hugging Face folder.

  Attributes:
    architecture: the name of transformers' class, under `architectures` in a
      config.json.
    name: the name of the module that holds the head.
    prefix: (what the other names begin with, what they begin with in a model
      with this head).
  """
  architecture: str
  name: str
  prefix: tuple[str, str] = ('', '')

  def rows(self, names: Iterable[Row]) -> tuple[Row, ...]:
    """Returns table rows that name the Hugging Face tensor of each parameter of
    a model with the head of this task.

    Args:
      names: the rows of the same model with the head of a language model. Its
        tensors may have another prefix.

    Returns:
      Rows of four strings: the path and the axes of our parameter, and the name
      and the axes of its tensor. Letters name axes, such as D d_model, H heads
      and K features of a head; {n} in a name is the number of the layer. 'DHK'
      and 'HK D' say that the tensor has two axes, of which the first is our H
      and K joined.
    """
    usual_prefix, prefix_with_head = self.prefix
    rows = []
    for our_path, our_axes, hf_name, hf_axes in names:
      if hf_name.startswith(usual_prefix):
        hf_name = prefix_with_head + hf_name.removeprefix(usual_prefix)
      rows.append((our_path, our_axes, hf_name, hf_axes))
    rows.append(('task/kernel', 'DU', f'{self.name}.weight', 'U D'))
    rows.append(('task/bias', 'U', f'{self.name}.bias', 'U'))
    return tuple(rows)


class HuggingFace:
  """How a system's config and weights stand in a Hugging Face folder.

  A row of `names` is (our path, our axes, their name, their axes):

    ('decoder/layers/attention/query', 'DHK',
     'model.layers.{n}.self_attn.q_proj.weight', 'HK D')

  Axes are letters of the legend in README.md, or U where the legend has none.
  Only their order and their grouping count; parts/hf/tensor_map.py tells the
  language in which they are written, with examples. In the name of a tensor,
  {n} is the number of the layer, counted through the blocks of the period; {m}
  is the same number where their files count a layer's feed-forward network as
  the next layer; {e} is the number of an expert, axis E of ours; {h} is L in
  the lower half of the layers, and H in the upper half, where {n} begins with 0
  again (loop 'turns', whose pattern is one layer). In our path,
  'query|key|value' are several parameters in one tensor of theirs, and
  decoder/layers/block_2 stands for one block of the period alone
  (`rows_of_layer`). A row is passed over where the model has no such
  parameter with as many axes, so that a dense and an expert ffn/up may both
  have one.

  The import starts from the system's PARTS, takes the table `fields`, then what
  `read` returns. The export writes the table `fields`, then what `write`
  returns.

  Attributes:
    model_type: the name of the system in a config.json, which tells whose
      weights a folder holds.
    architecture: the name of transformers' class, under `architectures` in a
      config.json.
    names: the rows of every model of the system; see `rows_of_model`.
    layer_prefix: what the names of a layer's tensors begin with, with the
      number of the layer as {n}; see `rows_of_layer`.
    fields: {field of config.model: (field of config.json, default)}, or with
      {their word: ours} as a third item. Of 'a|b' the import takes the first
      that is there, and the export writes the last. A default is what
      transformers takes where the field is missing; it may be a function of
      the fields that were read before it.
    only: {field of config.json: the one value that is known here}. The export
      does not write it, so it must be the default of transformers, unless
      `write` has the field too.
    more_model_types: further model_types, of published folders whose model is
      this one.
    fields_without_effect: fields of config.json that transformers declares or
      reads, and that do not change what is computed. A field that transformers
      does not know needs no name.
    tied: {tensor: the tensor whose values it must have}.
    spellings: (part of a name, what some files have in its place).
    module: (what the names begin with, what the names of transformers' modules
      and so of PEFT's adapters begin with), where the two differ.
    ignored: patterns of the names of tensors that hold no weights.
    integers: a pattern of the names of tensors of whole numbers, which are
      written as such.
    fixed_token_ids: token ids that an export writes as `write` has them,
      whatever the tokenizer of the run says.
    heads: the heads that transformers has for tasks, by model.head.
    optional: {its name in words: a pattern of the names of its tensors} of
      each part that only a pre-training needs. A folder may lack such a part as
      a whole, and a part that is there without a place in the model is passed
      over. The user is told of both.
  """
  model_type: str
  architecture: str
  names: Sequence[Row] = ()
  layer_prefix: str = 'model.layers.{n}'
  fields: Mapping[str, tuple] = {}
  only: Mapping[str, Any] = {}
  more_model_types: Sequence[str] = ()
  fields_without_effect: Sequence[str] = ()
  tied: Mapping[str, str] = {}
  spellings: Sequence[tuple[str, str]] = ()
  module: tuple[str, str] = ('', '')
  ignored: Sequence[str] = ()
  integers: str = ''
  fixed_token_ids: Sequence[str] = ()
  heads: Mapping[str, TaskHead] = {}
  optional: Mapping[str, str] = {}

  def read(self, reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the model that a config.json of Hugging Face says
    in another way than the table `fields` can tell.

    Args:
      reader: the reader of the config.json.
      fields: the fields of the model that were read by the table.
    """
    return {}

  def write(self, config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of the config.json of a model that the table `fields`
    does not have."""
    return {}

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model of this system that transformers does not
    run; such a model is neither read nor written."""

  def rows_of_model(self, config: ModelConfig) -> Sequence[Row]:
    """Returns the rows that name the tensor of each parameter of a model,
    without those of a task's head: `names`, and `rows_of_layer` for each block
    of the period of layers that is scanned. A system replaces this method where
    other rows depend on the config."""
    rows = list(self.names)
    # Our parameters of layer i of each period are stacked in the folder
    # block_i.
    for section in config.sections(config.num_layers):
      for i, kind in enumerate(section.kinds):
        folder = f'decoder/{section.name}/block_{i}'
        rows += prefix_rows(folder, self.layer_prefix,
                            *self.rows_of_layer(config.layer_config(kind.name)))
    return tuple(rows)

  def rows_of_layer(self, layer: ModelConfig) -> Sequence[Row]:
    """Returns the rows that name the tensors of one layer of a decoder.

    A system replaces this method where its kinds of layer have different
    tensors for parameters of one name. Where the kinds differ only in which
    parameters they have, the rows of all layers stand in `names`.

    Args:
      layer: the config of the layer's kind.

    Returns:
      Rows of four strings: the path and the axes of our parameter, and the name
      and the axes of its tensor. Paths and names are without their beginnings,
      which say the layer: `rows_of_model` adds these.
    """
    return ()

  def constants(self, config: ModelConfig) -> dict[str, Any]:
    """Returns the tensors of a folder, by name, whose values follow from the
    config of the model and are no parameters."""
    return {}

  def ignored_in(self, config: ModelConfig) -> Sequence[str]:
    """Returns the patterns of the names of tensors in the files of a model that
    hold no weights: `ignored`, and more where that depends on the config."""
    return self.ignored

  def read_tensor_names(self, names: Collection[str]) -> dict[str, Any]:
    """Returns the fields of the model that are told by the names of the tensors
    in a folder, and not by its config.json."""
    return {}

  def rows(self, config: ModelConfig) -> Sequence[Row]:
    """Returns the rows that name the tensor of each parameter of a model, with
    those of its head."""
    rows = self.rows_of_model(config)
    if config.head in self.heads:
      return self.heads[config.head].rows(rows)
    return rows

  def spellings_with_head(self, config: ModelConfig
                          ) -> Sequence[tuple[str, str]]:
    """Returns the table `spellings` for a model, whose head for a task may have
    a prefix of its own: files then have that prefix or the usual one."""
    if config.head not in self.heads:
      return tuple(self.spellings)
    usual_prefix, prefix_with_head = self.heads[config.head].prefix
    if not prefix_with_head:
      return tuple(self.spellings)
    return ((prefix_with_head, usual_prefix), *self.spellings)


def task_heads(system: str, sequence: str = 'score', tokens: str = 'classifier',
               span: tuple[str, str] = ('', ''),
               only: Collection[str] = ('sequence', 'tokens', 'span')
               ) -> dict[str, TaskHead]:
  """Describes the task heads that the library transformers has for one
  architecture. A task head is what a classifier has in place of the head that
  predicts tokens: it scores a sequence, each token, or the span of an answer.

  The class of a model with a task head is named by the architecture and the
  task, such as LlamaForTokenClassification. The names of its tensors begin with
  the name of the module of the head, such as score.weight.

  Args:
    system: the name of the architecture in the names of these classes, such as
      'Llama'.
    sequence: the name of the module that scores a sequence.
    tokens: the name of the module that scores each token.
    span: two prefixes of tensors' names, for an architecture whose model that
      finds the span of an answer has another prefix than its other models: the
      usual one, such as 'model.', and the one in that model.
    only: the tasks for which the architecture has a class.

  Returns:
    The TaskHead of each task in `only`, by the value of model.head: 'sequence',
    'tokens' or 'span'.
  """
  all_heads = {
      'sequence': TaskHead(
          architecture=f'{system}ForSequenceClassification', name=sequence),
      'tokens': TaskHead(
          architecture=f'{system}ForTokenClassification', name=tokens),
      'span': TaskHead(
          architecture=f'{system}ForQuestionAnswering', name='qa_outputs',
          prefix=span),
  }
  return {task: head for task, head in all_heads.items() if task in only}


# The field of config.model that a field of config.json mostly is.
_OUR_NAME_OF_HF_FIELD = {
    'hidden_size': 'd_model', 'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads', 'num_key_value_heads': 'num_kv_heads',
    'intermediate_size': 'd_ff', 'max_position_embeddings': 'max_len',
    'rms_norm_eps': 'norm_eps', 'layer_norm_eps': 'norm_eps',
    'layer_norm_epsilon': 'norm_eps', 'mlp_bias': 'ffn_bias',
    'tie_word_embeddings': 'tie_embeddings', 'num_experts': 'moe.num_experts',
    'num_local_experts': 'moe.num_experts', 'moe_intermediate_size': 'moe.d_ff',
    'n_routed_experts': 'moe.num_experts',
    'n_shared_experts': 'moe.shared_experts', 'n_group': 'moe.expert_groups',
    'num_experts_per_tok': 'moe.top_k', 'norm_topk_prob': 'moe.normalize_gates',
    'router_aux_loss_coef': 'moe.balance_weight',
    'router_jitter_noise': 'moe.jitter',
    'routed_scaling_factor': 'moe.gate_scale', 'topk_group': 'moe.top_groups',
    'kv_lora_rank': 'latent.kv_rank', 'qk_nope_head_dim': 'latent.nope_dim',
    'qk_rope_head_dim': 'latent.rope_dim', 'v_head_dim': 'latent.v_dim',
    'index_topk': 'indexer.top_k', 'index_n_heads': 'indexer.heads',
    'index_head_dim': 'indexer.head_dim',
    'linear_num_key_heads': 'deltanet.key_heads',
    'linear_num_value_heads': 'deltanet.value_heads',
    'linear_key_head_dim': 'deltanet.key_dim',
    'linear_value_head_dim': 'deltanet.value_dim',
    'linear_conv_kernel_dim': 'deltanet.conv'}

# Any config.json may say whether the model has such biases, and where a page
# does not ask for the field, it must say what the model has anyway.
BIAS_FIELDS = {'attention_bias': 'attention_bias', 'mlp_bias': 'ffn_bias'}


def fields_with_defaults(**defaults: Any) -> dict[str, tuple]:
  """Makes a table that maps fields of our config.model to the fields of a
  Hugging Face config.json of the same meaning.

  Args:
    **defaults: the fields of config.json, each with the value that transformers
      takes if it is missing. Our name of a field is looked up in a table of
      usual names; if it is not there, both names are the same.

  Returns:
    {our name: (name in config.json, default)}.
  """
  entries = {}
  for hf_name, default in defaults.items():
    our_name = _OUR_NAME_OF_HF_FIELD.get(hf_name, hf_name)
    entries[our_name] = (hf_name, default)
  return entries


def drop_entries(table: Mapping[str, Any], *names: str) -> dict[str, Any]:
  """Returns a table without the entries of these names."""
  return {name: entry for name, entry in table.items() if name not in names}


# Defaults that follow from fields which were read before.


def default_num_kv_heads(fields: Mapping[str, Any]) -> int:
  """Returns num_key_value_heads where each head has keys of its own."""
  return fields['num_heads']


def default_head_dim(fields: Mapping[str, Any]) -> int:
  """Returns head_dim where the heads divide the width among them."""
  return fields['d_model'] // fields['num_heads']


def prefix_rows(our_folder: str, hf_module: str, *rows: Row) -> tuple[Row, ...]:
  """Puts the name of a part of a model, such as its attention, before the names
  of the part's parameters, ours and those of Hugging Face.

  Args:
    our_folder: what is put before our paths, with a '/'.
    hf_module: what is put before the names of the tensors, with a '.'.
    *rows: rows of four strings: the path and the axes of our parameter, and the
      name and the axes of its tensor. Path and name begin within the part.

  Returns:
    The rows with longer paths and names.
  """
  prefixed = []
  for our_path, our_axes, hf_name, hf_axes in rows:
    prefixed.append((f'{our_folder}/{our_path}', our_axes,
                     f'{hf_module}.{hf_name}', hf_axes))
  return tuple(prefixed)


def norm_rows(ours: str, theirs: str) -> tuple[Row, Row]:
  """Returns the rows that give the Hugging Face names of a LayerNorm's scale
  and bias.

  Args:
    ours: the folder of our parameters.
    theirs: the name of the norm in transformers.
  """
  return ((f'{ours}/scale', 'D', f'{theirs}.weight', 'D'),
          (f'{ours}/bias', 'D', f'{theirs}.bias', 'D'))


def dense_rows(ours: str, our_axes: str, theirs: str, hf_axes: str
               ) -> tuple[Row, Row]:
  """Returns table rows that name the Hugging Face tensors of a matrix and of
  its bias.

  Args:
    ours: the path of our matrix; the bias is beside it, with _bias at its end.
      'gate|up' are two matrices in one tensor of theirs.
    our_axes: its axes, inputs first, such as 'DHK'.
    theirs: the name of the module in transformers.
    hf_axes: the axes of its weight, such as 'HK D'.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  # The bias has the axes of the output, which are the last ones of ours. Find
  # the dimension of the tensor that has these letters. A digit in it says how
  # many of our matrices it joins, and is no axis of ours.
  output_dimensions = []
  for dimension in hf_axes.split():
    letters = re.sub(r'\d', '', dimension)
    if our_axes.endswith(letters):
      output_dimensions.append((dimension, letters))
  hf_bias_axes, our_bias_axes = output_dimensions[0]
  # A Hugging Face file has a tensor for each expert; ours have an axis E.
  if '{e}' in theirs:
    our_bias_axes = 'E' + our_bias_axes
  bias_names = [f'{name}_bias' for name in ours.split('|')]
  return ((ours, our_axes, f'{theirs}.weight', hf_axes),
          ('|'.join(bias_names), our_bias_axes, f'{theirs}.bias',
           hf_bias_axes))


def attention_rows(query: str, key: str, value: str, out: str,
                   kv_heads: str = 'H') -> tuple[Row, ...]:
  """Returns table rows that name the Hugging Face tensors of the matrices and
  the biases of attention.

  Args:
    query: the name of the matrix for queries in transformers.
    key: the name of the matrix for keys.
    value: the name of the matrix for values.
    out: the name of the matrix behind the heads.
    kv_heads: the axis of the heads of keys and values: J where they may be
      fewer than those of queries, else H.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  kv = f'{kv_heads}K'
  return (*dense_rows('query', 'DHK', query, 'HK D'),
          *dense_rows('key', f'D{kv}', key, f'{kv} D'),
          *dense_rows('value', f'D{kv}', value, f'{kv} D'),
          *dense_rows('out', 'HKD', out, 'D HK'))


# Our model.ffn by hidden_act of a config.json, for a network without a gate and
# for one with a gate. Where two names mean one function, export takes the
# first. gelu_fast and gelu_new are the same tanh approximation.
FFN_OF_ACTIVATION = {
    'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu', 'silu': 'silu',
    'swish': 'silu', 'relu2': 'relu2'}
GATED_FFN_OF_ACTIVATION = {
    'silu': 'swiglu', 'gelu': 'geglu', 'gelu_new': 'geglu_tanh',
    'gelu_pytorch_tanh': 'geglu_tanh', 'relu': 'reglu'}
# The entry for model.ffn in the table `fields` of most systems.
GATED_FFN_FIELD = 'hidden_act', 'silu', GATED_FFN_OF_ACTIVATION


def check_heads_divide_width(config: ModelConfig) -> None:
  """Raises RequestError for heads that do not divide the width, of which some
  classes of transformers make no model whatever the size of a head is."""
  require(config.d_model % config.num_heads == 0,
          f'model.num_heads is {config.num_heads}, '
          f'which does not divide model.d_model {config.d_model}: transformers '
          f'refuses such a {config.arch}')


def check_gates(fields: Mapping[str, Any],
                top_k_name: str = 'num_experts_per_tok',
                normalize_name: str = 'norm_topk_prob') -> None:
  """Refuses a Hugging Face config.json in which each token goes to one expert
  and gates are made to sum to 1.

  In transformers the gate of each token is then always 1. Our model would
  compute something else: its gate is the router's score, so that the router
  learns.

  Args:
    fields: the fields of the model that were read so far. A system that has no
      field moe.normalize_gates always normalises the gates.
    top_k_name: the field of the file that says how many experts a token has.
    normalize_name: the field that says whether gates are made to sum to 1.

  Raises:
    RequestError: in this case.
  """
  if fields['moe.top_k'] > 1:
    return
  condition = f'{top_k_name} 1'
  if 'moe.normalize_gates' in fields:
    if not fields['moe.normalize_gates']:
      return
    condition += f' and {normalize_name} true'
  raise RequestError(
      f'config.json has {condition}: transformers then gives every expert the '
      "gate 1, where the gate here is the router's score, so that the router "
      'learns')


def read_shared_experts(reader: Reader, name: str, default: int, width: int
                        ) -> int:
  """Reads the width of the dense network beside the experts, as a multiple of
  the width of one expert (our field moe.shared_experts).

  Args:
    reader: the fields of a Hugging Face config.json: `reader(name, default)`
      returns one.
    name: the field that has the number of hidden units of this network.
    default: transformers' default of the field.
    width: the number of hidden units of an expert.

  Raises:
    RequestError: if the width is no multiple of an expert's.
  """
  shared_width = reader(name, default)
  require(shared_width % width == 0,
          f'config.json has {name} {shared_width}, which is no multiple of the '
          f'{width} hidden units of an expert: model.moe.shared_experts says '
          'how many times as wide as an expert the shared one is')
  return shared_width // width


def find_hf_word(our_value_of_word: Mapping[str, str], value: str, field: str
                 ) -> str:
  """Looks up the word by which a Hugging Face config.json calls a value of one
  of our fields.

  Args:
    our_value_of_word: {word of theirs: our value}. If several words have the
      same meaning, the first one is returned.
    value: the value of our field.
    field: the name of our field in config.model, for the message.

  Raises:
    RequestError: if there is no word for the value.
  """
  for word, our_value in our_value_of_word.items():
    if our_value == value:
      return word
  choices = ', '.join(dict.fromkeys(our_value_of_word.values()))
  raise RequestError(f'model.{field} is {value!r}, which has no counterpart in '
                     f'this config.json: choose from {choices}')
