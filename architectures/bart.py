"""BART: BERT's encoder and GPT's decoder in one model, which writes a damaged
text anew (Lewis et al. 2020, arXiv 1910.13461).

  x_0 = LayerNorm(E[tokens] + P[2..L+1])    P and the norm: each stack's own
  a   = LayerNorm(x + Attention(x))
  b   = LayerNorm(a + CrossAttention(a, memory))        in the decoder
  x'  = LayerNorm(b + W2 gelu(W1 b))
  logits = x_N E^T                          one table: source, target, head

The first token stands at row 2 of the tables of positions, as in RoBERTa, and a
target starts after the token that ends texts. transformers adds a bias to the
logits, which its files hold and it never trains: model.logits_bias, off by
default, of an import whether the files have one.
"""

from collections.abc import Collection

from architectures import transformer
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import EncoderDecoder


class BART(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""
  DECODER_EMBED = 'decoder_'
  STARTS_AFTER_END = True
  PARTS = dict(position='learned', learned=dict(offset=2), norm='layernorm',
               embed_norm=True, block='post_norm', attention='global',
               ffn='gelu', tie_embeddings=True)


def _embedding_rows(our_prefix: str, stack: str) -> tuple[hf.Row, ...]:
  """Returns the table by which two parameters of an embedding, its learned
  positions and its norm, are converted to tensors of a Hugging Face file, and
  back.

  Args:
    our_prefix: what the names of our parameters begin with, such as 'decoder_'.
    stack: 'encoder' or 'decoder', which is a part of the tensors' names.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  hf_prefix = f'model.{stack}'
  return ((f'embed/{our_prefix}positions', 'LD',
           f'{hf_prefix}.embed_positions.weight', 'L D'),
          *hf.norm_rows(f'embed/{our_prefix}norm',
                        f'{hf_prefix}.layernorm_embedding'))


class HF(transformer.HF):
  model_type = 'bart'
  architecture = 'BartForConditionalGeneration'
  names = (*transformer.HF.names, *_embedding_rows('', 'encoder'),
           *_embedding_rows(BART.DECODER_EMBED, 'decoder'))
  fields = transformer.FIELDS | hf.fields_with_defaults(vocab_size=50265) | {
      'ffn': ('activation_function', 'gelu', hf.FFN_OF_ACTIVATION)}
  only = dict(is_encoder_decoder=True, tie_word_embeddings=True,
              normalize_before=False, normalize_embedding=True,
              add_final_layer_norm=False, add_bias_logits=False,
              static_position_embeddings=False)
  ignored = ()

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
    model_fields = transformer.read_stacks(reader, fields=fields, scaled=False)
    model_fields['logits_bias'] = reader('final_logits_bias', True)
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
    return transformer.write_stacks(config) | dict(
        final_logits_bias=config.logits_bias,  # as transformer.py has it
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None)

  def read_tensor_names(self, names: Collection[str]) -> dict:
    """Returns the fields of the model that are told by the names of the tensors
    in a folder."""
    return dict(logits_bias='final_logits_bias' in names)
