"""ZAYA1: a mixture of experts whose attention is convolved, whose routers read
the router of the layer before, and whose residual sums are scaled (Zyphra 2026,
arXiv 2605.05365, section II; as transformers' zaya).

  x_0 = s (E[tokens] + b)
  a   = s_1 (x + b_1) + s_2 (CCA(RMSNorm(x)) + b_2)
  x'  = s_3 (a + b_3) + s_4 (g E_e(m) + b_4),     m = RMSNorm(a)
  r'  = W_d m + b_d + s_r r                       r of the layer before
  p   = softmax(W_3 gelu(W_2 gelu(W_1 RMSNorm(r') + b_5) + b_6)),   g = p_e
  logits = RMSNorm(x_N) E^T

A token goes to the one expert e with the largest p_e + bias_e, of which the
last returns nothing. All s and b are learned for each feature. CCA, in
parts/attention/convolved.py, has heads that are half as wide in all as the
model, of which half of the features turn. The first layer has no s_r. A
config.json may give layers a window, and another theta (hybrid_sliding).
"""

from typing import Any

from architectures import llama, phi3
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require

# The entries of layer_types in a config.json.
GLOBAL, LOCAL = 'hybrid', 'hybrid_sliding'
# The positions where a config.json does not say.
GLOBAL_ROPE = dict(theta=5e6, fraction=0.5)
LOCAL_ROPE = dict(theta=1e4, fraction=0.5)


def order_of_layers(types: list[str], window: int = 0,
                    local_rope: dict[str, Any] | None = None
                    ) -> dict[str, Any]:
  """Returns the fields of config.model that say what each layer has: the router
  of the first has no factor for an earlier one, and some layers may have a
  window.

  Args:
    types: for each layer 'hybrid', or 'hybrid_sliding' for one with a window.
    window: how many tokens the layers with a window see.
    local_rope: the fields of model.rope in these layers; None: LOCAL_ROPE.

  Returns:
    The order of the layers (`prefix`, `pattern`, `suffix`, names of kinds), and
    `kinds`, the fields that each kind overrides.
  """
  kind_names = []
  kinds: dict[str, dict[str, Any]] = {}
  for n, layer_type in enumerate(types):
    name = 'global'
    kind: dict[str, Any] = {}
    if layer_type == LOCAL:
      name = 'local'
      kind = dict(window=window, rope=local_rope or LOCAL_ROPE)
    if n == 0:
      name += '_first'
      kind['router_memory'] = False
    kind_names.append(name)
    kinds[name] = kind
  return layer_types.shortest_pattern(kind_names) | dict(kinds=kinds)


