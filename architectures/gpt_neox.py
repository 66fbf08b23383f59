"""GPT-NeoX: attention and feed-forward side by side (Black et al. 2022,
section 2.1; Pythia: Biderman et al. 2023).

  x' = x + Attention(LayerNorm_1(x)) + FFN(LayerNorm_2(x))
  logits = LayerNorm(x_N) W

Rotary positions turn the first quarter of each head (`model.rope.fraction`).
Their fused matrix holds query, key and value head by head.
"""

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder


class GPTNeoX(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', rope=dict(fraction=0.25), norm='layernorm',
               block='parallel', attention='global', ffn='gelu',
               tie_embeddings=False)


FFN = (*hf.dense('ffn/up', 'DF', 'mlp.dense_h_to_4h', 'F D'),  # Falcon's too
       *hf.dense('ffn/down', 'FD', 'mlp.dense_4h_to_h', 'D F'))


def layers(layer: str, attention: str) -> tuple[hf.Row, ...]:
  """Returns the rows of the layers, which BLOOM has too."""
  return hf.under(
      'decoder/layers', layer, *hf.norm('attention_norm', 'input_layernorm'),
      *hf.dense('attention/query|key|value', 'DHK',
                f'{attention}.query_key_value', 'H3K D'),
      *hf.dense('attention/out', 'HKD', f'{attention}.dense', 'D HK'),
      *hf.norm('ffn_norm', 'post_attention_layernorm'), *FFN)


class HF(hf.HuggingFace):
  model_type = 'gpt_neox'
  architecture = 'GPTNeoXForCausalLM'
  names = (
      ('embed/tokens', 'VD', 'gpt_neox.embed_in.weight', 'V D'),
      *layers('gpt_neox.layers.{n}', 'attention'),
      *hf.norm('decoder/final_norm', 'gpt_neox.final_layer_norm'),
      ('head/kernel', 'DV', 'embed_out.weight', 'V D'))
  fields = hf.fields(
      hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
      intermediate_size=24576, vocab_size=50432, max_position_embeddings=2048,
      layer_norm_eps=1e-5, tie_word_embeddings=False) | {
          'ffn': ('hidden_act', 'gelu', hf.FFNS)}
  unread = ('is_decoder',)  # The system has no other way to be.
  tied = {'embed_out.weight': 'gpt_neox.embed_in.weight'}
  spellings = (('gpt_neox.', ''),)
  ignored = (r'.*\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)',)
  heads = hf.heads('GPTNeoX')

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    rope = rope_fields.read(reader, theta=('rotary_emb_base', 10000.0),
                            fraction=('rotary_pct', 0.25))
    # Some versions wrote both under other names as well, which none reads.
    reader.must(rope_theta=rope['theta'],
                partial_rotary_factor=rope['fraction'])
    parallel = reader('use_parallel_residual', True)
    return dict(rope=rope, block='parallel' if parallel else 'pre_norm')

  def write(self, c: ModelConfig) -> dict:
    return dict(rope_parameters=rope_fields.write(c, whole_heads=False),
                use_parallel_residual=c.block == 'parallel')
