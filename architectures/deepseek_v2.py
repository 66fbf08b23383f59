"""DeepSeek-V2: latent attention, and a mixture of many small experts beside
some that every token goes through (DeepSeek-AI 2024a; the experts: Dai et al.
2024, DeepSeekMoE).

  a  = x + LatentAttention(RMSNorm(x))           parts/attention/latent.py
  x' = a + SwiGLU(n), n = RMSNorm(a)             in the first layer
  x' = a + shared(n) + gate_scale * sum over the 6 chosen experts of p_e E_e(n)

p is the softmax over all experts, and is not normalised over those chosen. The
shared experts are one network of their joint width. In the largest model a
token goes to experts of 3 of 8 groups at most, those with the best of its
experts (`moe.expert_groups`): each group lies on devices of its own.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.attention.fields import LatentConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import Decoder
from common.errors import check_choice, require


class DeepSeekV2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      rope=dict(interleaved=True), mixer='latent', ffn='moe', prefix='dense',
      kinds=dict(dense=dict(ffn='dense')), moe=dict(
          router='topk', top_k=6, ffn='swiglu', normalize_gates=False))


def read_dense_layers(reader: hf.Reader, fields: dict, dense: int) -> dict:
  """Reads from a Hugging Face config.json how many of the first layers have a
  dense feed-forward network in place of experts.

  Args:
    reader: the fields of the config.json.
    fields: the fields of our config.model that were looked up before.
    dense: the number of such layers if the config.json does not say it.

  Returns:
    Two fields of config.model: `prefix`, the kind of each of these layers, such
    as 'dense,dense'; and `kinds`, how a layer of the kind 'dense' differs from
    the others. They are '' and {} if there are no such layers.
  """
  num_dense = reader.read_count('first_k_dense_replace', dense)
  require(num_dense < fields['num_layers'],
          f'config.json has first_k_dense_replace {num_dense} of '
          f'num_hidden_layers {fields["num_layers"]}: no layer has experts')
  kinds = {}
  if num_dense:
    kinds['dense'] = dict(ffn='dense')
  return dict(prefix=','.join(['dense'] * num_dense), kinds=kinds)


def write_dense_layers(config: ModelConfig) -> dict:
  """Returns the field of a config.json that `read_dense_layers` reads."""
  has_experts = []
  for kind in config.layer_kinds(config.num_layers):
    has_experts.append(kind.ffn == 'moe')
  require(any(has_experts), 'no layer of this model has experts')
  return dict(first_k_dense_replace=has_experts.index(True))


def read_shared_fields(reader: hf.Reader, fields: dict, *, dense: int,
                       q_rank: int, interleaved: bool = True) -> dict:
  """Translates what the Hugging Face files config.json of DeepSeek-V2 and V3
  have in common: dense layers, latent attention and rotary positions.

  Args:
    reader: the fields of the config.json.
    fields: the fields of our config.model that were looked up before.
    dense: how many layers at the start are dense if the file does not say it.
    q_rank: the default of q_lora_rank, the rank of the queries' products.
    interleaved: whether rotary positions rotate pairs of neighbouring features.

  Returns:
    Further fields of config.model. Groups, such as rope, are dicts.
  """
  # Sizes that follow from others, or that transformers alone could set apart.
  reader.require_values(num_key_value_heads=fields['num_heads'],
                        moe_layer_freq=1)
  reader.ignore_fields('head_dim', 'qk_head_dim')
  # A null differs from a missing field here: it says that queries have no low
  # rank.
  rank = 0
  if not reader.is_null('q_lora_rank'):
    rank = reader('q_lora_rank', q_rank)
  return read_dense_layers(reader, fields=fields, dense=dense) | dict(
      head_dim=fields['latent.nope_dim'],
      latent=dict(q_rank=rank, norm_eps=EPSILON_OF_LATENT_NORMS),
      rope=rope_fields.read_rope(reader, interleaved=interleaved,
                                 on_scores=True))


def write_shared_fields(config: ModelConfig) -> dict:
  """Returns the fields of a config.json that `read_shared_fields` reads."""
  return write_dense_layers(config) | dict(
      num_key_value_heads=config.num_heads,
      q_lora_rank=config.part(LatentConfig).q_rank or None,
      rope_parameters=rope_fields.write_rope(config, on_scores=True))


# Values of topk_method: whether a token chooses its experts among all of them,
# or among those of the best groups.
ALL_EXPERTS, BEST_GROUPS = 'greedy', 'group_limited_greedy'
EPSILON_OF_LATENT_NORMS = 1e-6  # whatever a config.json says
# The rows of attention without the products for queries.
ATTENTION_ROWS = (
    *hf.dense_rows('attention/kv_down', 'DU', 'self_attn.kv_a_proj_with_mqa',
                   'U D'),
    ('attention/kv_norm/scale', 'U', 'self_attn.kv_a_layernorm.weight', 'U'),
    ('attention/kv_up', 'UHK', 'self_attn.kv_b_proj.weight', 'HK U'),
    *hf.dense_rows('attention/out', 'HKD', 'self_attn.o_proj', 'D HK'))
# The rows of a layer, without the products for queries, and without networks.
LAYER_ROWS = (*llama.norm_rows(), *ATTENTION_ROWS)
SHARED_EXPERT_ROWS = hf.prefix_rows('shared', 'shared_experts', *llama.FFN_ROWS)
NETWORK_ROWS = hf.prefix_rows(
    'ffn', 'mlp', *llama.FFN_ROWS, *llama.expert_rows(), *SHARED_EXPERT_ROWS)
QUERY_ROWS = (('attention/query', 'DHK', 'self_attn.q_proj.weight', 'HK D'),)
QUERY_DOWN_ROWS = (
    *hf.dense_rows('attention/query_down', 'DU', 'self_attn.q_a_proj', 'U D'),
    ('attention/query_norm/scale', 'U', 'self_attn.q_a_layernorm.weight', 'U'))
LATENT_QUERY_ROWS = (
    *QUERY_DOWN_ROWS,
    ('attention/query_up', 'UHK', 'self_attn.q_b_proj.weight', 'HK U'))


def rows_of_deepseek(config: ModelConfig, *more: hf.Row) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of a
  DeepSeek model, and `more` of each layer."""
  query_rows = QUERY_ROWS
  if config.part(LatentConfig).q_rank:
    query_rows = LATENT_QUERY_ROWS
  return llama.embedding_and_head_rows() + llama.layer_rows(
      *query_rows, *LAYER_ROWS, *NETWORK_ROWS, *more)


