"""How a page says what its system is in the Hugging Face format.

A page ends with `class HF(hf.HuggingFace)`, which gives values to the fields of
HuggingFace and replaces the methods that differ. training/hf/ reads an instance
of that class and nothing else of a page. A system that transformers does not
have has no `HF`. tests/architectures/pages_test.py checks each of them.
parts/hf/tensor_map.py finds the tensors of a model by its rows, and
parts/hf/rope_fields.py has what a config.json says of rotary positions.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Any

from architectures.parts.config import ModelConfig
from common.errors import RequestError, require

# The path of a parameter, its axes, the name of the tensor in a file, its axes.
Row = tuple[str, str, str, str]
# The reader of a config.json, which is in a room above (training/hf/config.py).
Reader = Any
MASKED_WORD_HEAD = 'head of masked words'  # a name in `HuggingFace.optional`


@dataclasses.dataclass(frozen=True)
class TaskHead:
  """How a model with the head of a task stands in a Hugging Face folder.

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
    """Returns the rows `names` under the prefix of a model with this head, and
    the rows of the head."""
    usual, here = self.prefix
    rows = []
    for ours, axes, theirs, their_axes in names:
      if theirs.startswith(usual):
        theirs = here + theirs.removeprefix(usual)
      rows.append((ours, axes, theirs, their_axes))
    rows.append(('task/kernel', 'DU', f'{self.name}.weight', 'U D'))
    rows.append(('task/bias', 'U', f'{self.name}.bias', 'U'))
    return tuple(rows)


