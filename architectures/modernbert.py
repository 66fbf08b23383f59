"""ModernBERT: an encoder of later decoders' parts (Warner et al. 2024, section
2.1): rotary positions, GeGLU, no biases, pre-norm, and windows in two layers of
three.

  x_0 = LayerNorm(E[tokens])
  a   = x + Attention(LayerNorm(x))       of x itself in the first layer
  x'  = a + W_down (gelu(W_gate n) * W_up n),  n = LayerNorm(a)
  logits = LayerNorm(gelu(W_t LayerNorm(x_N))) E^T + b

Every third layer, from the first on, sees all tokens; the others see window - 1
on either side, and have another theta. The first layer's attention has no norm:
its input has just been normalised. LayerNorm has no bias. With the head of a
task, scores are W_s t + b_s, where t is what E^T is applied to above: t of each
token, or, by model.pooling, t of the first token or of the mean of a row's x_N.
"""

import jax

from architectures.parts import heads, hf
from architectures.parts.config import ModelConfig
from architectures.parts.hf import layer_types
from architectures.parts.positions import RopeConfig
from architectures.parts.skeletons import Encoder


class ModernBERT(Encoder):
  """tokens [B, L] -> Output; see Encoder."""
  HEAD_ACT = 'gelu'
  HEAD_BIAS = False
  PARTS = dict(position='rope', norm='layernorm_no_bias', embed_norm=True,
               block='pre_norm', attention='global', attention_bias=False,
               ffn='geglu', ffn_bias=False, tie_embeddings=True,
               logits_bias=True, prefix='first', pattern='local,local,global',
               kinds=dict(first=dict(block='ffn_norm')))

  def input_of_task_head(self, x: jax.Array, of_row: bool):
    """Returns the states behind the transform, which heads of tasks read."""
    return self.transform(x), {}


# Ids whose defaults in transformers are larger than a small vocabulary.
TOKEN_ID_FIELDS = ('pad_token_id', 'bos_token_id', 'eos_token_id',
                   'cls_token_id', 'sep_token_id')
# Our kind of layer and the usual theta of its positions, by the entry of
# layer_types in a config.json.
KIND_AND_THETA_OF_LAYER_TYPE = {
    layer_types.FULL_ATTENTION: ('global', 160_000.0),
    layer_types.SLIDING_ATTENTION: ('local', 10_000.0)}


