"""T5: text to text (Raffel et al. 2020), and v1.1 (Shazeer 2020).

  x_0 = E[tokens]                           no absolute positions
  a   = x + Attention(RMSNorm(x))           scores q k + b[h, bucket(i - j)]
  b   = a + CrossAttention(RMSNorm(a), memory)          in the decoder
  x'  = b + W2 relu(W1 RMSNorm(b))          v1.1: W2 (gelu(Wg x) * W1 x)
  logits = RMSNorm(x_N) E^T / sqrt(d_model)            v1.1: a matrix of its own

There is no bias anywhere; scores are not scaled; one table of relative biases
serves all layers of a stack, and cross-attention has none. Weights are born
with variance 1 / fan_in (truncated; the paper's code draws normally), those of
the query by 1 / sqrt(head_dim) smaller, embeddings with variance 1.

The paper's code drops the outputs of both stacks too; here dropout acts on the
embedding, on what each part adds to the residual stream, and with
attention_dropout and ffn_dropout on attention weights and hidden units.
"""

from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.skeletons import EncoderDecoder
from common.errors import require


class T5(EncoderDecoder):
  """source [B, M], target [B, L] -> Output; see EncoderDecoder."""
  PARTS = dict(position='relative', norm='rmsnorm', block='pre_norm',
               attention='global', attention_bias=False, attention_scale=1.0,
               ffn='relu', ffn_bias=False, tie_embeddings=True,
               logits_scale=0.0)


def stack_rows(stack: str, *ffn: hf.Row) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  the encoder or the decoder, which Switch has too.

  Args:
    stack: 'encoder' or 'decoder', as the names of the tensors have it.
    *ffn: the rows of a feed-forward network.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  # A block is attention, in the decoder cross-attention, and the network.
  block = f'{stack}.block.{{n}}'
  rows = hf.prefix_rows(
      f'{stack}/layers', f'{block}.layer.0',
      *_attention_rows('attention', 'attention_norm', 'SelfAttention'))
  number_of_network = 1
  if stack == 'decoder':
    rows += hf.prefix_rows(
        f'{stack}/layers', f'{block}.layer.1',
        *_attention_rows('cross_attention', 'cross_norm', 'EncDecAttention'))
    number_of_network = 2
  rows += hf.prefix_rows(
      f'{stack}/layers', f'{block}.layer.{number_of_network}',
      ('ffn_norm/scale', 'D', 'layer_norm.weight', 'D'), *ffn)
  # The biases, of all layers or of each (UMT5), and the norm at the end.
  bias = 'SelfAttention.relative_attention_bias.weight'
  return (
      (f'{stack}/relative_bias/table', 'UH',
       f'{stack}.block.0.layer.0.{bias}', 'U H'),
      (f'{stack}/layers/attention/relative_bias/table', 'UH',
       f'{block}.layer.0.{bias}', 'U H'),
      *rows,
      (f'{stack}/final_norm/scale', 'D', f'{stack}.final_layer_norm.weight',
       'D'))