# Fields that V3 and Kimi Linear have too.
LATENT_FIELDS = hf.fields_with_defaults(
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, attention_bias=False)


class HF(llama.Family):
  model_type = 'deepseek_v2'
  architecture = 'DeepseekV2ForCausalLM'
  fields = LATENT_FIELDS | hf.fields_with_defaults(
      hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
      intermediate_size=11008, vocab_size=102400,
      max_position_embeddings=2048, rms_norm_eps=1e-6,
      tie_word_embeddings=False, num_experts_per_tok=6,
      moe_intermediate_size=1407, routed_scaling_factor=1.0,
      n_routed_experts=64, n_shared_experts=2) | {'moe.ffn': hf.GATED_FFN_FIELD}
  only = dict(norm_topk_prob=False, scoring_func='softmax')
  heads = hf.task_heads('DeepseekV2', only=('sequence',))

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
    return rows_of_deepseek(config)

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
    groups, chosen = reader('n_group', 1), reader('topk_group', 1)
    method = reader('topk_method', ALL_EXPERTS)
    check_choice('topk_method of config.json', value=method,
                 choices=(ALL_EXPERTS, BEST_GROUPS))
    model_fields = read_shared_fields(reader, fields=fields, dense=0,
                                      q_rank=1536)
    if method == BEST_GROUPS:
      model_fields['moe'] = dict(expert_groups=groups, top_groups=chosen)
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
    moe = config.part(MoEConfig)
    method = ALL_EXPERTS
    if moe.expert_groups > 1:
      method = BEST_GROUPS
    return write_shared_fields(config) | dict(
        topk_method=method, n_group=moe.expert_groups,
        topk_group=moe.top_groups)

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    hf.check_heads_divide_width(config)
