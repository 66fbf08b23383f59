"""LFM2, dense: gated short convolutions in most layers, and attention in the
others (Liquid AI 2025, "LFM2 Technical Report", arXiv 2511.23404).

  a  = x + ShortConv(n(x))                in 10 layers of 16, or in 22 of 30
  a  = x + W_o Attention(q, k, W_v m)     in the others,  m = n(x)
       q, k = n(W_q m), n(W_k m)          each head by itself, then turned
  x' = a + W_down (silu(W_gate m) * W_up m),  m = n(a)
  logits = n(x_N) E^T                     n is RMSNorm; no bias anywhere

parts/recurrent/short_conv.py has the convolution, over 3 tokens. A config.json
may give the hidden units before they are reduced to two thirds and rounded up
to a multiple (block_auto_adjust_ff_dim), as the published ones of 16 layers do.
"""

from architectures import llama, phi3
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require

SHORT_CONVOLUTION = 'conv'  # in layer_types, and our kind of layer
LAYER_KINDS = {SHORT_CONVOLUTION: dict(mixer='short_conv'), 'full': {}}
KIND_OF_LAYER_TYPE = {SHORT_CONVOLUTION: SHORT_CONVOLUTION,
                      layer_types.FULL_ATTENTION: 'full'}


class LFM2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(qk_norm=True, tie_embeddings=True,
                                   pattern='conv,full', kinds=LAYER_KINDS)


def _read_hidden_units(reader: hf.Reader) -> int:
  """Computes the number of hidden units of LFM2's feed-forward networks from
  four fields of a Hugging Face config.json, as transformers' Lfm2MLP does.

  Args:
    reader: the fields of the config.json: `reader(name, default)` returns one.

  Raises:
    RequestError: if the fields give no hidden units.
  """
  width = reader('block_ff_dim', reader('intermediate_size', 12288))
  factor = reader('block_ffn_dim_multiplier', 1.0)
  multiple = reader('block_multiple_of', 256)
  if reader('block_auto_adjust_ff_dim', True):
    # Two thirds, times the factor, rounded up to the multiple.
    width = int(factor * int(2 * width / 3))
    width = -(-width // multiple) * multiple
  require(width > 0, f'config.json has block_ffn_dim_multiplier {factor}, by '
          'which the networks have no hidden units')
  return width


def decoder_rows(name_of_out_product: str = 'out_proj', norm: str = 'layernorm'
                 ) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  an LFM2 decoder.

  Args:
    name_of_out_product: the name in transformers of the last product of
      attention.
    norm: the end of the names there of the norms of queries and keys.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  # The layers that attend.
  attention = hf.prefix_rows(
      'attention', 'self_attn',
      ('query', 'DHK', 'q_proj.weight', 'HK D'),
      ('key', 'DJK', 'k_proj.weight', 'JK D'),
      ('value', 'DJK', 'v_proj.weight', 'JK D'),
      ('out', 'HKD', f'{name_of_out_product}.weight', 'D HK'),
      ('query_norm/scale', 'K', f'q_{norm}.weight', 'K'),
      ('key_norm/scale', 'K', f'k_{norm}.weight', 'K'))
  # The layers that are a gated short convolution: its input product makes three
  # arrays (U) of I channels, and W taps.
  convolution = hf.prefix_rows(
      'attention', 'conv',
      *hf.dense_rows('in', 'DUI', 'in_proj', 'UI D'),
      ('conv', 'WI', 'conv.weight', 'I 1 W'),
      ('conv_bias', 'I', 'conv.bias', 'I'),
      *hf.dense_rows('out', 'ID', 'out_proj', 'D I'))
  # The network of all layers, and the rest of the model.
  network = hf.prefix_rows(
      'ffn', 'feed_forward',
      ('gate', 'DF', 'w1.weight', 'F D'),
      ('up', 'DF', 'w3.weight', 'F D'),
      ('down', 'FD', 'w2.weight', 'D F'))
  return (
      ('embed/tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
      ('decoder/final_norm/scale', 'D', 'model.embedding_norm.weight', 'D'),
      ('head/kernel', 'DV', 'lm_head.weight', 'V D'),
      *llama.layer_rows(
          ('attention_norm/scale', 'D', 'operator_norm.weight', 'D'),
          ('ffn_norm/scale', 'D', 'ffn_norm.weight', 'D'),
          *attention, *convolution, *network))


class HF(llama.Family):
  model_type = 'lfm2'
  architecture = 'Lfm2ForCausalLM'
  names = decoder_rows()
  fields = hf.fields_with_defaults(
      hidden_size=2560, num_hidden_layers=32, num_attention_heads=32,
      num_key_value_heads=8, head_dim=hf.default_head_dim, vocab_size=65536,
      max_position_embeddings=128000, norm_eps=1e-5) | {
          'tie_embeddings': ('tie_embedding|tie_word_embeddings', True),
          'short_conv.kernel': ('conv_L_cache', 3),
          'short_conv.bias': ('conv_bias', False)}

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
    types = layer_types.read_entry_of_each_layer(reader, field='layer_types',
                                                 layers=num_layers,
                                                 words=KIND_OF_LAYER_TYPE)
    # Without a list of types, the file may list the numbers of the layers with
    # attention. Without either, all layers have attention.
    full_layers = range(num_layers)
    if reader.has('full_attn_idxs'):
      full_layers = reader.read_list('full_attn_idxs')
    if not types:
      types = [SHORT_CONVOLUTION] * num_layers
      for n in range(num_layers):
        if n in full_layers:
          types[n] = layer_types.FULL_ATTENTION
    kind_names = [KIND_OF_LAYER_TYPE[layer_type] for layer_type in types]
    rope = rope_fields.read_rope(reader, theta=('rope_theta', 1e6))
    return layer_types.pattern_and_kinds(kind_names, LAYER_KINDS) | dict(
        d_ff=_read_hidden_units(reader), rope=rope)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The type of each layer.
    types = []
    for layer in config.layers(config.num_layers):
      if layer.mixer == 'short_conv':
        types.append(SHORT_CONVOLUTION)
      else:
        types.append(layer_types.FULL_ATTENTION)
    # The width of the networks is written as it is, to be taken unchanged.
    return dict(
        layer_types=types, intermediate_size=config.d_ff,
        block_auto_adjust_ff_dim=False,
        rope_parameters=rope_fields.write_rope(config),
        # Nulls. Left out, transformers takes the ids of special tokens from
        # the published vocabulary, which may lie outside of ours.
        **dict.fromkeys(phi3.TOKEN_ID_FIELDS))

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    layer_types.check_has_attention(config)