class HF(hf.HuggingFace):
  model_type = 'modernbert'
  architecture = 'ModernBertForMaskedLM'
  names = (
      ('embed/tokens', 'VD', 'model.embeddings.tok_embeddings.weight', 'V D'),
      *hf.norm_rows('embed/norm', 'model.embeddings.norm'),
      *hf.prefix_rows(
          'encoder/layers', 'model.layers.{n}',
          *hf.norm_rows('attention_norm', 'attn_norm'),
          *hf.dense_rows('attention/query|key|value', 'DHK', 'attn.Wqkv',
                         '3HK D'),
          *hf.dense_rows('attention/out', 'HKD', 'attn.Wo', 'D HK'),
          *hf.norm_rows('ffn_norm', 'mlp_norm'),
          *hf.dense_rows('ffn/gate|up', 'DF', 'mlp.Wi', '2F D'),
          *hf.dense_rows('ffn/down', 'FD', 'mlp.Wo', 'D F')),
      *hf.norm_rows('encoder/final_norm', 'model.final_norm'),
      ('transform', 'DU', 'head.dense.weight', 'U D'),
      *hf.norm_rows('transform_norm', 'head.norm'),
      ('head/kernel', 'DV', 'decoder.weight', 'V D'),
      ('head/bias', 'V', 'decoder.bias', 'V'))
  fields = hf.fields_with_defaults(
      hidden_size=768, num_hidden_layers=22, num_attention_heads=12,
      intermediate_size=1152, vocab_size=50368, max_position_embeddings=8192,
      norm_eps=1e-5, attention_bias=False, mlp_bias=False,
      tie_word_embeddings=True) | {
          'ffn': ('hidden_activation', 'gelu', hf.GATED_FFN_OF_ACTIVATION),
          'logits_bias': ('decoder_bias', True)}
  only = dict(classifier_bias=False, classifier_activation='gelu')
  fields_without_effect = ('deterministic_flash_attn', 'sparse_prediction',
                           'sparse_pred_ignore_index')
  tied = {'decoder.weight': 'model.embeddings.tok_embeddings.weight'}
  spellings = (('model.', ''),)
  optional = {hf.MASKED_WORD_HEAD: r'(head|decoder)\..*'}
  heads = hf.task_heads('ModernBert', sequence='classifier') | {
      'span': hf.TaskHead('ModernBertForQuestionAnswering', 'classifier')}

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
    # The head that classifies a sequence.
    pooling = reader.read_choice('classifier_pooling', 'cls', {
        name: name for name in heads.POOLINGS})
    if fields['head'] != 'sequence':
      pooling = 'cls'

    # The positions of each kind of layer.
    reader.require_values(rope_scaling=None)
    sections = reader.read_object('rope_parameters')
    ropes = {}
    for layer_type, kind_and_theta in KIND_AND_THETA_OF_LAYER_TYPE.items():
      kind, usual_theta = kind_and_theta
      section = sections.read_object(layer_type)
      section.require_values(rope_type='default')
      theta = reader(f'{kind}_rope_theta', usual_theta)
      ropes[kind] = dict(theta=section('rope_theta', theta))

    # The order of the layers, of which the first has one norm less.
    num_layers = fields['num_layers']
    interval = reader('global_attn_every_n_layers', 3)
    types = layer_types.read_entry_of_each_layer(
        reader, field='layer_types', layers=num_layers,
        words=KIND_AND_THETA_OF_LAYER_TYPE)
    if not types:
      types = [layer_types.SLIDING_ATTENTION] * num_layers
      for n in range(0, num_layers, interval):
        types[n] = layer_types.FULL_ATTENTION
    kind_names = [KIND_AND_THETA_OF_LAYER_TYPE[layer_type][0]
                  for layer_type in types]
    window = reader.read_count('local_attention', 128) // 2 + 1
    kinds = {'global': {}, 'local': dict(window=window, rope=ropes['local'])}
    kinds['first'] = kinds[kind_names[0]] | dict(block='ffn_norm')
    has_bias = reader('norm_bias', False)
    return layer_types.pattern_and_kinds(['first', *kind_names[1:]],
                                         kinds) | dict(
        pooling=pooling, rope=ropes['global'],
        norm='layernorm' if has_bias else 'layernorm_no_bias')

  def write(self, config: ModelConfig) -> dict:
    """Translates our config of a model to fields of a Hugging Face config.json.
    These are the fields that `read` translates; fields that only have another
    name there are written elsewhere.

    Args:
      config: our config of the model.

    Returns:
      {name of the field in config.json: its value}.
    """
    # The positions of each type of layer, and the type of each layer.
    ropes = {}
    for layer_type, (_, theta) in KIND_AND_THETA_OF_LAYER_TYPE.items():
      ropes[layer_type] = dict(rope_type='default', rope_theta=theta)
    types, windows = [], []
    for layer in config.layers(config.num_layers):
      layer_type = layer_types.attention_type(layer)
      types.append(layer_type)
      ropes[layer_type]['rope_theta'] = layer.part(RopeConfig).theta
      if layer.sliding_window:
        windows.append(layer.sliding_window)

    # 65 keys are the 64 tokens on one side, and the token itself.
    window = max(windows, default=65)
    return dict.fromkeys(TOKEN_ID_FIELDS) | dict(
        norm_bias=config.norm == 'layernorm', layer_types=types,
        classifier_pooling=config.pooling, local_attention=2 * (window - 1),
        rope_parameters=ropes)
