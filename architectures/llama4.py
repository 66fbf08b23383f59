"""Llama 4, of text: attention within chunks in three layers of four, and to all
tokens without positions in the fourth; an expert a token beside one that all
share (Meta 2025, "The Llama 4 herd"; as in transformers).

  a  = x + W_o Attention(q, k, v)     q, k turned, then q / rms(q), k / rms(k)
                                      in the smaller model; a token sees its own
                                      chunk of 8,192
  a  = x + W_o Attention(g q, k, v)   in every fourth layer, not turned, with
       g = 1 + 0.1 log(1 + floor((position + 1) / 8192))
  x' = a + SwiGLU(n) + SwiGLU_e(s n),  n = RMSNorm(a)
       e = argmax W_r n,  s = sigmoid of its logit
  x' = a + SwiGLU(n)                  in every second layer of the larger one

Turned pairs are neighbours. The published folders also hold what reads images:
transformers' Llama4ForCausalLM reads one and writes it without.
"""

from typing import Any

from architectures import llama
from architectures.parts import hf
from architectures.parts.attention.fields import AttentionConfig
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require
from common.kinds import DENSE_NETWORK

CHUNKED_ATTENTION = 'chunked_attention'
# A norm follows the turning there, so the temperatures of others would vanish.
SCALING_OF_ROPE_TYPE = {name: rope_fields.SCALING_OF_ROPE_TYPE[name]
                        for name in ('default', 'linear', 'dynamic', 'llama3')}


class Llama4(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      rope=dict(interleaved=True), qk_norm_scale=False,
      pattern='chunk,chunk,chunk,full', kinds=dict(
          chunk=dict(attention='chunked', qk_norm=True),
          full=dict(position='none', attention_log_scale=0.1)),
      ffn='moe', moe=dict(router='sigmoid_plain', top_k=1, ffn='swiglu',
                          shared_experts=1, gate_inputs=True))


def _name_and_kind(is_chunked: bool, is_rotated: bool, has_experts: bool,
                   has_norm: bool, scale: float) -> tuple[str, dict[str, Any]]:
  """Makes a kind of layer with these properties: its name, and the fields of
  config.model that it overrides.

  Args:
    is_chunked: whether a token sees only the keys of its own chunk.
    is_rotated: whether queries and keys are rotated by their positions.
    has_experts: whether the network is a mixture of experts.
    has_norm: whether queries and keys have a norm if they are rotated.
    scale: by how much queries grow with their position if they are not rotated.

  Returns:
    The name, such as 'chunk' or 'full_dense', and the fields.
  """
  name, kind = 'full', {}
  if is_chunked:
    name = 'chunk'
    kind['attention'] = 'chunked'
  # Most layers are both chunked and rotated, or neither. The name mentions
  # positions only in the other cases.
  if is_chunked != is_rotated:
    name += '_turned' if is_rotated else '_nope'
  if is_rotated:
    kind['qk_norm'] = has_norm
  else:
    kind |= dict(position='none', attention_log_scale=scale)
  if not has_experts:
    name += '_dense'
    kind['ffn'] = DENSE_NETWORK
  return name, kind


