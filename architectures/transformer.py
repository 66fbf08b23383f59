"""The Transformer: attention is all you need (Vaswani et al. 2017).

  x_0 = sqrt(d_model) E[tokens] + PE        sinusoids (section 3.5)
  a   = LayerNorm(x + Attention(x))         norm after the sum
  b   = LayerNorm(a + CrossAttention(a, memory))        in the decoder
  x'  = LayerNorm(b + W2 relu(W1 b))
  logits = x_N E^T                          one table: source, target, head

Trained with label smoothing 0.1 and a rate that rises for 4,000 steps and then
falls as 1 / sqrt(step). Sines and cosines alternate in the paper, and stand in
two halves in Marian (and in the paper's own code): the same up to a
permutation of the features, which training cannot tell apart. configs/
transformer.py takes `halves`, so that a run can be exported;
`model.sinusoidal.layout=interleaved` is the paper's formula to the letter.

Where transformers' Marian deviates from the paper, and what is done here:
- GELU or SiLU where its files say so. Here as well; by default ReLU.
- a bias on the logits, which it never trains: model.logits_bias, off by
  default. (Here it is a parameter like others.)
- it may leave the embedding unscaled (scale_embedding). Honoured.
- the embedding of padding gets no gradient from the input. Here it does,
  where a target starts with the padding token.
- tables of its own for source and target are not known here.
"""

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import EncoderDecoder
from common.errors import require


class Transformer(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""
  PARTS = dict(position='sinusoidal', sinusoidal=dict(layout='halves'),
               embed_scale=0.0,
               norm='layernorm', block='post_norm', attention='global',
               ffn='relu', tie_embeddings=True)


def attention_rows(ours: str, theirs: str) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  one attention, which GShard and OPT have too.

  Args:
    ours: our name of the attention.
    theirs: the name of it in transformers.
  """
  return hf.prefix_rows(ours, theirs, *hf.attention_rows(
      'q_proj', 'k_proj', 'v_proj', 'out_proj'))


def layer_rows(stack: str, *rows: hf.Row) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of a
  stack's layers, each below its prefix."""
  return hf.prefix_rows(f'{stack}/layers', f'model.{stack}.layers.{{n}}', *rows)


def read_stacks(reader: hf.Reader, fields: dict, scaled: bool) -> dict:
  """Reads what a Hugging Face config.json says of an encoder and a decoder
  apart, which must be the same for both, and the scale of the embedding.

  Args:
    reader: the reader of the config.json.
    fields: the fields of our config.model that were looked up before.
    scaled: whether the embedding is scaled where the file does not say.

  Returns:
    The field `embed_scale`: the root of d_model, or 1.

  Raises:
    RequestError: for a decoder with other heads or another network's width.
  """
  # Their name of the decoder's size, transformers' default, and our name.
  sizes = (('decoder_attention_heads', 16, 'num_heads'),
           ('decoder_ffn_dim', 4096, 'd_ff'))
  for name, default, our_name in sizes:
    value = reader(name, default)
    require(value == fields[our_name], f'config.json has {name} {value}: only '
            f'{fields[our_name]}, that of the encoder, is known here')
  reader.require_values(num_hidden_layers=fields['num_layers'])
  scale = 1.0
  if reader('scale_embedding', scaled):
    scale = fields['d_model'] ** 0.5
  return dict(embed_scale=scale)


def write_stacks(config: ModelConfig) -> dict:
  """Returns the fields of a config.json that `read_stacks` reads, and those
  that every model with an encoder and a decoder has."""
  return dict(decoder_attention_heads=config.num_heads,
              decoder_ffn_dim=config.d_ff,
              scale_embedding=config.embed_scale != 1, is_encoder_decoder=True,
              tie_word_embeddings=config.tie_embeddings)


FIELDS = hf.fields_with_defaults(d_model=1024, max_position_embeddings=1024) | {
    'num_heads': ('encoder_attention_heads', 16),
    'd_ff': ('encoder_ffn_dim', 4096), 'num_layers': ('encoder_layers', 12),
    'num_decoder_layers': ('decoder_layers', 12)}
# Fields that matter in training alone.
LAYERDROP_FIELDS = ('encoder_layerdrop', 'decoder_layerdrop')


LAYER_ROWS = (*attention_rows('attention', 'self_attn'),
              *hf.norm_rows('attention_norm', 'self_attn_layer_norm'),
              *hf.dense_rows('ffn/up', 'DF', 'fc1', 'F D'),
              *hf.dense_rows('ffn/down', 'FD', 'fc2', 'D F'),
              *hf.norm_rows('ffn_norm', 'final_layer_norm'))


class HF(hf.HuggingFace):
  model_type = 'marian'
  architecture = 'MarianMTModel'
  names = (
      ('embed/tokens', 'VD', 'model.shared.weight', 'V D'),
      ('head/bias', 'V', 'final_logits_bias', '1 V'),
      *layer_rows('encoder', *LAYER_ROWS),
      *layer_rows('decoder', *LAYER_ROWS,
                  *attention_rows('cross_attention', 'encoder_attn'),
                  *hf.norm_rows('cross_norm', 'encoder_attn_layer_norm')))
  fields = FIELDS | {
      'vocab_size': ('vocab_size', 58101),
      'ffn': ('activation_function', 'gelu', hf.FFN_OF_ACTIVATION)}
  only = dict(is_encoder_decoder=True, share_encoder_decoder_embeddings=True,
              tie_word_embeddings=True, normalize_before=False,
              normalize_embedding=False, add_final_layer_norm=False,
              add_bias_logits=False, static_position_embeddings=True)
  fields_without_effect = (*LAYERDROP_FIELDS, 'is_decoder')
  tied = {'model.encoder.embed_tokens.weight': 'model.shared.weight',
          'model.decoder.embed_tokens.weight': 'model.shared.weight',
          'lm_head.weight': 'model.shared.weight'}
  spellings = (('model.', ''),)
  # Sinusoids.
  ignored = (r'model\.(en|de)coder\.embed_positions\.weights?',)

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
    reader.require_values(decoder_vocab_size=fields['vocab_size'])
    model_fields = read_stacks(reader, fields=fields, scaled=False)
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
    return write_stacks(config) | dict(
        decoder_vocab_size=config.vocab_size,
        # Ours: whether the bias is there; transformers takes zeros where not.
        final_logits_bias=config.logits_bias,
        # Any token in the vocabulary serves: theirs must name one.
        pad_token_id=config.vocab_size - 1,
        decoder_start_token_id=config.vocab_size - 1,
        eos_token_id=0, forced_eos_token_id=None)
