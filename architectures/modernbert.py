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

  def scored(self, x: jax.Array, of_row: bool):
    return self.transform(x), {}


# Of which transformers' defaults are larger than a small vocabulary.
IDS = [f'{name}_token_id' for name in ('pad', 'bos', 'eos', 'cls', 'sep')]
# layer_types of config.json: our kind of layer, and the usual theta.
TYPES = {'full_attention': ('global', 160_000.0),
         'sliding_attention': ('local', 10_000.0)}


def _read(reader: hf.Reader, fields: dict) -> dict:
  pooling = reader.choose('classifier_pooling', 'cls', {
      name: name for name in heads.POOLINGS})
  reader.must(rope_scaling=None)
  kinds = {'global': {},
           'local': dict(window=reader.count('local_attention', 128) // 2 + 1)}
  sections = reader.section('rope_parameters')
  for type_, (name, theta) in TYPES.items():
    rope = sections.section(type_)
    rope.must(rope_type='default')
    kinds[name]['rope'] = dict(theta=rope('rope_theta', reader(
        f'{name}_rope_theta', theta)))
  layers, every = fields['num_layers'], reader('global_attn_every_n_layers', 3)
  types = layer_types.each(reader, 'layer_types', layers, TYPES) or [
      tuple(TYPES)[n % every > 0] for n in range(layers)]
  names = [TYPES[type_][0] for type_ in types]
  return dict(
      pooling=pooling if fields['head'] == 'sequence' else 'cls',
      norm='layernorm' if reader('norm_bias', False) else 'layernorm_no_bias',
      rope=kinds['global'].pop('rope'), **layer_types.named(
          ['first', *names[1:]],
          kinds | dict(first=kinds[names[0]] | dict(block='ffn_norm'))))


def _write(c: ModelConfig) -> dict:
  kinds = c.layers(c.num_layers)
  types = [tuple(TYPES)[kind.attention == 'banded'] for kind in kinds]
  thetas = {type_: theta for type_, (_, theta) in TYPES.items()} | {
      type_: kind.part(RopeConfig).theta for type_, kind in zip(types, kinds)}
  windows = [kind.sliding_window for kind in kinds if kind.sliding_window]
  return dict(
      dict.fromkeys(IDS), norm_bias=c.norm == 'layernorm', layer_types=types,
      classifier_pooling=c.pooling,
      local_attention=2 * (max(windows, default=65) - 1),
      rope_parameters={type_: dict(rope_type='default', rope_theta=theta)
                       for type_, theta in thetas.items()})


HF = hf.HuggingFace(
    'modernbert', 'ModernBertForMaskedLM',
    names=(
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
        ('head/bias', 'V', 'decoder.bias', 'V')),
    fields=hf.fields(
        hidden_size=768, num_hidden_layers=22, num_attention_heads=12,
        intermediate_size=1152, vocab_size=50368, max_position_embeddings=8192,
        norm_eps=1e-5, attention_bias=False, mlp_bias=False,
        tie_word_embeddings=True) | {
            'ffn': ('hidden_activation', 'gelu', hf.GATED),
            'logits_bias': ('decoder_bias', True)},
    only=dict(classifier_bias=False, classifier_activation='gelu'),
    unread=('deterministic_flash_attn', 'sparse_prediction',
            'sparse_pred_ignore_index'),
    read=_read, write=_write,
    tied={'decoder.weight': 'model.embeddings.tok_embeddings.weight'},
    spellings=(('model.', ''),),
    optional={hf.MASKED_WORDS: r'(head|decoder)\..*'},
    heads=hf.heads('ModernBert', sequence='classifier') | {
        'span': hf.TaskHead('ModernBertForQuestionAnswering', 'classifier')})
