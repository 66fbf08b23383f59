"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, and a
mixture of 512 narrow experts beside one that every token goes through (Qwen
Team 2025, "Qwen3-Next: Towards Ultimate Training & Inference Efficiency").

  a  = x + DeltaNet(n(x))                     in three layers of four
  a  = x + W_o (Attention(q, k, W_v m) * sigmoid(W_g m)),  m = n(x)
       q, k = n(W_q m), n(W_k m)              each head by itself; a quarter of
                                              its features turns
  x' = a + sum over the 10 best of 512 experts of g_e * SwiGLU_e(m)
         + sigmoid(w m) * SwiGLU(m),  m = n(a)
  g  = softmax(W_r m) of the chosen, divided by their sum
  n(x) = x / rms(x) * (1 + offset)

No bias anywhere. parts/recurrent/linear_attention.py has the recurrence, whose
32 heads of values share 16 of queries and keys. A config.json may name layers
without experts (mlp_only_layers, decoder_sparse_step), whose network is
SwiGLU; the published one has none. The published files also hold a module that
predicts a second token (mtp), which is not here.
"""

from architectures import llama, qwen3_moe
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.recurrent.linear_attention import DeltaNetConfig
from architectures.parts.skeletons import Decoder


# Choices that Qwen3.5 has too.
HYBRID_PARTS = llama.LLaMA.PARTS | dict(
    rope=dict(fraction=0.25), norm='rmsnorm_1p', attention_gate='elementwise',
    qk_norm=True, pattern='linear,linear,linear,full',
    kinds=dict(linear=dict(mixer='deltanet'), full={}))


class Qwen3Next(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = HYBRID_PARTS | dict(
      ffn='moe', moe=dict(router='topk', top_k=10, ffn='swiglu',
                          shared_experts=1, shared_gate=True))


def read_experts(reader: hf.Reader, fields: dict) -> dict:
  """Reads the shared expert from a Hugging Face config.json. It is a dense
  network beside the experts of a mixture, which all tokens go through.

  Args:
    reader: the fields of the config.json.
    fields: the fields of our config.model that were looked up before.

  Returns:
    The field `shared_experts` of config.model.moe, which is the width of the
    shared expert as a multiple of an expert's.
  """
  hf.check_gates(fields)
  shared_experts = hf.read_shared_experts(
      reader, 'shared_expert_intermediate_size', default=512,
      width=fields['moe.d_ff'])
  return dict(shared_experts=shared_experts)


def write_experts(config: ModelConfig) -> dict:
  """Returns the field of a config.json that `read_experts` reads."""
  moe = config.part(MoEConfig)
  return dict(shared_expert_intermediate_size=moe.shared_experts * moe.d_ff)


BASE_ROWS = (
    *llama.embedding_and_head_rows('offset'), *qwen3_moe.FFN_ROWS,
    *llama.layer_rows(
        *llama.norm_rows('offset'), *hf.prefix_rows(
            'ffn', 'mlp', *hf.prefix_rows(
                'shared', 'shared_expert', *llama.FFN_ROWS),
            ('shared_gate', 'DU', 'shared_expert_gate.weight', 'U D'))))
ATTENTION_ROWS = (
    *hf.dense_rows('attention/query|output_gate', 'DHK', 'self_attn.q_proj',
                   'H2K D'),
    *llama.attention_rows()[2:], *llama.head_norm_rows(norm='offset'))


# The rows of a recurrence, but for the products with its input.
STATE_ROWS = (
    ('query_conv|key_conv|value_conv', 'WJK|WJK|WHU', 'conv1d.weight',
     'JK+JK+HU 1 W'),
    ('decay_scale', 'H', 'A_log', 'H'), ('decay_bias', 'H', 'dt_bias', 'H'),
    ('out_norm/scale', 'U', 'norm.weight', 'U'),
    ('out', 'HUD', 'out_proj.weight', 'D HU'))


def attention_rows(config: ModelConfig) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of a
  layer of attention, with those of biases if the model has them."""
  rows = []
  for row in ATTENTION_ROWS:
    _, _, tensor_name, _ = row
    if config.attention_bias or not tensor_name.endswith('bias'):
      rows.append(row)
  return tuple(rows)


DELTANET_FIELDS = hf.fields_with_defaults(
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
    linear_value_head_dim=128, linear_conv_kernel_dim=4)
# It is of the convolutions too, which are SiLU's here.
SWIGLU_FIELD = 'hidden_act', 'silu', {'silu': 'swiglu'}


class HF(llama.Family):
  model_type = 'qwen3_next'
  architecture = 'Qwen3NextForCausalLM'
  names = BASE_ROWS
  fields = hf.fields_with_defaults(
      hidden_size=2048, num_hidden_layers=48, num_attention_heads=16,
      num_key_value_heads=2, head_dim=256, intermediate_size=5632,
      vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6,
      attention_bias=False, tie_word_embeddings=False,
      moe_intermediate_size=512, num_experts=512, num_experts_per_tok=10,
      norm_topk_prob=True, router_aux_loss_coef=0.001
  ) | DELTANET_FIELDS | {'moe.ffn': SWIGLU_FIELD}
  only = dict(use_sliding_window=False)
  optional = {'module that predicts a second token': r'mtp\..*'}
  heads = hf.task_heads('Qwen3Next', tokens='score', span=llama.SPAN_PREFIXES)

  def rows_of_layer(self, layer: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns table rows that name the Hugging Face tensors of a layer's gated
    DeltaNet, or its attention.

    A fused tensor of the DeltaNet goes head of keys by head of keys. For each
    of the J heads it has the query, the key, and the values and the gates of
    the R heads of values that belong to it.

    Args:
      layer: our config of the layer.

    Returns:
      Rows of four strings: the path and the axes of our parameter, and the name
      and the axes of its tensor (parts/hf/tensor_map.py explains the axes).
    """
    if layer.mixer != 'deltanet':
      return attention_rows(layer)
    num_key_heads = layer.part(DeltaNetConfig).key_heads
    return hf.prefix_rows(
        'attention', 'linear_attn',
        ('query|key|value|output_gate', 'DJK|DJK|DHU|DHU',
         'in_proj_qkvz.weight', 'J(K+K+RU+RU) D'),
        ('rate|decay', 'DH', 'in_proj_ba.weight', f'J={num_key_heads}(R+R) D'),
        *STATE_ROWS)

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
    model_fields = layer_types.read_recurrent_layers(
        reader, layers=fields['num_layers'], mixer='deltanet')
    model_fields['rope'] = rope_fields.read_rope(
        reader, fraction=('partial_rotary_factor', 0.25))
    model_fields['moe'] = read_experts(reader, fields)
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
    config_json = layer_types.write_recurrent_layers(config)
    config_json |= write_experts(config)
    config_json['rope_parameters'] = rope_fields.write_rope(config,
                                                            whole_heads=False)
    return config_json

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    layer_types.check_has_attention(config)
