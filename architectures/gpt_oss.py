"""gpt-oss: a decoder of experts with a bias everywhere, every other layer with
a window, and a sink in each head (OpenAI 2025, arXiv 2508.10925, section 2).

  o = softmax([q k^T / sqrt(K), s_h])[:-1] v   s_h is learned: no key need be
                                               attended to
  y = sum over the 4 best experts of softmax(their logits)_e * FFN_e(n)
  FFN(n) = W_down (g sigmoid(1.702 g) (u + 1)) + b
           g = min(W_gate n + b, 7), u = W_up n + b between -7 and 7

The first layer of two attends to the last 128 tokens. Positions turn by YaRN, a
factor of 32 from 4,096 tokens on, whose ramp begins and ends between two
frequencies (`rope.truncate=False`). The router has a bias too.
"""

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.moe.routing import MoEConfig
from architectures.parts.skeletons import Decoder
from common.errors import require


class GptOss(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      pattern='local,global',
      kinds={'local': dict(window=32), 'global': dict(window=0)},
      attention_sinks=True, attention_bias=True, ffn='moe', ffn_bias=True,
      moe=dict(router='topk', top_k=4, ffn='swiglu_clamped', logit_bias=True))


class HF(llama.Family):
  model_type = 'gpt_oss'
  architecture = 'GptOssForCausalLM'
  names = llama.ROWS + llama.layer_rows(
      ('attention/sink', 'H', 'self_attn.sinks', 'H'),
      ('ffn/router', 'DE', 'mlp.router.weight', 'E D'),
      ('ffn/logit_bias', 'E', 'mlp.router.bias', 'E'),
      # Hidden unit by hidden unit, its gate before the other factor.
      ('ffn/gate|up', 'EDF', 'mlp.experts.gate_up_proj', 'E D F2'),
      ('ffn/gate_bias|up_bias', 'EF', 'mlp.experts.gate_up_proj_bias',
       'E F2'),
      ('ffn/down', 'EFD', 'mlp.experts.down_proj', 'E F D'),
      ('ffn/down_bias', 'ED', 'mlp.experts.down_proj_bias', 'E D'))
  fields = hf.fields_with_defaults(
      hidden_size=2880, num_hidden_layers=36, num_attention_heads=64,
      num_key_value_heads=8, head_dim=64, intermediate_size=2880,
      vocab_size=201088, max_position_embeddings=131072, rms_norm_eps=1e-5,
      attention_bias=True, tie_word_embeddings=False, num_local_experts=128,
      num_experts_per_tok=4, router_aux_loss_coef=0.001) | {
          'clamp.alpha': ('swiglu_alpha', 1.702),
          'clamp.limit': ('swiglu_limit', 7.0)}
  only = dict(hidden_act='silu')
  heads = hf.task_heads(
      'GptOss', tokens='score', only=('sequence', 'tokens'))

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
    hf.check_gates(fields)
    scaling = reader('rope_parameters', reader('rope_scaling', {}))
    require(scaling, 'config.json has no rope_parameters: transformers takes '
            'YaRN with a factor of 32 from 4,096 tokens on then; write it '
            'there')
    num_layers = fields['num_layers']
    types = layer_types.read_attention_types(
        reader, layers=num_layers, has_window=lambda n: n % 2 == 0)
    window = reader('sliding_window', 128)
    rope = rope_fields.read_rope(reader, theta=('rope_theta', 150000.0))
    model_fields = layer_types.fields_of_attention_types(
        types, layers=num_layers, window=window)
    model_fields['rope'] = rope
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
    # The type of each layer, LLaMA's rotary positions (super), and the width
    # of an expert, which Hugging Face calls as that of a dense network.
    config_json = layer_types.write_attention_types(config)
    config_json |= super().write(config)
    config_json['intermediate_size'] = config.part(MoEConfig).d_ff
    return config_json
