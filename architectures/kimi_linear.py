"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention
without positions, and DeepSeek-V3's mixture of experts (Kimi Team 2025, "Kimi
Linear", arXiv 2510.26692).

  a  = x + KDA(RMSNorm(x))               in three layers of four
  a  = x + LatentAttention(RMSNorm(x))   in the fourth, without rotation
  x' = a + SwiGLU(n), n = RMSNorm(a)     in the first layer
  x' = a + shared(n) + gate_scale * sum over the 8 chosen of 256 of
                       s_e / (sum of s) E_e(n),  s = sigmoid(W_r n)

parts/recurrent/linear_attention.py has the recurrence, which alone tells the
order of the tokens; parts/attention/latent.py has the attention, whose
`rope_dim` features are a key that all heads share, and are not rotated. The 8
are the best by s + b, where b moves against the load as in DeepSeek-V3. The
published model has 27 layers. The last one, which follows two recurrences, has
attention too.
"""

from architectures import deepseek_v2, llama, phi3
from architectures.parts import hf
from architectures.parts.attention.fields import LatentConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.recurrent.linear_attention import KDAConfig
from architectures.parts.skeletons import Decoder
from common.errors import require


class KimiLinear(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      position='none', mixer='latent', ffn='moe', prefix='linear_dense',
      pattern='linear,linear,full', kinds=dict(
          linear_dense=dict(mixer='kda', ffn='dense'),
          linear=dict(mixer='kda'), full={}),
      moe=dict(router='sigmoid', top_k=8, ffn='swiglu'))


# Entries of mlp_layer_types in a config.json.
DENSE_NETWORK, EXPERT_NETWORK = 'dense', 'sparse'


def _read_dense_layers(reader: hf.Reader, layers: int) -> list[bool]:
  """Returns whether each layer has a dense network in place of experts."""
  num_dense = reader.read_count('first_k_dense_replace', 1)
  networks = layer_types.read_entry_of_each_layer(
      reader, field='mlp_layer_types', layers=layers,
      words=(DENSE_NETWORK, EXPERT_NETWORK))
  is_dense = [network == DENSE_NETWORK for network in networks]
  if not networks:
    is_dense = [n < num_dense for n in range(layers)]
  require(not all(is_dense), 'config.json has no layer with experts')
  return is_dense


def _read_layer_types(reader: hf.Reader, layers: int) -> list[str]:
  """Returns whether each layer is linear or full attention, by two lists of a
  Hugging Face config.json that number the layers from 1.

  Args:
    reader: the reader of the object linear_attn_config in the file.
    layers: the number of layers.

  Returns:
    For each layer the entry that layer_types would have. Without the lists,
    every fourth layer after the first is full attention.

  Raises:
    RequestError: where a layer is in neither list or in both.
  """
  full_layers = reader.read_list('full_attn_layers')
  linear_layers = reader.read_list('kda_layers')
  if not (reader.has('full_attn_layers') and reader.has('kda_layers')):
    full_layers = [n + 1 for n in range(layers) if n and n % 4 == 0]
    return _types_by_full_layers(full_layers, layers)

  # The two lists must have each layer once.
  all_layers = full_layers + linear_layers
  has_numbers = all(type(n) is int for n in all_layers)
  require(has_numbers and sorted(all_layers) == [*range(1, layers + 1)],
          'config.json has full_attn_layers and kda_layers in '
          f'linear_attn_config: each layer from 1 to {layers} must be in one '
          'of the two, once')
  return _types_by_full_layers(full_layers, layers)


def _types_by_full_layers(full_layers: list[int], layers: int) -> list[str]:
  """Returns the entry of layer_types for each layer, given the numbers, from 1,
  of those with full attention."""
  types = []
  for n in range(1, layers + 1):
    if n in full_layers:
      types.append(layer_types.FULL_ATTENTION)
    else:
      types.append(layer_types.LINEAR_ATTENTION)
  return types


# Queries and output have the names that latent attention gives them.
DELTA_ATTENTION_ROWS = hf.prefix_rows(
    'attention', 'self_attn',
    ('key', 'DHK', 'k_proj.weight', 'HK D'),
    ('value', 'DHK', 'v_proj.weight', 'HK D'),
    ('query_conv', 'WHK', 'q_conv1d.weight', 'HK 1 W'),
    ('key_conv', 'WHK', 'k_conv1d.weight', 'HK 1 W'),
    ('value_conv', 'WHK', 'v_conv1d.weight', 'HK 1 W'),
    ('decay_down', 'DU', 'f_a_proj.weight', 'U D'),
    ('decay_up', 'UHK', 'f_b_proj.weight', 'HK U'),
    ('decay_scale', 'H', 'A_log', '1 1 H 1'),
    ('decay_bias', 'HK', 'dt_bias', 'HK'),
    ('rate', 'DH', 'b_proj.weight', 'H D'),
    ('gate_down', 'DU', 'g_a_proj.weight', 'U D'),
    ('gate_up', 'UHK', 'g_b_proj.weight', 'HK U'),
    ('out_norm/scale', 'K', 'o_norm.weight', 'K'))
EXPERT_ROWS = hf.prefix_rows(
    'ffn', 'block_sparse_moe', *llama.expert_rows('w1', 'w3', 'w2'),
    ('router_bias', 'E', 'gate.e_score_correction_bias', 'E'),
    *deepseek_v2.SHARED_EXPERT_ROWS)


class HF(hf.HuggingFace):
  model_type = 'kimi_linear'
  architecture = 'KimiLinearForCausalLM'
  fields = deepseek_v2.LATENT_FIELDS | hf.fields_with_defaults(
      hidden_size=2304, num_hidden_layers=27, num_attention_heads=32,
      intermediate_size=9216, vocab_size=163840, rms_norm_eps=1e-5,
      moe_intermediate_size=1024, num_experts=256, topk_group=1,
      routed_scaling_factor=2.446) | {
          'max_len': ('model_max_length', 1048576),
          # It is of the convolutions too, which are SiLU's here.
          'moe.ffn': ('hidden_act', 'silu', {'silu': 'swiglu'}),
          'moe.top_k': ('num_experts_per_token', 8),
          'moe.shared_experts': ('num_shared_experts', 1),
          'moe.expert_groups': ('num_expert_group', 1),
          'moe.normalize_gates': ('moe_renormalize', True)}
  only = dict(tie_word_embeddings=False, mla_use_nope=True,
              moe_router_activation_func='sigmoid', moe_layer_freq=1,
              num_nextn_predict_layers=0)
  # Fields of positions, which this model has not.
  fields_without_effect = ('head_dim', 'qk_head_dim', 'rope_theta',
                           'rope_scaling', 'rope_parameters')
  # transformers writes the network of a dense layer as that of experts.
  spellings = (*llama.HF.spellings, ('.mlp.', '.block_sparse_moe.'))
  ignored = llama.Family.ignored

  def rows_of_model(self, config: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns the table by which our parameters are converted to the tensors of
    a Hugging Face file, and back.

    Args:
      config: our config of the model.

    Returns:
      Rows of four strings: the path and the axes of our parameter, and the name
      and the axes of its tensor. Letters name axes, such as D d_model, H heads
      and K features of a head. 'DHK' and 'HK D' say that the tensor has two
      axes, of which the first is our H and K joined. {n} in a name is the
      number of the layer. Rows of parameters that the model lacks are skipped.
    """
    queries = deepseek_v2.QUERY_ROWS
    if config.part(LatentConfig).q_rank:
      queries += deepseek_v2.LATENT_QUERY_ROWS
    return llama.embedding_and_head_rows() + llama.layer_rows(
        *deepseek_v2.LAYER_ROWS, *queries,
        *hf.prefix_rows('ffn', 'mlp', *llama.FFN_ROWS),
        *EXPERT_ROWS, *DELTA_ATTENTION_ROWS)

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
    reader.require_values(num_key_value_heads=fields['num_heads'])
    hf.check_gates(fields, top_k_name='num_experts_per_token',
                   normalize_name='moe_renormalize')
    is_dense = _read_dense_layers(reader, num_layers)

    # The recurrence: what stands in the section goes before the other names.
    linear = reader.read_object('linear_attn_config')
    num_heads = linear('num_heads', reader('linear_num_heads', 32))
    head_dim = linear('head_dim', reader('linear_head_dim', 128))
    kernel_size = linear('short_conv_kernel_size',
                         reader('linear_conv_kernel_dim', 4))
    kda = dict(key_heads=num_heads, value_heads=num_heads, key_dim=head_dim,
               value_dim=head_dim, rank=head_dim, conv=kernel_size)

    # Latent attention.
    rank = 0
    if reader.has('q_lora_rank'):
      rank = reader('q_lora_rank', 1)
    latent = dict(q_rank=rank, norm_eps=deepseek_v2.EPSILON_OF_LATENT_NORMS)

    # The order of the layers.
    types = layer_types.read_entry_of_each_layer(
        reader, field='layer_types', layers=num_layers,
        words=layer_types.KIND_OF_MIXER)
    types_of_section = _read_layer_types(linear, num_layers)
    model_fields = layer_types.fields_of_recurrent_layers(
        types or types_of_section, is_dense=is_dense, mixer='kda')
    model_fields |= dict(head_dim=fields['latent.nope_dim'], latent=latent,
                         kda=kda)
    if reader.is_null('moe_renormalize'):  # A null says no here.
      model_fields['moe'] = dict(normalize_gates=False)
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
    # The network and the mixer of each layer, numbered from 1.
    networks, full_layers, linear_layers = [], [], []
    for n, layer in enumerate(config.layers(config.num_layers), 1):
      networks.append(EXPERT_NETWORK if layer.ffn == 'moe' else DENSE_NETWORK)
      if layer.mixer == 'latent':
        full_layers.append(n)
      else:
        linear_layers.append(n)
    kda = config.part(KDAConfig)
    return dict(
        num_key_value_heads=config.num_heads,
        q_lora_rank=config.part(LatentConfig).q_rank or None,
        first_k_dense_replace=networks.index(EXPERT_NETWORK),
        mlp_layer_types=networks,
        linear_attn_config=dict(
            full_attn_layers=full_layers, kda_layers=linear_layers,
            num_heads=kda.key_heads, head_dim=kda.key_dim,
            short_conv_kernel_size=kda.conv),
        mla_use_nope=True, moe_router_activation_func='sigmoid',
        moe_layer_freq=1, use_grouped_topk=True, num_nextn_predict_layers=0,
        # Nulls. Left out, transformers takes the ids of special tokens from
        # the published vocabulary, which may lie outside of ours.
        **dict.fromkeys(phi3.TOKEN_ID_FIELDS))

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    layers = config.distinct_layers
    require(config.has_experts,
            'no layer of this model has experts: a kimi_linear '
            'config.json is of a model with some')
    require(any(layer.mixer == 'latent' for layer in layers),
            'all layers are recurrences: transformers runs a kimi_linear with '
            'some layers of attention only')
