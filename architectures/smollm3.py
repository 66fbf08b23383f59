"""SmolLM3: LLaMA with grouped heads, and with no positions in every fourth
layer (Hugging Face 2025, "SmolLM3: smol, multilingual, long-context reasoner";
layers without positions: Yang et al. 2025, arXiv 2501.18795).

  q, k = W_q n, W_k n,  n = RMSNorm(x)    turned, but in every fourth layer
  a    = x + W_o Attention(q, k, W_v n)
  x'   = a + W_down (silu(W_gate m) * W_up m),  m = RMSNorm(a)
  logits = RMSNorm(x_N) E^T               tied; no bias anywhere

The layers without positions know them by the causal mask and the layers below.
A config.json names them one by one (no_rope_layers, 0) or says that each n-th
is one, and may give layers a window; the published one does not.
"""

from architectures import llama, phi3
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types, rope_fields
from architectures.parts.skeletons import Decoder


class SmolLM3(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      pattern='rope,rope,rope,nope', tie_embeddings=True,
      kinds={'rope': {}, 'nope': dict(position='none')})


def _pattern_of_layers(types: list[str], has_rope: list[int], window: int
                       ) -> dict:
  """Returns the fields of config.model that say what each layer has: rotary
  positions or none, a sliding window or none.

  Args:
    types: for each layer 'sliding_attention' or 'full_attention'.
    has_rope: for each layer 1 where it has positions, and 0 where it has none.
    window: the number of tokens that the layers with a window see; 0: none has
      one.

  Returns:
    The fields `position`, `attention` and `sliding_window` of the model; the
    order of the layers; and `kinds`, what each kind of layer has of its own.
  """
  # If all layers have positions, or none has, they differ only in the window.
  model_fields = layer_types.fields_of_attention_types(
      types, layers=len(has_rope), window=window)
  if len(set(has_rope)) == 1:
    return model_fields | dict(position='rope' if has_rope[0] else 'none')

  # There are up to four kinds of layer. A kind says that it has no window only
  # if other kinds have one.
  kind_names, kinds = [], {}
  for layer_type, is_rotated in zip(types, has_rope):
    name, kind = 'rope', {}
    if not is_rotated:
      name = 'nope'
      kind['position'] = 'none'
    if layer_type == layer_types.SLIDING_ATTENTION:
      name += '_local'
      kind['window'] = window
    elif layer_types.SLIDING_ATTENTION in types:
      kind['window'] = 0
    kind_names.append(name)
    kinds[name] = kind
  return layer_types.shortest_pattern(kind_names) | dict(
      position='rope', attention='global', sliding_window=0, kinds=kinds)


class HF(llama.Family):
  model_type = 'smollm3'
  architecture = 'SmolLM3ForCausalLM'
  names = llama.HF.names
  fields = llama.HF.fields | hf.fields_with_defaults(
      hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
      num_key_value_heads=4, vocab_size=128256, max_position_embeddings=32768,
      tie_word_embeddings=True)
  heads = hf.task_heads('SmolLM3', tokens='score', span=llama.SPAN_PREFIXES)

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
    has_rope = layer_types.read_layers_with_rope(reader, num_layers)
    window = 0
    if reader.has('sliding_window'):
      window = reader('sliding_window', 4096)
    # A window that is not used is read all the same, so that it counts as
    # known.
    if not reader('use_sliding_window', False):
      window = 0
    types = layer_types.read_attention_types(
        reader, layers=num_layers,
        has_window=lambda n: window and not has_rope[n])
    model_fields = _pattern_of_layers(types, has_rope=has_rope, window=window)
    if reader.is_null('num_key_value_heads'):  # left out, there are 4
      model_fields['num_kv_heads'] = fields['num_heads']
    model_fields['rope'] = rope_fields.read_rope(reader,
                                                 theta=('rope_theta', 2e6))
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
    layers = config.layers(config.num_layers)
    rotated_layers = [layer for layer in layers if layer.position == 'rope']
    # Where no layer is rotated, the field says how one would be.
    if rotated_layers:
      rope = rope_fields.write_rope(rotated_layers[0])
    else:
      rope = rope_fields.write_rope(config)
    config_json = layer_types.write_attention_types(config)
    has_window = layer_types.SLIDING_ATTENTION in config_json['layer_types']
    return config_json | dict(
        # Nulls. Left out, transformers takes the ids of special tokens from
        # a vocabulary of 128,256, which may lie outside of ours.
        **dict.fromkeys(phi3.TOKEN_ID_FIELDS),
        rope_parameters=rope,
        no_rope_layers=[int(layer.position == 'rope') for layer in layers],
        use_sliding_window=has_window)
