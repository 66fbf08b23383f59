"""StarCoder2: a decoder of LayerNorm, rotary positions, grouped heads and GELU,
with biases (Lozhkov et al. 2024, arXiv 2402.19173, section 6).

  a   = x + Attention(LayerNorm(x))       a query sees the last 4,096 keys
  x'  = a + W_down gelu(W_up n + b) + b,  n = LayerNorm(a)
  logits = LayerNorm(x_N) E^T
"""

from architectures import llama, mistral
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import Decoder


class StarCoder2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = mistral.Mistral.PARTS | dict(
      norm='layernorm', ffn='gelu_tanh', attention_bias=True, ffn_bias=True,
      tie_embeddings=True)


class HF(mistral.HF):
  model_type = 'starcoder2'
  architecture = 'Starcoder2ForCausalLM'
  names = (
      ('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
      *llama.layer_rows(
          *hf.norm_rows('attention_norm', 'input_layernorm'),
          *llama.attention_rows(),
          *hf.norm_rows('ffn_norm', 'post_attention_layernorm'),
          *hf.dense_rows('ffn/up', 'DF', 'mlp.c_fc', 'F D'),
          *hf.dense_rows('ffn/down', 'FD', 'mlp.c_proj', 'D F')),
      *hf.norm_rows('decoder/final_norm', 'model.norm'),
      ('head/kernel', 'DV', 'lm_head.weight', 'V D'))
  fields = hf.fields_with_defaults(
      hidden_size=3072, num_hidden_layers=30, num_attention_heads=24,
      num_key_value_heads=2, head_dim=hf.default_head_dim,
      intermediate_size=12288,
      vocab_size=49152, max_position_embeddings=4096,
      tie_word_embeddings=True) | {
          'norm_eps': ('norm_epsilon', 1e-5),
          'ffn': ('hidden_act', 'gelu_pytorch_tanh', hf.FFN_OF_ACTIVATION)}
  heads = hf.task_heads('Starcoder2', tokens='score',
                        only=('sequence', 'tokens'))

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
    bias = reader('use_bias', True)
    model_fields = super().read(reader, fields)  # Mistral's: rope and window
    if not reader.has('sliding_window'):  # where a mistral has 4096
      model_fields |= dict(attention='global', sliding_window=0)
    model_fields['attention_bias'] = bias
    model_fields['ffn_bias'] = bias
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
    config_json = super().write(config)  # Mistral's: rope and window
    config_json['use_bias'] = config.ffn_bias
    return config_json

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    hf.check_heads_divide_width(config)