class Zaya(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | order_of_layers([GLOBAL] * 4) | dict(
      cca=True, rope=GLOBAL_ROPE, residual='affine', embed_affine=True,
      tie_embeddings=True, ffn='moe', moe=dict(
          router='softmax_bias', top_k=1, normalize_gates=False, ffn='swiglu',
          router_dim=256, zero_experts=1, zero_experts_skip=True))


def _sum_rows(ours: str, theirs: str) -> tuple[hf.Row, ...]:
  """Returns the rows that name the Hugging Face tensors of the sum after a
  branch.

  Args:
    ours: the folder of our parameters.
    theirs: the name of the module in transformers.
  """
  return hf.prefix_rows(
      ours, theirs, ('stream_scale', 'D', 'residual_scale', 'D'),
      ('stream_bias', 'D', 'residual_bias', 'D'),
      ('branch_scale', 'D', 'hidden_states_scale', 'D'),
      ('branch_bias', 'D', 'hidden_states_bias', 'D'))


# The convolutions of queries and keys are one there, of all their heads.
ATTENTION_ROWS = hf.prefix_rows(
    'attention', 'self_attn', *hf.dense_rows('out', 'HKD', 'o_proj', 'D HK'),
    ('key_temperature', 'J', 'qk_norm.temp', 'J')) + hf.prefix_rows(
        'attention', 'self_attn.qkv_proj',
        *hf.dense_rows('query', 'DHK', 'q_proj', 'HK D'),
        *hf.dense_rows('key', 'DJK', 'k_proj', 'JK D'),
        *hf.dense_rows('value', 'DJK', 'v_proj_current', 'JK D'),
        *hf.dense_rows('value_before', 'DJK', 'v_proj_delayed', 'JK D'),
        ('query_taps|key_taps', 'WHK|WJK', 'conv_qk_depthwise.weight',
         'HK+JK 1 W'),
        ('query_taps_bias|key_taps_bias', 'HK|JK', 'conv_qk_depthwise.bias',
         'HK+JK'),
        ('query_mix|key_mix', 'WHKU|WJKU', 'conv_qk_grouped.weight',
         'HU+JU K W'),
        ('query_mix_bias|key_mix_bias', 'HK|JK', 'conv_qk_grouped.bias',
         'HK+JK'))
EXPERT_ROWS = hf.prefix_rows(
    'ffn', 'mlp', ('gate|up', 'EDF', 'experts.gate_up_proj', 'E 2F D'),
    ('down', 'EFD', 'experts.down_proj', 'E D F'),
    *hf.dense_rows('router_down', 'DU', 'gate.down_proj', 'U D'),
    ('router_factor', 'U', 'gate.router_states_scale', 'U'),
    ('router_norm', 'U', 'gate.router_mlp.norm.weight', 'U'),
    *hf.dense_rows('router_hidden_1', 'TU', 'gate.router_mlp.fc1', 'U T'),
    *hf.dense_rows('router_hidden_2', 'TU', 'gate.router_mlp.fc2', 'U T'),
    ('router', 'UE', 'gate.router_mlp.out_proj.weight', 'E U'),
    ('router_bias', 'E', 'gate.balancing_biases', 'E'))


class HF(llama.Family):
  model_type = 'zaya'
  architecture = 'ZayaForCausalLM'
  names = llama.embedding_and_head_rows() + (
      ('head/bias', 'V', 'lm_head.bias', 'V'),
      ('embed/scale', 'D', 'model.input_hidden_states_scale', 'D'),
      ('embed/shift', 'D', 'model.input_hidden_states_bias', 'D'),
      *llama.layer_rows(
          *llama.norm_rows(), *ATTENTION_ROWS, *EXPERT_ROWS,
          *_sum_rows('attention_streams', 'post_attention_residual_scale'),
          *_sum_rows('ffn_streams', 'post_mlp_residual_scale')))
  fields = hf.fields_with_defaults(
      hidden_size=2048, num_hidden_layers=40, num_attention_heads=8,
      num_key_value_heads=2, head_dim=128, vocab_size=262272,
      max_position_embeddings=131072, rms_norm_eps=1e-5, attention_bias=False,
      tie_word_embeddings=True, moe_intermediate_size=2048,
      num_experts=16) | {
          'moe.ffn': hf.GATED_FFN_FIELD, 'logits_bias': ('lm_head_bias', False),
          'moe.router_dim': ('router_hidden_size', 256),
          'cca_taps': ('cca_time0', 2), 'cca_head_taps': ('cca_time1', 2)}
  only = dict(num_experts_per_tok=1)

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
    # Which layers have a window (LOCAL), which see all tokens (GLOBAL), and how
    # wide the window is. Without layer_types, none has one.
    num_layers = fields['num_layers']
    layer_types.check_number_of_layers('num_hidden_layers', num_layers)
    types = layer_types.read_entry_of_each_layer(
        reader, field='layer_types', layers=num_layers, words=(GLOBAL, LOCAL))
    if not types:
      types = [GLOBAL] * num_layers
    window = reader.read_count('sliding_window', 0)
    require(window or LOCAL not in types, 'config.json has layers of '
            f'{LOCAL} in layer_types, but no sliding_window')

    # The rotary positions of the two kinds of layer. They are those of the
    # published model where the file does not say.
    local_rope, global_rope = LOCAL_ROPE, GLOBAL_ROPE
    if reader.has('rope_parameters'):
      local_rope, global_rope = rope_fields.read_rope_of_layer_kinds(
          reader, (LOCAL, ('rope_theta', 1e4)), (GLOBAL, ('rope_theta', 5e6)),
          fraction=('partial_rotary_factor', 1.0))
    model_fields = order_of_layers(types, window, local_rope)
    return model_fields | dict(rope=global_rope)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The file has one set of rotary positions for each type of layer. Should
    # layers of one type differ, the last one stands here, and an export then
    # notices that the file says another model. transformers also wants the
    # positions of a type that no layer has, for which any will do. It turns a
    # part of each head (whole_heads=False), as this system does.
    rope_of_config = rope_fields.write_rope(config, whole_heads=False)
    rope_of_type = {GLOBAL: rope_of_config, LOCAL: rope_of_config}
    types = []
    window = None
    for layer in config.layers(config.num_layers):
      layer_type = GLOBAL
      attention_type = layer_types.attention_type(layer)
      if attention_type == layer_types.SLIDING_ATTENTION:
        layer_type = LOCAL
        window = layer.sliding_window
      types.append(layer_type)
      rope_of_type[layer_type] = rope_fields.write_rope(
          layer, whole_heads=False)
    return dict(
        layer_types=types, sliding_window=window, rope_parameters=rope_of_type,
        # Nulls. Left out, transformers takes the ids of special tokens from
        # the published vocabulary, which may lie outside of ours.
        **dict.fromkeys(phi3.TOKEN_ID_FIELDS))