class HuggingFace:
  """How a system's config and weights stand in a Hugging Face folder.

  A row of `names` is (our path, our axes, their name, their axes):

    ('decoder/layers/attention/query', 'DHK',
     'model.layers.{n}.self_attn.q_proj.weight', 'HK D')

  Axes are letters of the legend in README.md, or U where the legend has none.
  Only their order and their grouping count: a blank ends a dimension of theirs,
  and HK is one dimension of size H*K. {n} is the number of the layer, counted
  through the blocks of the period. {m} is the same number where their files
  count a layer's feed-forward network as the next layer. {e} is the number of
  an expert, axis E of ours. 'query|key|value' are several parameters of ours in
  one tensor of theirs, along its axis 3 (1 is a dimension of theirs that ours
  does not have). With the axes 'DHK|DJK|DJK' and 'HK+JK+JK D' they follow one
  another in the tensor, each of its own size, and with 'J(RK+K+K) D' they do so
  within each group of heads: R is H / J, and J=2 gives the number of groups
  where no axis of ours does. A row is passed over where the model has no such
  parameter with as many axes, so that a dense and an expert ffn/up may both
  have one; decoder/layers/block_2 stands for one block of the period alone
  (`by_block`).

  The import starts from the system's PARTS, takes the table `fields`, then what
  `read` returns. The export writes the table `fields`, then what `write`
  returns.

  Attributes:
    model_type: the name of the system in a config.json, which tells whose
      weights a folder holds.
    architecture: the name of transformers' class, under `architectures` in a
      config.json.
    names: the rows of every model of the system; see `names_of`.
    fields: {field of config.model: (field of config.json, default)}, or with
      {their word: ours} as a third item. Of 'a|b' the import takes the first
      that is there, and the export writes the last. A default is what
      transformers takes where the field is missing; it may be a function of
      the fields that were read before it.
    only: {field of config.json: the one value that is known here}. The export
      does not write it, so it must be the default of transformers, unless
      `write` has the field too.
    also: further model_types, of published folders whose model is this one.
    unread: fields of config.json that transformers declares or reads, and that
      do not change what is computed. A field that transformers does not know
      needs no name.
    tied: {tensor: the tensor whose values it must have}.
    spellings: (part of a name, what some files have in its place).
    module: (what the names begin with, what the names of transformers' modules
      and so of PEFT's adapters begin with), where the two differ.
    ignored: patterns of the names of tensors that hold no weights.
    integers: a pattern of the names of tensors of whole numbers, which are
      written as such.
    fixed: token ids that an export writes as `write` has them, whatever the
      tokenizer of the run says.
    heads: the heads that transformers has for tasks, by model.head.
    optional: {its name in words: a pattern of the names of its tensors} of
      each part that only a pre-training needs. A folder may lack such a part as
      a whole, and a part that is there without a place in the model is passed
      over. The user is told of both.
  """
  model_type: str
  architecture: str
  names: Sequence[Row] = ()
  fields: Mapping[str, tuple] = {}
  only: Mapping[str, Any] = {}
  also: Sequence[str] = ()
  unread: Sequence[str] = ()
  tied: Mapping[str, str] = {}
  spellings: Sequence[tuple[str, str]] = ()
  module: tuple[str, str] = ('', '')
  ignored: Sequence[str] = ()
  integers: str = ''
  fixed: Sequence[str] = ()
  heads: Mapping[str, TaskHead] = {}
  optional: Mapping[str, str] = {}

  def read(self, reader: Reader, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns fields of config.model that the table `fields` does not have.

    Args:
      reader: the reader of the config.json.
      fields: the fields that were read by the table.
    """
    return {}

  def write(self, config: ModelConfig) -> dict[str, Any]:
    """Returns fields of config.json that the table `fields` does not have."""
    return {}

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run, which is
    neither read nor written."""

  def names_of(self, config: ModelConfig) -> Sequence[Row]:
    """Returns the rows for the config `config`, without those of a task's head.
    A system replaces this method where its rows depend on the config."""
    return self.names

  def constants(self, config: ModelConfig) -> dict[str, Any]:
    """Returns the tensors, by name, whose values follow from the config."""
    return {}

  def of_files(self, names: Collection[str]) -> dict[str, Any]:
    """Returns fields of config.model that the names of a folder's tensors tell,
    and not its config.json."""
    return {}

  def rows(self, config: ModelConfig) -> Sequence[Row]:
    """Returns all rows for the config `config`, with those of its head."""
    rows = self.names_of(config)
    if config.head in self.heads:
      return self.heads[config.head].rows(rows)
    return rows

  def spellings_of(self, config: ModelConfig) -> Sequence[tuple[str, str]]:
    """Returns `spellings`, and before them the usual prefix where a model with
    the head of `config` has another one."""
    if config.head not in self.heads:
      return tuple(self.spellings)
    usual, here = self.heads[config.head].prefix
    if not here:
      return tuple(self.spellings)
    return ((here, usual), *self.spellings)


def task_heads(system: str, sequence: str = 'score', tokens: str = 'classifier',
               span: tuple[str, str] = ('', ''),
               only: Collection[str] = ('sequence', 'tokens', 'span')
          ) -> dict[str, TaskHead]:
  """Returns the heads that a system has in transformers.

  Args:
    system: the name that its classes begin with.
    sequence: the name of the module that scores a row.
    tokens: the name of the module that scores each token.
    span: the `prefix` of the model that answers questions.
    only: the names of the heads that the system has.
  """
  every = {
      'sequence': TaskHead(
          architecture=f'{system}ForSequenceClassification', name=sequence),
      'tokens': TaskHead(
          architecture=f'{system}ForTokenClassification', name=tokens),
      'span': TaskHead(
          architecture=f'{system}ForQuestionAnswering', name='qa_outputs',
          prefix=span),
  }
  return {name: head for name, head in every.items() if name in only}


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
  """Returns entries of `HuggingFace.fields` by transformers' defaults of fields
  that have their usual names, or ours."""
  entries = {}
  for name, default in defaults.items():
    ours = _OUR_NAME_OF_HF_FIELD.get(name, name)
    entries[ours] = (name, default)
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


def prefix_rows(ours: str, theirs: str, *rows: Row) -> tuple[Row, ...]:
  """Returns the rows with a folder of ours and a prefix of theirs before each.
  """
  moved = []
  for path, axes, name, their_axes in rows:
    moved.append((f'{ours}/{path}', axes, f'{theirs}.{name}', their_axes))
  return tuple(moved)


def rows_of_each_block(config: ModelConfig, theirs: str,
                       rows: Callable[[ModelConfig],
                                      Iterable[Row]]) -> tuple[Row, ...]:
  """Returns rows of the layers of a decoder whose kinds differ in more than
  which parameters they have.

  Args:
    config: the model.
    theirs: the prefix of a layer, with {n}.
    rows: the config of a kind of layer -> its rows, below the layer.
  """
  all_rows: list[Row] = []
  for section in config.sections(config.num_layers):
    for i, kind in enumerate(section.kinds):
      layer = config.of_kind(kind.name)
      folder = f'decoder/{section.name}/block_{i}'
      all_rows += prefix_rows(folder, theirs, *rows(layer))
  return tuple(all_rows)


def norm_rows(ours: str, theirs: str) -> tuple[Row, Row]:
  """Returns the rows of a LayerNorm's scale and bias."""
  return ((f'{ours}/scale', 'D', f'{theirs}.weight', 'D'),
          (f'{ours}/bias', 'D', f'{theirs}.bias', 'D'))


def dense_rows(ours: str, axes: str, theirs: str, their_axes: str
          ) -> tuple[Row, Row]:
  """Returns the rows of a matrix and of its bias, which has the axes of the
  output: the last ones of ours."""
  # The dimension of theirs that is the output. A digit in it stands for a
  # number of matrices, of which ours has one each.
  outputs = []
  for dim in their_axes.split():
    letters = re.sub(r'\d', '', dim)
    if axes.endswith(letters):
      outputs.append((dim, letters))
  out, bias_axes = outputs[0]
  if '{e}' in theirs:
    bias_axes = 'E' + bias_axes
  names = [f'{name}_bias' for name in ours.split('|')]
  return ((ours, axes, f'{theirs}.weight', their_axes),
          ('|'.join(names), bias_axes, f'{theirs}.bias', out))


def attention_rows(query: str, key: str, value: str, out: str,
                   kv_heads: str = 'H'
              ) -> tuple[Row, ...]:
  """Returns the rows of attention's matrices and biases.

  Args:
    query: the name of the matrix for queries in transformers.
    key: the name of the matrix for keys.
    value: the name of the matrix for values.
    out: the name of the matrix behind the heads.
    kv_heads: the axis of the heads of keys and values, H or J.
  """
  kv = f'{kv_heads}K'
  return (*dense_rows('query', 'DHK', query, 'HK D'),
          *dense_rows('key', f'D{kv}', key, f'{kv} D'),
          *dense_rows('value', f'D{kv}', value, f'{kv} D'),
          *dense_rows('out', 'HKD', out, 'D HK'))


# hidden_act: our ffn. Where two names mean one function, export takes the
# first. gelu_fast and gelu_new are the same tanh approximation.
FFN_OF_ACTIVATION = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh',
                     'gelu_fast': 'gelu_tanh',
                     'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu',
                     'silu': 'silu',
                     'swish': 'silu', 'relu2': 'relu2'}
