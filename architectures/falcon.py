"""Falcon: attention and a GELU network side by side, with few heads of keys and
values, rotary positions, and no biases (Almazrouei et al. 2023, arXiv
2311.16867, section 4.3).

  x' = x + Attention(n(x)) + W_down gelu(W_up n(x))     7B, one head of keys
  x' = x + Attention(n1(x)) + W_down gelu(W_up n2(x))   40B and 180B, eight
  logits = n(x_N) E^T                                   n is LayerNorm

The second is new_decoder_architecture of a config.json, which also has a form
with one norm for both (num_ln_in_parallel_attn). The fused matrix holds, group
by group, the queries that share a key, then the key and the value. The models
with ALiBi (falcon-rw) are not read: their slopes are rounded to bfloat16.
"""

from architectures import gpt_neox
from architectures.parts import hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import rope_fields
from architectures.parts.skeletons import Decoder
from common.errors import require


class Falcon(Decoder):
  """tokens [B, L] -> Output; see Decoder."""
  PARTS = dict(position='rope', norm='layernorm', block='shared_norm',
               attention='global', attention_bias=False, ffn='gelu',
               ffn_bias=False, tie_embeddings=True)


class HF(hf.HuggingFace):
  model_type = 'falcon'
  architecture = 'FalconForCausalLM'
  fields = hf.fields_with_defaults(
      num_hidden_layers=32, num_attention_heads=71, vocab_size=65024,
      max_position_embeddings=2048, layer_norm_epsilon=1e-5,
      tie_word_embeddings=True) | {
          'd_model': ('n_embed|hidden_size', 4544),
          'd_ff': ('ffn_hidden_size', lambda fields: 4 * fields['d_model']),
          'ffn': ('activation', 'gelu', hf.FFN_OF_ACTIVATION)}
  only = dict(alibi=False)
  tied = {'lm_head.weight': 'transformer.word_embeddings.weight'}
  spellings = (('transformer.', ''),)
  heads = hf.task_heads('Falcon')

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
    # The name of the norm before attention and that before the network: with
    # one norm for both branches, or with two, the files have others.
    norms = 'input_layernorm', 'post_attention_layernorm'
    if config.block == 'parallel':
      norms = 'ln_attn', 'ln_mlp'
    # The products of queries, keys and values are one tensor, in which each of
    # the J groups of heads has R queries, a key and a value of K features.
    fused = 'self_attention.query_key_value'
    return (
        ('embed/tokens', 'VD', 'transformer.word_embeddings.weight', 'V D'),
        *hf.prefix_rows(
            'decoder/layers', 'transformer.h.{n}',
            *hf.norm_rows('attention_norm', norms[0]),
            *hf.norm_rows('ffn_norm', norms[1]),
            ('attention/query|key|value', 'DHK|DJK|DJK', f'{fused}.weight',
             'J(RK+K+K) D'),
            ('attention/query_bias|key_bias|value_bias', 'HK|JK|JK',
             f'{fused}.bias', 'J(RK+K+K)'),
            *hf.dense_rows('attention/out', 'HKD', 'self_attention.dense',
                           'D HK'),
            *gpt_neox.FFN_ROWS),
        *hf.norm_rows('decoder/final_norm', 'transformer.ln_f'),
        ('head/kernel', 'DV', 'lm_head.weight', 'V D'))

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
    # The new architecture has several heads of keys and values (it is grouped),
    # and its layers are parallel, with one norm or two.
    num_heads = fields['num_heads']
    is_grouped = reader('new_decoder_architecture', False)
    has_single_kv_head = reader('multi_query', True)
    is_parallel = reader('parallel_attn', True)
    num_norms = reader('num_ln_in_parallel_attn', 2 if is_grouped else 1)
    if is_grouped:
      is_known = is_parallel and num_norms in (1, 2)
    else:
      is_known = num_norms == 1
    require(is_known, f'config.json has new_decoder_architecture {is_grouped}, '
            f'parallel_attn {is_parallel} and num_ln_in_parallel_attn '
            f'{num_norms}, of which transformers has no layers: two norms '
            'stand in the new architecture alone, and it is always parallel')

    # The heads of keys and values.
    if is_grouped or has_single_kv_head:
      reader.ignore_fields('num_kv_heads')
    else:
      reader.require_values(num_kv_heads=num_heads)
    num_kv_heads = num_heads
    if is_grouped:
      num_kv_heads = reader('num_kv_heads', num_heads)
    elif has_single_kv_head:
      num_kv_heads = 1

    # The wiring of a layer.
    block = 'shared_norm'
    if not is_parallel:
      block = 'pre_norm'
    elif num_norms == 2:
      block = 'parallel'
    bias = reader('bias', False)
    return dict(
        rope=rope_fields.read_rope(reader), block=block, attention_bias=bias,
        ffn_bias=bias, num_kv_heads=num_kv_heads)

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    is_parallel = config.block != 'pre_norm'
    has_two_norms = config.block == 'parallel'
    # The new architecture alone has two norms, or groups of heads.
    is_grouped = is_parallel and (has_two_norms or config.num_kv_heads > 1)
    return dict(
        rope_parameters=rope_fields.write_rope(config), bias=config.ffn_bias,
        new_decoder_architecture=is_grouped, parallel_attn=is_parallel,
        multi_query=config.num_kv_heads == 1,
        num_kv_heads=config.num_kv_heads if is_grouped else config.num_heads,
        num_ln_in_parallel_attn=2 if has_two_norms else 1)

  def check(self, config: ModelConfig) -> None:
    """Raises RequestError for a model that transformers does not run."""
    hf.check_heads_divide_width(config)
