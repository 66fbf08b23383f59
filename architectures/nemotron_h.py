"""Nemotron-H: Mamba-2, few layers of attention without positions, and networks
of squared ReLU, each with its own norm (NVIDIA 2025, arXiv 2504.03624; with
experts Nemotron 3 Nano, arXiv 2512.20848).

  x' = x + Mamba2(n(x))                         written M
  x' = x + W_o Attention(q, k, v)               written *
  x' = x + W_down relu(W_up n(x))^2             written -
  x' = x + shared(n(x)) + gate_scale * sum over the 6 best of 128 experts of
           g_e E_e(n(x))                        written E, as in DeepSeek-V3;
           Super: W_up sum over the 22 best of 512 of g_e E_e(W_down n(x))
  logits = n(x_N) W                             n is RMSNorm

What transformers calls a layer is one of these. A layer here is M or *, and
with it the network that follows, which is the same function: M-M*- has three
layers, of kinds mamba_mlp, mamba and attention_mlp. A network that follows no
M or * is refused.
"""

from collections.abc import Sequence
from typing import Any

from architectures import deepseek_v2, deepseek_v3, llama, mamba2, qwen3_next
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import Decoder
from common.errors import require

MAMBA, ATTENTION, DENSE_NETWORK, EXPERTS = 'M', '*', '-', 'E'
# The letter by the entry of layers_block_type in a config.json.
LETTER_OF_BLOCK_TYPE = {
    layer_types.LINEAR_ATTENTION: MAMBA, layer_types.FULL_ATTENTION: ATTENTION,
    'mlp': DENSE_NETWORK, 'moe': EXPERTS, 'mamba': MAMBA,
    'attention': ATTENTION}
LAYER_KINDS = {
    'mamba': dict(mixer='mamba2', ffn='none'),
    'mamba_mlp': dict(mixer='mamba2', ffn='relu2'),
    'mamba_moe': dict(mixer='mamba2', ffn='moe'),
    'attention': dict(ffn='none'),
    'attention_mlp': dict(ffn='relu2'),
    'attention_moe': dict(ffn='moe')}
# The field of a config.json for the width of the shared network.
SHARED_EXPERT_WIDTH = 'moe_shared_expert_intermediate_size'


def pattern_of_letters(pattern: Sequence[str]) -> dict[str, Any]:
  """Translates the letters by which Nemotron-H describes its layers to fields
  of our config.model.

  M (Mamba-2) and * (attention) begin a layer. - (a dense network) and E
  (experts) belong to the layer before them. So M-M* makes three layers, of the
  kinds mamba_mlp, mamba and attention.

  Args:
    pattern: the letters.

  Returns:
    The number and the order of the layers, and what each kind of layer is.

  Raises:
    RequestError: if a network does not follow Mamba-2 or attention.
  """
  kind_names: list[str] = []
  for letter in pattern:
    if letter == MAMBA:
      kind_names.append('mamba')
    elif letter == ATTENTION:
      kind_names.append('attention')
    else:
      require(kind_names and '_' not in kind_names[-1], 'the layers '
              f'{"".join(pattern)} have a network that follows no Mamba-2 and '
              'no attention: here it belongs to the layer with one of these')
      kind_names[-1] += '_mlp' if letter == DENSE_NETWORK else '_moe'
  order = layer_types.pattern_and_kinds(kind_names, LAYER_KINDS)
  return order | dict(num_layers=len(kind_names))


