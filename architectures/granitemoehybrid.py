"""Granite 4.0-H: nine layers of Mamba-2 to one of attention without positions,
with a factor on everything that meets (IBM 2025, "Granite 4.0", and its model
cards).

  x_0 = 12 E[tokens]
  a   = x + 0.22 Mamba2(n(x))              in nine layers of ten
  a   = x + 0.22 W_o Attention(q, k, v)    in the tenth; scores times 1 / K
  x'  = a + 0.22 (shared(m) + sum over the best experts of g_e SwiGLU_e(m))
        or a + 0.22 SwiGLU(m), without experts;   m = n(a)
  g   = softmax over those chosen of W_r m
  logits = n(x_N) E^T * 256 / D            n is RMSNorm; no bias but of the
                                           convolutions

The factors are model.embed_scale, residual_scale, attention_scale and
logits_scale. parts/recurrent/mamba2.py has the recurrence.
"""

from architectures import llama, mamba2
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.recurrent.mamba2 import Mamba2Config
from architectures.parts.skeletons import Decoder
from common.errors import require

LAYER_KINDS = {'linear': dict(mixer='mamba2'), 'full': {}}
# Our kind of layer by the entry of layer_types in transformers' files, and in
# the published ones.
KIND_OF_LAYER_TYPE = {layer_types.LINEAR_ATTENTION: 'linear',
                      layer_types.FULL_ATTENTION: 'full',
                      'mamba': 'linear', 'attention': 'full'}
# Fields of a config.json that a product or a quotient needs above 0.
FACTORS_ABOVE_ZERO = ('embedding_multiplier', 'attention_multiplier',
                      'logits_scaling')


class GraniteHybrid(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      position='none', pattern='linear,full', kinds=LAYER_KINDS,
      tie_embeddings=True, embed_scale=12.0, residual_scale=0.22,
      attention_scale=1 / 128,
      logits_scale=1 / 6, ffn='moe', moe=dict(
          router='topk', top_k=6, ffn='swiglu', shared_experts=2))


def _read_positions(reader: hf.Reader) -> dict:
  """Returns the fields of the model for its positions: rotary ones, or none."""
  rope = rope_fields.read_rope(reader)
  if reader('position_embedding_type', 'nope') == 'rope':
    return dict(position='rope', rope=rope)
  return dict(position='none')


def _read_ffn(reader: hf.Reader) -> dict:
  """Reads the feed-forward networks of a Hugging Face config.json: one dense
  network in each layer, or experts and a shared one beside them.

  Args:
    reader: the reader of the config.json.

  Returns:
    The fields of config.model: `ffn` and `d_ff`, or `d_ff` and those of `moe`.
  """
  num_experts = reader.read_count('num_local_experts', 8)
  shared_width = reader('shared_intermediate_size', 1024)
  if not num_experts:
    reader.ignore_fields('intermediate_size', 'num_experts_per_tok',
                         'router_aux_loss_coef')
    return dict(ffn='swiglu', d_ff=shared_width)

  # With experts, the width of the shared network is a multiple of theirs.
  expert_width = reader('intermediate_size', 11008)
  top_k = reader('num_experts_per_tok', 2)
  hf.check_gates({'moe.top_k': top_k})
  shared_experts = hf.read_shared_experts(
      reader, 'shared_intermediate_size', default=shared_width,
      width=expert_width)
  return dict(d_ff=shared_width, moe=dict(
      num_experts=num_experts, top_k=top_k, d_ff=expert_width,
      shared_experts=shared_experts,
      balance_weight=reader('router_aux_loss_coef', 0.001)))


def _write_ffn(config: ModelConfig) -> dict:
  """Returns the fields of a config.json that `_read_ffn` reads."""
  if not config.has_experts:
    return dict(num_local_experts=0, shared_intermediate_size=config.d_ff)
  moe = config.part(MoEConfig)
  return dict(
      num_local_experts=moe.num_experts, num_experts_per_tok=moe.top_k,
      intermediate_size=moe.d_ff, router_aux_loss_coef=moe.balance_weight,
      shared_intermediate_size=moe.shared_experts * moe.d_ff)


