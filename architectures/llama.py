"""LLaMA: a decoder of RMSNorm, rotary positions and SwiGLU (Touvron et al.
2023a, section 2.2), with grouped heads from LLaMA 2 70B on (2023b; Llama 3:
Dubey et al. 2024).

  x_0 = E[tokens]
  a   = x + Attention(RMSNorm(x))         q and k turned by their position
  x'  = a + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(a)
  logits = RMSNorm(x_N) W                 a matrix of its own; no bias anywhere

Longer contexts: `model.rope.scaling` linear, ntk, dynamic, llama3, yarn or
longrope, by `model.rope.factor`.
"""

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder


class LLaMA(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='rmsnorm', block='pre_norm',
               attention='global', attention_bias=False,
               ffn='swiglu', ffn_bias=False, tie_embeddings=False)


# Rows that other systems have too.


def ends(norm: str = 'scale') -> tuple[hf.Row, ...]:
  """Returns the rows of the embedding, the final norm and the head."""
  return (('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
          (f'decoder/final_norm/{norm}', 'D', 'model.norm.weight', 'D'),
          ('head/kernel', 'DV', 'lm_head.weight', 'V D'))


def layers(*rows: hf.Row) -> tuple[hf.Row, ...]:
  """Returns rows of a layer with the layer before them."""
  return hf.under('decoder/layers', 'model.layers.{n}', *rows)


def norms(norm: str = 'scale') -> tuple[hf.Row, ...]:
  """Returns the rows of a layer's norms before its parts."""
  return ((f'attention_norm/{norm}', 'D', 'input_layernorm.weight', 'D'),
          (f'ffn_norm/{norm}', 'D', 'post_attention_layernorm.weight', 'D'))


def head_norms(axis: str = 'K', norm: str = 'scale') -> tuple[hf.Row, ...]:
  """Returns the rows of a layer's norms of queries and keys: of each head, or
  over all (axis U)."""
  return (
      (f'attention/query_norm/{norm}', axis, 'self_attn.q_norm.weight', axis),
      (f'attention/key_norm/{norm}', axis, 'self_attn.k_norm.weight', axis))


def attention(*more: hf.Row) -> tuple[hf.Row, ...]:
  """Returns the rows of a layer's attention, and `more` of it."""
  return hf.under('attention', 'self_attn', *hf.attention(
      'q_proj', 'k_proj', 'v_proj', 'o_proj', 'J'), *more)


FFN = (*hf.dense('gate', 'DF', 'gate_proj', 'F D'),
       *hf.dense('up', 'DF', 'up_proj', 'F D'),
       *hf.dense('down', 'FD', 'down_proj', 'D F'))


def experts(gate: str = 'gate_proj', up: str = 'up_proj',
            down: str = 'down_proj') -> tuple[hf.Row, ...]:
  """Returns the rows of experts whose matrices have these names."""
  return (('router', 'DE', 'gate.weight', 'E D'),
          ('gate', 'EDF', f'experts.{{e}}.{gate}.weight', 'F D'),
          ('up', 'EDF', f'experts.{{e}}.{up}.weight', 'F D'),
          ('down', 'EFD', f'experts.{{e}}.{down}.weight', 'D F'))


# All but the feed-forward networks, as Mixtral has them too.
NAMES = ends() + layers(*norms(), *attention())
SPAN = 'model.', 'transformer.'


class Family(hf.HuggingFace):
  """A folder of LLaMA, or of a system that took its names: with rotary
  positions, and with the names around the layers."""
  tied = {'lm_head.weight': 'model.embed_tokens.weight'}
  spellings = (('model.', ''),)
  ignored = (r'.*\.rotary_emb\.inv_freq',)

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    return dict(rope=rope_fields.read(reader))

  def write(self, c: ModelConfig) -> dict:
    return dict(rope_parameters=rope_fields.write(c))


class HF(Family):
  model_type = 'llama'
  architecture = 'LlamaForCausalLM'
  names = NAMES + layers(*hf.under('ffn', 'mlp', *FFN))
  fields = hf.fields(
      hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=hf.each_head, head_dim=hf.split_width,
      intermediate_size=11008, vocab_size=32000, max_position_embeddings=2048,
      rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False,
      tie_word_embeddings=False) | {'ffn': hf.SILU}
  only = dict(rope_interleaved=False)
  heads = hf.heads('Llama', tokens='score', span=SPAN)

  def check(self, c: ModelConfig) -> None:
    hf.check_heads(c)