class HF(llama.Family):
  model_type = 'llama4_text'
  architecture = 'Llama4ForCausalLM'
  names = llama.ROWS + llama.layer_rows(*hf.prefix_rows(
      'ffn', 'feed_forward', *llama.FFN_ROWS,
      *hf.prefix_rows('shared', 'shared_expert', *llama.FFN_ROWS),
      ('router', 'DE', 'router.weight', 'E D'),
      ('gate|up', 'EDF', 'experts.gate_up_proj', 'E D 2F'),
      ('down', 'EFD', 'experts.down_proj', 'E F D')))
  fields = hf.fields_with_defaults(
      hidden_size=5120, num_hidden_layers=48, num_attention_heads=40,
      num_key_value_heads=8, head_dim=128, vocab_size=202048,
      max_position_embeddings=131072, rms_norm_eps=1e-5, attention_bias=False,
      tie_word_embeddings=False, num_local_experts=16,
      router_aux_loss_coef=0.001) | {
          'd_ff': ('intermediate_size_mlp', 16384),
          'moe.d_ff': ('intermediate_size', 8192),
          'moe.ffn': hf.GATED_FFN_FIELD}
  only = dict(num_experts_per_tok=1)
  fields_without_effect = ('router_jitter_noise',)  # transformers reads none.

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
    has_rope = layer_types.read_layers_with_rope(reader, num_layers)

    # The layers that see a chunk alone: by default, those with positions.
    chunk = 0
    if not reader.is_null('attention_chunk_size'):
      chunk = reader('attention_chunk_size', 8192)
    types = layer_types.read_entry_of_each_layer(
        reader, field='layer_types', layers=num_layers,
        words=(CHUNKED_ATTENTION, layer_types.FULL_ATTENTION))
    if not types:
      types = [layer_types.FULL_ATTENTION] * num_layers
      for n, is_rotated in enumerate(has_rope):
        if is_rotated and chunk:
          types[n] = CHUNKED_ATTENTION
    require(chunk or CHUNKED_ATTENTION not in types,
            f'config.json has layers of {CHUNKED_ATTENTION} in layer_types, '
            'but no attention_chunk_size')

    # The layers that have experts.
    step = reader('interleave_moe_layer_step', 1)
    experts = range(step - 1, num_layers, step)
    if reader.has('moe_layers'):
      experts = reader.read_list('moe_layers')

    # The kinds of layer.
    has_norm = reader('use_qk_norm', True)
    scale = reader('attn_scale', 0.1)
    if not reader('attn_temperature_tuning', True):
      scale = 0.0
    kind_names, kinds = [], {}
    for n, (layer_type, is_rotated) in enumerate(zip(types, has_rope)):
      name, kind = _name_and_kind(
          is_chunked=layer_type == CHUNKED_ATTENTION,
          is_rotated=bool(is_rotated), has_experts=n in experts,
          has_norm=has_norm, scale=scale)
      kind_names.append(name)
      kinds[name] = kind
    rope = rope_fields.read_rope(reader, theta=('rope_theta', 5e5),
                                 interleaved=True, words=SCALING_OF_ROPE_TYPE)
    return layer_types.shortest_pattern(kind_names) | dict(
        kinds=kinds, attention_chunk=chunk, rope=rope,
        attention_log_from=reader('floor_scale', 8192))

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The kind of attention, the positions and the network of each layer.
    types, has_rope, layers_with_experts = [], [], []
    rotated_layers, scales = [], []
    for n, layer in enumerate(config.layers(config.num_layers)):
      if layer.attention == 'chunked':
        types.append(CHUNKED_ATTENTION)
      else:
        types.append(layer_types.FULL_ATTENTION)
      has_rope.append(int(layer.position == 'rope'))
      if layer.ffn == 'moe':
        layers_with_experts.append(n)
      if layer.position == 'rope':
        rotated_layers.append(layer)
      else:
        scales.append(layer.part(AttentionConfig).attention_log_scale)
    require(rotated_layers, 'no layer of this model has positions: a llama4 '
            'config.json is of a model with some')

    # All layers with positions agree, and so do all without.
    scale = max(scales, default=0.0)
    rope = rope_fields.write_rope(
        rotated_layers[0], words=SCALING_OF_ROPE_TYPE)
    config_json = dict(
        layer_types=types, no_rope_layers=has_rope,
        moe_layers=layers_with_experts,
        attention_chunk_size=config.attention_chunk or None,
        use_qk_norm=rotated_layers[0].part(AttentionConfig).qk_norm,
        attn_temperature_tuning=scale > 0,
        floor_scale=config.part(AttentionConfig).attention_log_from,
        rope_parameters=rope)
    if scale:
      config_json['attn_scale'] = scale
    return config_json
