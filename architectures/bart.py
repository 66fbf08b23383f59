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
  """Returns the rows that map two parameters of an embedding to the tensors of
  a Hugging Face file: its learned positions, and its norm.

  Args:
    our_prefix: the beginning of the names of our parameters, such as
      'decoder_'.
    stack: 'encoder' or 'decoder', as the tensors' names have it.

  Returns:
    Rows of four strings: the path and the axes of a parameter of ours, and the
    name and the axes of its tensor in a Hugging Face file. 'HK D' are two axes,
    of which the first is ours of H and K as one (see tensor_map.py).
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
      'num_decoder_layers': ('decoder_layers', 12),
      'ffn': ('activation_function', 'gelu', hf.FFN_OF_ACTIVATION)}
  only = dict(is_encoder_decoder=True, tie_word_embeddings=True,
              normalize_before=False, normalize_embedding=True,
              add_final_layer_norm=False, add_bias_logits=False,
              static_position_embeddings=False)
  ignored = ()

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
    model_fields = transformer.read_stacks(reader, fields=fields, scaled=False)
    model_fields['logits_bias'] = reader('final_logits_bias', True)
    return model_fields

  def write(self, config: ModelConfig) -> dict:
    """Returns the fields of a Hugging Face config.json that `read` reads, with
    the values that say what this model is.

    Args:
      config: our config of the model.
    """
    return transformer.write_stacks(config) | dict(
        final_logits_bias=config.logits_bias,  # as transformer.py has it
        bos_token_id=0, pad_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None)

  def read_tensor_names(self, names: Collection[str]) -> dict:
    """Returns the fields of the model that are told by the names of the tensors
    in a folder."""
    return dict(logits_bias='final_logits_bias' in names)
