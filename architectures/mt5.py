"""mT5: T5 v1.1 over texts of 101 languages (Xue et al. 2021, arXiv 2010.11934).

  x_0 = E[tokens]                           E has 250,112 rows
  a   = x + Attention(RMSNorm(x))           scores q k + b[h, bucket(i - j)]
  b   = a + CrossAttention(RMSNorm(a), memory)          in the decoder
  x'  = b + W2 (gelu(Wg x) * W1 x)
  logits = W_head RMSNorm(x_N)

All is T5 v1.1's (architectures/t5.py) but the vocabulary. transformers does not
scale the logits of an mT5 whose head is tied, and goes by the tensors, not by
tie_word_embeddings, for whether it is; the head of an export is its own.
"""

from collections.abc import Collection

from architectures import t5
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import EncoderDecoder


class MT5(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""
  PARTS = t5.T5.PARTS | dict(ffn='geglu_tanh', tie_embeddings=False,
                             logits_scale=1.0)


DEFAULT_SIZES = hf.fields_with_defaults(vocab_size=250112, d_ff=1024,
                                        num_layers=8, num_heads=6) | {
    'ffn': ('feed_forward_proj', 'gated-gelu', t5.FFN_OF_ACTIVATION)}


class HF(t5.HF):
  model_type = 'mt5'
  architecture = 'MT5ForConditionalGeneration'
  fields = hf.drop_entries(t5.FIELDS | DEFAULT_SIZES, 'tie_embeddings')
  fields_without_effect = (*t5.HF.fields_without_effect, 'tie_word_embeddings')

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
    t5.check_ffn(reader, fields)
    return {}

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    config_json = super().write(config)  # T5's: the first and the padding id
    config_json['tie_word_embeddings'] = False
    return config_json

  def read_tensor_names(self, names: Collection[str]) -> dict:
    """Returns the fields of the model that are told by the names of the tensors
    in a folder."""
    return dict(tie_embeddings='lm_head.weight' not in names)
