"""What a page says of its system in the Hugging Face format, in one record.

A page ends with `HF = HuggingFace(...)`; of a page, training/weights.py and
training/hf/ read that record and nothing else. A system that transformers does
not have has no `HF`. tests/architectures/pages_test.py checks every record.
parts/hf/tensor_map.py finds the tensors of a model by its rows, and
parts/hf/rope_fields.py has what a config.json says of rotary positions.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
import re
from typing import Any, NamedTuple

from architectures.parts.config import ModelConfig
from common.errors import require

# The path of a parameter, its axes, the name of the tensor in a file, its axes.
Row = tuple[str, str, str, str]
Reader = Any  # of a config.json: training/hf/config.py, a room above
MASKED_WORDS = 'head of masked words'  # a name in `HuggingFace.optional`


class TaskHead(NamedTuple):
  """How a model with the head of a task stands in a Hugging Face folder.

  Attributes:
    architecture: of config.json, the name of transformers' class.
    name: of the module that holds the head.
    prefix: (what the other names begin with, what they begin with here).
  """
  architecture: str
  name: str
  prefix: tuple[str, str] = ('', '')

  def rows(self, names: Iterable[Row]) -> tuple[Row, ...]:
    """Returns the rows `names` as they stand here, and those of the head."""
    usual, here = self.prefix
    return (*((ours, axes, here + theirs.removeprefix(usual)
               if theirs.startswith(usual) else theirs, their_axes)
              for ours, axes, theirs, their_axes in names),
            ('task/kernel', 'DU', f'{self.name}.weight', 'U D'),
            ('task/bias', 'U', f'{self.name}.bias', 'U'))


class HuggingFace(NamedTuple):
  """How a system's config and weights stand in a Hugging Face folder.

  A row of `names` is (our path, our axes, their name, their axes):

    ('decoder/layers/attention/query', 'DHK',
     'model.layers.{n}.self_attn.q_proj.weight', 'HK D')

  Axes are letters of the legend, or U where it has none, of which only the
  order and the grouping count: a blank ends a dimension of theirs, and HK is
  one dimension of size H*K. {n} is the layer, counted through the blocks of
  the period; {m} is the same where theirs counts a layer's feed-forward network
  as the next layer. {e} is an expert, axis E of ours. 'query|key|value' are
  several parameters of ours in one tensor of theirs, along its axis 3 (1 is a
  dimension of theirs that ours has not); with the axes 'DHK|DJK|DJK' and
  'HK+JK+JK D' they follow one another in it, each of its own size, and with
  'J(RK+K+K) D' within each group of heads: R is H / J, and J=2 says how many
  groups there are where no axis of ours does. A row is passed over where the
  model has no such
  parameter with as many axes, so that a dense and an expert ffn/up may both
  have one; decoder/layers/block_2 stands for one block of the period alone
  (`by_block`).

  The import starts from the system's PARTS, then reads `fields`, then `read`;
  the export writes `fields`, then `write`.

  Attributes:
    model_type: of config.json, which tells whose weights a folder holds.
    architecture: of config.json, the name of transformers' class.
    names: the rows, or a function of the ModelConfig that returns them.
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
      do not change what is computed. Those that it does not know need no name.
    read: (the Reader, the fields that were read) -> further fields of ours.
    write: ModelConfig -> further fields of config.json.
    check: ModelConfig -> None; raises RequestError for a model that
      transformers does not run, which is neither read nor written.
    tied: {tensor: the tensor whose values it must have}.
    spellings: (part of a name, what some files have in its place).
    module: (what names begin with, what those of transformers' modules do, and
      so those of PEFT's adapters), where these differ.
    ignored: patterns of the names of tensors that hold no weights.
    constants: ModelConfig -> the tensors, by name, that follow from it.
    integers: a pattern of those of whole numbers, which are so written.
    fixed: token ids that an export writes as `write` has them, whatever the
      tokenizer of the run says.
    heads: those that transformers has for tasks, by model.head.
    of_files: the names of a folder's tensors -> fields of ours that these tell,
      and not its config.json.
    optional: {what it is called: the pattern of its tensors' names} of what
      only a pre-training needs: a folder may lack it as a whole, and what it
      has of it without a place in the model is passed over; both are told.
  """
  model_type: str
  architecture: str
  names: Sequence[Row] | Callable[[ModelConfig], Sequence[Row]]
  fields: Mapping[str, tuple]
  only: Mapping[str, Any] = {}
  also: Sequence[str] = ()
  unread: Sequence[str] = ()
  read: Callable[[Reader, dict], dict] = lambda hf, fields: {}
  write: Callable[[ModelConfig], dict] = lambda c: {}
  check: Callable[[ModelConfig], None] = lambda c: None
  tied: Mapping[str, str] = {}
  spellings: Sequence[tuple[str, str]] = ()
  module: tuple[str, str] = ('', '')
  ignored: Sequence[str] = ()
  constants: Callable[[ModelConfig], dict[str, Any]] = lambda c: {}
  integers: str = ''
  fixed: Sequence[str] = ()
  heads: Mapping[str, TaskHead] = {}
  of_files: Callable[[Collection[str]], dict] = lambda names: {}
  optional: Mapping[str, str] = {}

  def rows(self, c: ModelConfig) -> Sequence[Row]:
    """Returns the rows of `names` for the config `c`, and of its head."""
    rows = self.names(c) if callable(self.names) else self.names
    return self.heads[c.head].rows(rows) if c.head in self.heads else rows

  def spellings_of(self, c: ModelConfig) -> Sequence[tuple[str, str]]:
    """Returns `spellings`, and the usual names where the head of `c` has other
    ones."""
    usual, here = self.heads.get(c.head, TaskHead('', '')).prefix
    return (*(((here, usual),) if here else ()), *self.spellings)


def heads(system: str, sequence: str = 'score', tokens: str = 'classifier',
          span: tuple[str, str] = ('', ''),
          only: Collection[str] = ('sequence', 'tokens', 'span')
          ) -> dict[str, TaskHead]:
  """Returns the heads that a system has in transformers.

  Args:
    system: what the names of its classes begin with.
    sequence, tokens: the names of the modules that score a row, and tokens.
    span: the `prefix` of the model that answers questions.
    only: those that it has.
  """
  return {name: head for name, head in {
      'sequence': TaskHead(f'{system}ForSequenceClassification', sequence),
      'tokens': TaskHead(f'{system}ForTokenClassification', tokens),
      'span': TaskHead(f'{system}ForQuestionAnswering', 'qa_outputs', span),
  }.items() if name in only}


# The field of config.model that a field of config.json mostly is.
_OURS = {
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

# Of any system, whether it has such biases: where a page does not ask, a
# config.json may say what the model has anyway.
BIASES = {'attention_bias': 'attention_bias', 'mlp_bias': 'ffn_bias'}


def fields(**defaults: Any) -> dict[str, tuple]:
  """Returns `HuggingFace.fields` of transformers' defaults of fields that have
  their usual names, or ours."""
  return {_OURS.get(name, name): (name, default)
          for name, default in defaults.items()}


# Defaults that follow from fields which were read before.
EACH_HEAD = lambda fields: fields['num_heads']  # heads of keys
SPLIT_WIDTH = lambda fields: fields['d_model'] // fields['num_heads']


def under(ours: str, theirs: str, *rows: Row) -> tuple[Row, ...]:
  """Returns the rows with a folder of ours and a prefix of theirs before each.
  """
  return tuple((f'{ours}/{row[0]}', row[1], f'{theirs}.{row[2]}', row[3])
               for row in rows)


def by_block(c: ModelConfig, theirs: str,
             rows: Callable[[ModelConfig], Iterable[Row]]) -> tuple[Row, ...]:
  """Returns rows of the layers of a decoder whose kinds differ in more than
  which parameters they have.

  Args:
    c: the model.
    theirs: the prefix of a layer, with {n}.
    rows: the config of a kind of layer -> its rows, below the layer.
  """
  return sum((under(f'decoder/{section}/block_{i}', theirs,
                    *rows(c.of_kind(kind.name)))
              for section, kinds, *_ in c.sections(c.num_layers)
              for i, kind in enumerate(kinds)), ())


def norm(ours: str, theirs: str) -> tuple[Row, Row]:
  """Returns the rows of a LayerNorm's scale and bias."""
  return ((f'{ours}/scale', 'D', f'{theirs}.weight', 'D'),
          (f'{ours}/bias', 'D', f'{theirs}.bias', 'D'))


def dense(ours: str, axes: str, theirs: str, their_axes: str
          ) -> tuple[Row, Row]:
  """Returns the rows of a matrix and of its bias, which has the axes of the
  output: the last ones of ours."""
  out = next(dim for dim in their_axes.split()
             if axes.endswith(re.sub(r'\d', '', dim)))
  experts = 'E' if '{e}' in theirs else ''
  biases = '|'.join(f'{name}_bias' for name in ours.split('|'))
  return ((ours, axes, f'{theirs}.weight', their_axes),
          (biases, experts + re.sub(r'\d', '', out), f'{theirs}.bias', out))


def attention(query: str, key: str, value: str, out: str, kv_heads: str = 'H'
              ) -> tuple[Row, ...]:
  """Returns the rows of attention's matrices and biases, which have these names
  in transformers. `kv_heads` is the axis of the heads of keys and values."""
  kv = f'{kv_heads}K'
  return (*dense('query', 'DHK', query, 'HK D'),
          *dense('key', f'D{kv}', key, f'{kv} D'),
          *dense('value', f'D{kv}', value, f'{kv} D'),
          *dense('out', 'HKD', out, 'D HK'))


# hidden_act: our ffn. Where two names mean one function, export takes the
# first. gelu_fast and gelu_new are the same tanh approximation.
FFNS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
        'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu', 'silu': 'silu',
        'swish': 'silu', 'relu2': 'relu2'}
GATED = {'silu': 'swiglu', 'gelu': 'geglu', 'gelu_new': 'geglu_tanh',
         'gelu_pytorch_tanh': 'geglu_tanh', 'relu': 'reglu'}
SILU = 'hidden_act', 'silu', GATED  # what most have for an ffn


def check_heads(c: ModelConfig) -> None:
  """Raises RequestError for heads that do not divide the width, of which some
  classes of transformers make no model whatever the size of a head is."""
  require(c.d_model % c.num_heads == 0, f'model.num_heads is {c.num_heads}, '
          f'which does not divide model.d_model {c.d_model}: transformers '
          f'refuses such a {c.arch}')


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
  has_field = 'moe.normalize_gates' in fields
  require(fields['moe.top_k'] > 1
          or has_field and not fields['moe.normalize_gates'],
          f'config.json has {chosen} 1' + f' and {normalised} true' * has_field
          + ': transformers then gives every expert the gate 1, where the gate '
          "here is the router's score, so that the router learns")


def shared_experts(reader: Reader, name: str, default: int, width: int) -> int:
  """Returns model.moe.shared_experts by the field `name`, the hidden units of
  the shared network, where an expert has `width`."""
  shared = reader(name, default)
  require(shared % width == 0, f'config.json has {name} {shared}, which is no '
          f'multiple of the {width} hidden units of an expert: '
          'model.moe.shared_experts says how many times as wide as an expert '
          'the shared one is')
  return shared // width


def theirs(choices: Mapping[str, str], ours: str, field: str) -> str:
  """Returns the first of their words for `ours`, the value of model.`field`.

  Raises:
    RequestError: where they have none.
  """
  words = [word for word, value in choices.items() if value == ours]
  known = ', '.join(dict.fromkeys(choices.values()))
  require(words, f'model.{field} is {ours!r}, which has no counterpart in this '
          f'config.json: choose from {known}')
  return words[0]
