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
    return self.transform(x), {}


# Ids whose defaults in transformers are larger than a small vocabulary.
IDS = [f'{name}_token_id' for name in ('pad', 'bos', 'eos', 'cls', 'sep')]
# layer_types of config.json: our kind of layer, and the usual theta.
TYPES = {layer_types.WHOLE: ('global', 160_000.0),
         layer_types.WINDOW: ('local', 10_000.0)}


class HF(hf.HuggingFace):
  model_type = 'modernbert'
  architecture = 'ModernBertForMaskedLM'
  names = (
      ('embed/tokens', 'VD', 'model.embeddings.tok_embeddings.weight', 'V D'),
      *hf.norm('embed/norm', 'model.embeddings.norm'),
      *hf.under(
          'encoder/layers', 'model.layers.{n}',
          *hf.norm('attention_norm', 'attn_norm'),
          *hf.dense('attention/query|key|value', 'DHK', 'attn.Wqkv', '3HK D'),
          *hf.dense('attention/out', 'HKD', 'attn.Wo', 'D HK'),
          *hf.norm('ffn_norm', 'mlp_norm'),
          *hf.dense('ffn/gate|up', 'DF', 'mlp.Wi', '2F D'),
          *hf.dense('ffn/down', 'FD', 'mlp.Wo', 'D F')),
      *hf.norm('encoder/final_norm', 'model.final_norm'),
      ('transform', 'DU', 'head.dense.weight', 'U D'),
      *hf.norm('transform_norm', 'head.norm'),
      ('head/kernel', 'DV', 'decoder.weight', 'V D'),
      ('head/bias', 'V', 'decoder.bias', 'V'))
  fields = hf.fields(
      hidden_size=768, num_hidden_layers=22, num_attention_heads=12,
      intermediate_size=1152, vocab_size=50368, max_position_embeddings=8192,
      norm_eps=1e-5, attention_bias=False, mlp_bias=False,
      tie_word_embeddings=True) | {
          'ffn': ('hidden_activation', 'gelu', hf.GATED),
          'logits_bias': ('decoder_bias', True)}
  only = dict(classifier_bias=False, classifier_activation='gelu')
  unread = ('deterministic_flash_attn', 'sparse_prediction',
            'sparse_pred_ignore_index')
  tied = {'decoder.weight': 'model.embeddings.tok_embeddings.weight'}
  spellings = (('model.', ''),)
  optional = {hf.MASKED_WORDS: r'(head|decoder)\..*'}
  heads = hf.heads('ModernBert', sequence='classifier') | {
      'span': hf.TaskHead('ModernBertForQuestionAnswering', 'classifier')}

  def read(self, reader: hf.Reader, fields: dict) -> dict:
    # The head of a row.
    pooling = reader.choose('classifier_pooling', 'cls', {
        name: name for name in heads.POOLINGS})
    if fields['head'] != 'sequence':
      pooling = 'cls'

    # The positions of each kind.
    reader.must(rope_scaling=None)
    sections = reader.section('rope_parameters')
    ropes = {}
    for word, (name, theta) in TYPES.items():
      section = sections.section(word)
      section.must(rope_type='default')
      theta = reader(f'{name}_rope_theta', theta)
      ropes[name] = dict(theta=section('rope_theta', theta))

    # The order of the layers, of which the first has one norm less.
    layers = fields['num_layers']
    every = reader('global_attn_every_n_layers', 3)
    types = layer_types.each(reader, 'layer_types', layers, TYPES)
    if not types:
      types = [layer_types.WINDOW if n % every else layer_types.WHOLE
               for n in range(layers)]
    names = [TYPES[word][0] for word in types]
    window = reader.count('local_attention', 128) // 2 + 1
    kinds = {'global': {}, 'local': dict(window=window, rope=ropes['local'])}
    kinds['first'] = kinds[names[0]] | dict(block='ffn_norm')
    has_bias = reader('norm_bias', False)
    return layer_types.named(['first', *names[1:]], kinds) | dict(
        pooling=pooling, rope=ropes['global'],
        norm='layernorm' if has_bias else 'layernorm_no_bias')

  def write(self, c: ModelConfig) -> dict:
    thetas = {word: theta for word, (_, theta) in TYPES.items()}
    types, windows = [], []
    for layer in c.layers(c.num_layers):
      word = layer_types.type_of(layer)
      types.append(word)
      thetas[word] = layer.part(RopeConfig).theta
      if layer.sliding_window:
        windows.append(layer.sliding_window)
    window = max(windows, default=65)
    ropes = {word: dict(rope_type='default', rope_theta=theta)
             for word, theta in thetas.items()}
    return dict.fromkeys(IDS) | dict(
        norm_bias=c.norm == 'layernorm', layer_types=types,
        classifier_pooling=c.pooling, local_attention=2 * (window - 1),
        rope_parameters=ropes)
