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
  """Returns the number of hidden units of LFM2's feed-forward networks, which
  follows from four fields of a Hugging Face config.json.

  The rule is that of transformers' Lfm2MLP.

  Args:
    reader: the reader of the config.json.

  Raises:
    RequestError: for fields by which there would be none.
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
  """Returns the rows that give the Hugging Face names of an LFM2 decoder.

  Args:
    name_of_out_product: the name in transformers of the last product of
      attention.
    norm: the end of the names there of the norms of queries and keys.

  Returns:
    Rows of four strings: the path and the axes of a parameter of ours, and the
    name and the axes of its tensor in a Hugging Face file. 'HK D' are two axes,
    of which the first is ours of H and K as one (see tensor_map.py).
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
    """Returns the fields of our config.model that take more than looking up one
    field of a Hugging Face config.json.

    Args:
      reader: reads that file: `reader(name, default)` returns a field and marks
        it as read. The import refuses a file with fields that nothing has read
        and that may matter; `ignore_fields` marks those that do not.
      fields: the fields of ours that were looked up before, by flat name.

    Returns:
      Further fields of config.model, with a dict for each group, such as rope.
      They replace those of `fields`.
    """
    num_layers = fields['num_layers']
    layer_types.check_number_of_layers('num_hidden_layers', num_layers)
    types = layer_types.read_entry_of_each_layer(reader, field='layer_types',
                                                 layers=num_layers,
                                                 words=KIND_OF_LAYER_TYPE)
    # Where they are not listed, the layers of attention may be numbered.
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
    """Returns the fields of a Hugging Face config.json that `read` reads, with
    the values that say what this model is.

    Args:
      config: our config of the model.
    """
    types = []
    for layer in config.layers(config.num_layers):
      if layer.mixer == 'short_conv':
        types.append(SHORT_CONVOLUTION)
      else:
        types.append(layer_types.FULL_ATTENTION)
    return dict(
        layer_types=types, intermediate_size=config.d_ff,
        block_auto_adjust_ff_dim=False,
        rope_parameters=rope_fields.write_rope(config),
        **dict.fromkeys(phi3.TOKEN_ID_FIELDS))

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    layer_types.check_has_attention(config)
