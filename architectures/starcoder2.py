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
      *llama.layers(
          *hf.norm('attention_norm', 'input_layernorm'), *llama.attention(),
          *hf.norm('ffn_norm', 'post_attention_layernorm'),
          *hf.dense('ffn/up', 'DF', 'mlp.c_fc', 'F D'),
          *hf.dense('ffn/down', 'FD', 'mlp.c_proj', 'D F')),
      *hf.norm('decoder/final_norm', 'model.norm'),
      ('head/kernel', 'DV', 'lm_head.weight', 'V D'))
  fields = hf.fields(
      hidden_size=3072, num_hidden_layers=30, num_attention_heads=24,
      num_key_value_heads=2, head_dim=hf.split_width, intermediate_size=12288,
      vocab_size=49152, max_position_embeddings=4096,
      tie_word_embeddings=True) | {
          'norm_eps': ('norm_epsilon', 1e-5),
          'ffn': ('hidden_act', 'gelu_pytorch_tanh', hf.FFNS)}
  heads = hf.heads('Starcoder2', tokens='score', only=('sequence', 'tokens'))

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    bias = reader('use_bias', True)
    return super().read(reader, fields) | dict(
        attention_bias=bias, ffn_bias=bias)

  def write(self, c: ModelConfig) -> dict:
    return super().write(c) | dict(use_bias=c.ffn_bias)

  def check(self, c: ModelConfig) -> None:
    hf.check_heads(c)
