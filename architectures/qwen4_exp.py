"""Qwen4-Exp, of text: Qwen3.5 with experts, whose layers read streams by gates,
whose attention sees blocks that an indexer chooses, and of which one layer
looks up n-grams (Qwen Team 2026; transformers' qwen4_exp).

  r  = mean over the 4 streams u of g_u * n_u(x_u),  g_u in (0, 1) by features
  x'_u = x_u + b_u F(r),  b_u in (0, 2)       F: a recurrence or attention, then
                                              experts
  x'_u = x_u + v_u + silu(conv(n_u(v_u)))     before, of layer 2: v_u of n-grams

F is as in architectures/qwen3_5_moe.py, but the gate of the recurrence is a
sigmoid. Streams are `gated` in parts/blocks.py, blocks in
parts/attention/indexer.py and n-grams `engram` in parts/lookup.py, where those
that reach over the token that ends texts stop at it. There is no norm but what
streams are read through, and one such reading ends the stack.

The published folder also holds what reads images, a module that predicts a
second token, and the table of n-grams in parts: transformers'
Qwen4ExpForCausalLM reads it and writes it without, in one part if its config
has split_ngram_parts=1.
"""

import numpy as np

from architectures import qwen3_5_moe, qwen3_next
from architectures.parts import hf, lookup
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.lookup import NGramsConfig
from architectures.parts.skeletons import Decoder
from common.errors import require, shorten

LAYER_KINDS = dict(
    linear=dict(mixer='deltanet'), full=dict(attention='indexed'),
    ngrams=dict(mixer='deltanet', memory='engram'))