ROWS = llama.embedding_and_head_rows() + llama.layer_rows(
    *llama.norm_rows(),
    *hf.prefix_rows(
        'ffn', 'shared_mlp',
        ('gate|up', 'DF', 'input_linear.weight', '2F D'),
        ('down', 'FD', 'output_linear.weight', 'D F'),
        ('shared/gate|up', 'DF', 'input_linear.weight', '2F D'),
        ('shared/down', 'FD', 'output_linear.weight', 'D F')),
    *hf.prefix_rows(
        'ffn', 'block_sparse_moe',
        ('router', 'DE', 'router.layer.weight', 'E D'),
        ('gate|up', 'EDF', 'input_linear.weight', 'E 2F D'),
        ('down', 'EFD', 'output_linear.weight', 'E D F')))


class HF(llama.Family):
  model_type = 'granitemoehybrid'
  architecture = 'GraniteMoeHybridForCausalLM'
  names = ROWS
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=hf.default_num_kv_heads, head_dim=hf.default_head_dim,
      vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-6,
      attention_bias=False, tie_word_embeddings=False) | {
          'embed_scale': ('embedding_multiplier', 1.0),
          'residual_scale': ('residual_multiplier', 1.0),
          'attention_scale': ('attention_multiplier', 1.0),
          'mamba2.heads': ('mamba_n_heads', 128),
          'mamba2.groups': ('mamba_n_groups', 1),
          'mamba2.state': ('mamba_d_state', 256),
          'mamba2.conv': ('mamba_d_conv', 4),
          'mamba2.conv_bias': ('mamba_conv_bias', True)}
  only = dict(hidden_act='silu', mamba_proj_bias=False)
  fields_without_effect = ('mamba_chunk_size',)

  def rows_of_layer(self, layer: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns table rows that name the Hugging Face tensor of each parameter of
    a layer's Mamba-2, or of its attention."""
    if layer.mixer == 'mamba2':
      return hf.prefix_rows('attention', 'mamba', *mamba2.MIXER_ROWS)
    return llama.attention_rows()

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
    # The type of each layer; by default, all are recurrences.
    num_layers = fields['num_layers']
    layer_types.check_number_of_layers('num_hidden_layers', num_layers)
    types = layer_types.read_entry_of_each_layer(reader, field='layer_types',
                                                 layers=num_layers,
                                                 words=KIND_OF_LAYER_TYPE)
    if not types:
      types = [layer_types.LINEAR_ATTENTION] * num_layers
    kind_names = [KIND_OF_LAYER_TYPE[layer_type] for layer_type in types]
    for name in FACTORS_ABOVE_ZERO:
      factor = reader(name, 1.0)
      require(factor > 0, f'config.json has {name} {factor}: it must be > 0')

    # The heads of the recurrence.
    num_heads = fields['mamba2.heads']
    inner_width = reader('mamba_expand', 2) * fields['d_model']
    head_dim = reader('mamba_d_head', inner_width // num_heads)
    require(head_dim * num_heads == inner_width,
            f'config.json has mamba_n_heads {num_heads} of mamba_d_head '
            f'{head_dim}, which are not mamba_expand times hidden_size, '
            f'{inner_width}')
    mamba2_fields = mamba2.read_step_limits(reader) | dict(head_dim=head_dim)

    model_fields = layer_types.pattern_and_kinds(kind_names, LAYER_KINDS)
    model_fields |= _read_ffn(reader)
    model_fields |= _read_positions(reader)
    return model_fields | dict(logits_scale=1 / reader('logits_scaling', 1.0),
                               mamba2=mamba2_fields)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The type of each layer.
    types = []
    for layer in config.layers(config.num_layers):
      if layer.mixer == 'mamba2':
        types.append(layer_types.LINEAR_ATTENTION)
      else:
        types.append(layer_types.FULL_ATTENTION)

    # The heads of the recurrence. Where no layer has one, sizes that fit.
    num_heads, head_dim = 1, config.d_model
    if layer_types.LINEAR_ATTENTION in types:
      sizes = config.part(Mamba2Config)
      num_heads, head_dim = sizes.heads, sizes.head_dim
    config_json = _write_ffn(config) | mamba2.write_step_limits(config) | dict(
        layer_types=types, mamba_expand=num_heads * head_dim // config.d_model,
        mamba_n_heads=num_heads, mamba_d_head=head_dim,
        logits_scaling=1 / config.logits_scale, position_embedding_type='nope')
    if config.position == 'rope':
      config_json['position_embedding_type'] = 'rope'
      config_json['rope_parameters'] = rope_fields.write_rope(config)
    return config_json

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    layer_types.check_has_attention(config)
    require(config.head_dim % 2 == 0, f'model.head_dim is {config.head_dim}: '
            f'transformers refuses a {config.arch} of odd heads, whether or '
            'not they turn')
