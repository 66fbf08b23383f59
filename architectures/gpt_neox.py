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


# Falcon has these rows too.
FFN_ROWS = (*hf.dense_rows('ffn/up', 'DF', 'mlp.dense_h_to_4h', 'F D'),
            *hf.dense_rows('ffn/down', 'FD', 'mlp.dense_4h_to_h', 'D F'))


def layer_rows(layer: str, attention: str) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  the layers, which BLOOM has too.

  Args:
    layer: the prefix of a layer's tensors, with {n} for its number.
    attention: the name of the module of attention in a layer.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  return hf.prefix_rows(
      'decoder/layers', layer,
      *hf.norm_rows('attention_norm', 'input_layernorm'),
      *hf.dense_rows('attention/query|key|value', 'DHK',
                     f'{attention}.query_key_value', 'H3K D'),
      *hf.dense_rows('attention/out', 'HKD', f'{attention}.dense', 'D HK'),
      *hf.norm_rows('ffn_norm', 'post_attention_layernorm'), *FFN_ROWS)


class HF(hf.HuggingFace):
  model_type = 'gpt_neox'
  architecture = 'GPTNeoXForCausalLM'
  names = (
      ('embed/tokens', 'VD', 'gpt_neox.embed_in.weight', 'V D'),
      *layer_rows('gpt_neox.layers.{n}', 'attention'),
      *hf.norm_rows('decoder/final_norm', 'gpt_neox.final_layer_norm'),
      ('head/kernel', 'DV', 'embed_out.weight', 'V D'))
  fields = hf.fields_with_defaults(
      hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
      intermediate_size=24576, vocab_size=50432, max_position_embeddings=2048,
      layer_norm_eps=1e-5, tie_word_embeddings=False) | {
          'ffn': ('hidden_act', 'gelu', hf.FFN_OF_ACTIVATION)}
  fields_without_effect = ('is_decoder',)  # The system has no other way to be.
  tied = {'embed_out.weight': 'gpt_neox.embed_in.weight'}
  spellings = (('gpt_neox.', ''),)
  ignored = (r'.*\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)',)
  heads = hf.task_heads('GPTNeoX')

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
    rope = rope_fields.read_rope(reader, theta=('rotary_emb_base', 10000.0),
                                 fraction=('rotary_pct', 0.25))
    # Some versions wrote both under other names as well, which none reads.
    reader.require_values(rope_theta=rope['theta'],
                          partial_rotary_factor=rope['fraction'])
    block = 'pre_norm'
    if reader('use_parallel_residual', True):
      block = 'parallel'
    return dict(rope=rope, block=block)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    rope = rope_fields.write_rope(config, whole_heads=False)
    return dict(rope_parameters=rope,
                use_parallel_residual=config.block == 'parallel')
