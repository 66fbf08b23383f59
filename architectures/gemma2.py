"""Gemma 2: a decoder with a norm before and after each part, and layers that
see a window and the whole text in turn (Gemma Team 2024, section 2).

  x_0 = E[tokens] sqrt(D)
  a   = x + n(Attention(n(x)))      n(x) = x / rms(x) * (1 + offset)
  x'  = a + n(W_down (gelu(W_gate m) * W_up m)),  m = n(a)
  scores = 50 tanh(q k / (50 s)),  logits = 30 tanh(n(x_N) E^T / 30)

s is sqrt(K), but in 27B sqrt(D / H). The first layer of two sees 4,096 tokens.
"""

from typing import Any

from architectures import llama
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.skeletons import Decoder
from common.errors import require


class Gemma2(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = llama.LLaMA.PARTS | dict(
      norm='rmsnorm_1p', block='sandwich', attention_softcap=50.0,
      pattern='local,global',
      kinds={'local': dict(window=128), 'global': dict(window=0)},
      ffn='geglu_tanh', tie_embeddings=True, embed_scale=0.0,
      logits_softcap=30.0)


def read_alternating_layers(reader: hf.Reader, fields: dict, interval: int,
                            **kind_fields: Any) -> dict:
  """Reads from a Hugging Face config.json which layers attend to a sliding
  window of keys, and which to all keys.

  Args:
    reader: the fields of the config.json.
    fields: the fields of our config.model that were looked up before.
    interval: if the file does not list the types of the layers, the last of
      every `interval` layers sees all keys.
    **kind_fields: further arguments of layer_types.fields_of_attention_types.

  Returns:
    Fields of config.model: the window, the order of the layers, and how each
    kind of layer differs from the model's own fields.
  """
  # Layers are numbered from 0, so layer interval - 1 is the first that sees all
  # keys.
  num_layers = fields['num_layers']
  types = layer_types.read_attention_types(
      reader, layers=num_layers, has_window=lambda n: (n + 1) % interval)
  window = reader('sliding_window', 4096)
  return layer_types.fields_of_attention_types(
      types, layers=num_layers, window=window, **kind_fields)


def read_scales(reader: hf.Reader, softcap: float = 30.0) -> dict:
  """Returns the fields of the model for the factor on the scores of attention
  and for the soft cap (a bound) of the logits, as Gemma 2 and 3 have them."""
  return dict(
      attention_scale=reader('query_pre_attn_scalar', 256) ** -0.5,
      logits_softcap=read_softcap(reader, 'final_logit_softcapping',
                                  default=softcap))


def read_softcap(reader: hf.Reader, name: str, default: float) -> float:
  """Returns the bound that tanh sets to logits (a soft cap), as a field of a
  Hugging Face config.json holds it; 0 if it is null: there is none.

  Args:
    reader: the reader of the config.json.
    name: the name of the field.
    default: transformers' default of it.

  Raises:
    RequestError: for a cap that is not above 0.
  """
  # reader() would take null for the default, so null is told apart first.
  reader.ignore_fields(name)
  if reader.is_null(name):
    return 0.0
  if not reader.has(name):
    return default
  softcap = reader(name, default)
  require(softcap > 0,
          f'config.json has {name} {softcap}: it must be > 0, or null')
  return softcap


def write_scales(config: ModelConfig) -> dict:
  """Returns the fields of a config.json that `read_scales` reads."""
  return dict(query_pre_attn_scalar=round(config.attention_scale ** -2),
              final_logit_softcapping=config.logits_softcap or None)


def decoder_rows(norm: str = 'offset') -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of a
  Gemma decoder.

  Args:
    norm: the name of our parameter of a norm, 'offset' where it is w - 1.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  hf_name_of_norm = {'attention_norm': 'input_layernorm',
                     'attention_out_norm': 'post_attention_layernorm',
                     'ffn_norm': 'pre_feedforward_layernorm',
                     'ffn_out_norm': 'post_feedforward_layernorm'}
  norms = []
  for our_name, hf_name in hf_name_of_norm.items():
    norms.append((f'{our_name}/{norm}', 'D', f'{hf_name}.weight', 'D'))
  network = hf.prefix_rows('ffn', 'mlp', *llama.FFN_ROWS)
  layers = llama.layer_rows(*norms, *llama.attention_rows(), *network)
  return *llama.embedding_and_head_rows(norm), *layers


class HF(llama.Family):
  model_type = 'gemma2'
  architecture = 'Gemma2ForCausalLM'
  names = decoder_rows()
  fields = hf.fields_with_defaults(
      hidden_size=2304, num_hidden_layers=26, num_attention_heads=8,
      num_key_value_heads=4, head_dim=256, intermediate_size=9216,
      vocab_size=256000, max_position_embeddings=8192, rms_norm_eps=1e-6,
      attention_bias=False, tie_word_embeddings=True) | {
          'ffn': ('hidden_activation', 'gelu_pytorch_tanh',
                  hf.GATED_FFN_OF_ACTIVATION)}
  only = dict(use_bidirectional_attention=False)
  heads = hf.task_heads(
      'Gemma2', tokens='score', only=('sequence', 'tokens'))

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
    # Three dicts are joined that have no field in common: the window and the
    # order of the layers, the scales, and LLaMA's rotary positions (super).
    softcap = read_softcap(reader, 'attn_logit_softcapping', default=50.0)
    model_fields = read_alternating_layers(reader, fields=fields, interval=2)
    model_fields |= read_scales(reader)
    model_fields |= super().read(reader, fields)
    model_fields['attention_softcap'] = softcap
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
    # Three dicts are joined that have no field in common: the scales, the type
    # of each layer, and LLaMA's rotary positions (super).
    config_json = write_scales(config)
    config_json |= layer_types.write_attention_types(config)
    config_json |= super().write(config)
    config_json['attn_logit_softcapping'] = config.attention_softcap or None
    return config_json

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    hf.check_heads_divide_width(config)