class NemotronH(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(
      position='none', norm='rmsnorm', block='pre_norm', attention='global',
      attention_bias=False, ffn='relu2', ffn_bias=False, tie_embeddings=False,
      pattern='mamba_mlp,mamba,mamba_mlp,attention_mlp',
      kinds={name: LAYER_KINDS[name] for name in (
          'mamba_mlp', 'mamba', 'attention_mlp')},
      moe=dict(router='sigmoid', top_k=6, ffn='relu2', shared_experts=2))


# transformers counts a mixer and a network as a layer each: {m}.
LAYER_PREFIX = 'backbone.layers.{m}'
ROWS = (
    ('embed/tokens', 'VD', 'backbone.embeddings.weight', 'V D'),
    *hf.prefix_rows(
        'decoder/layers', LAYER_PREFIX,
        ('attention_norm/scale', 'D', 'norm.weight', 'D'),
        ('ffn_norm/scale', 'D', 'norm.weight', 'D'),
        *hf.prefix_rows(
            'ffn', 'mixer', *llama.FFN_ROWS, *llama.expert_rows(),
            *deepseek_v2.SHARED_EXPERT_ROWS,
            *hf.dense_rows('latent_down', 'DU', 'fc1_latent_proj', 'U D'),
            *hf.dense_rows('latent_up', 'UD', 'fc2_latent_proj', 'D U'),
            ('router_bias', 'E', 'gate.e_score_correction_bias', 'E'))),
    ('decoder/final_norm/scale', 'D', 'backbone.norm_f.weight', 'D'),
    ('head/kernel', 'DV', 'lm_head.weight', 'V D'))


def _read_letters(reader: hf.Reader) -> list[str]:
  """Reads the order of the layers of a Hugging Face config.json, where Mamba-2,
  attention and networks are layers of their own.

  Args:
    reader: the reader of the config.json, which lists them as words or writes
      them as one string of letters.

  Returns:
    A letter for each: M for Mamba-2, * for attention, - for a dense network and
    E for experts.

  Raises:
    RequestError: for another word or letter.
  """
  reader.ignore_fields('num_hidden_layers', 'hybrid_override_pattern')
  if reader.has('layers_block_type'):
    types = reader.read_list('layers_block_type')
    layer_types.read_entry_of_each_layer(reader, field='layers_block_type',
                                         layers=len(types),
                                         words=LETTER_OF_BLOCK_TYPE)
    return [LETTER_OF_BLOCK_TYPE[block_type] for block_type in types]
  letters = list(reader('hybrid_override_pattern', 'ME*-'))
  require(set(letters) <= set(LETTER_OF_BLOCK_TYPE.values()), 'config.json has '
          f'hybrid_override_pattern {"".join(letters)!r}: its letters are '
          'M, *, - and E')
  return letters


class HF(hf.HuggingFace):
  model_type = 'nemotron_h'
  architecture = 'NemotronHForCausalLM'
  names = ROWS
  layer_prefix = LAYER_PREFIX
  fields = hf.fields_with_defaults(
      hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
      head_dim=128, intermediate_size=21504, vocab_size=131072,
      max_position_embeddings=4096, layer_norm_epsilon=1e-5,
      moe_intermediate_size=7688, num_experts_per_tok=2, topk_group=1,
      routed_scaling_factor=1.0, norm_topk_prob=True, n_routed_experts=8,
      n_group=1) | {
          'moe.latent_dim': ('moe_latent_size', 0),
          'mamba2.heads': ('mamba_num_heads', 128),
          'mamba2.head_dim': ('mamba_head_dim', 64),
          'mamba2.groups': ('n_groups', 8),
          'mamba2.state': ('ssm_state_size', 128),
          'mamba2.conv': ('conv_kernel', 4),
          'mamba2.conv_bias': ('use_conv_bias', True),
          # A bound of every step, and not only of the first weights.
          'mamba2.least_step': ('time_step_min', 0.001)}
  only = dict(tie_word_embeddings=False, use_bias=False, sliding_window=None,
              mlp_hidden_act='relu2', mamba_hidden_act='silu')
  fields_without_effect = (
      'chunk_size', 'expand', 'mamba_proj_bias', 'mamba_ssm_cache_dtype',
      'moe_shared_expert_overlap', 'mtp_hybrid_override_pattern',
      'mtp_layers_block_type', 'n_shared_experts', 'num_logits_to_keep',
      'partial_rotary_factor', 'rescale_prenorm_residual',
      'residual_in_fp32', 'rope_theta', 'time_step_floor',
      'time_step_limit', 'time_step_max', 'use_mamba_kernels')
  spellings = (('backbone.', 'model.'),)
  module = ('backbone.', 'model.')
  optional = qwen3_next.HF.optional

  def rows_of_layer(self, layer: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns table rows that name the Hugging Face tensor of each parameter of
    a layer's Mamba-2, or of its attention.

    Args:
      layer: our config of the layer.

    Returns:
      Rows of four strings: the path and the axes of our parameter, and the name
      and the axes of its tensor (parts/hf/tensor_map.py explains the axes).
    """
    if layer.mixer == 'mamba2':
      return hf.prefix_rows('attention', 'mixer', *mamba2.MIXER_ROWS)
    return hf.prefix_rows(
        'attention', 'mixer', ('query', 'DHK', 'q_proj.weight', 'HK D'),
        ('key', 'DJK', 'k_proj.weight', 'JK D'),
        ('value', 'DJK', 'v_proj.weight', 'JK D'),
        ('out', 'HKD', 'o_proj.weight', 'D HK'))

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
    letters = _read_letters(reader)
    require(letters, 'config.json has no layers: layers_block_type must name '
            'some')
    layer_types.check_number_of_layers('layers', len(letters))
    deepseek_v3.note_multi_token_prediction(reader)
    if EXPERTS not in letters:
      reader.ignore_fields(SHARED_EXPERT_WIDTH)
      return pattern_of_letters(letters)
    hf.check_gates(fields)
    shared_experts = hf.read_shared_experts(
        reader, SHARED_EXPERT_WIDTH, default=7688, width=fields['moe.d_ff'])
    return pattern_of_letters(letters) | dict(
        moe=dict(shared_experts=shared_experts))

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # A layer here is a mixer and, mostly, a network, each a layer there.
    types: list[str] = []
    for layer in config.layers(config.num_layers):
      if layer.mixer == 'mamba2':
        types.append(layer_types.LINEAR_ATTENTION)
      else:
        types.append(layer_types.FULL_ATTENTION)
      if layer.ffn == 'moe':
        types.append('moe')
      elif layer.ffn != 'none':
        types.append('mlp')
    config_json = dict(layers_block_type=types, num_nextn_predict_layers=0)
    if config.has_experts:
      moe = config.part(MoEConfig)
      config_json['moe_latent_size'] = moe.latent_dim or None
      config_json[SHARED_EXPERT_WIDTH] = moe.shared_experts * moe.d_ff
    return config_json

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    layer_types.check_has_attention(config)