class Qwen4Exp(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = qwen3_next.Qwen3Next.PARTS | dict(
      pattern='linear,ngrams,linear,full', kinds=LAYER_KINDS, block='no_norm',
      residual='gated', deltanet=dict(gate='sigmoid'),
      indexer=dict(block=4), ngrams=dict(stops=True))


KIND_OF_LAYER_TYPE = {layer_types.LINEAR_ATTENTION: 'linear',
                      'indexed_attention': 'full',
                      layer_types.FULL_ATTENTION: 'full'}


def _stream_rows(our_folder: str, hf_module: str) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  the hyper-connections of one branch: the matrices by which it reads and writes
  the residual streams.

  Args:
    our_folder: the folder of our parameters.
    hf_module: the name of the module in transformers.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  return hf.prefix_rows(
      our_folder, hf_module, ('norm/offset', 'UD', 'hc_norm.weight', 'UD'),
      ('down', 'UDC', 'input_mix_weight_down.weight', 'C UD'),
      ('up', 'CUD', 'input_mix_weight_up.weight', 'UD C'),
      ('write', 'UDC', 'block_inject_weight.weight', 'C UD'))


NGRAM_ROWS = hf.prefix_rows(
    'memory', 'ple',
    ('table', 'IS', 'ple_embedding.ngram_embedding.shard_0.weight', 'I S'),
    ('key', 'IF', 'key_proj.weight', 'F I'),
    ('value', 'ID', 'value_proj.weight', 'D I'),
    ('conv', 'WF', 'conv1d.weight', 'F 1 W'),
    *((f'{name}_norm/offset', 'UD', f'norm_{name}.weight', 'UD')
      for name in ('key', 'query', 'conv')))


class HF(qwen3_5_moe.HF):
  model_type = 'qwen4_exp_text'
  architecture = 'Qwen4ExpForCausalLM'
  names = (
      *qwen3_next.BASE_ROWS,
      *_stream_rows('decoder/final_streams', 'model.hyper_connection_mixer'))
  fields = qwen3_5_moe.HF.fields | hf.fields_with_defaults(
      num_experts=512, num_experts_per_tok=10, norm_topk_prob=True) | {
          'streams.count': ('hc_count', 4),
          'streams.rank': ('hc_lowrank', 320),
          'indexer.heads': ('indexer_n_heads', 4),
          'indexer.head_dim': ('indexer_head_dim', 128),
          'indexer.top_k': ('indexer_budget', 2048),
          'indexer.block': ('indexer_compress_ratio', 4),
          'ngrams.order': ('ngram_size', 3),
          'ngrams.heads': ('heads_per_ngram', 8),
          'ngrams.rows': ('ngram_vocab_size_base', 20_000_000),
          'ngrams.kernel': ('ple_conv_kernel_size', 4),
          'deltanet.gate': ('output_gate_type', 'silu', {
              'silu': 'silu', 'sigmoid': 'sigmoid'})}
  only = dict(attn_output_gate=True)
  fields_without_effect = (*qwen3_5_moe.HF.fields_without_effect,
                           'number_of_conv_states')
  fixed_token_ids = ('eos_token_id',)

  def rows_of_layer(self, layer: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns table rows that name the Hugging Face tensor of each parameter of
    a layer, with those of an indexer and of n-grams, which some layers have."""
    indexer_rows = hf.prefix_rows(
        'attention/indexer', 'self_attn.indexer',
        ('query|key', 'DHK|DK', 'index_qk_proj.weight', 'HK+K D'),
        ('query_norm/offset', 'K', 'q_layernorm.weight', 'K'),
        ('key_norm/offset', 'K', 'k_layernorm.weight', 'K'))
    return (*_stream_rows('attention_streams', 'attn_hyper_connection'),
            *_stream_rows('ffn_streams', 'mlp_hyper_connection'), *NGRAM_ROWS,
            *indexer_rows, *super().rows_of_layer(layer))

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    """Translates a Hugging Face config.json to fields of our config.model.
    Fields that only have another name there have been looked up before.

    Args:
      reader: the fields of the file. `reader(name, default)` returns a field's
        value, or the default if the file lacks it, and marks it as read. A file
        is refused if a field that may matter was never read; `ignore_fields`
        marks fields that do not matter.
      fields: the fields of config.model that have been looked up.

    Returns:
      Further fields of config.model, by name. Groups, such as rope, are dicts.
      They replace fields of the same name in `fields`.
    """
    num_layers = fields['num_layers']
    layer_types.check_number_of_layers('num_hidden_layers', num_layers)
    reader.require_values(
        indexer_kv_heads=1, split_ngram_parts=1,
        seed=lookup.SEED_OF_MULTIPLIERS,
        make_ngram_vocab_size_divisible_by=lookup.ROWS_ARE_MULTIPLE_OF)

    # The kind of each layer; by default, the last of every few sees all keys.
    interval = reader('full_attention_interval', 4)
    types = layer_types.read_entry_of_each_layer(reader, field='layer_types',
                                                 layers=num_layers,
                                                 words=KIND_OF_LAYER_TYPE)
    kind_names = [KIND_OF_LAYER_TYPE[layer_type] for layer_type in types]
    if not types:
      kind_names = ['linear'] * num_layers
      for last in range(interval - 1, num_layers, interval):
        kind_names[last] = 'full'

    # One of the linear layers, numbered from 1, looks up n-grams.
    linear_layers = []
    for n, name in enumerate(kind_names, 1):
      if name == 'linear':
        linear_layers.append(n)
    ngram_layers = reader.read_list('ple_layer_ids')
    is_known = len(ngram_layers) == 1 and ngram_layers[0] in linear_layers
    require(is_known, f'config.json has ple_layer_ids {shorten(ngram_layers)}: '
            'n-grams are known in one layer, of linear_attention')
    kind_names[ngram_layers[0] - 1] = 'ngrams'

    # The tables of n-grams share their width; the end of a text pads them.
    num_tables = (fields['ngrams.order'] - 1) * fields['ngrams.heads']
    width = reader('ple_embed_dim', fields['d_model'])
    end_tokens = reader.read_list('eos_token_id')
    if end_tokens:
      end_token = end_tokens[0]
    else:
      end_token = reader.read_count('eos_token_id', 0)
    ngrams = dict(stops=True, size=width // num_tables, pad_token=end_token)

    moe = qwen3_next.read_experts(reader, fields)
    rope = rope_fields.read_rope(
        reader, fraction=('partial_rotary_factor', 1.0),
        unread=('mrope_section',))
    model_fields = layer_types.pattern_and_kinds(kind_names, LAYER_KINDS)
    model_fields |= dict(ngrams=ngrams, moe=moe, rope=rope)
    return model_fields

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The layers that look up n-grams, numbered from 1.
    ngram_layers = []
    for n, layer in enumerate(config.layers(config.num_layers), 1):
      if layer.memory == 'engram':
        ngram_layers.append(n)
    ngrams = config.part(NGramsConfig)
    # The fields of Qwen3.5 with experts (super), and those of the n-grams.
    config_json = super().write(config)
    config_json |= dict(
        ple_layer_ids=ngram_layers, ple_embed_dim=ngrams.tables * ngrams.size,
        indexer_kv_heads=1, split_ngram_parts=1, eos_token_id=ngrams.pad_token)
    return config_json

  def constants(self, config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the tensors of whole numbers by which n-grams are hashed: Hugging
    Face files hold them, though they follow from the config.

    Args:
      config: our config of the model.

    Returns:
      For each layer that looks up n-grams, by the tensors' names: the factors
      of the tokens, the sizes of the tables, and the first row of each table.
    """
    ngrams = config.part(NGramsConfig)
    sizes = lookup.first_primes(ngrams.rows, ngrams.tables)
    values = dict(
        layer_multipliers=lookup.hash_multipliers(
            config.vocab_size, ngrams.order),
        ngram_heads_vocab_sizes=sizes,
        ngram_heads_offsets=np.cumsum((0, *sizes[:-1])))
    tensors = {}
    # The config.json numbers these layers from 1, and the tensors from 0.
    for n in self.write(config)['ple_layer_ids']:
      for name, value in values.items():
        full_name = f'model.layers.{n - 1}.ple.ple_embedding.{name}'
        tensors[full_name] = np.array(value, np.int64)
    return tensors