def _attention_rows(our_name: str, norm: str, hf_name: str
                    ) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  one attention and of the norm before it.

  Args:
    our_name: our name of the attention.
    norm: our name of the norm.
    hf_name: the name of the attention in transformers.

  Returns:
    Rows of four strings: the path and the axes of our parameter, and the name
    and the axes of its tensor. Letters name axes, such as D d_model, H heads
    and K features of a head; {n} in a name is the number of the layer. 'DHK'
    and 'HK D' say that the tensor has two axes, of which the first is our H and
    K joined.
  """
  return (
      (f'{our_name}/query', 'DHK', f'{hf_name}.q.weight', 'HK D'),
      (f'{our_name}/key', 'DHK', f'{hf_name}.k.weight', 'HK D'),
      (f'{our_name}/value', 'DHK', f'{hf_name}.v.weight', 'HK D'),
      (f'{our_name}/out', 'HKD', f'{hf_name}.o.weight', 'D HK'),
      (f'{norm}/scale', 'D', 'layer_norm.weight', 'D'))


def model_rows(*ffn: hf.Row) -> tuple[hf.Row, ...]:
  """Returns table rows that name the Hugging Face tensor of each parameter of
  both stacks, and of the embedding and the head."""
  return (('embed/tokens', 'VD', 'shared.weight', 'V D'),
          ('head/kernel', 'DV', 'lm_head.weight', 'V D'),
          *stack_rows('encoder', *ffn), *stack_rows('decoder', *ffn))


FFN_OF_ACTIVATION = {'relu': 'relu', 'gated-gelu': 'geglu_tanh',
                     'gated-silu': 'swiglu'}
FIELDS = hf.fields_with_defaults(
    vocab_size=32128, d_model=512, d_ff=2048, num_layers=6,
    num_decoder_layers=lambda fields: fields['num_layers'], num_heads=8,
    layer_norm_epsilon=1e-6, tie_word_embeddings=True) | {
        'head_dim': ('d_kv', 64), 'max_len': ('n_positions', 512),
        'relative.buckets': ('relative_attention_num_buckets', 32),
        'relative.max_distance': ('relative_attention_max_distance', 128)}


def head_fields(fields: dict, tied: bool) -> dict:
  """Returns the fields of the model for its head: where it shares the table of
  the embedding (`tied`), the logits are multiplied by D^-0.5."""
  scale = 1.0
  if tied:
    scale = fields['d_model'] ** -0.5
  return dict(tie_embeddings=tied, logits_scale=scale)


def check_ffn(reader: hf.Reader, fields: dict) -> None:
  """Checks that the fields of a Hugging Face config.json for the feed-forward
  network agree. A file may say the same in two ways: by feed_forward_proj, or
  by dense_act_fn and is_gated_act. If it has the latter, they count in
  transformers; if not, they are derived from the former.

  Args:
    reader: the reader of the config.json.
    fields: the fields of our config.model that were looked up before, with the
      network by feed_forward_proj.

  Raises:
    RequestError: where the two disagree.
  """
  name = hf.find_hf_word(FFN_OF_ACTIVATION, value=fields['ffn'], field='ffn')
  function = name.removeprefix('gated-')
  if name == 'gated-gelu':
    function = 'gelu_new'
  reader.require_values(dense_act_fn=function,
                        is_gated_act=name.startswith('gated-'))


def write_usual_fields(config: ModelConfig) -> dict:
  """Returns the fields of a config.json that every T5 or Switch has alike."""
  return dict(is_encoder_decoder=True, decoder_start_token_id=0,
              pad_token_id=0)


class HF(hf.HuggingFace):
  model_type = 't5'
  architecture = 'T5ForConditionalGeneration'
  fields = FIELDS | {'ffn': ('feed_forward_proj', 'relu', FFN_OF_ACTIVATION)}
  only = dict(is_encoder_decoder=True)
  fields_without_effect = ('is_decoder',)  # It is a field of the stacks.
  tied = {'encoder.embed_tokens.weight': 'shared.weight',
          'decoder.embed_tokens.weight': 'shared.weight',
          'lm_head.weight': 'shared.weight'}
  # Old files hold a table that the reference does not use either.
  ignored = (r'decoder\.block\.0\.layer\.1\.EncDecAttention\.'
             r'relative_attention_bias\.weight',)

  def rows_of_model(self, config: ModelConfig) -> tuple[hf.Row, ...]:
    """Returns the table by which our parameters are converted to the tensors of
    a Hugging Face file, and back.

    Args:
      config: our config of the model.

    Returns:
      Rows of four strings: the path and the axes of our parameter, and the name
      and the axes of its tensor. Letters name axes, such as D d_model, H heads
      and K features of a head. 'DHK' and 'HK D' say that the tensor has two
      axes, of which the first is our H and K joined. {n} in a name is the
      number of the layer. Rows of parameters that the model lacks are skipped.
    """
    up = 'wi_1' if config.ffn in ('geglu_tanh', 'swiglu') else 'wi'
    return model_rows(*hf.prefix_rows(
        'ffn', 'DenseReluDense', ('gate', 'DF', 'wi_0.weight', 'F D'),
        ('up', 'DF', f'{up}.weight', 'F D'),
        ('down', 'FD', 'wo.weight', 'D F')))

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
    check_ffn(reader, fields)
    # transformers ties v1.1 in name, and tells it by the missing scale.
    require(not reader.is_null('scale_decoder_outputs'),
            'config.json has scale_decoder_outputs null, which transformers '
            'takes for false: write true or false')
    tied = reader('scale_decoder_outputs', fields['tie_embeddings'])
    return head_fields(fields, tied)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    return write_usual_fields(config)