GATED_FFN_OF_ACTIVATION = {'silu': 'swiglu', 'gelu': 'geglu',
                           'gelu_new': 'geglu_tanh',
                           'gelu_pytorch_tanh': 'geglu_tanh', 'relu': 'reglu'}
# the entry that most systems have for ffn
GATED_FFN_FIELD = 'hidden_act', 'silu', GATED_FFN_OF_ACTIVATION


def check_heads_divide_width(config: ModelConfig) -> None:
  """Raises RequestError for heads that do not divide the width, of which some
  classes of transformers make no model whatever the size of a head is."""
  require(config.d_model % config.num_heads == 0,
          f'model.num_heads is {config.num_heads}, '
          f'which does not divide model.d_model {config.d_model}: transformers '
          f'refuses such a {config.arch}')


def check_gates(fields: Mapping[str, Any], chosen: str = 'num_experts_per_tok',
                normalised: str = 'norm_topk_prob') -> None:
  """Raises RequestError where transformers divides a token's only gate by
  itself.

  Args:
    fields: what was read so far; a system without moe.normalize_gates always
      normalises them.
    chosen: the field of the config.json that says how many experts a token has.
    normalised: the field that says whether its gates are made to sum to 1.
  """
  if fields['moe.top_k'] > 1:
    return
  condition = f'{chosen} 1'
  if 'moe.normalize_gates' in fields:
    if not fields['moe.normalize_gates']:
      return
    condition += f' and {normalised} true'
  raise RequestError(
      f'config.json has {condition}: transformers then gives every expert the '
      "gate 1, where the gate here is the router's score, so that the router "
      'learns')


def read_shared_experts(reader: Reader, name: str, default: int,
                        width: int) -> int:
  """Returns model.moe.shared_experts by the field `name`, the hidden units of
  the shared network, where an expert has `width`."""
  shared = reader(name, default)
  require(shared % width == 0, f'config.json has {name} {shared}, which is no '
          f'multiple of the {width} hidden units of an expert: '
          'model.moe.shared_experts says how many times as wide as an expert '
          'the shared one is')
  return shared // width


def find_hf_word(choices: Mapping[str, str], ours: str, field: str) -> str:
  """Returns the first of their words for `ours`, the value of model.`field`.

  Raises:
    RequestError: if they have none.
  """
  for word, value in choices.items():
    if value == ours:
      return word
  known = ', '.join(dict.fromkeys(choices.values()))
  raise RequestError(f'model.{field} is {ours!r}, which has no counterpart in '
                     f'this config.json: choose from {known}')
